"""Every model of a zoo on several ranks against one process: exactness, FLOPs, gathers, graphs, compile time.

    python benchmarks/zoo.py --ranks 4 [--zoo FOLDER] [--inductor] [--wide] [names ...]
    python benchmarks/zoo.py --ranks 2 --resolutions [names ...]
    python benchmarks/zoo.py --page docs/models.md

The models are those of ``benchmarks/diffusers_zoo`` and of another folder, if there is one, with a ``zoo.py`` whose
``ZOO`` maps a name to a function that returns ``(model, kwargs)``. They are compiled with ``placement="shard"``
(whatever has a rule is sharded, whatever it costs). Without ``--inductor`` they run eagerly inside, so that many models
fit in a minute; with it the table also says how long Inductor takes on the same graphs, on the rank itself and (rank 0)
on the unsharded model. Ranks exchange errors: the table shows the worst of all ranks. With ``--wide`` what a model
computes in bf16 or fp16 inside is computed in fp32, here and in the reference: its error is then the sharding's alone.

With ``--resolutions`` a model is called at three sizes of its latents with ``dynamic=True``, and the table says how
often Dynamo traced it for Inductor (rank 0, unsharded) and for us, and how many sharded programs that made.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers_zoo.registry import CLASSES
from torch import fx
from torch._dynamo.utils import compilation_time_metrics, counters
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_page import page, tried

from sfcompile.backend import reports, streamfusion_backend
from sfcompile.commands.launch import launch

TOLERANCE = 1e-5
ROUNDING = {torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Models that cast to a narrow type inside flip its last bit where sums are added in another order."""
NARROW = frozenset(ROUNDING)
SHARE = 1.10
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "zoo"


@dataclass
class Row:
    """What one model gave; ``failure`` is the first line of an error."""

    name: str
    error: float = float("nan")
    same: bool = False
    share: float = float("nan")
    gathers: int = 0
    gathered_bytes: int = 0
    graphs: int = 0
    capture_s: float = 0.0
    pass_s: float = 0.0
    first_s: float = 0.0
    inductor_s: float = float("nan")
    tolerance: float = TOLERANCE
    plan: str = ""
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"{self.name:<22} FAILED  {self.failure[:150]}"
        exact = "exact" if self.exact else "WRONG"
        return (
            f"{self.name:<22} {exact:<6}{self.error:>9.1e}{self.share:>8.3f}{self.gathers:>8}"
            f"{self.gathered_bytes / 2**10:>10.1f}{self.graphs:>7}{self.capture_s:>11.2f}{self.pass_s:>9.2f}"
            f"{self.inductor_s:>11.1f}{self.first_s:>8.1f}  {self.plan}"
        )

    @property
    def exact(self) -> bool:
        return not self.failure and self.error <= self.tolerance and self.same


_COLUMNS = (
    ("error", 9),
    ("share", 8),
    ("gathers", 8),
    ("KiB", 10),
    ("graphs", 7),
    ("capture s", 11),
    ("passes s", 9),
    ("Inductor s", 11),
    ("first s", 8),
)
HEAD = f"{'model':<28} " + "".join(f"{name:>{width}}" for name, width in _COLUMNS) + "  plan"


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def widened(gm: fx.GraphModule) -> fx.GraphModule:
    """A Dynamo graph that computes in fp32 what it computed in a narrow type."""
    for node in gm.graph.nodes:
        wide: Callable[[Any], Any] = lambda a: torch.float32 if a in NARROW else a  # noqa: E731
        node.args, node.kwargs = fx.node.map_aggregate(node.args, wide), fx.node.map_aggregate(node.kwargs, wide)
        if node.op == "call_method" and node.target in ("bfloat16", "half"):
            node.target = "float"
    gm.recompile()
    return gm


def wide_backend(gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
    """Ours on the widened graph; without options that graph as it is."""
    gm = widened(gm)
    return streamfusion_backend(gm, inputs, options=options) if options else gm.forward


def run(
    name: str, build: Callable[[], tuple[torch.nn.Module, dict[str, Any]]], options: dict[str, Any], wide: bool = False
) -> Row:
    """One model on this rank, beside the same model in one process."""
    torch._dynamo.reset()
    row, before = Row(name), len(reports())
    model, kwargs = build()
    want = tensors((torch.compile(model, backend=wide_backend) if wide else model)(**kwargs))
    torch._dynamo.reset()
    with NarrowTypes() as seen, suppress(RuntimeError):  # flex attention runs under no mode
        model(**build()[1])
    row.tolerance = TOLERANCE if wide else max([TOLERANCE, *(ROUNDING[dtype] for dtype in seen.types)])
    # A model that writes to its inputs starts from the same ones again.
    kwargs = build()[1]
    inductor_before = inductor_seconds()
    compiled = torch.compile(model, backend=wide_backend if wide else "streamfusion", options=options)
    start = time.perf_counter()
    first = tensors(compiled(**kwargs))
    row.first_s = time.perf_counter() - start
    row.inductor_s = inductor_seconds() - inductor_before
    second = tensors(compiled(**build()[1]))
    row.error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, want, strict=True) if b.numel())
    row.same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plans = reports()[before:]
    total = sum(plan.total_flops for plan in plans)
    ranks = dist.get_world_size()
    busiest = [sum(plan.rank_flops[rank] for plan in plans) for rank in range(ranks)]
    row.share = max(busiest) * ranks / total if total else float("nan")
    row.gathers = sum(len(plan.gathered) for plan in plans)
    row.gathered_bytes = sum(left.nbytes for plan in plans for left in plan.gathered)
    row.graphs = len(plans)
    row.capture_s = sum(plan.pass_seconds.get("capture", 0.0) for plan in plans)
    row.pass_s = sum(sum(plan.pass_seconds.values()) for plan in plans) - row.capture_s
    row.plan = next((plan.schedule for plan in plans if plan.schedule), "nothing sharded")
    return row


class NarrowTypes(TorchDispatchMode):
    """Which of the narrow types a model makes while it runs eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.types |= {leaf.dtype for leaf in tensors(out) if leaf.dtype in ROUNDING}
        return out


def inductor_seconds() -> float:
    """What Inductor has taken in this process so far."""
    return sum(compilation_time_metrics.get("compile_fx_inner", []))


def known(folder: Path) -> dict[str, Any]:
    """Every model by name; the folder's go first."""
    from diffusers_zoo import ZOO

    found = {}
    if (folder / "zoo.py").is_file():
        spec = importlib.util.spec_from_file_location("other_zoo", folder / "zoo.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules["other_zoo"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = dict(module.ZOO)
    return {**found, **{name: build for name, build in ZOO.items() if name not in found}}


RESIZED = ("sd3", "pixart_sigma", "sana", "wan_t2v", "cosmos", "hunyuan_video", "latte")


def traces(name: str, build: Callable[[], tuple[torch.nn.Module, dict[str, Any]]], rank: int) -> str:
    """A line of the table of ``--resolutions``."""
    model, kwargs = build()
    latents = kwargs["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    *rest, height, width = latents.shape
    sizes = [(height, width), (height + 8, width), (height, width + 4)]
    calls = [{**kwargs, "hidden_states": torch.randn(*rest, h, w, generator=generator)} for h, w in sizes]
    counts, error, before = {}, 0.0, len(reports())
    for backend in ("inductor", "streamfusion"):
        if backend == "inductor" and rank:
            dist.barrier()  # rank 0 compiles for longer than a rank waits for another
            continue
        torch._dynamo.reset()
        counters.clear()
        options = {"placement": "shard", "inner": "eager"} if backend == "streamfusion" else None
        run = torch.compile(model, backend=backend, dynamic=True, options=options)
        for given in (*calls, *calls):
            got, want = tensors(run(**given)), tensors(model(**given))
            error = max(error, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)))
        counts[backend] = counters["stats"]["unique_graphs"]
        if backend == "inductor":
            dist.barrier()
    inductor = counts.get("inductor", -1)
    return f"{name:<22}{inductor:>10}{counts['streamfusion']:>14}{len(reports()) - before:>18}{error:>9.1e}"


def resolutions(folder: Path, names: list[str]) -> int:
    """One rank of ``--resolutions``."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    zoo = known(folder)
    if dist.get_rank() == 0:
        print(f"{'model':<22}{'Inductor':>10}{'streamfusion':>14}{'sharded programs':>18}{'error':>9}   (traces)")
    for name in names or RESIZED:
        with torch.no_grad():
            line = traces(name, zoo[name], dist.get_rank())
        if dist.get_rank() == 0:
            print(line, flush=True)
    dist.destroy_process_group()
    return 0


def worker(folder: Path, names: list[str], mesh: dict[str, int] | None, inductor: bool, wide: bool) -> int:
    """One rank: every model in turn."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    zoo = known(folder)
    dist.init_process_group("gloo")
    rank, rows = dist.get_rank(), []
    options = {"placement": "shard", "inner": "auto" if inductor else "eager", "mesh": mesh}
    if rank == 0:
        print(HEAD)
    for name in names or list(zoo):
        try:
            with torch.no_grad():
                mine = run(name, zoo[name], options, wide)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            torch._dynamo.reset()
            mine = Row(name, failure=f"{type(error).__name__}: {next((t for t in text if t.strip()), '')}")
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        failed = [row for row in everyone if row.failure]
        mine = failed[0] if failed else max(everyone, key=lambda row: (row.error, not row.same))
        rows.append(mine)
        if rank == 0:
            print(mine, flush=True)
    if rank == 0:
        exact = [row for row in rows if row.exact]
        single = [row for row in exact if row.graphs == 1]
        divided = [row for row in single if row.share <= SHARE]
        print(
            f"{len(exact)} of {len(rows)} exact; {len(divided)} of {len(single)} of one graph at most {SHARE} x total/P"
        )
    dist.destroy_process_group()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--zoo", type=Path, default=FOLDER)
    parser.add_argument("--mesh", type=int, nargs=2, metavar=("ULYSSES", "RING"), help="instead of the plan")
    parser.add_argument("--inductor", action="store_true", help="compile the local graphs, and time that")
    parser.add_argument("--wide", action="store_true", help="compute in fp32 what a model computes in bf16 inside")
    parser.add_argument("--resolutions", action="store_true", help="count traces at three sizes instead")
    parser.add_argument("--page", type=Path, metavar="FILE", help="only write docs/models.md from the result files")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.page is not None:
        args.page.write_text(page(tried(), CLASSES), encoding="utf-8")
        return 0
    if args.worker:
        mesh = {"ulysses": args.mesh[0], "ring": args.mesh[1]} if args.mesh else None
        if args.resolutions:
            return resolutions(args.zoo, args.names)
        return worker(args.zoo, args.names, mesh, args.inductor, args.wide)
    mesh = ["--mesh", *map(str, args.mesh)] if args.mesh else []
    flags = [f"--{name}" for name in ("inductor", "wide", "resolutions") if getattr(args, name)]
    argv = [__file__, *args.names, "--worker", "--zoo", str(args.zoo), *mesh, *flags]
    return launch(argv, args.ranks, env={"SFCOMPILE_LOG": "error"})


if __name__ == "__main__":
    raise SystemExit(main())
