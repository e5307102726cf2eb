"""What a generated attention kernel is specialised to, and the tile sizes for it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from sfcompile.codegen.rows.elements import DTYPES, TRITON_TYPES, block_of, element_bytes
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import UnsupportedError
from sfcompile.options import AS_IT_IS, Wire
from sfcompile.runtime.program.formats import SAME
from sfcompile.runtime.program.instructions import Forward, Push
from sfcompile.runtime.program.sites import AttentionSite

MAX_HEAD_DIM = 256
LOG2E = math.log2(math.e)
LN2 = math.log(2)
VIRTUAL_ROW = (
    "out", "place", "state", "counters", "units", "queries", "keys", "forwards", "q_positions", "k_positions", "spans",
    "lse", "num_units", "num_forwards", "heads", "first_head", "kv_heads", "first_kv", "own_rows",
)  # fmt: skip
"""Arguments that differ between virtual ranks, as int64."""
INTEGERS = (
    "rank", "num_units", "num_forwards", "batch", "heads", "first_head", "kv_heads",
    "first_kv", "own_rows",
)  # fmt: skip
"""Arguments that the kernel is not specialised to: they differ from rank to rank."""


@dataclass(frozen=True)
class KernelSpec:
    """Everything that the text of a kernel depends on: two sites with equal specs share their kernels.

    Attributes:
        dtype: "fp32", "fp16" or "bf16".
        head_dim, v_head_dim: D and E, 1 to 256; blocks in the kernel are the next powers of two.
        scale: factor of the scores.
        causal: keys after a query are left out, by global position.
        mask: "none", "key" (one row for all heads and queries: [B or 1, 1, 1, Lk]) or "full".
        mask_is_bool: True may attend; else the mask is added to the scores.
        group: query heads per K/V head.
        reach: of what this kernel sends: "peer" (every destination by load and store, or nothing is sent), "nvshmem"
            (every one by NVSHMEM) or "mixed" (said by the tables, per destination).
        forwards, pushes: whether chunks are passed on round a ring, whether outputs are sent home.
        wire: how chunks that have come, and outputs that leave, are written.
        carry: whether some query is attended in several units, so that its softmax state is kept in memory between.
        tails: how a last block that keys do not fill is done: "none" (there is none), "apart" (after the loop, so that
            full blocks need no masks), "inside" (every block is masked: half the code, fewer registers).
        lse: whether the natural log-sum-exp of the own queries is stored.
        virtual: ranks that share one launch (one GPU, tests); 1 in production.
        block_m, block_n: queries and keys of a tile.
        fetch: how tiles come into shared memory: "threads" (those that attend copy them, everywhere) or "tma" (a warp
            of its own does, by tensor copies: attend_tma.py, on sm_90).
        copy_programs: programs that pass chunks on.
        warps, stages: Triton's num_warps and num_stages.
    """

    dtype: str
    head_dim: int
    v_head_dim: int
    scale: float
    causal: bool = False
    mask: str = "none"
    mask_is_bool: bool = True
    group: int = 1
    reach: str = "peer"
    forwards: bool = False
    pushes: bool = False
    wire: Wire = AS_IT_IS
    carry: bool = True
    tails: str = "apart"
    lse: bool = False
    virtual: int = 1
    block_m: int = 64
    block_n: int = 64
    fetch: str = "threads"
    copy_programs: int = 1
    warps: int = 4
    stages: int = 2

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of q, k, v and the output: 2 or 4."""
        return element_bytes(self.dtype)

    @property
    def element(self) -> str:
        """Triton's name of an element's type."""
        return TRITON_TYPES[self.dtype]

    @property
    def needs_positions(self) -> bool:
        """Whether global positions of tokens matter: to causal order, or to find the mask's entry."""
        return self.causal or self.mask != "none"

    @property
    def state_words(self) -> int:
        """Words of fp32 that a query's softmax state takes in memory: its values, and maximum and sum, which "tma"
        keeps as each of four threads has them."""
        return block_of(self.v_head_dim) + (8 if self.fetch == "tma" else 2)

    @property
    def senders(self) -> int:
        """Programs that put outputs to other machines: one, where a warp fetches tiles (attend_tma_outputs.py)."""
        return int(self.fetch == "tma" and self.pushes and self.reach != "peer")

    @property
    def aside(self) -> int:
        """Programs of a launch that do not attend."""
        return (self.copy_programs if self.forwards else 0) + self.senders

    @property
    def key(self) -> str:
        """Short digest: names the generated files."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]

    def with_(self, **changes: Any) -> KernelSpec:
        """The same with some entries changed."""
        return replace(self, **changes)


def attend_arguments(spec: KernelSpec) -> tuple[str, ...]:
    """Arguments of the kernel, in order."""
    names = ["out_ptr", "out_sb", "out_sh", "out_sr"]
    if spec.mask != "none":
        names += ["mask_ptr", "mask_sb", "mask_sh", "mask_sr", "mask_sc"]
    if spec.needs_positions:
        names += ["q_positions_ptr", "k_positions_ptr"]
    names += ["spans_ptr"] if spec.causal else []
    names += ["lse_ptr"] if spec.lse else []
    names += ["state_ptr"] if spec.carry else []
    names += ["heaps_ptr", "place_ptr", "units_ptr", "queries_ptr", "keys_ptr"]
    names += ["forwards_ptr"] if spec.forwards else []
    names += ["counters_ptr"] if spec.forwards or spec.pushes else []
    names += ["virtual_ptr"] if spec.virtual > 1 else []
    return (*names, *INTEGERS)


def tiles_for(
    arch: int,
    dtype: str,
    head_dim: int,
    v_head_dim: int,
    masked: bool = False,
    hard: bool = False,
    coded: bool = False,
) -> dict[str, Any]:
    """Tile sizes, warps and stages for an architecture (80, 90, 100); 0 is the interpreter, which wants few, big tiles.

    OpLayouts so that no kernel spills (tests/codegen/toolchain/test_compiler.py compiles them).

    Args:
        masked: a whole mask is read, another tile of operands.
        hard: the kernel does more than attend to peers' chunks (NVSHMEM, positions, grouped heads).
        coded: chunks that have come are decoded.
    """
    width = max(64, _power_of_two(head_dim), _power_of_two(v_head_dim))
    if arch == 0:
        return {"block_m": 64, "block_n": 64, "warps": 4, "stages": 2}
    names = ("block_m", "block_n", "warps", "stages", "tails")
    if dtype == "fp32":
        keys = 32 if width < (128 if coded else 256) else 16
        return dict(zip(names, (32, keys, 4 if width == 64 else 8, 2, "inside"), strict=True))
    if masked:  # a whole mask is another tile of operands
        return dict(zip(names, (64, 32, 4 if width == 64 else 8, 2, "inside"), strict=True))
    family = 80 if arch < 90 else 90 if arch < 100 else 100
    tile = (coded and _CODED.get((family, width))) or (hard and _HARD.get((family, width))) or _TILES[family, width]
    return dict(zip(names, tile, strict=True))


_TILES = {
    (80, 64): (128, 64, 8, 3, "inside"),
    (80, 128): (128, 64, 8, 2, "inside"),
    (80, 256): (64, 32, 8, 2, "inside"),
    (90, 64): (128, 64, 8, 3, "apart"),
    (90, 128): (128, 64, 8, 3, "apart"),
    (90, 256): (64, 64, 8, 2, "inside"),
    (100, 64): (128, 64, 8, 3, "apart"),
    (100, 128): (64, 64, 8, 2, "apart"),
    (100, 256): (64, 32, 8, 1, "inside"),
}
"""(architecture, head size) -> tile. The largest that spill nothing; which is fastest is for a GPU to say."""


_HARD = {(80, 128): (64, 64, 8, 2, "inside")}
"""Where the tile of ``_TILES`` has no registers left for more."""

_CODED = {
    (80, 64): (128, 32, 8, 3, "inside"),
    (80, 128): (64, 64, 8, 2, "inside"),
    (80, 256): (32, 32, 8, 2, "inside"),
    (90, 128): (128, 64, 8, 3, "inside"),
    (90, 256): (64, 32, 8, 2, "inside"),
}
"""Nor for the loop over chunks that have come, which decodes them, beside the one over own chunks."""


_TMA: dict[int, dict[str, Any]] = {
    64: {"fetch": "tma", "block_m": 128, "block_n": 128, "warps": 4, "stages": 3, "tails": "apart"},
    128: {"fetch": "tma", "block_m": 128, "block_n": 128, "warps": 4, "stages": 2, "tails": "apart"},
}
"""Head size -> tile where a warp of its own fetches; ``warps`` are one warpgroup's."""
_TMA_KEYS = (64, 128)
"""Keys of a block there: a chunk that has fewer is not attended so."""


def fetched_by_tma(site: AttentionSite, arch: int, reach: str, mask: str, wire: Wire, rows: set[int]) -> bool:
    """Whether attend_tma.py writes a site's kernel: half precision on sm_90, no mask of queries and keys, no chunk of
    ``rows`` too short."""
    plain = mask != "full" and wire == AS_IT_IS
    # Both leave no registers for a warpgroup of head size 128: ten words are spilled. So are nine with NVSHMEM's code.
    plain = plain and not ((mask == "key" or reach != "peer") and site.causal and site.head_dim > 64)
    sizes = site.head_dim == site.v_head_dim and site.head_dim in _TMA
    long = bool(rows) and min(rows) >= min(_TMA_KEYS)
    return 90 <= arch < 100 and plain and sizes and long and element_bytes(DTYPES[site.dtype]) == 2


def tma_tiles(head_dim: int, rows: int) -> dict[str, Any]:
    """The tile of attend_tma.py's kernel, where chunks of keys have ``rows`` or more."""
    return _TMA[head_dim] | {"block_n": max(n for n in _TMA_KEYS if n <= max(rows, _TMA_KEYS[0]))}


@cache
def has_tensor_copies() -> bool:
    """Whether this Triton has what attend_tma.py writes with: Gluon under the names of 3.9 (3.6's differ)."""
    try:
        from triton.experimental.gluon import constexpr_function  # noqa: F401
        from triton.experimental.gluon.language import inline_asm, warp_specialize  # noqa: F401
        from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait  # noqa: F401
    except ImportError:
        return False
    return hasattr(tma, "async_load") and hasattr(mbarrier, "allocate_mbarrier")


def cannot_generate(site: AttentionSite) -> str:
    """Why no kernel is generated for a site; "" if one is."""
    if site.dtype not in DTYPES:
        return f"dtype {site.dtype}"
    if not (0 < site.head_dim <= MAX_HEAD_DIM and 0 < site.v_head_dim <= MAX_HEAD_DIM):
        return f"head sizes {site.head_dim} and {site.v_head_dim}"
    if not site.scale > 0:  # the kernel takes the maximum before it scales
        return f"scores are scaled by {site.scale}, which is not positive"
    return ""


def spec_of(
    schedule: AttentionSchedule,
    arch: int,
    machine_of: tuple[int, ...] | None = None,
    mask: tuple[str, bool] = ("none", True),
    **changes: Any,
) -> KernelSpec:
    """The kernel that runs a schedule's attend phase.

    Args:
        arch: 80, 90, 100, ...; 0 for the interpreter.
        machine_of: machine of each rank of the mesh: NVSHMEM is used between machines. None: all reach each other.
        mask: kind and whether it is boolean, for a site with a mask.
        changes: entries to set by hand; tiles without ``fetch`` are for "threads".

    Raises:
        UnsupportedError: a dtype or head size that no kernel is generated for.
    """
    site = schedule.site
    hindrance = cannot_generate(site)
    if hindrance:
        raise UnsupportedError(
            f"attention {site.name}: {hindrance}",
            f"kernels are generated for {', '.join(DTYPES.values())} and head sizes up to {MAX_HEAD_DIM}",
            "use attention='aten' for this model",
        )
    steps = schedule.origin.phases["attend"]
    sent = {
        step.to_slot if isinstance(step, Forward) else step.slot for step in steps if isinstance(step, Forward | Push)
    }
    reach, group = schedule_reach(schedule, machine_of, sent), site.heads // site.kv_heads
    more = reach != "peer" or group > 1 or site.causal or mask[0] == "key"
    wire = _wire(schedule)
    coded = (wire.q, wire.k, wire.v) != (SAME,) * 3
    rows = {
        int(n)
        for part in range(schedule.kv_parts)
        for n in schedule.row_counts("k", part)
        if n
    }  # fmt: skip
    tiles = tiles_for(arch, DTYPES[site.dtype], site.head_dim, site.v_head_dim, mask[0] == "full", more, coded)
    fetch = changes.get("fetch") or ("threads" if changes.keys() & tiles.keys() else "")
    if fetch == "tma" or (not fetch and fetched_by_tma(site, arch, reach, mask[0], wire, rows) and has_tensor_copies()):
        tiles = tma_tiles(site.head_dim, min(rows))
    spec = KernelSpec(
        DTYPES[site.dtype],
        site.head_dim,
        site.v_head_dim,
        site.scale,
        causal=site.causal,
        mask=mask[0],
        mask_is_bool=mask[1],
        group=group,
        reach=reach,
        forwards=any(isinstance(step, Forward) for step in steps),
        pushes=any(isinstance(step, Push) for step in steps),
        wire=wire,
        **tiles,
    ).with_(**changes)
    assert spec.fetch == "threads" or all(n >= spec.block_n for n in rows), "a block begins before its chunk"
    assert spec.fetch == "threads" or spec.mask != "full", "tensor copies fetch no whole mask"
    return spec if any(n % spec.block_n for n in rows) else spec.with_(tails="none")


def _wire(schedule: AttentionSchedule) -> Wire:
    """The site's, of what travels at all: an all-gather leaves queries and outputs at home."""
    travels = {arrival.tensor for arrival in schedule.origin.arrivals}
    return AS_IT_IS._replace(**{name: schedule.site.written(name) for name in travels})


def schedule_reach(schedule: Schedule, machine_of: tuple[int, ...] | None, slots: set[int] | None = None) -> str:
    """How ranks reach those whose slots they fill: "peer", "nvshmem" or "mixed".

    Args:
        machine_of: of each rank of the mesh; None: all reach each other.
        slots: only these; an attention kernel fills those of chunks passed on and of outputs sent home. What it waits
            for and reads lies in its own rank's heap, however it came there.
    """
    if machine_of is None:
        return "peer"
    members = len(machine_of)
    across = {
        machine_of[int(src)] != machine_of[rank]
        for arrival in schedule.origin.arrivals
        if slots is None or arrival.slot in slots
        for rank, src in zip(range(members), schedule.mesh.ranks_after(arrival.src), strict=True)
    }
    return "mixed" if len(across) == 2 else "nvshmem" if True in across else "peer"


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
