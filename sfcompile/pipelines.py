"""``compile_pipeline(pipe)``: a diffusers pipeline on all ranks, its networks compiled in place.

A pipeline is a box of components. Those that work on tokens are compiled, each with a plan of its own; they share this
process's session, and with it one heap. Schedulers, tokenizers, processors and every other component stay what they
are, and so do the pipeline's own loop and its callbacks.

What is compiled of a component is its innermost ``forward`` (of a VAE ``encode`` and ``decode`` too). Hooks that move
weights to a device and away again are wrapped around it, whether they were installed before or come later: they run as
Python, and the graph between them sees weights where they are.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sfcompile.backend import streamfusion_backend
from sfcompile.errors import OptionError
from sfcompile.options import Options, named_options
from sfcompile.runtime.rank.sharded_value import with_wholes

log = logging.getLogger("sfcompile")
Pipeline = TypeVar("Pipeline")
KINDS = ("transformer", "unet", "controlnet", "vae", "text_encoder")
"""What is compiled by default: components whose names, which diffusers gives, begin so."""
METHODS = ("encode", "decode")
"""What pipelines call of a component instead of its ``forward``, where it has them."""


def compile_pipeline(
    pipe: Pipeline,
    *,
    options: Mapping[str, Any] | None = None,
    components: Mapping[str, Mapping[str, Any] | None] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
) -> Pipeline:
    """Compile the networks of a diffusers pipeline with this backend, in place.

    Call it on every rank with the same pipeline, then call the pipeline on every rank with the same arguments and seed.
    Called again, it compiles anew with the new options.

    Args:
        pipe: a diffusers pipeline, or anything with ``components``: a dict of name -> component.
        options: of the backend, as for ``torch.compile``; they hold for every component.
        components: name -> options of that component alone, beside ``options``; or None: it is left as it is. A
            component that is not compiled by default is compiled if it is named here.
        mode, dynamic: as for ``torch.compile``, which takes no options beside a mode.

    Returns:
        ``pipe``.

    Raises:
        OptionError: unknown options, or a mode beside options; a name in ``components`` that is no network of the
            pipeline; nothing to compile.
    """
    networks = _networks(pipe)
    asked = dict(components or {})
    for name in asked:
        if name not in networks:
            raise OptionError(
                f"components={{{name!r}: ...}} names no network of the {type(pipe).__name__}",
                "only torch modules among its components can be compiled",
                f"name some of {', '.join(networks) or 'its components (it has no network)'}",
            )
    chosen = {
        name: named_options(options) | named_options(asked.get(name))
        for name in networks
        if (asked[name] is not None if name in asked else name.startswith(KINDS))
    }
    if not chosen:
        raise OptionError(
            f"the {type(pipe).__name__} has nothing to compile",
            f"its networks are {', '.join(networks) or 'none'}; compiled are those named {', '.join(KINDS)}...",
            "name others as components={'name': {}}",
        )
    for own in chosen.values():
        mode_or_options(mode, own)
        Options.from_dict(own, mode)  # a mistake is told here, before any component has changed
    for name, own in chosen.items():
        _compile_component(name, networks[name], own, mode, dynamic)
    left = [name for name in networks if name not in chosen]
    log.info("compiled when called: %s%s", ", ".join(chosen), f"; left as they are: {', '.join(left)}" if left else "")
    return pipe


def _networks(pipe: object) -> dict[str, nn.Module]:
    """The components that are torch modules, by name."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise OptionError(
            f"compile_pipeline was given a {type(pipe).__name__}, which has no components",
            "it compiles the networks of a diffusers pipeline",
            'hand in the pipeline, or write torch.compile(model, backend="streamfusion") for a single model',
        )
    return {name: component for name, component in components.items() if isinstance(component, nn.Module)}


def _compile_component(
    name: str, module: nn.Module, options: dict[str, Any], mode: str | None, dynamic: bool | None
) -> None:
    """Compile what pipelines call of a component.

    It becomes an attribute of the object: Python finds it before the class's, hooks find it as any ``forward``.
    """
    compiled = functools.partial(
        torch.compile, backend=streamfusion_backend, options=options or None, mode=mode, dynamic=dynamic
    )
    others = [method for method in METHODS if callable(getattr(module, method, None))]
    for method in others:
        _compile_method(module, module, method, compiled, hooked=True)
    if not others or not name.startswith("vae"):
        _compile_method(module, *innermost_forward(module), compiled)


def _compile_method(
    module: nn.Module,
    owner: Any,
    attribute: str,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    hooked: bool = False,
) -> None:
    """One of them. It returns what is whole also where blocks inside hand on shards (sfcompile/repeated_blocks.py)."""
    method = getattr(owner, attribute)
    wholes = isinstance(method, CompiledMethod) and method.wholes
    setattr(owner, attribute, CompiledMethod(module, as_written(method), compiled, hooked, wholes))


def mode_or_options(mode: str | None, options: Mapping[str, Any] | None) -> None:
    """``torch.compile`` takes one of the two.

    Raises:
        OptionError: both are wanted.
    """
    if mode is not None and options:
        raise OptionError(
            f"mode={mode!r} together with options={dict(options)!r}",
            "torch.compile takes a mode or options, not both",
            "leave one of the two out",
        )


class CompiledMethod:
    """A method of a component, compiled, as an attribute of the component.

    A copy of the component has one of its own, which reads the copy's weights; what is pickled is the method as its
    author wrote it.

    Args:
        method: bound to the module.
        compile: what makes the compiled function of it.
        hooked: it is not ``forward``: a hook that accelerate installed goes first, as diffusers has it.
        wholes: what it returns is whole, also where values go from block to block in shards.
    """

    def __init__(
        self,
        module: nn.Module,
        method: Callable[..., Any],
        compile: Callable[[Callable[..., Any]], Callable[..., Any]],
        hooked: bool = False,
        wholes: bool = False,
    ) -> None:
        functools.update_wrapper(self, method)
        self.wholes = wholes
        self._sfcompile_as_written = method
        self._module, self._compile, self._hooked = module, compile, hooked
        self._compiled = compile(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self._module, "_hf_hook", None) if self._hooked else None
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self._module)
        result = self._compiled(*args, **kwargs)
        return with_wholes(result) if self.wholes else result

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledMethod:
        module, method = copy.deepcopy((self._module, self._sfcompile_as_written), memo)
        return CompiledMethod(module, method, self._compile, self._hooked, self.wholes)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._sfcompile_as_written.__name__)


def innermost_forward(module: nn.Module) -> tuple[Any, str]:
    """The object and its attribute that hold a component's own ``forward``, under whatever hooks were installed."""
    if "_old_forward" in module.__dict__:  # accelerate's
        return module, "_old_forward"
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", None)
    if references:  # diffusers' own; one that replaces forward keeps it beside
        return references[0], "forward" if references[0].original_forward is None else "original_forward"
    return module, "forward"


def as_written(method: Any) -> Any:
    """A method as its author wrote it: not compiled, and without what diffusers puts around it to call a hook."""
    method = getattr(method, "_sfcompile_as_written", method)
    method = getattr(method, "_torchdynamo_orig_callable", method)
    function = getattr(method, "__func__", None)
    if function is not None and function.__code__.co_freevars == ("method",):  # diffusers' apply_forward_hook
        method = function.__wrapped__.__get__(getattr(method, "__self__", None))
    return method
