"""Tests plan on assumed constants: no plan depends on what else the machine does. Tests that measure say so.

And every test plans for itself, whatever another one left on disk. Tests of what is kept there say so.
"""

from __future__ import annotations

import os

os.environ.setdefault("SFCOMPILE_LINKS", "assumed")
os.environ.setdefault("SFCOMPILE_PLANS", "off")
