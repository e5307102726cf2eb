"""What goes wrong in a compile: other options and versions on some ranks, no memory, two compiles at once."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from model_cases import Plain, tokens

from torture.faults.out_of_step import another, raising
from torture.rank import Injected, Rank
from torture.table import fault

PASSES = "sfcompile.backend:run_passes"
CAPTURE = "sfcompile.backend:capture"


@fault("an error on both", name="another_mesh_on_one_rank", args=("mesh", {"ulysses": 2}, {"ring": 2}), quick=True)
@fault("an error on both", name="another_timeout_on_one_rank", args=("timeout_s", 4.0, 5.0))
@fault("an error on both", name="inputs_trusted_on_one_rank", args=("inputs", "checked", "trusted"))
@fault("an error on both", name="another_placement_on_one_rank", args=("placement", "shard", "auto"))
@fault("an error on both", name="another_transport_on_one_rank", args=("transport", "auto", "c10d"))
@fault("an error on both", name="no_such_option_on_one_rank", args=("mesh", None, {"ulysses": 7}))
@fault("an error on both", name="no_such_value_on_one_rank", args=("schedule", "auto", "spiral"))
def another_option_on_one_rank(rank: Rank, option: str, first: Any, second: Any) -> None:
    """Rank 1 is given another option than rank 0."""
    model = Plain()
    run = rank.compiled(model, **{option: second if rank.number == 1 else first})
    rank.call("first", run, model, must="error")


@fault("an error on both, then the old model exact")
def a_wrong_option_in_a_later_compile(rank: Rank) -> None:
    """A second model is given another transport; the first one goes on."""
    run, model = rank.warm()
    second = another()
    rank.call("second model", rank.compiled(second, transport="c10d"), second, must="error")
    rank.call("old model", run, model)


@fault("an error on both, then the old model exact")
def a_wrong_option_later_on_one_rank(rank: Rank) -> None:
    """Only rank 1 gives the second model another transport."""
    run, model = rank.warm()
    second = another()
    options = {"transport": "c10d"} if rank.number == 1 else {}
    rank.call("second model", rank.compiled(second, **options), second, must="error")
    rank.recovers(run, model)


@fault("an OptionError or exact, at once", name="a_timeout_of_1e300", args=(1e300,))
@fault("an OptionError or exact, at once", name="a_timeout_of_nan", args=(float("nan"),))
@fault("an OptionError or exact, at once", name="a_timeout_of_1e9", args=(1e9,))
@fault("an OptionError or exact, at once", name="a_timeout_below_zero", args=(-1.0,))
@fault("an error on both", name="a_timeout_of_a_nanosecond", args=(1e-9,))
def an_odd_timeout(rank: Rank, seconds: float) -> None:
    """``timeout_s`` of another order than anyone needs."""
    model = Plain()
    rank.call("first", rank.compiled(model, timeout_s=seconds), model, must="either")


@fault("an error on both")
def another_version_on_one_rank(rank: Rank) -> None:
    """Rank 1 runs another release of sfcompile."""
    import sfcompile
    import sfcompile.version

    if rank.number == 1:
        sfcompile.version.__version__ = "0.0.9"
        for module in [m for name, m in sys.modules.items() if name.startswith("sfcompile")]:
            if "__version__" in vars(module):
                module.__version__ = "0.0.9"  # type: ignore[attr-defined]
    model = Plain()
    rank.call("first", rank.compiled(model), model, must="error")


@fault("the user's error on one, ours on the others; then exact", ranks=3)
def a_foreign_exception_in_a_capture(rank: Rank) -> None:
    """What captures the graph raises on rank 1 what nobody thought of."""
    run, model = rank.warm()
    second = another()
    if rank.number == 1:
        rank.before(CAPTURE, raising(Injected("in a capture")))
    rank.call("compile", rank.compiled(second), second, must="error", own=(Injected,))
    rank.recovers(run, model)


@fault("the user's error on one, ours on the others; then exact", ranks=3)
def a_foreign_exception_in_a_pass(rank: Rank) -> None:
    """A pass raises on rank 1 what nobody thought of."""
    run, model = rank.warm()
    second = another()
    if rank.number == 1:
        rank.before(PASSES, raising(Injected("in a pass")))
    rank.call("compile", rank.compiled(second), second, must="error", own=(Injected,))
    rank.recovers(run, model)


@fault("a foreign error on one, ours on the other")
def no_memory_for_a_capture(rank: Rank) -> None:
    """Rank 1 may take no more memory when it compiles."""
    model = Plain()

    def starve() -> None:
        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken, resource.RLIM_INFINITY))
        hoard = []
        while True:  # what the allocators still have at hand
            hoard.append(bytearray(1 << 16))

    if rank.number == 1:
        rank.before(CAPTURE, starve)
    own = (MemoryError, RuntimeError, OSError) if rank.number == 1 else ()
    rank.call("starved", rank.compiled(model), model, must="error", own=own)
    if rank.number == 1:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@fault("exact: a slow compile is waited for", timeout_s=3.0)
def a_compile_slower_than_the_timeout(rank: Rank) -> None:
    """Rank 1 works on its graph for longer than ``timeout_s``."""
    if rank.number == 1:
        rank.before("sfcompile.lowering.compile_once:run_inner", lambda: time.sleep(2 * rank.timeout_s))
    model = Plain()
    rank.call("first", rank.compiled(model), model)


@fault("an error on the others soon after the kill", ranks=3, timeout_s=4.0)
def killed_while_others_wait_in_a_compile(rank: Rank) -> None:
    """Rank 1 is killed in the middle of a long compile."""
    if rank.number == 1:

        def work() -> None:
            time.sleep(2.0)
            rank.die()

        rank.before("sfcompile.lowering.compile_once:run_inner", work)
    model = Plain()
    rank.call("first", rank.compiled(model), model, must="error")


@fault("an error on every rank")
def a_topology_of_other_ranks(rank: Rank) -> None:
    """The topology names four ranks; two run."""
    model = Plain()
    rank.call("first", rank.compiled(model, topology="2x2"), model, must="error")


@fault("an error on every rank")
def another_topology_on_one_rank(rank: Rank) -> None:
    """Rank 1 believes it sits on a machine of its own."""
    model = Plain()
    rank.call("first", rank.compiled(model, topology="2x1" if rank.number == 1 else "1x2"), model, must="error")


@fault("an error on every rank")
def a_topology_file_missing_on_one_rank(rank: Rank) -> None:
    """Rank 1 has no cluster.toml."""
    from sfcompile.runtime.program.topology import Topology

    here = rank.folder / "cluster.toml"
    if rank.number == 0:
        here.write_text(Topology((0, 0)).to_toml())
    rank.meet("written")
    model = Plain()
    path = str(here) if rank.number == 0 else str(rank.folder / "none.toml")
    rank.call("first", rank.compiled(model, topology=path), model, must="error")
    rank.meet("read")
    here.unlink(missing_ok=True)


@fault("exact")
def autocast_inside_and_out(rank: Rank) -> None:
    """Casts inside ``forward``; compared in fp32's tolerance with a region that changes nothing, and by dtype."""

    class Region(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                inside = super().forward(x)
            return inside.float()

    model, x = Region(), tokens()
    run = rank.compiled(model)
    reference = Plain()(x)
    limit = 1.2 * float((model(x) - reference).abs().max())
    got = rank.attempt("region", lambda: run(x))
    error = float("inf") if got is None else float((got - reference).abs().max())
    rank.check("error of the casts", error <= limit, f"{error:.1e} against {limit:.1e}")


@fault("exact: what is differentiated is computed whole on every rank")
def derivatives_inside(rank: Rank) -> None:
    """The model turns gradients on under the caller's no_grad() and returns what its loss wants of the tokens."""

    class Guided(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                y = x.detach().requires_grad_(True)
                (guide,) = torch.autograd.grad(self.inner(y).square().sum(), y)
            return guide

    model = Guided()
    rank.call("guide", rank.compiled(model), model)
