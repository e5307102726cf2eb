"""Ship a model as one file: exported in one process, loaded by ranks without the model's source and without a trace.

    sfcompile run --ranks 2 examples/export_and_load.py          both halves, one after the other
    sfcompile export examples/export_and_load.py:make --topology 1x2 --out hello.sf     the first half alone

Rank 0 plays the machine that exports; it would need neither ranks nor a GPU. The package holds every rank's graph, the
schedules, the plan, the weights and a hash of each; see docs/packages.md.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hello import DiT

import sfcompile


def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """What to export: a model and how it is called."""
    torch.manual_seed(0)
    return DiT(width=128, depth=2).eval(), (torch.randn(1, 4, 32, 32), torch.tensor([500.0]))


def export(path: Path, ranks: int) -> None:
    """The machine that exports."""
    model, args = make()
    start = time.perf_counter()
    options = {"placement": "shard", "inner": "eager"}
    sfcompile.export(model, args=args, path=path, topology=f"1x{ranks}", options=options)
    print(f"exported for {ranks} ranks in {time.perf_counter() - start:.1f} s: {path.stat().st_size / 2**20:.1f} MiB")


def serve(path: Path) -> Any:
    """A rank that serves: it knows nothing but the file."""
    start = time.perf_counter()
    model = sfcompile.load(path)
    if dist.get_rank() == 0:
        print(f"loaded in {time.perf_counter() - start:.2f} s: {model}")
    return model


@torch.no_grad()
def main() -> None:
    """Export on rank 0, load on all, compare."""
    dist.init_process_group("gloo")
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    path = Path(where[0]) / "hello.sf"
    if dist.get_rank() == 0:
        export(path, dist.get_world_size())
    dist.barrier()

    loaded = serve(path)
    model, args = make()  # only to compare
    want = model(*args)
    error = float((loaded(*args) - want).abs().max() / want.abs().max())
    try:
        loaded(torch.randn(1, 4, 16, 16), args[1])
    except sfcompile.errors.InputError as problem:
        refused = str(problem).splitlines()[0]
    dist.barrier()
    if os.environ["RANK"] == "0":
        print(f"another size is refused: {refused}")
        print(f"difference from one process: {error:.1e} of the output's scale")
        path.unlink()
        path.parent.rmdir()


if __name__ == "__main__":
    main()
