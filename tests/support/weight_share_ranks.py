"""Ranks on several machines that hold the large weights of a model in shares."""

from __future__ import annotations

import copy
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch
from sharded_weight_ranks import EAGER, WIDTH, Block, inputs_of, model_of, write_files
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import sfcompile
from sfcompile.backend import reports
from sfcompile.errors import StreamFusionError
from sfcompile.lowering import inner
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.rank.sharded_weight import ShardedWeight

SHARES = {**EAGER, "weights": "sharded"}
LARGE = 1 << 16


def uneven(seed: int) -> nn.Module:
    """The blocks with a layer between whose rows no number of ranks divides."""
    torch.manual_seed(seed)
    middle = nn.Sequential(nn.Linear(WIDTH, 211), nn.GELU(), nn.Linear(211, WIDTH)).requires_grad_(False)
    blocks = model_of(seed)
    return nn.Sequential(blocks[0], middle, blocks[1]).eval()  # type: ignore[index]


def exact(rank: int, topology: str) -> dict[str, Any]:
    """A model in shares and the same one whole, written to alike: equal to the last bit after every write.

    Args:
        topology: what is planned for, whatever the ranks run on.
    """
    model, twin, x, seen = uneven(0), uneven(0), inputs_of(), dict[str, Any]()
    sfcompile.shard_weights(model, options=SHARES)
    # Both with one plan: with whole weights tokens may be cut into parts, which adds in another order.
    run, other = (
        torch.compile(m, backend="streamfusion", options={**options, "topology": topology})
        for m, options in ((model, SHARES), (twin, EAGER))
    )

    def step(name: str) -> None:
        with torch.inference_mode():
            got, want = run(x), other(x)
        seen[name] = torch.equal(got, want)

    step("first")
    seen["lines"] = [report.weights for report in reports()]
    step("again")
    with torch.no_grad():
        seen["eager"] = torch.equal(model(x), twin(x))
    large = [weight for weight in model.parameters() if weight.numel() * 4 >= LARGE]
    seen["cut"] = all(isinstance(weight, ShardedWeight) for weight in large)
    seen["tied"] = model[0].again.weight is model[0].out.weight  # type: ignore[union-attr, union-attr, index]
    shard = model[1][0].weight.shard  # type: ignore[index, union-attr]
    seen["rows"] = shard.shape[0]
    for each in (model, twin):
        each[0].qkv.weight.data += 0.25  # type: ignore[index, union-attr, operator]
    step("fused")
    for each in (model, twin):
        each.load_state_dict(uneven(5).state_dict())
    step("other weights")
    seen["shares"] = all(isinstance(weight, ShardedWeight) for weight in large)
    state = {name: value.whole() if hasattr(value, "whole") else value for name, value in model.state_dict().items()}
    seen["state"] = all(torch.equal(state[name], value) for name, value in twin.state_dict().items())
    seen["heap"], seen["largest"] = current_session().heap_bytes, 3 * WIDTH * WIDTH * 4
    return seen


def loaded(rank: int, folder: str, inner: str) -> tuple[float, int, int]:
    """A model that was never whole: largest difference to one process; bytes of its large weights here, and in all."""
    options = {**SHARES, "inner": inner}
    model = sfcompile.load_sharded(model_of(0, "meta"), Path(folder), options=options)
    with torch.no_grad():
        got = torch.compile(model, backend="streamfusion", options=options)(inputs_of())
        worst = float((got - model_of(0)(inputs_of())).abs().max())
    cut = [weight for weight in model.parameters() if isinstance(weight, ShardedWeight)]
    return worst, sum(w.shard.numel() * 4 for w in cut), sum(w.numel() * 4 for w in cut)


def from_torch(rank: int, called: bool) -> dict[str, Any]:
    """A model under ``fully_shard``, block by block, whose shards become ours: how far it is from the model itself.

    Args:
        called: the model was called before, by its own hooks.
    """
    dist.init_process_group("gloo")
    model, twin, x = uneven(0), uneven(0), inputs_of()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh)
    with torch.no_grad():
        if called:
            model(x)
            model.reshard()  # type: ignore[operator]
    before = {name: weight.to_local().data_ptr() for name, weight in model.named_parameters()}  # type: ignore[attr-defined]
    sfcompile.shard_weights(model, options=SHARES)
    weights = dict(model.named_parameters())
    large = {name: weight for name, weight in weights.items() if weight.numel() * 4 >= LARGE}
    seen: dict[str, Any] = {
        "hooks": [str(part) for part in model.modules() if isinstance(part, FSDPModule) or part._forward_hooks],
        "cut": all(isinstance(weight, ShardedWeight) for weight in large.values()),
        "kept": [weight.shard.data_ptr() == before[name] for name, weight in large.items()],  # type: ignore[attr-defined]
        "others": {type(weight).__name__ for name, weight in weights.items() if name not in large},
        "tied": model[0].again.weight is model[0].out.weight,  # type: ignore[union-attr, index]
    }
    run, errors = torch.compile(model, backend="streamfusion", options=SHARES), []
    with torch.no_grad():
        for _ in range(2):
            errors.append(float((run(x) - twin(x)).abs().max()))
            for each in (model, twin):
                each.load_state_dict(uneven(5).state_dict())
        errors.append(float((model(x) - twin(x)).abs().max()))
    seen["error"], seen["line"] = max(errors), reports()[0].weights
    return seen


def other_cuts(rank: int) -> list[str]:
    """What every rank says of DTensors and hooks that are not taken; the model goes on as it was."""
    dist.init_process_group("gloo")
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    columns, cast = model_of(0), model_of(0)
    distribute_module(columns[0].qkv, mesh, lambda name, part, mesh: part.register_parameter(  # type: ignore[index]
        "weight", nn.Parameter(distribute_tensor(part.weight, mesh, [Shard(1)]), requires_grad=False)))  # type: ignore[arg-type]  # fmt: skip
    fully_shard(cast, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64))
    for model in (columns, cast):
        try:
            sfcompile.shard_weights(model, options=SHARES)
        except StreamFusionError as error:
            said.append(f"{type(error).__name__}: {error}")
    with torch.no_grad():
        assert cast(inputs_of()).dtype == torch.float64
    return said


class Odd(nn.Module):
    """What no capture takes, a sparse input, beside a weight that is written to while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(2))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.a.weight.mul_(0.5).sub_(self.b.weight.t().tanh(), alpha=0.1)
        return self.a(x) + torch.sparse.mm(rows, self.b(x)[0])[None]


def odd(rank: int) -> bool:
    """Op by op, every read gathers: the same bits as with whole weights, at every call."""
    torch.manual_seed(0)
    model, x, rows = Odd(), inputs_of(), torch.eye(inputs_of().shape[1]).to_sparse()
    twin = copy.deepcopy(model)
    sfcompile.shard_weights(model, options=SHARES)
    run = torch.compile(model, backend="streamfusion", options=SHARES)
    with torch.no_grad():
        return all(torch.equal(run(x, rows), twin(x, rows)) for _ in range(3))


def faults(rank: int) -> list[StreamFusionError]:
    """What every rank raises where weights are whole, where one writes alone, and where one loads another model."""
    errors, x = list[StreamFusionError](), inputs_of()

    def attempt(call: Any) -> None:
        try:
            call()
        except StreamFusionError as error:
            errors.append(error)

    with torch.no_grad():
        attempt(lambda: torch.compile(model_of(0), backend="streamfusion", options=SHARES)(x))
        attempt(lambda: sfcompile.shard_weights(model_of(rank), options=SHARES))
        with tempfile.TemporaryDirectory() as folder:  # files that look alike, of another model on every rank
            write_files(Path(folder), rank)
            for weights in ("sharded", "sharded-by-machine"):
                options = {**EAGER, "weights": weights}
                attempt(lambda: sfcompile.load_sharded(model_of(0, "meta"), folder, options=options))  # noqa: B023
        model = sfcompile.shard_weights(model_of(0), options=SHARES)
        run = torch.compile(model, backend="streamfusion", options=SHARES)
        want = model_of(0)(x)
        assert float((run(x) - want).abs().max()) < 1e-5
        if rank == 1:
            model[0].qkv.weight.add_(1.0)  # type: ignore[index, union-attr]
        attempt(lambda: run(x))
        if rank == 0:
            model[0].qkv.weight.add_(1.0)  # type: ignore[index, union-attr]
        twin = model_of(0)
        twin[0].qkv.weight.add_(1.0)  # type: ignore[index, union-attr, operator]
        assert float((run(x) - twin(x)).abs().max()) < 1e-5
    return errors


def killed(rank: int) -> None:
    """Rank 1 ends when a weight is gathered."""
    model = sfcompile.shard_weights(model_of(0), options=SHARES)
    run = torch.compile(model, backend="streamfusion", options={**SHARES, "timeout_s": 20.0})
    with torch.no_grad():
        run(inputs_of())
        session = current_session()
        if rank == 1:
            session.receive = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        run(inputs_of())


def blocks(rank: int) -> tuple[int, str, bool]:
    """Six equal blocks with weights in shares: how many graphs are compiled, what is said, and whether it is exact.

    They run as they are handed to the compiler: what is looked at is how the graph is cut.
    """
    compiled: list[Any] = []

    def counted(gm: Any, *args: Any) -> Any:
        compiled.append(gm)
        return gm

    inner.compile_with_inductor = counted
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(6))).eval().requires_grad_(False)
    twin, x = copy.deepcopy(model), inputs_of()
    sfcompile.shard_weights(model, options=SHARES)
    run = torch.compile(model, backend="streamfusion", options={**SHARES, "inner": "inductor"})
    other = torch.compile(twin, backend="streamfusion", options=EAGER)
    with torch.no_grad():
        alike = all(torch.equal(run(x), other(x)) for _ in range(2))
    return len(compiled), reports()[0].blocks, alike
