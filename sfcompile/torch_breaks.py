"""What Dynamo does while it traces for us: the private part of torch that sfcompile/capture/fewer_breaks.py needs.

With torch_private.py the only file that touches what torch does not promise.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from sfcompile.errors import InternalError, StreamFusionError
from sfcompile.torch_private import other_memory

FOLDED_NUMEL = 4096
"""Tensors of at most so many elements are computed while they are traced, where everything they are made of is known.
They are lengths, sizes of grids, tables of offsets. Dynamo's own bound is one element."""
COLLECT_EVERY = 100_000
"""While Dynamo traces for us and the graph is compiled, Python looks for cycles of garbage when so many more objects
live, and not after its own few hundred: nearly all that is new lives until the end, and is gone through each time for
nothing."""
LOGGER_METHODS = frozenset({"debug", "info", "warning", "error", "critical", "warning_once"})
"""Methods of loggers that write a record and give nothing back."""

SkippedFrame = Callable[[CodeType, str], None]
"""Is told of a function that Dynamo leaves to Python, and why."""

Returned = Callable[[Mapping[str, Any]], Callable[[Any], Any] | None]
"""From a backend's options: what is done to the result of a function that was compiled with them; None: nothing."""

Refused = Callable[[Mapping[str, Any], CodeType, str], None]
"""From a backend's options: raises where a function must not run as Python, and all that it calls with it, for a
reason."""

Programs = Callable[[Mapping[str, Any]], int]
"""From a backend's options: so many programs a function may have at least before Dynamo leaves it to Python."""


class _Marked(NamedTuple):
    """What is done for a marked backend; see :func:`trace_with_fewer_breaks`."""

    skipped: SkippedFrame
    returned: Returned
    programs: Programs
    refused: Refused


_traced_with_fewer_breaks: weakref.WeakKeyDictionary[Callable[..., Any], _Marked] = weakref.WeakKeyDictionary()


def _nothing(options: Mapping[str, Any]) -> None:
    """Results stay what they are."""


class KeptWhole(NamedTuple):
    """Python functions whose calls a trace shall not enter (sfcompile/capture/library_functions.py).

    Attributes:
        knows: whether a function may be one.
        as_op: from a function, its arguments and its keyword arguments (tensors and constants) to an op and what that
            takes in place of the call: tensors of the call's, in a list, and a text; None: the call is traced.
    """

    knows: Callable[[Any], bool]
    as_op: Callable[[Any, list[Any], Mapping[str, Any]], tuple[Any, list[Any], str] | None]


_kept = [KeptWhole(lambda function: False, lambda function, args, kwargs: None)]


def keep_whole(functions: KeptWhole) -> None:
    """From now on calls of such functions, traced for a marked backend, stand in its graphs as ops."""
    _kept[0] = functions


def _as_set(options: Mapping[str, Any]) -> int:
    """Programs up to Dynamo's own limit."""
    return 0


def _let(options: Mapping[str, Any], code: CodeType, reason: str) -> None:
    """Python may run it."""


def trace_with_fewer_breaks(
    backend: Callable[..., Any],
    skipped: SkippedFrame,
    returned: Returned = _nothing,
    programs: Programs = _as_set,
    refused: Refused = _let,
) -> None:
    """From now on, what Dynamo traces for ``backend`` breaks in fewer places (sfcompile/capture/fewer_breaks.py).

    Dynamo has no settings of one backend, so its entry is wrapped, once for a process: settings are changed while a
    frame is traced for a marked backend and put back after it. Dynamo traces one frame at a time, under a lock.

    An error of ours comes out as it is, and not inside torch's `BackendCompilerFailed`, whose own advice would stand
    below it. `TORCHDYNAMO_VERBOSE=1` shows that one, with all frames, as do mistakes of ours.

    Args:
        skipped: is told of functions in which Dynamo finds a break that it cannot continue after: it runs them as
            Python, and what they call is traced by itself.
        returned: says what goes over the results of compiled functions.
        programs: says how many programs a function may have at least.
        refused: is asked where a function and all that it calls is about to run as Python: its programs are too many,
            tensors of a class of their own come to it, or a mode stands around it that sees every op.
    """
    from torch._dynamo import config
    from torch._dynamo.convert_frame import CatchErrorsWrapper, ConvertFrameAssert
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    _traced_with_fewer_breaks[backend] = _Marked(skipped, returned, programs, refused)
    convert: Any = ConvertFrameAssert.__call__
    catch: Any = CatchErrorsWrapper.__call__
    if hasattr(convert, "__wrapped__"):
        return

    @functools.wraps(convert)
    def convert_frame(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        marked = _marked(self._torchdynamo_orig_backend)
        if marked is None:
            return convert(self, frame, *args, **kwargs)
        try:
            options = _options(self._torchdynamo_orig_backend)
            more = config.patch(recompile_limit=max(config.recompile_limit, marked.programs(options)))
            with _fewer_breaks(), _fewer_collections(), _going_over(marked.returned(options)), more:
                return convert(self, frame, *args, **kwargs)
        except Unsupported as error:
            stack = getattr(error, "real_stack", None)
            place = f" at {stack[-1].filename}:{stack[-1].lineno}" if stack else ""
            reason = f"{str(error).strip().splitlines()[0]}{place}"
            marked.skipped(frame.f_code, reason)
            if getattr(error, "frame_exec_strategy", None) is not None or _odd_tensors(frame):
                marked.refused(options, frame.f_code, reason)
            raise
        except BackendCompilerFailed as error:
            ours = error.inner_exception
            if config.verbose or not isinstance(ours, StreamFusionError) or isinstance(ours, InternalError):
                raise
            raise ours.with_traceback(None) from None  # what is wrong is the user's: no frame of ours says more

    @functools.wraps(catch)
    def catch_errors(self: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        result = catch(self, frame, *args, **kwargs)
        reason = getattr(result, "skip_reason", None) or ""
        if "dispatch mode" in reason:
            backend = getattr(self._torchdynamo_orig_backend, "_torchdynamo_orig_backend", None)
            marked = _marked(backend)
            if marked is not None:
                marked.refused(_options(backend), frame.f_code, reason)
        return result

    ConvertFrameAssert.__call__ = convert_frame  # type: ignore[method-assign]
    CatchErrorsWrapper.__call__ = catch_errors  # type: ignore[method-assign]


def _marked(backend: Any) -> _Marked | None:
    """What is done for a backend, under Dynamo's wrappers. By identity: not every backend can be hashed, Inductor's own
    cannot."""
    backend = _innermost(backend)
    return next((marked for other, marked in list(_traced_with_fewer_breaks.items()) if other is backend), None)


def _odd_tensors(frame: Any) -> bool:
    """Whether tensors of a class of their own come to a function."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    came = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    own = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return any(isinstance(value, torch.Tensor) and type(value) not in own for value in tree_leaves(came))


def _innermost(backend: Any) -> Any:
    """The function that was given to ``torch.compile`` as a backend, or named there, under Dynamo's wrappers."""
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        backend = getattr(backend, name, backend)
    return backend


def _options(backend: Any) -> Mapping[str, Any]:
    """The options that were given to ``torch.compile`` with a backend."""
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        kwargs = getattr(backend, "kwargs", {})
        options = kwargs.get("options") if isinstance(kwargs, Mapping) else None
        if options and isinstance(options, Mapping):
            return options
        backend = getattr(backend, name, backend)
    return {}


@contextmanager
def _going_over(result: Callable[[Any], Any] | None) -> Iterator[None]:
    """While Dynamo compiles a function: what the function returns goes through ``result`` first.

    A value may come from the first of its graphs and be returned by Python behind the last one: no graph returns it.
    """
    if result is None:
        yield
        return
    from torch._dynamo.bytecode_transformation import (
        add_push_null,
        create_call_function,
        create_instruction,
        create_rot_n,
        overwrite_instruction,
        transform_code_object,
    )
    from torch._dynamo.convert_frame import register_bytecode_hook

    def through(instructions: list[Any], options: dict[str, Any]) -> None:
        for place in reversed(range(len(instructions))):
            if instructions[place].opname == "RETURN_VALUE":
                function = add_push_null(create_instruction("LOAD_CONST", argval=result))
                below = [step for _ in function for step in create_rot_n(len(function) + 1)]
                call = [*function, *below, *create_call_function(1, False), create_instruction("RETURN_VALUE")]
                instructions[place : place + 1] = overwrite_instruction(instructions[place], call)  # jumps stay good

    def hook(code: CodeType, new_code: CodeType) -> CodeType:
        # Dynamo keeps instructions by code, and code has no hash where a constant has none (Dynamo's own dicts).
        constants, held = list(new_code.co_consts), dict[object, Any]()
        for place, constant in enumerate(constants):
            try:
                hash(constant)
            except TypeError:
                constants[place] = stands_for = object()
                held[stands_for] = constant
        changed: Any = transform_code_object(new_code.replace(co_consts=tuple(constants)), through)
        changed = changed[0] if isinstance(changed, tuple) else changed
        through_it: CodeType = changed.replace(co_consts=tuple(held.get(c, c) for c in changed.co_consts))
        return through_it

    handle = register_bytecode_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _fewer_breaks() -> Iterator[None]:
    """While Dynamo traces: numbers read from tensors of known values are constants; records are written later."""
    from torch._dynamo import config
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._dynamo.variables.misc import DebuggingVariable, LoggingLoggerVariable
    from torch._dynamo.variables.tensor import NumpyNdarrayVariable, TensorVariable
    from torch._subclasses import fake_tensor

    mode = fake_tensor.FakeTensorMode
    later = {*config.reorderable_logging_functions, print, warnings.warn}
    changed = (
        (fake_tensor, "CONSTANT_NUMEL_LIMIT", FOLDED_NUMEL),
        (mode, "_cached_dispatch_impl", _not_from_cache(mode._cached_dispatch_impl)),
        (TensorVariable, "method_item", _item_of(TensorVariable.method_item)),
        *_item_tables(TensorVariable),
        (NumpyNdarrayVariable, "call_method", _array_item_of(NumpyNdarrayVariable.call_method)),
        (DebuggingVariable, "call_function", _written_later(DebuggingVariable.call_function)),
        (LoggingLoggerVariable, "call_method", _logged_later(LoggingLoggerVariable.call_method)),
        (UserFunctionVariable, "call_function", _kept_whole(UserFunctionVariable.call_function)),
        *_no_names_for_logs(),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    with config.patch(reorderable_logging_functions=later):
        try:
            for owner, name, value in changed:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


@contextmanager
def _fewer_collections() -> Iterator[None]:
    """While Dynamo traces: Python's collector of cycles runs as seldom as :data:`COLLECT_EVERY` says, where it runs."""
    first, *others = before = gc.get_threshold()
    ours = (max(first, COLLECT_EVERY) if first else 0, *others)
    gc.set_threshold(*ours)
    try:
        yield
    finally:
        if gc.get_threshold() == ours:  # else somebody has set it meanwhile
            gc.set_threshold(*before)


def _no_names_for_logs() -> Iterator[tuple[Any, str, Any]]:
    """For the text of a log Dynamo looks up in which function a line stands, and takes every source file of the model
    apart for that, whether the log is written or not: not done where it is not written."""
    from torch._dynamo import output_graph, symbolic_convert

    logs = (getattr(module, name, None) for module, name in ((output_graph, "trace_call_log"),
                                                             (symbolic_convert, "trace_source_log")))  # fmt: skip
    if hasattr(symbolic_convert, "get_funcname") and not any(log and log.isEnabledFor(logging.DEBUG) for log in logs):
        yield symbolic_convert, "get_funcname", lambda filename, lineno: None


def _not_from_cache(dispatch: Any) -> Any:
    """An op on fake tensors, computed each time if it gives one of them other memory.

    Such an op changes the sizes of its operand. The cache of torch 2.14 takes ``shallow_copy_data_`` for one that does
    not: of two weights of the same sizes the second would keep those it had.
    """

    def cached_dispatch(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in other_memory:
            return self._dispatch_impl(func, types, args, kwargs)
        return dispatch(self, func, types, args, kwargs)

    return cached_dispatch


def _item_of(method: Any) -> Any:
    """``Tensor.item`` in a trace: the number, where it is known."""

    def item(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        known = None if args or kwargs else _known_number(self)
        return method(self, tx, *args, **kwargs) if known is None else known

    return item


def _item_tables(variable: Any) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """The tables of methods, where Dynamo has them (from torch 2.15 on), in which ``item`` of a tensor is looked up and
    not on the class: with ours in its place. Classes derived from a tensor's may have tables of their own."""
    for owner in (variable, *variable.__subclasses__()):
        table = vars(owner).get("tp_methods", {})
        if "item" in table:
            entry = dataclasses.replace(table["item"], handler=_item_of(table["item"].handler))
            yield owner, "tp_methods", {**table, "item": entry}


def _array_item_of(method: Any) -> Any:
    """``ndarray.item``, which ``int()`` and ``float()`` of an array call too: Dynamo traces arrays as tensors."""

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        known = _known_number(self) if name == "item" and not args and not kwargs else None
        return method(self, tx, name, args, kwargs) if known is None else known

    return call_method


def _known_number(variable: Any) -> Any:
    """Dynamo's constant for the only element of a traced tensor; None if it is not known."""
    from torch._dynamo.variables.constant import ConstantVariable

    value = getattr(variable.as_proxy().node.meta.get("example_value"), "constant", None)
    return ConstantVariable.create(value.item()) if value is not None and value.numel() == 1 else None


def _written_later(method: Any) -> Any:
    """A call of ``print`` or ``warnings.warn`` in a trace, done when the graph has run.

    Dynamo's own way forgets keywords, and what a function called from the traced one says.
    """
    from torch._dynamo.variables.constant import ConstantVariable

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        # Where a warning points to is the traced frame in any case.
        kwargs = {name: value for name, value in kwargs.items() if name != "stacklevel"}
        args = list(args)
        if self.value is warnings.warn:
            args = args[:2] + ([kwargs.pop("category")] if "category" in kwargs else [])
        others = [arg for arg in args if not arg.is_python_constant()]
        if kwargs or tx.export or not _can_wait(self, others):
            return method(self, tx, args, kwargs)
        tx.output.root_tx.debug_locals.append((self, args))
        return ConstantVariable.create(None)

    return call_function


def _can_wait(variable: Any, args: list[Any]) -> bool:
    """Whether Dynamo can keep such arguments of a call until the graph has run."""
    asked: tuple[Any, ...] = (args, {})
    if len(inspect.signature(variable.can_reorder_logs).parameters) > len(asked):
        asked = (variable.value, *asked)  # up to torch 2.14, which does not look at it
    return bool(variable.can_reorder_logs(*asked))


def _logged_later(method: Any) -> Any:
    """A record of a logger in a trace, written when the graph has run."""
    from torch._dynamo import config
    from torch._dynamo.source import AttrSource
    from torch._dynamo.variables.misc import DebuggingVariable

    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        write = getattr(self.value, name, None)
        ignored = {
            write,
            getattr(write, "__func__", None),
        } & config.ignore_logger_methods  # the name that torch 2.11 has too
        if name not in LOGGER_METHODS or write is None or self.source is None or ignored:
            return method(self, tx, name, args, kwargs)
        return DebuggingVariable(write, source=AttrSource(self.source, name)).call_function(tx, args, kwargs)

    return call_method


def _kept_whole(method: Any) -> Any:
    """A call of a Python function in a trace, as one op where that is known of the function."""

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        kept = _kept[0]
        if not kept.knows(self.fn):
            return method(self, tx, args, kwargs)
        from torch._dynamo.variables.builder import wrap_fx_proxy
        from torch._dynamo.variables.tensor import TensorVariable

        realized = [arg.realize() for arg in args], {name: arg.realize() for name, arg in kwargs.items()}
        leaves = [*realized[0], *realized[1].values()]
        if not all(isinstance(leaf, TensorVariable) or leaf.is_python_constant() for leaf in leaves):
            return method(self, tx, args, kwargs)
        shown = {id(v): v.as_proxy().node.meta["example_value"] for v in leaves if isinstance(v, TensorVariable)}

        def value(leaf: Any) -> Any:
            return shown[id(leaf)] if id(leaf) in shown else leaf.as_python_constant()

        call = kept.as_op(self.fn, [value(v) for v in realized[0]], {name: value(v) for name, v in realized[1].items()})
        if call is None:
            return method(self, tx, args, kwargs)
        op, tensors, text = call
        proxies = [next(v for v in leaves if shown.get(id(v)) is tensor).as_proxy() for tensor in tensors]
        return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", op, (proxies, text), {}))

    return call_function
