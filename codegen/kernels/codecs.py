"""How kernels write and read chunks that travel as bf16 or fp8: text for what runtime/program/formats.py defines.

A kernel encodes what it sends while the values are in registers, and decodes what it reads where it reads it: nothing
is stored in between. Own chunks lie in the bank as they were computed, so a kernel that meets both asks its tables.
"""

from __future__ import annotations

from sfcompile.codegen.rows.elements import LARGEST, TRITON_TYPES
from sfcompile.runtime.program.formats import BF16, FP8

_CODE_TYPES = {BF16: "tl.bfloat16", FP8: "tl.uint8"}
_CODE_BYTES = {BF16: 2, FP8: 1}


def pointers(written: str, name: str, address: str, rows: str, width: int) -> list[str]:
    """Lines that set ``{name}_codes``, a pointer to a chunk's elements as they travel, and ``{name}_factors`` of fp8.

    Args:
        address: of the chunk, in bytes.
        rows: how many rows of ``width`` elements it has.
    """
    codes = f"({address}).to(tl.pointer_type({_CODE_TYPES[written]}))"
    if width * _CODE_BYTES[written] % 16 == 0:
        codes = f"tl.multiple_of({codes}, 16)"
    lines = [f"{name}_codes = {codes}"]
    if written == FP8:
        size = f"{rows} * {width}" if width % 4 == 0 else f"({rows} * {width} + 3) // 4 * 4"
        lines.append(f"{name}_factors = ({address} + {size}).to(tl.pointer_type(tl.int32))")
    return lines


def stored(written: str, name: str, values: str, at: str, inside: str, row: str, row_inside: str) -> list[str]:
    """Lines that write a block of rows to a chunk that travels.

    Args:
        values: fp32 or the model's type, [rows, block of W].
        at: elements from the chunk's first, ``inside``: which of them exist; ``row``, ``row_inside``: the same of rows.
    """
    if written == BF16:
        return [f"tl.store({name}_codes + {at}, {values}.to(tl.float32).to(tl.bfloat16), mask={inside})"]
    return [
        f"{name}_sent = tl.where({inside}, {values}.to(tl.float32), 0.0)",
        f"{name}_factor = factor_of({name}_sent)",
        f"{name}_code = e4m3_of({name}_sent * inverse_of({name}_factor)[:, None]).to(tl.uint8)",
        f"tl.store({name}_codes + {at}, {name}_code, mask={inside})",
        f"tl.store({name}_factors + {row}, {name}_factor, mask={row_inside})",
    ]


def loaded(
    written: str, name: str, dtype: str, at: str, limits: list[str], row: str, row_limits: list[str], spread: str
) -> list[str]:
    """Lines that set ``name`` to a block of a chunk that has travelled, in the model's type.

    Args:
        at, limits: elements from the chunk's first, and which of them exist; ``row``, ``row_limits``: the same of rows.
        spread: the index that makes a row's factor one of the block: "[:, None]" or "[None, :]".
    """
    element, bound = TRITON_TYPES[dtype], f"{LARGEST[dtype]!r}"
    codes = f"tl.load({name}_codes + {at}{_masked(limits)})"
    if written == BF16:
        return [f"{name} = {codes}.to(tl.float32).to({element})"]
    return [
        f"{name}_factor = tl.load({name}_factors + {row}{_masked(row_limits)}).to(tl.float32, bitcast=True)",
        f"{name}_code = {codes}",
        f"{name} = at_most(from_e4m3({name}_code) * {name}_factor{spread}, {bound}).to({element})",
    ]


def _masked(limits: list[str]) -> str:
    return f", mask={' & '.join(limits)}, other=0" if limits else ""
