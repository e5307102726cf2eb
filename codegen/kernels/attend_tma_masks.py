"""What hides keys from queries in the kernel for Hopper (attend_tma.py): causal order, and a mask of keys.

**Causal.** A tile of queries sees a beginning of each chunk's blocks, and most of these whole. Which, the table of
spans says (tables.py): a pair for each tile of a query chunk and each chunk of a unit. Producer, masker and both
warpgroups read it, and so agree on the blocks that go through the ring: one that no query of the tile sees is neither
fetched nor attended to. Only in blocks that not all queries see whole are positions loaded and compared.

**A mask of keys.** A warp of its own, the masker, reads what is added to the scores of a block, one number a key, and
writes it beside the tile of keys in shared memory. Most masks are of padding, so most blocks hide nothing: a word says
whether this one does, and the warpgroups add only then. What is added is divided by the factor of the scores, which
stands in the exponent's multiply-add: blocks in which nothing is hidden run as those of a kernel without a mask.

    masker: bias, word -> shared memory -> warp barrier -> arrives at k_full [stage]        beside the copy of the keys
    warpgroups: wait for k_full [stage] -> read them under the sum of the block before -> arrive at k_empty [stage]

So they are there when the keys are, and free when the keys are. (Not when the values are: a warpgroup waits for the
next keys before it gives back the values of two blocks ago, so with two stages all would wait for each other.)
"""

from __future__ import annotations

from sfcompile.codegen.kernels.reach import KernelText
from sfcompile.codegen.kernels.spec import KernelSpec
from sfcompile.codegen.kernels.tables import KEY, QUERY, SPAN, UNIT
from sfcompile.codegen.kernels.text import columns

MASK_RING = ("biases", "masked")
"""In shared memory, by stage of the ring: what is added to a block's scores, and whether anything is."""
_MASKER = (
    "k_full", "k_empty", "units_ptr", "queries_ptr", "keys_ptr", "num_units", "batch", "heads", "me", "workers",
    "mask_ptr", "mask_sb", "mask_sc", "k_positions_ptr",
)  # fmt: skip
_SMALL, _LEAST = -(2.0**24), -(2.0**60)
"""Numbers added that are smaller are the least one: a power of two, whose product with the factor of scores is exact.
The exponent's multiply-add sees by how much a row's maximum was rounded, and of larger numbers that is too much."""
_SPAN = f"spans_ptr + (span_at + tile % blocks * (last_key - first_key) + j - first_key) * {len(SPAN)}"
_AGAIN = columns("unit", UNIT, {"span_at": "span_at"}, small=True)
"""What is read again where it is seldom needed: kept through the loop over blocks it would be a register."""


def least(bias: str, factor: str, small: float, least: float) -> str:
    """What a mask adds (fp32), times a factor, so that it stays finite: below ``small`` it is ``least``, if not -inf.

    Torch adds first, in the scores' own unit, and there the least number of a format is one like others: a row in which
    it is added to all keys has equal weights. A row of -inf alone has none.
    """
    scaled = f"{bias} * {factor}"
    return f"tl.where(({scaled} < {small!r}) & ({bias} > float('-inf')), {least!r}, {scaled})"


def masker_arguments(spec: KernelSpec) -> list[str]:
    """Of the warp that reads the mask."""
    return [*MASK_RING, *_MASKER, *(["spans_ptr"] if spec.causal else [])]


def seen_columns() -> list[str]:
    """Lines that read how many keys of chunk ``j`` are fetched for a tile; attend.py has them too."""
    return [*_AGAIN, f"seen = tl.load({_SPAN})"]


def to_chunk() -> list[str]:
    """Lines that go on to the first chunk from ``j`` on of which the tile sees anything: ``left`` keys are fetched from
    this block on; from ``partial`` on not all queries see them all."""
    return [
        *_AGAIN,
        "left = 0",
        "partial = 0",
        "while (j < last_key) & (left <= 0):",
        f"    span = {_SPAN}",
        *(f"    {line}" for line in columns("span", SPAN, {"left": "seen", "partial": "partial"})),
        "    j += (left <= 0).to(gl.int32)",
    ]


def hide_later_keys(out: KernelText) -> None:
    """In a block that not all queries see whole: positions are read where they are compared, not kept."""
    with out.block("if left <= partial:"):
        out(
            f"key = keys_ptr + j * {len(KEY)}",
            *columns("key", KEY, {"columns": "rows", "k_position": "position"}, small=True),
            *_AGAIN,
            *columns("query", QUERY, {"position": "position"}, small=True),
            f"at = tl.load({_SPAN}) - left",
            "k_ptr = k_positions_ptr + k_position + gl.minimum(at, columns - BN)",
            "k_place = gl.load(k_ptr + gl.arange(0, BN, gl.SliceLayout(0, QK)))",
            "query_row = (tile % blocks) * BM + which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, QK))",
            "q_place = gl.load(q_positions_ptr + position + query_row, mask=query_row < rows, other=0)",
            's = gl.where(k_place[None, :] <= q_place[:, None], s, float("-inf"))',
        )


def add_mask(out: KernelText) -> None:
    """What the masker has written for a block is added to its scores, if it is anything."""
    with out.block("if gl.max(masked.index(stage).load(gl.SliceLayout(0, QK)), 0) != 0:"):
        out("s = s + biases.index(stage).load(gl.SliceLayout(0, QK))[None, :]")


def mask_block(out: KernelText, spec: KernelSpec) -> None:
    """The masker's part of a block; a chunk's last block begins earlier, and what it meets twice is hidden too."""
    out(
        "row = gl.minimum(at, columns - BN)",
        "stage = n % STAGES",
        "parity = ((n // STAGES) & 1) ^ 1",
        "place = gl.load(k_positions_ptr + position + row + col)",
        "bias = gl.load(mask_row + place.to(gl.int64) * mask_sc)",
        'bias = gl.where(bias != 0, 0.0, float("-inf"))'
        if spec.mask_is_bool
        else f"bias = {least('bias.to(gl.float32)', 'MASK_SCALE', _SMALL, _LEAST)}",
        *(['bias = gl.where(row + col < at, float("-inf"), bias)'] if spec.tails != "none" else []),
        "some = gl.max((bias != 0.0).to(gl.int32), 0)",
        "mbarrier.wait(k_empty.index(stage), parity)",
        "biases.index(stage).store(bias)",
        "masked.index(stage).store(gl.full([1], some, gl.int32, KEYS))",
        "mbarrier.arrive(k_full.index(stage), count=1)",
        "n += 1",
        "at += BN",
    )
