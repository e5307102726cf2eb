"""What one rank of an end-to-end test does: ``run(rank, CASE, ARGUMENT...)`` ends well if the case holds on this rank.

As a program, under torchrun or our launcher: ``model_cases.py CASE [ARGUMENT...]``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sfcompile.backend import last_report, reports
from sfcompile.errors import RankMismatchError


def rank() -> int:
    """Of this process: ranks are forked from one that has imported this file, so it is no constant."""
    return int(os.environ["RANK"])


def ranks() -> int:
    """How many there are."""
    return int(os.environ["WORLD_SIZE"])


def run(rank: int, case: str, *arguments: str) -> None:
    """One case on one rank."""
    with torch.no_grad():
        globals()[f"case_{case}"](*arguments)


def compiled(model: nn.Module, **options: Any) -> Any:
    """The model behind the backend, by its registered name."""
    return torch.compile(model, backend="streamfusion", options={"inner": "eager", "timeout_s": 30.0, **options})


class Plain(nn.Module):
    """Two self-attention blocks over [B, S, C] tokens."""

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList([nn.Linear(32, 96) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in qkv(x).chunk(3, dim=-1))
            if self.attention:
                v = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + out(v.transpose(1, 2).flatten(2))
        return x


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """The fp32 contract."""
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= 1e-5, f"rank {rank()}: error {error:.2e} of the output's scale"


def tokens(count: int = 50) -> torch.Tensor:
    return torch.randn(2, count, 32, generator=torch.Generator().manual_seed(1))


def case_model(name: str) -> None:
    """A diffusers model equals one-process eager, twice the same bits; its FLOPs are divided."""
    from diffusers_models import build

    torch._dynamo.reset()
    model, inputs = build(name)
    total, want = profiled_flops(lambda: model(**inputs)[0])
    run = compiled(model, placement="shard")
    first = run(**inputs)[0]
    mine, second = profiled_flops(lambda: run(**inputs)[0])
    close(first, want)
    assert torch.equal(first, second), "not repeatable"
    plan = last_report()
    assert plan is not None and (plan.sharded_sites > 0 or plan.batch == ranks()), str(plan)
    share = mine * ranks() / total
    print(f"{name}: rank {rank()} of {ranks()}: share {share:.3f} of total/{ranks()}, plan says {plan.share:.3f}")
    if ranks() == 4:
        assert share <= 1.10, f"rank {rank()} computes {share:.3f} x total/{ranks()}\n{plan}"


def case_decoder(name: str) -> None:
    """A convolutional decoder equals one-process eager; its FLOPs are divided.

    What is gathered is the output (of groups of ranks, too) and, where attention has a mask, that.
    """
    from diffusers_models import build

    torch._dynamo.reset()
    model, inputs = build(name)
    run = compiled(model, placement="shard")
    first, second = run(**inputs)[0], run(**inputs)[0]
    close(first, model(**inputs)[0])
    assert torch.equal(first, second), "not repeatable"
    plan = last_report()
    assert plan is not None and plan.share <= 1.10, str(plan)
    assert not any(row.flops for row in plan.left_behind), str(plan)
    masks = sum("mask" in row.source for row in plan.gathered)
    assert len(plan.gathered) == 1 + (plan.batch > 1) + masks, str(plan)


def profiled_flops(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Matmul and attention FLOPs that the profiler saw, by the shapes of the kernels that really ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        out = run()
    flops = 0.0
    for event in prof.events():
        shapes = event.input_shapes
        if event.name == "aten::mm":
            flops += 2.0 * shapes[0][0] * shapes[0][1] * shapes[1][1]
        elif event.name == "aten::addmm":
            flops += 2.0 * shapes[1][0] * shapes[1][1] * shapes[2][1]
        elif event.name == "aten::bmm":
            flops += 2.0 * shapes[0][0] * shapes[0][1] * shapes[0][2] * shapes[1][2]
        elif event.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            (batch, heads, rows, dim), columns = shapes[0], shapes[1][2]
            flops += 4.0 * batch * heads * rows * columns * dim
    return flops, out


def case_two_machines(*names: str) -> None:
    """Models on ranks that a real torchrun placed on two machines."""
    from sfcompile.runtime.rank.session import current_session

    for name in names:
        case_meshes() if name == "plain" else case_model(name)
    assert current_session().topology.machine_of == (0, 0, 1, 1)


def case_inductor(folder: str) -> None:
    """The default inner compiler: one rank compiles, another finds what it made; after that, all do."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"], model, x = folder, Plain(), tokens()
    for misses in (1 if rank() == 0 else 0, 0):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        close(torch.compile(model, backend="streamfusion", options={"placement": "shard"})(x), model(x))
        seen = torch._dynamo.utils.counters["inductor"]
        assert (seen["fxgraph_cache_miss"], seen["fxgraph_cache_bypass"]) == (misses, 0), seen


def case_meshes() -> None:
    """Every mesh of these ranks (heads that do not divide too), uneven tokens, many steps, two programs in turn."""
    model = Plain()
    runs = []
    for ulysses in range(1, ranks() + 1):
        if ranks() % ulysses == 0:
            torch._dynamo.reset()
            runs.append(compiled(model, placement="shard", mesh={"ulysses": ulysses, "ring": ranks() // ulysses}))
            close(runs[-1](tokens(37)), model(tokens(37)))
    for step in range(5):
        x = tokens(37) + step
        for run in runs:
            close(run(x), model(x))


def case_schedules() -> None:
    """Every schedule by name, and the batch split, alone and with each."""
    model, x = Plain(), tokens(37)
    want = model(x)
    for schedule in ("torus", "ulysses", "ring", "usp"):
        torch._dynamo.reset()
        close(compiled(model, placement="shard", schedule=schedule)(x), want)
        plan = last_report()
        assert plan is not None and plan.schedule.split()[0] in (schedule, "ring"), str(plan)
    for mesh in ({"batch": 2, "ulysses": ranks() // 2}, {"batch": 2, "ring": ranks() // 2}):
        torch._dynamo.reset()
        run = compiled(model, placement="shard", mesh=mesh)
        for step in range(3):
            close(run(x + step), model(x + step))
        plan = last_report()
        assert plan is not None and plan.batch == 2 and plan.share < 1.2, str(plan)


def case_transport(name: str) -> None:
    """A transport asked for by name, which carries what is asked for; a wire rounds, and the report says how."""
    model, x = Plain(), tokens()
    close(compiled(model, placement="shard", transport=name)(x), model(x))
    for wire, least, most in (("bf16", 1e-5, 4e-3), ({"kv": "fp8", "qo": "bf16"}, 1e-3, 6e-2)):
        torch._dynamo.reset()
        run = compiled(model, placement="shard", transport=name, wire=wire, mesh={"ulysses": ranks()})
        error = float((run(x) - model(x)).abs().max() / model(x).abs().max())
        assert least < error < most, f"rank {rank()}: error {error:.2e} with wire={wire!r}"
        assert torch.equal(run(x), run(x))
        plan = last_report()
        assert plan is not None and plan.wire.endswith("(2 attentions), all else as it is"), str(plan)


def case_options_of_a_second_model() -> None:
    """A later compile may change the timeout, not the transport; one that was refused settles nothing."""
    model, x = Plain(), tokens()
    try:
        compiled(model, transport="nccl")(x)
    except Exception as error:
        assert "with CPU ranks" in str(error), error
    torch._dynamo.reset()
    compiled(model, placement="shard")(x)
    torch._dynamo.reset()
    close(compiled(model, placement="shard", timeout_s=7.0)(x), model(x))
    torch._dynamo.reset()
    try:
        compiled(model, transport="c10d")(x)
    except Exception as error:
        assert "already runs on transport='auto'" in str(error), error
    else:
        raise AssertionError("another transport was taken without a word")
    torch._dynamo.reset()
    close(compiled(model, placement="shard")(x), model(x))


def case_heap() -> None:
    """The heap does not grow with steps or layers, and nothing is left in shared memory while we run."""
    from sfcompile.runtime.rank.session import current_session

    model, x = Plain(), tokens()
    run = compiled(model, placement="shard")
    run(x)
    before = current_session().heap_bytes
    for _ in range(50):
        run(x)
    assert current_session().heap_bytes == before > 0
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("sfcompile-")]


def case_shapes() -> None:
    """Another length compiles anew, on every rank; an old length still works."""
    model = Plain()
    run = compiled(model, placement="shard")
    for count in (50, 31, 50, 64):
        close(run(tokens(count)), model(tokens(count)))


def case_dynamic(name: str) -> None:
    """dynamic=True: several resolutions, exact, each compiled once, with as few traces as Inductor alone."""
    calls: list[dict[str, Any]] = [{"x": tokens(count)} for count in (50, 31, 44)]
    model: nn.Module = Plain()
    if name != "plain":
        from diffusers_models import build

        model, given = build(name)
        sizes = ((16, 20), (24, 16), (12, 28))
        calls = [given | {"hidden_states": tokens(h * w // 8).reshape(2, 4, h, w)} for h, w in sizes]
    traces = {}
    for backend in ("aot_eager", "streamfusion"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        options = {"inner": "eager", "placement": "shard"} if backend == "streamfusion" else None
        before = len(reports())
        run = torch.compile(model, backend=backend, dynamic=True, options=options)
        for kwargs in (*calls, *calls):
            out, want = run(**kwargs), model(**kwargs)
            close(*((out[0], want[0]) if isinstance(out, tuple) else (out, want)))
        traces[backend] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"rank {rank()}: traces {traces}, sharded programs {len(reports()) - before}")
    assert traces["streamfusion"] <= traces["aot_eager"]
    assert len(reports()) - before == 3 * traces["streamfusion"]


def case_own_dit() -> None:
    """A DiT in plain PyTorch, attention by hand and fused; three resolutions in one process with dynamic=True."""
    import clients

    model = clients.plain_dit()
    run = torch.compile(model, backend="streamfusion", dynamic=True, options={"inner": "eager", "placement": "shard"})
    time = torch.tensor([0.2, 0.9])
    for height, width in ((16, 24), (20, 20), (32, 12), (16, 24)):
        x = tokens(height * width // 8).reshape(2, 4, height, width)
        close(run(x, time), model(x, time))
    plans = reports()
    assert len(plans) == 3, "each resolution is compiled once"
    for plan in plans:
        assert plan.sharded_sites == 3 or plan.batch > 1, str(plan)
        assert plan.share <= 1.10, str(plan)


def case_package(path: str) -> None:
    """A loaded package gives the bits of the compile that it stands for, and refuses other shapes on every rank."""
    from sfcompile.errors import InputError
    from sfcompile.package.export import export
    from sfcompile.package.load import load

    model, x = Plain(), tokens(37)
    want = compiled(model, placement="shard", mesh={"ulysses": 2, "ring": 2}, wire={"kv": "fp8"})(x)
    if rank() == 0:
        export(
            model,
            (x,),
            {},
            path,
            topology=f"1x{ranks()}",
            placement="shard",
            inner="eager",
            mesh={"ulysses": 2, "ring": 2},
            wire={"kv": "fp8"},
        )
    torch.distributed.barrier()
    del model
    loaded = load(path)
    for _ in range(3):
        assert torch.equal(loaded(x), want)
    try:
        loaded(tokens(36))
    except InputError as error:
        assert "x must be float32[2, 37, 32], got float32[2, 36, 32]" in str(error), error
    else:
        raise AssertionError("another length was taken")
    assert torch.equal(loaded(x=x), want)


def case_no_attention() -> None:
    """Compiles anyway, with a warning that nothing was sharded."""
    model, x = Plain(attention=False), tokens()
    close(compiled(model)(x), model(x))
    assert any("nothing was sharded" in warning for warning in reports()[0].warnings)


def case_unknown_option() -> None:
    compiled(Plain(), meshh={"ulysses": 2})(tokens())


def case_bad_mesh() -> None:
    compiled(Plain(), mesh={"ulysses": 3, "ring": 5})(tokens())


def case_training() -> None:
    with torch.enable_grad():
        compiled(Plain())(tokens())


def case_other_shapes() -> None:
    compiled(Plain())(tokens(50 if rank() == 0 else 48))


def case_other_shapes_later() -> None:
    """Rank 1 goes on with another length while the others run the old program."""
    run = compiled(Plain(), placement="shard", timeout_s=4.0)
    run(tokens(50))
    run(tokens(50 if rank() != 1 else 48))


def case_other_weights() -> None:
    model = Plain()
    with torch.no_grad():
        model.out[1].bias += rank()
    compiled(model)(tokens())


def case_other_wire() -> None:
    compiled(Plain(), wire="fp8" if rank() == 0 else "bf16")(tokens())


def case_other_noise() -> None:
    """The first call is right; then each rank draws its own."""
    model, x = Plain(), tokens()
    run = compiled(model, placement="shard")
    close(run(x), model(x))
    run(x + rank())


def case_own_inputs_again() -> None:
    """After a call with inputs of each rank's own the next one, with equal inputs, is right without a new compile."""
    model, x = Plain(), tokens()
    run = compiled(model, placement="shard")
    run(x)
    try:
        run(x + rank())
    except RankMismatchError:
        close(run(x), model(x))
        assert len(reports()) == 1
    else:
        raise AssertionError("ranks with other inputs were not told")


def case_groups(transport: str) -> None:
    """Data parallel 2 x sequence parallel 2: both groups at once on inputs of their own, and a model of all beside."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    sample = mesh.get_local_rank("dp")
    group = mesh["sp"].get_group() if sample else mesh["sp"]  # a process group and a mesh may meet: same ranks
    wish = {"transport": transport, "placement": "shard"}  # so small a model is cheaper whole
    ours, everyone = compiled(Plain(), mesh=group, **wish), compiled(Plain(), **wish)
    for step in range(3):
        x = tokens(50 + 10 * sample) * (1 + sample + step)
        close(ours(x), Plain()(x))
    plan = last_report()
    assert plan is not None and plan.num_ranks == 2
    shared = tokens(40)
    close(everyone(shared), Plain()(shared))
    x = tokens(50 + 10 * sample) * 3
    close(ours(x), Plain()(x))
    # One group fails; the other goes on, and so does the first when its ranks call again.
    if sample == 0:
        try:
            ours(x + rank())
            raise AssertionError("other inputs were not noticed")
        except RankMismatchError:
            pass
    for _ in range(2):
        close(ours(x), Plain()(x))
    alone = compiled(Plain(), mesh=mesh["sp"], **wish)
    close(alone(x), Plain()(x))
    dist.barrier()
    dist.destroy_process_group()


def case_not_in_the_group() -> None:
    """A rank that is in no group is told so; the group computes."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group = dist.new_group([0, 2])
    x = tokens()
    if rank() in (0, 2):
        close(compiled(Plain(), mesh=group, placement="shard")(x), Plain()(x))
    else:
        try:
            compiled(Plain(), mesh=group)(x)
            raise AssertionError("no error")
        except Exception as error:
            assert "new_group returns to ranks outside" in str(error), error
    # A mesh of named axes gives the degrees.
    both = dist.init_device_mesh("cpu", (1, 3), mesh_dim_names=("ulysses", "ring"))
    close(compiled(Plain(), mesh=both, placement="shard")(x), Plain()(x))
    plan = last_report()
    assert plan is not None and "ring 3" in str(plan), plan
    dist.barrier()
    dist.destroy_process_group()


def case_autocast() -> None:
    """A region inside forward, and one around the call, then inference mode and back: dtypes and values of eager."""

    class Region(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model, plain, x = Region(), Plain(), tokens()
    run, around = compiled(model, placement="shard"), compiled(plain, placement="shard")
    reference = plain(x)
    limit = 1.2 * float((model(x) - reference).abs().max())  # of single-device attention against fp32
    with torch.inference_mode():
        run(x)
    got = run(x)
    assert got.dtype == model(x).dtype and float((got - reference).abs().max()) <= limit
    with torch.autocast("cpu", torch.bfloat16):
        got, want = around(x), plain(x)
    assert got.dtype == want.dtype and float((got - reference).abs().max()) <= limit


def case_strict() -> None:
    class Mixing(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return torch.linalg.solve(x[0].T @ x[0] + 40 * torch.eye(32), x.transpose(1, 2)).sort(dim=-1).values @ x

    compiled(Mixing(), placement="shard", strict=True, mesh={"ulysses": ranks()})(tokens())


def case_killed() -> None:
    """Rank 1 dies between two steps."""
    run = compiled(Plain(), placement="shard")
    run(tokens())
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    run(tokens())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(rank(), *sys.argv[1:])
    print(f"rank {rank()} passed")
