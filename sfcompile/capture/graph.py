"""Capture: a Dynamo graph becomes a functional ATen graph that keeps high-level ops whole.

``linear``, ``layer_norm``, ``rms_norm`` and ``scaled_dot_product_attention`` stay single nodes (pre-dispatch tracing),
in-place writes are functionalised, and every value gets a fake tensor with static sizes.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import fx

from sfcompile.capture.aliases import Alias, Joined, Shared, aliases, joined_outputs, shared_outputs
from sfcompile.capture.attention import recognise_attention
from sfcompile.capture.autocast import Regions, bake_autocast
from sfcompile.capture.expand import expand_calls
from sfcompile.capture.opaque import hide_opaque
from sfcompile.capture.randomness import draws
from sfcompile.capture.refused import (
    refuse_derivatives,
    refuse_odd_tensors,
    refuse_other_memory,
    refuse_unseen_writes,
    refuse_wrapped_outputs,
)
from sfcompile.capture.runtime_numbers import PICKS, Copied, Number, NumberNeeded, call, name_of, needed, numbers_in
from sfcompile.capture.wrappers import PutTogether, op_of_wrapper
from sfcompile.errors import TrainingGraphError, UnsupportedError
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.torch_private import (
    FakeTensor,
    FakeTensorMode,
    FunctionalTensorMode,
    TracingContext,
    autocast_state,
    compile_fx,
    dispatch_functionalize,
    enter_autocast,
    exit_autocast,
    has_data_mutation,
    is_comparable,
    make_fx,
    static_mode,
    symbol_hint,
    symbols_in,
    tracing,
)


@dataclass
class CaptureFacts:
    """What calls of a captured graph need to know of it.

    Attributes:
        tensor_inputs: positions of the placeholders among the original inputs (the others are sizes, now constants).
        written: positions of the inputs that the graph writes to. Their new values follow its own outputs.
        numbers: positions of the placeholders that are Python numbers; the graph takes them as 0-dim tensors.
        aliases: outputs that are views of inputs. The graph gives their values; who calls it makes the views.
        shared: outputs that are views of other outputs, in the same way; ``joined``: those that overlap otherwise.
        parameters: positions of the inputs that are parameters of the model.
        draws: whether the graph draws random numbers.
        mark: of the graph and the shapes of its inputs; ``samples``: of its constants.
    """

    tensor_inputs: tuple[int, ...]
    written: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    aliases: tuple[Alias, ...] = ()
    shared: tuple[Shared, ...] = ()
    joined: tuple[Joined, ...] = ()
    parameters: tuple[int, ...] = ()
    draws: bool = False
    mark: str = ""
    samples: int = 0

    def as_tensors(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs, of which those in ``numbers`` are 0-dim tensors."""
        tensors = list(inputs)
        for i in self.numbers:
            if not isinstance(tensors[i], torch.Tensor) or isinstance(tensors[i], FakeTensor):
                tensors[i] = _number(tensors[i])
        return tensors


@dataclass
class Captured(CaptureFacts):
    """A functional ATen graph.

    Attributes:
        gm: the graph; placeholders are the tensor inputs only, in order.
        mode: the fake mode of every ``node.meta["val"]``.
    """

    gm: fx.GraphModule = field(kw_only=True)
    mode: FakeTensorMode = field(kw_only=True)

    @property
    def facts(self) -> CaptureFacts:
        """What is known without the graph."""
        return CaptureFacts(**{entry.name: getattr(self, entry.name) for entry in fields(CaptureFacts)})


def _marks(gm: fx.GraphModule) -> tuple[str, int]:
    """What ranks compare of a captured graph."""
    nodes = list(gm.graph.nodes)
    constants = [operator.attrgetter(str(node.target))(gm) for node in nodes if node.op == "get_attr"]
    shapes = [(node.meta["val"].dtype, tuple(node.meta["val"].shape)) for node in nodes if node.op == "placeholder"]
    mark = hashlib.sha256(f"{gm.code}\n{shapes}".encode()).hexdigest()
    return mark, fingerprint([value for value in constants if is_comparable(value)])


def refuse_training(inputs: Sequence[Any]) -> None:
    """Raise TrainingGraphError if gradients are on and some input wants one."""
    if not torch.is_grad_enabled():
        return
    wanting = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if wanting:
        raise TrainingGraphError(
            f"{len(wanting)} of {len(inputs)} graph inputs require gradients and gradients are enabled",
            "the streamfusion backend compiles inference only: its communication has no backward",
            "call the model under torch.no_grad() or torch.inference_mode(), or use model.requires_grad_(False)",
        )


def present(size: Any) -> Any:
    """The present value of a size that may be symbolic, without a guard: Dynamo's graph stays good for other sizes.

    Raises:
        UnsupportedError: it depends on data.
    """
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    hint = symbol_hint(size)
    if hint is None:
        raise UnsupportedError(
            f"an input size ({size}) is not known before the graph runs",
            "sharding needs the number of tokens",
            "mark the length as an ordinary input size, or let this graph run unsharded",
        )
    return hint


def numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, float | int]:
    """Inputs that are only read as numbers, with their present values: Python floats that Dynamo dressed as 0-dim
    tensors (dynamic=True), tensors of a position or a length of which the model takes ``item()`` (fullgraph=True)."""
    values = {}
    for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        items = [user for user in node.users if user.op == "call_method" and user.target == "item"]
        if items and len(items) == len(node.users) and isinstance(inputs[i], torch.Tensor):
            fake = isinstance(inputs[i], FakeTensor)
            values[i] = present(items[0].meta["example_value"]) if fake else inputs[i].item()
    return values


def _number(value: Any) -> torch.Tensor:
    """The 0-dim tensor of a number: a symbolic one's present value, a float that Dynamo dressed as a fake tensor."""
    if isinstance(value, FakeTensor):  # read at calls only
        return torch.zeros((), dtype=value.dtype)
    value = present(value)
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def changing_numbers(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[int, ...]:
    """Inputs that are Python numbers which change from call to call, and that are no tensor's size or stride.

    Example inputs are real tensors: which of their sizes are symbols is known to the placeholders alone.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    shown = [node.meta.get("example_value") for node in placeholders]
    if any(isinstance(x, torch.Tensor) and not isinstance(shown[i], torch.Tensor) for i, x in enumerate(inputs)):
        return ()
    sizes = symbols_in(*(n for x in shown if isinstance(x, torch.Tensor) for n in (*x.shape, *x.stride())))
    symbolic = (
        i
        for i, x in enumerate(inputs)
        if isinstance(x, (torch.SymInt, torch.SymFloat)) and symbols_in(x) and not symbols_in(x) & sizes
    )
    return tuple(sorted({*numbers(gm, inputs), *symbolic}))


class _Replay(fx.Interpreter):
    """Runs a Dynamo graph; what it reads from tensors that are numbers is known, or stays an input (``running``)."""

    def __init__(
        self, gm: fx.GraphModule, known: dict[int, float | int], running: Sequence[int], regions: Regions
    ) -> None:
        super().__init__(gm)
        self._regions = regions
        self._wrapped = any(isinstance(node.target, PutTogether) for node in gm.graph.nodes)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._known = {placeholders[i]: value for i, value in known.items() if i not in running}
        self._running = {placeholders[i]: i for i in running}
        self.copied = Copied()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_method" and n.target == "item" and isinstance(source := n.args[0], fx.Node):
            if source in self._known:
                return self._known[source]
            if source in self._running:
                return Number(self.env[source], frozenset({self._running[source]}))
        if n in self._running:
            value = super().run_node(n)
            dressed = any(user.target == "item" for user in n.users)
            return value if dressed else Number(value, frozenset({self._running[n]}))
        if self._running:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.op == "output" and numbers_in(args):
                raise needed(args)
            if among := numbers_in(args, kwargs):
                result = call(n.op, n.target, args, kwargs)
                if name_of(n.op, n.target) in PICKS:
                    self.copied.note(args[0], result, among)
                return result
        if self._wrapped and n.op in ("call_function", "call_method") and not isinstance(n.target, PutTogether):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if (op := op_of_wrapper(n.target, args, kwargs)) is not None:
                return op()
        if n.target is enter_autocast:
            return self._regions.enter(*n.args)
        if n.target is exit_autocast:
            (region,) = n.all_input_nodes
            return self._regions.exit(self.env[region])
        return super().run_node(n)


def _static_fake(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the same geometry with constant sizes; meta tensors become CPU ones."""
    device = torch.device("cpu") if value.device.type == "meta" else value.device
    sizes = [present(size) for size in value.shape]
    strides = [present(stride) for stride in value.stride()]
    with mode:
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)


def capture(gm: fx.GraphModule, inputs: Sequence[Any], keep_numbers: bool = False) -> Captured:
    """Trace a Dynamo graph to functional ATen.

    Args:
        gm: the graph as Dynamo hands it to a backend.
        inputs: its example inputs: tensors (real or fake) and, for dynamic shapes, numbers. Symbolic sizes count as
            what they are now: the graph that comes out is good for these sizes only.
        keep_numbers: numbers that change from call to call stay inputs where they can (runtime_numbers.py); else they
            count as what they are now.

    Raises:
        UnsupportedError: the graph cannot be traced with static sizes (sizes that depend on data, ops that do not
            survive functionalisation), takes derivatives, or has inputs that are no plain tensors.
    """
    refuse_odd_tensors(gm, inputs)
    refuse_derivatives(gm)
    refuse_other_memory(gm)
    refuse_unseen_writes(gm)
    running = changing_numbers(gm, inputs) if keep_numbers else ()
    while True:  # once more at most for every number
        try:
            return _capture(gm, inputs, running)
        except NumberNeeded as need:
            running = tuple(i for i in running if i not in need.sources)


def _capture(gm: fx.GraphModule, inputs: Sequence[Any], running: tuple[int, ...]) -> Captured:
    """:func:`capture` with the numbers at ``running`` kept; raises NumberNeeded."""
    mode = static_mode()
    values = [_static_fake(mode, x) if isinstance(x, torch.Tensor) else present(x) for x in inputs]
    for i in running:
        if not isinstance(values[i], torch.Tensor):
            values[i] = _static_fake(mode, _number(inputs[i]))
    tensors = tuple(i for i, x in enumerate(values) if isinstance(x, torch.Tensor))
    functional = FunctionalTensorMode(pre_dispatch=True, export=True)
    known = numbers(gm, inputs)
    gm = hide_opaque(expand_calls(gm))
    written: list[int] = []
    views: list[Alias] = []
    shared: list[Shared] = []
    joined: list[Joined] = []
    regions, before = Regions(), autocast_state()

    def run(*args: torch.Tensor) -> Any:
        full = list(values)
        for i, arg in zip(tensors, args, strict=True):
            full[i] = arg
        try:
            replay = _Replay(gm, known, running, regions)
            out = replay.run(*full)
        finally:
            regions.close()
        written[:] = [i for i, arg in zip(tensors, args, strict=True) if has_data_mutation(arg)]
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        replay.copied.check(outputs)
        refuse_wrapped_outputs(gm, outputs)
        views[:] = aliases(outputs, full)
        shared[:] = shared_outputs(outputs, [view.output for view in views])
        joined[:] = joined_outputs(outputs, [*(view.output for view in views), *(view.output for view in shared)])
        return (*outputs, *(full[i] for i in written))

    with torch.no_grad(), mode, fx.traceback.preserve_node_meta(), _on_cpu(gm, inputs):
        traced = make_fx(
            dispatch_functionalize(run, functional),
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*(values[i] for i in tensors))
    bake_autocast(traced.graph, mode, before)
    _clean(traced, mode)
    recognise_attention(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    parameters = tuple(i for i in tensors if isinstance(inputs[i], torch.nn.Parameter))
    return Captured(
        tensors, tuple(written), running, tuple(views), tuple(shared), tuple(joined), parameters, draws(traced),
        *_marks(traced), gm=traced, mode=mode,
    )  # fmt: skip


@contextmanager
def _on_cpu(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[None]:
    """While tracing a model that lives on the meta device, read literal ``device=meta`` arguments as CPU."""
    meta = torch.device("meta")
    changed: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any]]] = []
    if any(isinstance(x, torch.Tensor) and x.device == meta for x in inputs):
        for node in gm.graph.nodes:
            swap: Callable[[Any], Any] = lambda a: torch.device("cpu") if a == meta or a == "meta" else a  # noqa: E731
            args = fx.node.map_aggregate(node.args, swap)
            kwargs = fx.node.map_aggregate(node.kwargs, swap)
            if (args, kwargs) != (node.args, node.kwargs):
                changed.append((node, node.args, node.kwargs))
                node.args, node.kwargs = args, kwargs
    try:
        yield
    finally:
        for node, old_args, old_kwargs in changed:
            node.args, node.kwargs = old_args, old_kwargs


_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}


def _clean(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Drop run-time metadata checks, merge repeated getitems, give constants a fake value, drop dead nodes."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _CHECKS:
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch.ops.aten.type_as.default:
            # Only the dtype of the second operand matters; reading its values would gather a shard for nothing.
            with gm.graph.inserting_before(node):
                args, kwargs = (node.args[0],), {"dtype": node.meta["val"].dtype}
                cast = gm.graph.call_function(torch.ops.aten._to_copy.default, args, kwargs)
            cast.meta = node.meta
            node.replace_all_uses_with(cast)
            gm.graph.erase_node(node)
        elif node.op == "get_attr" and "val" not in node.meta:
            value = operator.attrgetter(str(node.target))(gm)
            if isinstance(value, torch.Tensor):
                fake = isinstance(value, FakeTensor)
                node.meta["val"] = value if fake else mode.from_tensor(value.detach())
        elif node.op == "call_function" and node.target is operator.getitem:
            first = next(
                user for user in node.args[0].users if user.target is operator.getitem and user.args[1] == node.args[1]
            )
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch.ops.aten.cat.default:
            _drop_empties(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def _drop_empties(cat: fx.Node) -> None:
    """Take tensors without elements out of a cat: the rows behind the last token, mostly, which would be gathered."""
    tensors, out = cast(Sequence[fx.Node], cat.args[0]), cat.meta["val"]
    full = [tensor for tensor in tensors if tensor.meta["val"].numel()]
    dtypes = [tensor.meta["val"].dtype for tensor in full]
    if full and functools.reduce(torch.promote_types, dtypes) == out.dtype:
        cat.args = (full, *cat.args[1:])


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode | None, config: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a graph with Inductor for inference.

    Args:
        gm: the graph; called with the same arguments as ``inputs``.
        inputs: fake tensors of ``mode``, or Dynamo's own example inputs with ``mode`` None.
        config: Inductor config patches.
    """
    if mode is None:
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=config))
    # The graph's fake tensors belong to our own mode, not to Dynamo's: give Inductor a context of its own.
    with tracing(TracingContext(mode)), torch.no_grad():
        return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=config))


def break_reason(gm: fx.GraphModule) -> str:
    """What made Dynamo end this graph before the model ended, in a line with the user's place; "" if nothing did."""
    cause = getattr(gm, "compile_subgraph_reason", None)
    if cause is None or not cause.graph_break:
        return ""
    place = f" at {cause.user_stack[-1].filename}:{cause.user_stack[-1].lineno}" if cause.user_stack else ""
    return f"{str(cause.reason).strip().splitlines()[0]}{place}"
