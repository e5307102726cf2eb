"""Tests plan on assumed constants: no plan depends on what else the machine does. Tests that measure say so."""

from __future__ import annotations

import os

os.environ.setdefault("SFCOMPILE_LINKS", "assumed")
