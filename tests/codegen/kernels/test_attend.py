"""Whole attention sites with nothing but generated kernels, in Triton's interpreter, ranks as processes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from kernel_ranks import Job, Pool, error_of, expected, inputs_of, make_site, rows_of
from random_sites import Case
from rank_workers import attend_and_gather, schedules_of
from threads import run_threads
from wire_bounds import attention_off, most_off

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.kernels.spec import KernelSpec, attend_arguments
from sfcompile.codegen.proof.checker import check
from sfcompile.errors import ScheduleError
from sfcompile.options import Wire
from sfcompile.runtime.rank.session import current_session

pytestmark = pytest.mark.ranks

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
MESHES = {
    "torus": {2: (2, 1), 3: (3, 1), 4: (2, 2)},
    "tas": {2: (2, 1), 3: (3, 1), 4: (2, 2)},
    "usp": {2: (1, 2), 3: (1, 3), 4: (2, 2)},
    "ulysses": {2: (2, 1), 3: (3, 1), 4: (4, 1)},
    "ring": {2: (1, 2), 3: (1, 3), 4: (1, 4)},
    "allgather": {2: (2, 1), 3: (1, 3), 4: (2, 2)},
}
TOKENS = {2: [40, 33], 3: [40, 0, 33], 4: [40, 21, 0, 33]}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


def job(kind: str, ranks: int, dtype: torch.dtype, net: bool, **changes: object) -> Job:
    machines = 2 if ranks == 4 else ranks
    site = make_site(TOKENS[ranks], ranks, heads=4 if ranks != 3 else 3, dtype=dtype)
    across = "ring" if kind == "usp" else "ulysses"
    epochs = 2 if dtype == torch.float32 else 1  # banks, epochs and credits do not depend on the dtype
    shape = (machines, ranks // machines, *MESHES[kind][ranks])
    return Job(kind, *shape, site, net, across, late=1, epochs=epochs, **changes)  # type: ignore[arg-type]


def cells() -> Iterator[Any]:
    """Every kind, rank count, dtype and reach; ``make test`` runs every kind once: rank counts, dtypes and reaches by
    turns."""
    for (k, kind), (r, ranks), (d, dtype), net in product(
        enumerate(MESHES), enumerate((2, 3, 4)), enumerate(LIMITS), (False, True)
    ):
        quick = r == k % 3 and d == k // 2 % 3 and net == (k % 2 == 1)
        marks = () if quick else pytest.mark.thorough
        name = f"{kind}-{ranks}-{str(dtype).removeprefix('torch.')}-{'nvshmem' if net else 'peer'}"
        yield pytest.param(kind, ranks, dtype, net, marks=marks, id=name)


@pytest.mark.parametrize(("kind", "ranks", "dtype", "net"), list(cells()))
def test_every_schedule(pool: Pool, kind: str, ranks: int, dtype: torch.dtype, net: bool) -> None:
    """Uneven chunks, a rank without tokens, tails in every block, one rank late; two epochs in fp32."""
    this = job(kind, ranks, dtype, net)
    check(this.schedule())
    assert error_of(this, pool.run(this)) < LIMITS[dtype]


SITES = {
    "several blocks and parts": (make_site([150, 70], 2, 2, torch.float16), {"parts": (2, 2)}),
    "grouped heads": (make_site([40, 70], 2, 4, torch.float32, kv_heads=2), {}),
    "head size 72, values 40": (make_site(40, 2, 2, torch.float16, 72, v_head_dim=40), {}),
    "head size 128, batch 2": (make_site([30, 50], 2, 2, torch.bfloat16, 128, batch=2), {}),
    "head size 256": (make_site(24, 2, 2, torch.float16, 256), {}),
    "causal": (make_site([70, 90], 2, 2, torch.float32, causal=True), {}),
    "key mask": (make_site([40, 70], 2, 2, torch.float32, mask="full"), {"mask": "key"}),
    "added key mask": (make_site([40, 70], 2, 2, torch.float32, mask="full"), {"mask": "key", "mask_is_bool": False}),
    "full mask": (make_site([40, 70], 2, 2, torch.float32, batch=2, mask="full"), {"mask": "full"}),
    "bias": (make_site([40, 70], 2, 4, torch.float32, mask="full"), {"mask": "full", "mask_is_bool": False}),
    "least numbers": (
        make_site([40, 70], 2, 2, torch.float32, batch=2, mask="full"),
        {"mask": "key", "mask_is_bool": False, "least": True},
    ),
}


@pytest.mark.parametrize(
    ("name", "net"),
    [
        # `make test` runs every site, by one way or the other in turn.
        pytest.param(name, net, id=f"{name}-{way}", marks=[] if net == (i % 2 == 1) else pytest.mark.thorough)
        for i, name in enumerate(SITES)
        for net, way in ((False, "peer"), (True, "nvshmem"))
    ],
)
def test_every_kind_of_site(pool: Pool, name: str, net: bool) -> None:
    site, changes = SITES[name]
    this = Job("torus", 2, 1, 2, 1, site, net, epochs=2, late=0, **changes)
    assert error_of(this, pool.run(this)) < LIMITS[site.dtype]


FP8, BF16 = Wire(*["fp8"] * 4), Wire(*["bf16"] * 4)
QKV = FP8._replace(o="same")
WIRED = {
    "torus, fp8": ("torus", 4, torch.bfloat16, True, FP8),
    "torus, K and V": ("torus", 4, torch.float32, False, Wire(k="fp8", v="bf16")),
    "torus, Q and O": ("torus", 3, torch.float32, True, Wire(q="fp8", o="bf16")),
    "usp, in pieces": ("usp", 4, torch.float32, False, QKV),
    "ring, bf16": ("ring", 3, torch.float32, True, BF16),
    "allgather": ("allgather", 2, torch.float16, False, FP8),
}


@pytest.mark.parametrize(
    "name", [name if i in (0, 3) else pytest.param(name, marks=pytest.mark.thorough) for i, name in enumerate(WIRED)]
)
def test_chunks_that_travel_encoded(pool: Pool, name: str) -> None:
    """What the executor makes of the same chunks, and that is within the bound; own chunks as they are in both."""
    kind, ranks, dtype, net, wire = WIRED[name]
    this = job(kind, ranks, dtype, net)
    this = replace(this, site=replace(this.site, wire=wire))
    outs = pool.run(this)
    (q, k, v, _), schedule = inputs_of(this), this.schedule()
    case = Case(this.site, schedule.mesh, q, k, v, None, expected(this), kind, this.parts)

    def execute(rank: int) -> torch.Tensor:
        current_session().load("p", schedules_of(case))
        return attend_and_gather(case, rank, torch.zeros(1, dtype=torch.int64))[0]

    whole = run_threads(ranks, execute)[0].double()
    off, bound = (whole - case.expected).abs(), attention_off(case) + LIMITS[dtype]
    assert bool((off <= bound).all()) and float(off.max()) > 10 * LIMITS[torch.float32]
    for rank, out in enumerate(outs):
        rows = rows_of(this.site.q_positions[rank])
        want = whole[:, :, rows]
        # An output that lies between two numbers of its wire may fall to either.
        slack = most_off(want, wire.o) * 2 + LIMITS[dtype] * want.abs().amax() if rows.numel() else 0.0
        assert bool(((out.double() - want).abs() <= slack).all())


def test_cross_attention_and_tiles_that_share_programs(pool: Pool) -> None:
    """Queries longer than keys; more tiles than programs; ring hops merged into a pass, and not."""
    site = make_site([100, 130, 90, 140], 4, 2, torch.float32)
    site = replace(site, kv_positions=make_site([9, 20, 0, 70], 4).kv_positions)
    for merge in (True, False):
        this = Job("torus", 2, 2, 2, 2, site, True, epochs=1, merge=merge)
        assert error_of(this, pool.run(this)) < 1e-5


def mutant(name: str) -> Job:
    site = make_site([40, 40, 40, 40], 4, 4, torch.float32)
    return Job("torus", 2, 2, 2, 2, site, late=1, late_s=0.8, epochs=3, drop=name)


MUTANTS = ["wait", "early push", "slot", "put"]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_refused(name: str) -> None:
    """By the checker, before anything runs."""
    with pytest.raises(ScheduleError):
        check(mutant(name).schedule())


@pytest.mark.parametrize(
    "name", [name if name == "wait" else pytest.param(name, marks=pytest.mark.thorough) for name in MUTANTS]
)
def test_kernels_follow_the_schedule_mistakes_included(pool: Pool, name: str) -> None:
    this = mutant(name)
    try:
        error = error_of(this, pool.run(this))
    except RuntimeError as failure:
        assert "did not arrive" in str(failure)
    else:
        assert not error < 0.01


def test_the_text_depends_on_the_spec_alone() -> None:
    spec = KernelSpec("bf16", 64, 64, 0.125, forwards=True, pushes=True, reach="mixed")
    assert attend_source(spec) == attend_source(replace(spec))
    assert attend_source(spec) != attend_source(spec.with_(causal=True))
    assert all(len(line) <= 120 for line in attend_source(spec).splitlines())
    assert "state_ptr" not in attend_arguments(spec.with_(carry=False))
    compile(attend_source(spec), "attend", "exec")


def test_chunks_are_polled_for_on_a_programs_first_tile_of_a_unit() -> None:
    spec = KernelSpec("bf16", 64, 64, 0.125, causal=True, forwards=True, pushes=True, reach="mixed")
    (tiles,) = (
        node
        for node in ast.walk(ast.parse(attend_source(spec)))
        if isinstance(node, ast.While) and ast.unparse(node.test) == "tile < tiles"
    )
    first = [node for node in ast.walk(tiles) if isinstance(node, ast.If) and ast.unparse(node.test) == "tile == start"]
    assert len(first) == 1 and ast.unparse(tiles).count("wait_word(") == ast.unparse(first[0]).count("wait_word(") == 2


@pytest.mark.parametrize("tails", ["none", "apart", "inside"])
def test_blocks_that_no_query_of_a_tile_sees_are_not_attended_to(tails: str) -> None:
    for causal, end in ((True, "seen"), (False, "columns")):
        text = attend_source(KernelSpec("bf16", 64, 64, 0.125, causal=causal, tails=tails))
        loops = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.For)]
        bounds = {ast.unparse(node.iter) for node in loops}
        assert bounds == ({"range(0, full, BN)"} if tails == "apart" else {f"range(0, {end}, BN)"})
        assert (f"full = {end} // BN * BN" in text) == (f"if full < {end}:" in text) == (tails == "apart")
        assert ("seen = tl.load(spans_ptr" in text) == causal
