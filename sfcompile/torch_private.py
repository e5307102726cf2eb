"""Everything private that we need of torch (2.11 to 2.15), in one place. Leaf file: of ours it imports the version.

The names of TORCH_LOGS are registered in torch_logs.py, which runs before this file can be imported.

When a new torch moves one of these, this is the only file to mend.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import inspect
import locale
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from sfcompile.version import refuse_ascii, refuse_other_torch

refuse_other_torch(torch.__version__)  # before its private parts are imported, which may be gone
refuse_ascii(locale.getpreferredencoding(False))

from torch._compile import _disable_dynamo
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.distributed import distributed_c10d
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as no_modes
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from torch._dynamo.exc import Unsupported as GraphBreak
    from torch._functorch._aot_autograd.functional_utils import has_data_mutation
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "GraphBreak",
    "HigherOrderOperator",
    "AutocastState",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "TracingContext",
    "aoti_compile",
    "aten_op",
    "aoti_load",
    "as_of_torch",
    "assert_on_device",
    "autocast_as",
    "autocast_off",
    "autocast_state",
    "block_lists_of_gradients",
    "compile_fx",
    "dispatch_functionalize",
    "enter_autocast",
    "exit_autocast",
    "forward_of",
    "functions_transformed",
    "fused_attention",
    "fused_encoder_layer",
    "has_autocast_kernel",
    "has_data_mutation",
    "inductor_keeps",
    "inductor_mode_options",
    "is_comparable",
    "is_composite",
    "is_of_torch",
    "is_plain",
    "is_wrapper",
    "is_refs_tensor",
    "is_static_input",
    "default_store",
    "keep_for_ever",
    "kernel_writes",
    "kernels_of_aten",
    "mark_static_input",
    "make_fx",
    "module_of",
    "no_modes",
    "no_torch_function",
    "not_traced",
    "other_memory",
    "outside_autocast",
    "pad",
    "pad_sequence",
    "plain_storage",
    "profiler_runs",
    "refuse_address",
    "registered_for_autocast",
    "same_storage",
    "set_grad_enabled",
    "storage_users",
    "static_mode",
    "symbol_hint",
    "symbols_in",
    "symmetric_memory",
    "takes_list",
    "tracing",
    "tree_leaves",
    "tree_map",
    "wrapper_tensor",
]

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a class whose ops are torch's own, down to its ``__torch_dispatch__``."""

set_grad_enabled: Any = torch._C._set_grad_enabled
"""What ``torch.enable_grad()`` and ``torch.no_grad()`` are in a Dynamo graph."""

fused_attention: Any = torch._native_multi_head_attention
fused_encoder_layer: Any = torch._transformer_encoder_layer_fwd
"""What ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call at inference."""
pad: Any = torch._C._nn.pad
"""What ``nn.functional.pad`` is in a graph of Dynamo's."""
pad_sequence: Any = torch._C._nn.pad_sequence
"""What ``nn.utils.rnn.pad_sequence`` is in a graph of Dynamo's."""
other_memory: tuple[Any, ...] = (torch.Tensor.set_, torch.ops.aten.set_.source_Tensor) + (
    (torch.ops.aten.shallow_copy_data_, torch.ops.aten.shallow_copy_data_.default)
    if hasattr(torch.ops.aten, "shallow_copy_data_")
    else ()
)
"""What ``tensor.data = other`` may be in a graph of Dynamo's: the last two in torch 2.14 and later."""


# Imported on first use: Dynamo and Inductor take seconds, and a loaded package needs neither.
_LATER = {
    "GraphBreak": ("torch._dynamo.exc", "Unsupported"),
    "has_data_mutation": ("torch._functorch._aot_autograd.functional_utils", "has_data_mutation"),
    "TracingContext": ("torch._guards", "TracingContext"),
    "tracing": ("torch._guards", "tracing"),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx"),
    "FunctionalTensor": ("torch._subclasses.functional_tensor", "FunctionalTensor"),
    "FunctionalTensorMode": ("torch._subclasses.functional_tensor", "FunctionalTensorMode"),
    "dispatch_functionalize": ("torch._subclasses.functional_tensor", "dispatch_functionalize"),
    "make_fx": ("torch.fx.experimental.proxy_tensor", "make_fx"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    return getattr(importlib.import_module(module), attribute)


AutocastState = dict[str, tuple[bool, torch.dtype]]
"""Per type of device, whether autocast is on and to which dtype."""


def autocast_state() -> AutocastState:
    """The autocast state of this thread, on the types of device that ranks run on."""
    devices = ("cpu", "cuda")
    return {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices}


@contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """Autocast as in ``state`` and nowhere else; casts are not kept, so that none outlives its graph."""
    with ExitStack() as stack:
        for device, before in autocast_state().items():
            enabled, dtype = state.get(device, (False, before[1]))
            if enabled or before[0]:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def autocast_off() -> AbstractContextManager[None]:
    """Around graphs that hold the casts of autocast already: with it on they would be done twice."""
    return autocast_as({})


def has_autocast_kernel(op: OpOverload, device: str) -> bool:
    """Whether autocast on a type of device does anything to an op."""
    schema = op._schema
    name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{device.upper()}"))


def outside_autocast(device: str, op: OpOverload | None = None) -> bool:
    """Whether somebody gave an op a kernel of their own for autocast on a type of device; without ``op``, whether one
    of torch's operators has such a kernel."""
    keys = (f"/Autocast{device.upper()}", "/Autocast")
    ours = [name.rpartition("/")[0] for name in torch.library._impls if name.endswith(keys)]
    if op is None:
        return any(name.startswith("aten/") for name in ours)
    if op.namespace not in ("aten", "prims"):
        return has_autocast_kernel(op, device) or op._name.replace("::", "/") in ours
    return op._name.replace("::", "/") in ours


def calls_no_other(op: OpOverload) -> bool:
    """Whether no kernel of an operator of torch calls others: what computes element by element, and views."""
    name = op._name.removesuffix(".default")
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"):
        return False
    return op.is_view or torch.Tag.pointwise in op.tags


def registered_for_autocast(device: str) -> list[str]:
    """Every op to which autocast on a type of device does something, as ``aten::name.overload``."""
    names: list[str] = torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{device.upper()}")
    return names


def is_composite(op: OpOverload) -> bool:
    """Whether an op is written as calls of others, all of which can be seen."""
    return bool(op._can_decompose())


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Stop the stream with ``message`` unless a condition of one element holds; the host does not wait."""
    torch.ops.aten._assert_async.msg(condition, message)


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views of the same memory; fake tensors too."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors lie in the memory that a tensor lies in: itself, and views of it."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # less the storage's own wrapper, of the line above


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a dense one, real or fake, whose class does not give its ops another meaning."""
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and not tensor.is_quantized and (isinstance(tensor, FakeTensor) or not own)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a dense one around others that it can be taken apart into, on this rank alone."""
    local = not type(tensor).__module__.startswith("torch.distributed")
    return local and tensor.layout is torch.strided and is_traceable_wrapper_subclass(tensor)


def aten_op(name: str, args: Any, kwargs: Any) -> OpOverload | None:
    """The op of ATen by its name, in the overload that takes such arguments."""
    if not hasattr(torch.ops.aten, name):
        return None
    try:
        overload = torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs)
    except RuntimeError:
        return None
    op: OpOverload = getattr(getattr(torch.ops.aten, name), overload or "default")
    return op


def is_comparable(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a dense tensor with real data, which can be read; its class may be one of its own, if that
    leaves torch's ops their meaning (:func:`is_plain`)."""
    if not isinstance(value, torch.Tensor):
        return False
    if not is_of_torch(value):
        own = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if own or isinstance(value, UninitializedTensorMixin):
            return False
    return value.layout is torch.strided and value.device.type != "meta"


def is_of_torch(tensor: torch.Tensor) -> bool:
    """Whether its class is no other than torch's: a tensor or a parameter."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def as_of_torch(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without the tensor's own class, which is asked nothing."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo runs and does not look into, whatever is being compiled around it. Imports no Dynamo."""
    wrapped: Callable[..., Any] = _disable_dynamo(function)
    return wrapped


def wrapper_tensor(cls: type[torch.Tensor], shape: Sequence[int], like: torch.Tensor) -> Any:
    """A tensor of a class with a dispatch of its own: contiguous, with the dtype and device of another, and no data: a
    storage of no bytes, so that what is done to that alone reaches none."""
    return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device, storage_size=0)


def plain_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage of a tensor, whatever its class makes of the question."""
    return torch.Tensor.untyped_storage(tensor)


def refuse_address(tensor: torch.Tensor) -> None:
    """From now on who asks for the address of a tensor's memory, below Python too, gets an error of torch's."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def is_static_input(tensor: torch.Tensor) -> bool:
    """Whether an input of a Dynamo graph is a weight or buffer of the model, not an argument of the call."""
    return isinstance(tensor, torch.nn.Parameter) or hasattr(tensor, "_dynamo_static_input_type")


def mark_static_input(tensor: torch.Tensor) -> None:
    """From now on a tensor counts as a weight or buffer (:func:`is_static_input`), as Dynamo marks them."""
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def is_refs_tensor(target: object) -> bool:
    """Whether a target in a Dynamo graph is what ``torch.tensor`` of numbers becomes there."""
    return getattr(target, "__module__", "") == "torch._refs" and getattr(target, "__name__", "") == "tensor"


def symbol_hint(size: Any) -> Any:
    """The present value of a symbolic number, without adding a guard; None if it has none (it depends on data)."""
    node = size.node
    # The ragged length of a nested tensor is one too, of another kind.
    return node.hint if hasattr(node, "has_hint") and node.has_hint() else None


def symbols_in(*sizes: Any) -> set[Any]:
    """The symbols that symbolic numbers are made of; plain numbers have none."""
    symbolic = [size for size in sizes if isinstance(size, (torch.SymInt, torch.SymFloat))]
    return set().union(*(size.node.expr.free_symbols for size in symbolic))


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings, by name, for a ``mode`` of torch.compile such as "max-autotune"."""
    from torch import _inductor

    options: dict[str, Any] = _inductor.list_mode_options(mode)
    return options


def kernels_of_aten() -> str:
    """A mark of the kernels of torch's operators that were registered from Python, torch's own among them."""
    names = sorted(name for name in torch.library._impls if name.startswith("aten/"))
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def static_mode() -> FakeTensorMode:
    """A mode of fake tensors whose sizes are numbers, and whose values nobody may ask for.

    Inductor keeps on disk what it made of a graph only where the mode has a ShapeEnv, were it to say that there are no
    symbols.
    """
    # By name: types of this module would have mypy read torch's symbolic shapes and with them all of sympy.
    shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes")
    env = shapes.ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=env, static_shapes=True)


def inductor_keeps() -> bool:
    """Whether Inductor keeps on disk what it makes of a graph, and looks there first."""
    config = importlib.import_module("torch._inductor.config")
    return bool(config.fx_graph_cache) and not config.force_disable_caches


def takes_list(compiled: Callable[..., Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """What Inductor compiled, as a function of a list of its inputs, which it empties: so none of them outlives its
    last use, as it would in the tuple of a call."""
    inner: Any = compiled
    while inner is not None:
        code = getattr(inner, "__code__", None)
        if code is not None and not code.co_flags & inspect.CO_VARARGS and getattr(inner, "_boxed_call", False):
            return inner  # type: ignore[no-any-return]
        inner = getattr(inner, "__wrapped__", None)

    def run(values: list[Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = compiled(*values)
        return outputs

    return run


def module_of(root: torch.nn.Module, graph: torch.fx.Graph, name: str = "GraphModule") -> torch.fx.GraphModule:
    """A graph as a module whose Python text is written when it is asked for or called: that of a whole model takes
    longer than many a pass, and who compiles a graph reads its nodes."""
    lazy: Any = importlib.import_module("torch.fx._lazy_graph_module")
    module: torch.fx.GraphModule = lazy._LazyGraphModule(root, graph, name)
    return module


def forward_of(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """A graph's own Python function, written by now (:func:`module_of`): calls of it take no detour."""
    lazy: Any = gm
    if hasattr(lazy, "real_recompile"):
        lazy.real_recompile()
    forward: Callable[..., Any] = gm.forward
    return forward


def default_store(prefix: str) -> tuple[Any, Any]:
    """The key-value store of the default process group, and one with a connection of its own, under a prefix.

    The first is to be kept as long as the second is used: it may be the one that serves all ranks.
    """
    kept = distributed_c10d._get_default_store()
    own = kept.clone() if hasattr(kept, "clone") else kept
    return kept, distributed_c10d.PrefixStore(prefix, own)


def symmetric_memory() -> Any:
    """torch's symmetric memory."""
    from torch.distributed import _symmetric_memory as library

    return library


def block_lists_of_gradients() -> frozenset[int]:
    """The places, in the tuple that flex attention takes as its block mask, of what its gradient alone reads."""
    from torch.nn.attention.flex_attention import BlockMask

    names: Any = SimpleNamespace(**{name: name for name in BlockMask.__annotations__})  # each stands for itself
    return frozenset(i for i, e in enumerate(BlockMask.as_tuple(names)) if str(e).startswith(("q_", "full_q_", "dq_")))


def kernel_writes(call: Mapping[str, Any]) -> list[str]:
    """Which of the tensors that a graph's call of a Triton kernel is given it writes to, by name; all where torch
    cannot tell from its code."""
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

    where = call["kernel_idx"], call["constant_args_idx"], call["kwargs"], call["tma_descriptor_metadata"]
    return list(get_mutated_tensors(*where))


def functions_transformed() -> AbstractContextManager[Any]:
    """``vmap`` and its kin work here. Below a ``TorchDispatchMode``, as at the first call of what AOTAutograd compiled,
    the dispatcher leaves out the keys by which they see a call, and kernels would get tensors of theirs."""
    keys, left_out = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.FuncTorchDynamicLayerFrontMode, keys.FuncTorchDynamicLayerBackMode):
        left_out = left_out - torch._C.DispatchKeySet(key)
    included = torch._C._dispatch_tls_local_include_set()
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(included, left_out)
    return guard


def profiler_runs() -> bool:
    """Whether a profiler (or ``emit_nvtx``) records this thread."""
    return bool(torch._C._autograd._profiler_enabled())


def keep_for_ever(*objects: object) -> None:
    """Never destroy these objects and this process's process groups and stores, not at its end either.

    For a process that was forked from a rank: their destructors join threads that only the parent has.
    """
    for group, (_, store) in distributed_c10d._world.pg_map.items():
        objects += (group, store)
    for kept in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def aoti_compile(gm: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], path: Path) -> None:
    """Compile a graph to native code for inputs of these shapes and strides, and write it to ``path`` (.pt2)."""
    from torch import _inductor

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own
        program = torch.export.export(gm, tuple(inputs))
        _inductor.aoti_compile_and_package(program, package_path=str(path))


def aoti_load(path: Path) -> Callable[..., list[torch.Tensor]]:
    """The callable of a file that :func:`aoti_compile` wrote. Its code is native: it runs what the file holds.

    torch's own loader for Python would import Inductor first, for seconds; the one beneath takes flat tensors.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = loader.boxed_run(list(values))
        return outputs

    return run


@contextmanager
def no_logged_traces() -> Iterator[None]:
    """torch logs the frames of what an op raises on tensors without values; whoever catches it says what is wrong."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
