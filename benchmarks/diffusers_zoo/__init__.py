"""Tiny random-weight models of diffusers' transformer classes, one or more for every class that can be built."""

from __future__ import annotations

from . import convolutional, image, other, packed, video
from .registry import ZOO

__all__ = ["ZOO", "convolutional", "image", "other", "packed", "video"]
