"""Dtypes and blocks of generated code."""

from __future__ import annotations

import pytest
import torch

from sfcompile.codegen.rows.elements import DTYPES, TRITON_TYPES, block_of, element_bytes, is_padded


def test_blocks_are_powers_of_two_that_tensor_cores_take() -> None:
    assert [block_of(size) for size in (1, 16, 17, 64, 72, 256)] == [16, 16, 32, 64, 128, 256]
    assert [is_padded(size) for size in (8, 16, 72, 128)] == [True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_names_agree_with_torch(dtype: torch.dtype) -> None:
    name = DTYPES[dtype]
    assert element_bytes(name) == dtype.itemsize
    assert TRITON_TYPES[name].removeprefix("tl.") == str(dtype).removeprefix("torch.")
