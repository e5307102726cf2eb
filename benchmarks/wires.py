"""What each wire costs in accuracy: models on several ranks against the same models in fp64, in one process.

    python benchmarks/wires.py [names ...] [--ranks 4] [--mesh ULYSSES RING] [--dtype float32 bfloat16]

A model of ``benchmarks/diffusers_zoo`` (tiny, random weights) is compiled with ``placement="shard"``, so that whatever
can be shared out travels, once for every wire, and called. An error is the root mean square of what the output is off,
over that of the output of the model and its inputs in fp64; behind it the largest element that is off, over the
output's largest. A column is a wire; "one process" is the model as it is, in the same dtype. Ranks compare their
outputs bit by bit. Without ``--mesh`` heads are split over all ranks, so that q, k, v and outputs all travel.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers_zoo import ZOO
from torch.overrides import TorchFunctionMode
from zoo import tensors

from sfcompile.backend import reports
from sfcompile.commands.launch import launch

MODELS = (
    "flux2", "cogview4", "hunyuan_image", "longcat_image", "krea2", "z_image", "hunyuan_video15", "allegro",
    "wan_vace", "bria", "cogview3_plus", "ovis_image",
)  # fmt: skip
WIRES: dict[str, str | Mapping[str, str]] = {
    "same": "same",
    "bf16": "bf16",
    "KV fp8, QO bf16": {"kv": "fp8", "qo": "bf16"},
    "fp8": "fp8",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NARROW = (torch.float32, torch.bfloat16, torch.float16)


class InDouble(TorchFunctionMode):
    """Where a model asks for fp32 by name, for its angles or its norms, it gets fp64: else its reference would be no
    better than fp32, or meet weights of another dtype and fail."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(leaf: Any) -> Any:
            return torch.float64 if leaf in NARROW else leaf

        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        if func is torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return func(*args)
        args, kwargs = torch.utils._pytree.tree_map_only(torch.dtype, wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def in_double(model: torch.nn.Module, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What a model gives in fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            return tensors(copy.deepcopy(model).double()(**cast(kwargs, torch.float64)))
    finally:
        torch.set_default_dtype(before)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A call's arguments with every floating tensor in a dtype."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x.clone(), value
    )


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> str:
    """Root mean square and largest, relative, over all outputs together."""
    off = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(got, want, strict=True)])
    whole = torch.cat([b.double().flatten() for b in want])
    rms = float(off.square().mean().sqrt() / whole.square().mean().sqrt())
    return f"{rms:.1e} {float(off.abs().max() / whole.abs().max()):.1e}"


def row(name: str, dtype: torch.dtype, mesh: dict[str, int]) -> str:
    """The errors of one model, by wire; the same line on every rank.

    Raises:
        RuntimeError: ranks got different outputs, or nothing was shared out.
    """
    model, kwargs = ZOO[name]()
    want = in_double(model, kwargs)
    model = model.to(dtype)
    cells = [error(tensors(model(**cast(kwargs, dtype))), want)]
    for wire in WIRES.values():
        torch._dynamo.reset()
        before = len(reports())
        options = {"placement": "shard", "inner": "eager", "mesh": mesh, "wire": wire}
        out = tensors(torch.compile(model, backend="streamfusion", options=options)(**cast(kwargs, dtype)))
        if not any(report.sharded_sites for report in reports()[before:]):
            raise RuntimeError("no attention was shared out")
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, [x.contiguous().view(torch.uint8).numpy().tobytes() for x in out])
        if any(digest != digests[0] for digest in digests):
            raise RuntimeError(f"ranks have different outputs with wire={wire!r}")
        cells.append(error(out, want))
    return f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells)


def worker(names: list[str], dtypes: list[str], mesh: dict[str, int]) -> int:
    """One rank: every model in turn."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # diffusers says at every cast that no module must stay in fp32
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for dtype in dtypes:
        if dist.get_rank() == 0:
            print(f"\n{dtype:<18}" + "".join(f"{name:>18}" for name in ("one process", *WIRES)))
        for name in names or MODELS:
            try:
                with torch.no_grad():
                    line = row(name, DTYPES[dtype], mesh)
            except Exception as error:  # such as fewer heads than ranks; on every rank
                line = f"{name:<18}  {next(iter(str(error).strip().splitlines()), '')[:100]}"
            if dist.get_rank() == 0:
                print(line, flush=True)
    dist.destroy_process_group()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mesh", type=int, nargs=2, metavar=("ULYSSES", "RING"), help="default: RANKS 1")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.worker:
        return worker(args.names, args.dtype, dict(zip(("ulysses", "ring"), args.mesh, strict=True)))
    mesh = args.mesh or (args.ranks, 1)
    argv = [__file__, *args.names, "--worker", "--dtype", *args.dtype, "--mesh", *map(str, mesh)]
    return launch(argv, args.ranks, env={"SFCOMPILE_LOG": "error"})


if __name__ == "__main__":
    raise SystemExit(main())
