"""What generated code computes with: dtypes by torch's name, by ours and by Triton's, and blocks of elements."""

from __future__ import annotations

import torch

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What kernels load and store, and how specs and signatures name it."""
TRITON_TYPES = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}

LARGEST = {"fp32": 3.4028234663852886e38, "fp16": 65504.0, "bf16": 3.3895313892515355e38}
"""The largest number of each."""


def element_bytes(dtype: str) -> int:
    """Bytes of an element of "fp32", "fp16" or "bf16"."""
    return 4 if dtype == "fp32" else 2


def block_of(size: int) -> int:
    """The block that holds a head: a power of two of at least 16, which tensor cores need."""
    return max(16, 1 << (size - 1).bit_length())


def is_padded(size: int) -> bool:
    """Whether the block of a head is wider than the head, so that loads and stores need a mask."""
    return block_of(size) != size
