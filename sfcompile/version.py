"""The version, in a leaf of its own: rooms need it, and none imports the package's front for it."""

from __future__ import annotations

__version__ = "0.1.0"
