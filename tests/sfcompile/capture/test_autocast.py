"""Autocast inside and around a model: the captured graph computes what eager does, to the bit, with autocast off."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from autocast_calls import HOLDING, REGISTERED, UNREACHED, differs, reads_values, refused
from helpers import run_sharded
from torch import nn
from torch.nn import functional as F

from sfcompile.capture.graph import Captured, capture
from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import (
    autocast_off,
    autocast_state,
    enter_autocast,
    exit_autocast,
    outside_autocast,
    registered_for_autocast,
)

LOW = torch.bfloat16


_library = torch.library.Library("autocast_tests", "DEF")
_library.define("product(Tensor x, Tensor w, float scale=2.0) -> Tensor")
_library.define("products(Tensor[] xs, Tensor? w) -> (Tensor, Tensor)")
_library.define("add_product(Tensor(a!) x, Tensor w) -> ()")
_library.define("lower(Tensor x, Tensor w) -> Tensor")
"""Ops of a user, without an autocast kernel: the products inside them are cast where autocast is on."""


def _products(xs: list[torch.Tensor], w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.stack(list(xs)) @ xs[0]
    return first.float(), (first if w is None else first @ w).float().argmax(-1)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "product": (lambda x, w, scale=2.0: (x @ w).float() * scale, lambda x, w, scale=2.0: (x @ w).float()),
    "products": (_products, _products),
    "add_product": (lambda x, w: (x.add_((x @ w).float()), None)[1], lambda x, w: None),
    "lower": (lambda x, w: x @ w, lambda x, w: x.new_empty(x.shape)),
}
for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autocast_tests::{_name}", _fake, lib=_library)
mine = torch.ops.autocast_tests


def _written(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x * 1
    mine.add_product(y, w)
    return y


class Blocks(nn.Module):
    """Two attention blocks; ``around`` is what its forward runs under, ``inside`` the second block."""

    def __init__(self, region: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.region = region

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv[i](self.norm(x)).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.region == "island":
            with torch.autocast("cpu", LOW):
                y = self.block(0, x)
            return self.block(1, y.float())
        if self.region == "off inside":
            with torch.autocast("cpu", LOW):
                y = self.block(0, x)
                with torch.autocast("cpu", enabled=False):
                    z = self.block(1, y.float())
                return torch.cat([self.block(1, z), z], -1) @ torch.ones(32, 16)
        with torch.autocast("cpu", LOW):
            return self.block(1, self.block(0, x)).mean(1).float().softmax(-1)


def captured(fn: Callable[..., Any], *args: torch.Tensor) -> Captured:
    graphs: list[Captured] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))

        def run(*full: Any) -> Any:
            with autocast_off():
                return graphs[-1].gm(*(full[i] for i in graphs[-1].tensor_inputs))

        return run

    torch._dynamo.reset()
    want = fn(*args)
    got = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    assert got.dtype == want.dtype and torch.equal(got, want)
    return graphs[0]


REGIONS = ("island", "off inside", "whole")


@pytest.mark.parametrize("region", REGIONS)
@torch.no_grad()
def test_regions_inside_a_model_become_casts(region: str) -> None:
    graph = captured(Blocks(region), torch.randn(2, 12, 16)).gm.graph
    assert not [node for node in graph.nodes if node.target in (enter_autocast, exit_autocast)]
    casts = [node for node in graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert len(casts) == len({(node.args[0], node.kwargs["dtype"]) for node in casts}), "a value is cast twice"


@torch.no_grad()
def test_a_region_around_the_compiled_model() -> None:
    model = Blocks("island")
    with torch.autocast("cpu", LOW):
        captured(lambda x: model.block(1, x) * x.softmax(-1), torch.randn(2, 12, 16))
        assert autocast_state()["cpu"] == (True, LOW)


@torch.no_grad()
def test_a_failing_capture_leaves_autocast_as_it_was() -> None:
    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        add = next(node for node in gm.graph.nodes if node.target is torch.add)
        add.target = lambda *values: (_ for _ in ()).throw(ValueError("broken"))
        capture(gm, inputs)
        return gm.forward

    def model(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", LOW):
            return torch.add(x @ x, x)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="broken"):
        torch.compile(model, backend=backend)(torch.ones(4, 4))
    assert autocast_state()["cpu"][0] is False


INSIDE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "an op of the user's": lambda x, w: mine.product(x, w, 3.0) + 1,
    "with keywords": lambda x, w: mine.product(x, w=w, scale=4.0),
    "of several outputs": lambda x, w: mine.products([x, w], None)[1],
    "of lists": lambda x, w: mine.products([x, w], w)[0],
    "that writes": _written,
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "einsum of three": lambda x, w: torch.einsum("ij,jk,kl->il", x, w, x),
    "einsum with a sum": lambda x, w: torch.einsum("ij,jk->k", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "inner": torch.inner,
    "power": lambda x, w: torch.matrix_power(x, 3),
    "a cell": lambda x, w: torch.gru_cell(x, x, w.repeat(3, 1), w.repeat(3, 1)),
    "nothing to cast": lambda x, w: F.rms_norm(x, (12,), w[0]),
    "an int": lambda x, w: torch.kron(x.long(), w.long()),
    "fp64": lambda x, w: torch.einsum("ij,jk->ik", x.double(), w.double()),
}


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_what_autocast_does_inside_a_call_that_it_does_not_know(name: str) -> None:
    """In eager the calls inside are cast; the graph runs with autocast off and must compute the same."""

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", LOW):
            return INSIDE[name](x, w)

    graph = captured(model, torch.randn(12, 12), torch.randn(12, 12)).gm.graph
    targets = [node.target for node in graph.nodes]
    if name in ("einsum", "einsum of three"):  # still an einsum, which has a rule
        assert torch.ops.aten.einsum.default in targets
    if name in ("nothing to cast", "an int", "fp64"):
        assert torch.ops.streamfusion.opaque.default not in targets


@torch.no_grad()
def test_an_op_that_returns_another_dtype_than_it_says_is_refused() -> None:
    """Its fake implementation says fp32; under autocast it returns bf16. aot_eager computes another thing."""

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", LOW):
            return mine.lower(x, w).float()

    with pytest.raises(UnsupportedError, match="returned .*bfloat16.* captured as returning .*float32"):
        captured(model, torch.randn(4, 4), torch.randn(4, 4))


def _brighter(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, y) + 100


def _of_one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mul(y, y)


def _casting(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.mul(x.to(LOW), y.to(LOW) if isinstance(y, torch.Tensor) else y)


OF_MUL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "a product": lambda x, w: x * w,
    "by a number": lambda x, w: x * 3 - w,
    "inside a call": lambda x, w: F.rms_norm(x, (12,), w[0]) + torch.addcmul(x, x, w),
    "beside torch's own kernels": lambda x, w: (x @ w) * w + F.softmax(x * w, -1),
}


@pytest.mark.parametrize("name", OF_MUL)
@pytest.mark.parametrize("kernel", [_brighter, _of_one, _casting])
@torch.no_grad()
def test_a_kernel_from_outside_for_one_of_torchs_operators(name: str, kernel: Callable[..., torch.Tensor]) -> None:
    """Autocast calls it instead of the operator: casts say what it does only if it does nothing else."""

    def called(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return kernel(x, y)

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", LOW):
            return OF_MUL[name](x, w)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mul.Tensor", called, "AutocastCPU")
    try:
        assert outside_autocast("cpu") and outside_autocast("cpu", torch.ops.aten.mul.Tensor)
        graph = captured(model, torch.randn(12, 12), torch.randn(12, 12)).gm.graph
        targets = [node.target for node in graph.nodes]
        if name == "a product":
            assert (torch.ops.streamfusion.opaque.default in targets) == (kernel is not _casting)
    finally:
        library._destroy()
    assert not outside_autocast("cpu")


@pytest.mark.parametrize("region", REGIONS)
@torch.no_grad()
def test_ranks_get_what_one_process_gets(region: str) -> None:
    """The passes see casts as pointwise ops: attention is sharded inside regions too."""
    model = Blocks(region)
    (report,) = run_sharded(model, [torch.randn(2, 12, 16)], ranks=2)
    assert report.sharded_sites >= 2 and not report.left_behind


def test_every_op_that_torch_registers_for_autocast_has_a_case() -> None:
    registered = {name.removeprefix("aten::").removesuffix(".input") for name in registered_for_autocast("cpu")}
    assert registered <= REGISTERED.keys() | UNREACHED.keys(), registered - REGISTERED.keys() - UNREACHED.keys()


@pytest.mark.parametrize("low", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)], ids=str)
@torch.no_grad()
def test_captured_as_eager_computes_it(low: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of ops that it gives up
        cases = {**REGISTERED, **HOLDING}
        odd = {
            f"{name} of {given}": difference
            for name, case in cases.items()
            for given in (torch.float32, low)
            if (difference := differs(case, given, low))
        }
        assert not odd, odd
        refusals = {name for name, case in cases.items() if refused(case, low) and not reads_values(case)}
        assert refusals == {"pinv"}
