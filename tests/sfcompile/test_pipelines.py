"""One call compiles a pipeline's networks; hooks go on working, the rest is left as it is. On ranks: tests/e2e."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import sfcompile
from sfcompile.errors import OptionError
from sfcompile.pipelines import CompiledMethod

OPTIONS = {"inner": "eager"}


class Coder(nn.Module):
    """Has no forward that a pipeline calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sin()

    def with_hook(method: Any) -> Any:  # noqa: N805  # as diffusers decorates it where accelerate is installed
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(self, "_hf_hook") and hasattr(self._hf_hook, "pre_forward"):
                self._hf_hook.pre_forward(self)
            return method(self, *args, **kwargs)

        return wrapper

    decode = with_hook(_decode)


class Pipe:
    """What is asked of a pipeline."""

    def __init__(self, **others: Any) -> None:
        torch.manual_seed(0)
        networks = {"transformer": nn.Linear(8, 8), "transformer_2": nn.Linear(8, 8), "vae": Coder()}
        self.components = {**networks, "scheduler": object(), "safety_checker": nn.Linear(8, 8), **others}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.components
        return parts["vae"].decode(parts["transformer_2"](parts["transformer"](parts["vae"].encode(x))))


def is_compiled(method: Any) -> bool:
    return isinstance(method, CompiledMethod)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def test_networks_are_compiled_in_place_and_nothing_else() -> None:
    pipe, x = Pipe(), torch.randn(3, 8)
    want = pipe(x)
    before = dict(pipe.components)
    assert sfcompile.compile_pipeline(pipe, options=OPTIONS) is pipe
    assert pipe.components == before, "the same objects"
    parts = pipe.components
    assert is_compiled(parts["transformer"].forward) and is_compiled(parts["transformer_2"].forward)
    assert is_compiled(parts["vae"].encode) and is_compiled(parts["vae"].decode)
    assert not is_compiled(parts["vae"].forward) and not is_compiled(parts["safety_checker"].forward)
    assert torch.equal(pipe(x), want)


def test_components_have_options_of_their_own_or_are_left() -> None:
    pipe = Pipe()
    components: dict[str, Any] = {"vae": None, "transformer_2": {"timeout_s": 5.0}, "safety_checker": {}}
    sfcompile.compile_pipeline(pipe, options=OPTIONS, components=components)
    assert not is_compiled(pipe.components["vae"].decode)
    assert is_compiled(pipe.components["safety_checker"].forward)


class Recorder(ModelHook):
    """A hook of diffusers', which notes when it is called and whether it was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, bool]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.said.append(("before", torch.compiler.is_compiling()))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.said.append(("after", torch.compiler.is_compiling()))
        return output


@pytest.mark.parametrize("first", ["hook", "compile"])
def test_hooks_of_diffusers_run_as_python_around_the_graph(first: str) -> None:
    pipe, x, hook = Pipe(), torch.randn(3, 8), Recorder()
    want = pipe(x)
    network = pipe.components["transformer"]
    steps = [
        lambda: HookRegistry.check_if_exists_or_initialize(network).register_hook(hook, "recorder"),
        lambda: sfcompile.compile_pipeline(pipe, options=OPTIONS),
    ]
    for step in steps if first == "hook" else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(pipe(x), want)
    assert hook.said == [("before", False), ("after", False)] * 2


class Offload:
    """What accelerate's hooks are asked for."""

    def __init__(self) -> None:
        self.traced: list[bool] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.traced.append(torch.compiler.is_compiling())
        return args, kwargs


def install(module: Any, hook: Offload) -> None:
    """As accelerate does it: the old forward is kept beside a new one."""
    module._hf_hook, module._old_forward = hook, module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(forward, module._old_forward)


@pytest.mark.parametrize("first", ["hook", "compile"])
def test_hooks_of_accelerate_run_as_python_before_the_graph(first: str) -> None:
    pipe, x = Pipe(), torch.randn(3, 8)
    want = pipe(x)
    hooks = {name: Offload() for name in ("transformer", "vae")}
    steps = [
        lambda: [install(pipe.components[name], hook) for name, hook in hooks.items()],
        lambda: sfcompile.compile_pipeline(pipe, options=OPTIONS),
    ]
    for step in steps if first == "hook" else reversed(steps):
        step()
    assert torch.equal(pipe(x), want)
    assert hooks["transformer"].traced == [False]
    assert hooks["vae"].traced == [False, False], "once for encode, once for decode"


def test_compiled_again_it_has_the_new_options_only() -> None:
    pipe, x = Pipe(), torch.randn(3, 8)
    want = pipe(x)
    for options in ({"inner": "eager"}, {"inner": "eager", "placement": "shard"}):
        sfcompile.compile_pipeline(pipe, options=options)
        assert torch.equal(pipe(x), want)
    written = pipe.components["transformer"].forward._sfcompile_as_written
    assert written.__func__ is nn.Linear.forward
    assert pipe.components["vae"].decode._sfcompile_as_written.__func__ is Coder._decode


def test_copies_have_their_own_weights() -> None:
    """A copy's method was the first one's, and drew with its weights; a pickled one is as it was written."""
    pipe, x = Pipe(), torch.randn(3, 8)
    sfcompile.compile_pipeline(pipe, options=OPTIONS)
    want = pipe(x)
    copied = copy.deepcopy(pipe)
    for name in ("transformer", "vae"):
        for parameter in copied.components[name].parameters():
            parameter.mul_(0.5)
    plain = Pipe()
    for name in ("transformer", "vae"):
        for parameter in plain.components[name].parameters():
            parameter.mul_(0.5)
    assert is_compiled(copied.components["vae"].decode)
    assert torch.equal(copied(x), plain(x)) and torch.equal(pipe(x), want)
    network = pickle.loads(pickle.dumps(pipe.components["transformer"]))
    assert not is_compiled(network.forward) and torch.equal(network(x), Pipe().components["transformer"](x))


def test_a_network_that_has_a_decoder_beside_its_forward_is_compiled_too() -> None:
    network = Coder()
    network.forward = nn.Linear(8, 8).forward  # type: ignore[method-assign]
    pipe = Pipe(text_encoder=network)
    sfcompile.compile_pipeline(pipe, options=OPTIONS)
    assert is_compiled(network.forward) and is_compiled(network.decode)


@pytest.mark.parametrize(
    ("pipe", "arguments", "text"),
    [
        (Pipe(), {"components": {"unet": {}}}, "names no network of the Pipe.*transformer, transformer_2, vae"),
        (Pipe(), {"components": {"scheduler": {}}}, "names no network"),
        (Pipe(), {"options": {"meshh": 1}}, "Did you mean 'mesh'"),
        (Pipe(), {"components": {"vae": {"wire": "int4"}}}, "Bad value for option 'wire'"),
        (nn.Linear(8, 8), {}, "a Linear, which has no components"),
        (Pipe(), {"components": {"transformer": None, "transformer_2": None, "vae": None}}, "nothing to compile"),
    ],
)
def test_what_cannot_be_compiled_is_told_before_anything_has_changed(pipe: Any, arguments: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        sfcompile.compile_pipeline(pipe, **arguments)
    if isinstance(pipe, Pipe):
        assert not any(is_compiled(pipe.components[name].forward) for name in ("transformer", "transformer_2"))
