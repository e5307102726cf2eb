"""The private parts of torch that we rely on still do what we rely on."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn

from sfcompile.capture.graph import compile_with_inductor
from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import (
    FakeTensorMode,
    FunctionalTensorMode,
    OpOverload,
    default_store,
    dispatch_functionalize,
    forward_of,
    inductor_mode_options,
    keep_for_ever,
    make_fx,
    module_of,
    not_traced,
    static_mode,
    storage_users,
    takes_list,
)


def test_pre_dispatch_tracing_keeps_attention_whole_and_removes_writes() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x).clone()
        y.add_(1)
        return y

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))
        fake = torch.empty(1, 2, 5, 4)
        gm = make_fx(functional, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(fake)
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, OpOverload) and not target._schema.is_mutable for target in targets)
    assert torch.ops.aten.scaled_dot_product_attention.default in targets


def test_another_torch_is_refused_before_its_private_parts_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("sfcompile.torch_private")
    assert spec is not None and spec.loader is not None
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setitem(sys.modules, "torch._ops", None)
    with pytest.raises(UnsupportedError, match="torch 2.99.0 is installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_modes_are_inductors() -> None:
    assert inductor_mode_options("max-autotune-no-cudagraphs")["max_autotune"] is True


def test_the_default_store_is_shared_under_a_prefix() -> None:
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        default_store("a")[1].set("key", "1")
        assert default_store("a")[1].get("key") == b"1" and not default_store("b")[1].check(["key"])
    finally:
        if own:
            dist.destroy_process_group()


def test_what_is_kept_for_ever_is_not_destroyed() -> None:
    kept, dropped = set[int](), set[int]()
    before = sys.getrefcount(kept), sys.getrefcount(dropped)
    keep_for_ever(kept)
    assert (sys.getrefcount(kept), sys.getrefcount(dropped)) == (before[0] + 1, before[1])


def test_users_of_a_storage_are_the_tensors_that_lie_in_it() -> None:
    tensor = torch.zeros(4, 4)
    assert storage_users(tensor) == 1
    views = [tensor[0], tensor.detach()]
    assert storage_users(tensor) == 3
    views.clear()
    weight = nn.Parameter(torch.zeros(2))
    assert storage_users(tensor) == storage_users(weight) == 1


def test_what_inductor_compiled_takes_a_list_and_empties_it() -> None:
    mode = static_mode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.t.default, (x,)),))
    with mode:
        inputs = [torch.empty(2, 3)]
    compiled = compile_with_inductor(fx.GraphModule({}, graph), inputs, mode, {})
    values = [torch.arange(6.0).view(2, 3)]
    want = values[0].t()
    (got,) = takes_list(compiled)(values)
    assert torch.equal(got, want) and values == []
    assert takes_list(lambda a, b: (b, a))([1, 2]) == (2, 1), "any other function is called as it is"


def test_dynamo_does_not_look_into_what_is_not_traced() -> None:
    seen: list[str] = []

    def backend(gm: fx.GraphModule, inputs: object) -> object:
        seen.extend(node.name for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    @not_traced
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.cos() * 2

    assert torch.compile(lambda x: doubled(x).sin(), backend=backend)(torch.zeros(3)).shape == (3,)
    assert not any("cos" in name for name in seen)


def test_a_graphs_text_is_written_when_it_is_wanted() -> None:
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.add, (graph.placeholder("x"), 1)),))
    plain = torch.fx.GraphModule(torch.nn.Module(), graph)
    module = module_of(torch.nn.Module(), graph)
    assert "_code" not in vars(module), "not yet"
    run = forward_of(module)
    assert run.__code__.co_varnames[:2] == ("self", "x"), "the graph's own function"  # type: ignore[attr-defined]
    assert module.code == plain.code and run(torch.ones(1))[0] == module(torch.ones(1))[0] == 2
    assert forward_of(plain)(torch.ones(1))[0] == 2
