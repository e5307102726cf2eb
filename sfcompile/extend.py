"""The compiler opened up: passes, op rules, schedules and topologies of your own, with no edit of this repository.

* A **pass** is a function of one argument, the :class:`State` that all passes share. Name it with
  :func:`register_pass`, and run it with ``options={"passes": [...]}``: a list of names, from which built-in passes may
  be left out or moved too. :func:`passes` is the compiler's own list to start from. Names that passes had once are
  other names of the same passes: ``schedule_puts`` is ``order_puts``, ``schedule_fused_puts`` is ``fuse_puts``,
  ``schedule_sites`` is ``build_schedules``.
* An **op rule** says how an op behaves on shards (passes/rules/rule.py). ``@register_op_rule("my_op")`` adds or
  replaces one; :func:`register_row_wise` is the rule of an op that computes each token alone. An op without a rule is
  computed whole on every rank, never guessed. :func:`check_op_rule` holds a rule against its op.
* A **schedule** is a function that builds what one attention does on all ranks. Registered, it is a candidate of the
  planner on every mesh, and can be asked for with ``options={"schedule": name}``. The checker proves it before it is
  priced, and again before it runs: a wrong one is refused with its reason, it cannot give a wrong answer or hang.
* An **attention** that a library computes in an op of its own is read by a function that says where q, k, v, scale and
  mask stand among the op's arguments (:func:`register_attention`); one whose kernel shall stay as it is, on some of the
  heads, by one that says which dims are tokens and heads (:func:`register_per_head_attention`; of an attention that is
  a Python function and no op :func:`register_attention_function`).
* A **topology** is a set of constants under a name, used as ``"4x8:name"``.

Register on every rank, before the model is compiled: ranks compare the options they compile with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfcompile import options
from sfcompile.capture import attention_calls, library_functions
from sfcompile.capture.attention_calls import AttentionCall, Reader
from sfcompile.capture.library_functions import FunctionReader
from sfcompile.codegen.plan.choose_plan import forget_plans
from sfcompile.codegen.schedule import builders
from sfcompile.codegen.schedule.builders import BUILDERS, Builder
from sfcompile.errors import OptionError
from sfcompile.passes import pipeline
from sfcompile.passes.graph import cost
from sfcompile.passes.graph.op_view import OpView
from sfcompile.passes.pipeline import PIPELINE, Pass
from sfcompile.passes.rules import per_head
from sfcompile.passes.rules import rule as op_rules
from sfcompile.passes.rules.linked import Linked, Names, aligned
from sfcompile.passes.rules.per_head import Dims
from sfcompile.passes.rules.per_head import Reader as HeadsReader
from sfcompile.passes.rules.rule import Rule
from sfcompile.passes.rules.rule import register_rule as register_op_rule
from sfcompile.passes.runner import FIELDS, OLD_NAMES
from sfcompile.passes.state import State
from sfcompile.rule_check import check_op_rule
from sfcompile.runtime.program import presets as topology_presets
from sfcompile.runtime.program.topology import Topology

__all__ = [
    "AttentionCall",
    "Dims",
    "State",
    "check_op_rule",
    "passes",
    "register_attention",
    "register_attention_function",
    "register_op_rule",
    "register_pass",
    "register_per_head_attention",
    "register_row_wise",
    "register_schedule",
    "register_topology",
    "scope",
]


class _PassNames(list[str]):
    """Names of passes; finds them by the names that they had once, too."""

    def index(self, name: str, *span: Any) -> int:
        return super().index(OLD_NAMES.get(name, name), *span)

    def remove(self, name: str) -> None:
        super().remove(OLD_NAMES.get(name, name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(OLD_NAMES.get(str(name), name))


def passes() -> list[str]:
    """Names of the compiler's own passes in their order, to copy and edit."""
    return _PassNames(entry.name for entry in PIPELINE)


def register_pass(
    run: Callable[[State], None], name: str = "", why: str = "", needs: Sequence[str] = (), makes: Sequence[str] = ()
) -> str:
    """Make a pass known by name; it runs where ``options={"passes": [...]}`` names it.

    Before ``rewrite_local`` a pass may put another graph into ``state.gm`` (the old one must stay as it is); after it,
    it may edit ``state.local.graph``, this rank's. Ranks must communicate in one order: they compare it.

    Args:
        name: default: the function's.
        why: why it stands where it does, for dumps.
        needs, makes: fields of the state that must be there before it runs, and those that it fills. An order that
            lacks one is then refused before the pass runs, with the name of the pass that makes it.

    Returns:
        The name.

    Raises:
        OptionError: a built-in pass has that name, or the state has no such field.
    """
    if not callable(run):
        raise OptionError(f"{run!r} is no pass", "A pass is a function of the state", "Write def my_pass(state): ...")
    name = name or getattr(run, "__name__", "")
    if not name or name in passes():
        raise OptionError(
            f"a pass cannot be named {name!r}", "it is one of the compiler's own, or empty", "give it another name"
        )
    unknown = sorted({*needs, *makes} - {*FIELDS})
    if unknown:
        raise OptionError(
            f"pass {name!r} needs or makes {unknown[0]!r}, which is no field that passes make",
            f"there are {', '.join(FIELDS)}",
            "name some of these; what the state starts with (gm, topology, asked, ...) is always there",
        )
    pipeline.REGISTERED[name] = Pass(name, run, " ".join(needs), " ".join(makes), why or "from outside")
    return name


def register_row_wise(*names: str, mixed: int = 1) -> None:
    """The rule of ops that compute every row alone: a norm, a softmax, a projection by a table, quantisation by token.

    Tokens may lie in any dim of the first tensor but the last ``mixed`` ones, which the op may mix. Dims of the other
    tensors that line up with it from the right, as in pointwise ops, are cut with it; those of size 1 are not. Outputs
    must have its leading dims, or nothing is sharded.

    Args:
        names: "rms_norm" of ATen, "mylib::my_norm" of others.
        mixed: how many last dims the op may mix.

    Raises:
        OptionError: no name, or a negative number.
    """
    if not names or mixed < 0:
        raise OptionError(f"register_row_wise({names}, mixed={mixed})", "it names ops, and a number of dims from 0 up")

    def row_wise(op: OpView) -> Rule | None:
        if not op.operands:
            return None
        lead = list(op.operands[0].shape[: max(0, op.operands[0].ndim - mixed)])
        kept = len(lead)
        if any(list(shape[:kept]) != lead for shape in op.out_shapes):
            return None
        whole = op.operands[0].shape

        def cut(names: Names) -> Names:
            return [name if isinstance(name, int) and name < kept else None for name in names]

        ins = [cut(aligned(operand.shape, whole)) for operand in op.operands]
        return Linked(ins, [cut(range(len(shape))) for shape in op.out_shapes])

    register_op_rule(*names)(row_wise)


def register_schedule(name: str, builder: Builder) -> None:
    """Make a schedule a candidate of the planner, and a value of the option ``schedule``.

    Args:
        builder: ``(site, mesh, q_parts, kv_parts) -> Schedule``; raises MeshError for what it cannot do. The
            schedule's ``kind`` must be ``name``.

    Raises:
        OptionError: a built-in schedule has that name.
    """
    if name in BUILDERS or name in options.SCHEDULES:
        raise OptionError(
            f"a schedule cannot be named {name!r}", f"built in are {', '.join(BUILDERS)}", "give it another name"
        )
    builders.REGISTERED[name] = builder
    options.REGISTERED_SCHEDULES.add(name)
    forget_plans()


def register_attention(op: str, reader: Reader) -> None:
    """Have calls of an op sharded as the attention that they are.

    Args:
        op: its name with its namespace, as in its schema: ``"library::attention"``. It need not be loaded yet.
        reader: ``(arguments by the schema's names, defaults filled in) -> AttentionCall | None``; None leaves the call
            as it is, computed whole on every rank. It sees tensors without values: what a call is must show in shapes
            and in arguments that are no tensors. Only the op's first result may be used by the model.

    Raises:
        OptionError: ``op`` is not of that form.
    """
    attention_calls.READERS[_op_name(op)] = reader


def register_per_head_attention(op: str, reader: HeadsReader) -> None:
    """Have calls of an attention op computed by heads: every rank runs the op as it is, on all tokens of its heads.

    For kernels of which no more is known than that heads are independent: quantised, block-sparse, packed ones. The
    results are those of the op on one device, head by head. Tokens travel twice, as in Ulysses, and at most as many
    ranks compute as there are heads of keys and values; where the call is softmax(q k^T) v,
    :func:`register_attention` shards it further.

    Args:
        op: its name with its namespace, as in its schema: ``"library::attention"``. It need not be loaded yet.
        reader: ``(arguments by the schema's names, defaults filled in) -> Dims | None``: which dims of the tensors are
            tokens and heads, as in ``Dims({"q": "LHD", "k": "LHD", "v": "LHD"}, "LHD")``; None leaves the call whole.
            Tensors are there as things with a ``shape``. Only the op's first result may be used by the model.

    Raises:
        OptionError: ``op`` is not of that form.
    """
    per_head.register_per_head(_op_name(op), reader)


def register_attention_function(function: str, reader: FunctionReader) -> None:
    """The same for an attention that a library offers as a Python function: Dynamo does not enter it, ranks call it.

    Args:
        function: ``"library.function"``: the first part of the name of the module that defines it, and its own name.
        reader: ``(arguments by name, defaults filled in) -> (letters by argument, letters of the result) | None``, as
            in ``({"q": "BLHD", "k": "BLHD", "v": "BLHD"}, "BLHD")``; None has the call traced as it stands. Every
            argument must be a tensor or a constant; the result has q's dtype and sizes, with v's last one.

    Raises:
        OptionError: ``function`` is not of that form.
    """
    if function.count(".") != 1 or not all(function.split(".")):
        raise OptionError(
            f"a function cannot be named {function!r}",
            "its library and its own name are needed, nothing between them",
            "write 'library.function'",
        )
    library_functions.FUNCTIONS[function] = reader


def _op_name(op: str) -> str:
    if op.count("::") != 1 or not all(op.split("::")):
        raise OptionError(
            f"an op cannot be named {op!r}",
            "a name with its namespace is needed",
            "write 'library::op', without '.default'",
        )
    return op


def register_topology(name: str, **constants: Any) -> None:
    """Make a set of constants known as ``"NxM:name"``; those left out have the defaults of Topology.

    Raises:
        OptionError: the name is taken.
        TopologyError: an unknown constant, or no positive number.
    """
    if name in topology_presets.PRESETS:
        raise OptionError(f"a topology cannot be named {name!r}", "there is a preset of that name", "choose another")
    topology_presets.PRESETS[name] = Topology.constants(constants, f"register_topology({name!r})")


_TABLES: tuple[dict[str, Any], ...] = (
    pipeline.REGISTERED,
    builders.REGISTERED,
    topology_presets.PRESETS,
    op_rules.RULES,
    attention_calls.READERS,
    library_functions.FUNCTIONS,
    per_head.PER_HEAD,
    cost.FORMULAS,
)
"""All that can be registered."""
_OURS = tuple(dict(table) for table in _TABLES)
"""What they held before anybody registered anything."""


def registered() -> str:
    """The names of what was registered from outside, or put in the place of ours; "": nothing."""
    names = [str(name) for table, ours in zip(_TABLES, _OURS, strict=True)
             for name in {*table, *ours} if table.get(name) is not ours.get(name)]  # fmt: skip
    return ", ".join(sorted(names))


@contextmanager
def scope() -> Iterator[None]:
    """Everything registered inside is forgotten at the end: for notebooks and tests."""
    tables = _TABLES
    before = [dict(table) for table in tables]
    names = set(options.REGISTERED_SCHEDULES)
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
        options.REGISTERED_SCHEDULES.clear()
        options.REGISTERED_SCHEDULES.update(names)
        forget_plans()
