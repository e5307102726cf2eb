"""The options of `torch.compile(model, backend="streamfusion", options={...})`. Leaf file: standard library only.

`Options.from_dict` checks everything that can be checked without knowing the ranks; `Options.check_world` checks the
rest once the number of ranks is known.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from sfcompile.errors import MeshError, OptionError, StreamFusionError, TopologyError

MESH_AXES = ("ulysses", "ring")
BATCH_AXIS = "batch"
SCHEDULES = ("auto", "torus", "ulysses", "ring", "usp")
TRANSPORTS = ("auto", "shm", "c10d", "nvshmem", "symm_mem", "nccl")
ATTENTIONS = ("auto", "aten", "triton")
INNERS = ("auto", "inductor", "eager")
PLACEMENTS = ("auto", "shard")
TIMEOUT_BOUNDS_S = (0.1, 604800.0)
"""Ranks look round for each other every 0.2 s or so; a week in milliseconds still fits into 32 bits, in gloo."""
ASSUMED = "auto:assumed"
WIRES = ("same", "bf16", "fp8")
COMPILE_BLOCKS = ("auto", "off")
INPUTS = ("checked", "trusted", "rank0")
"""Whether ranks compare samples of their inputs and weights, trust each other, or take rank 0's inputs."""
BOUNDARIES = ("whole", "shards", "regions")
"""What a graph that ends at a break hands on: whole values on every rank, or shards that the next graph may take."""
WEIGHTS = ("whole", "sharded", "sharded-by-machine")
"""Whether every rank holds all weights, all ranks together hold them once, or the ranks of each machine do."""
REGISTERED_SCHEDULES: set[str] = set()
"""Names that sfcompile.extend.register_schedule added to SCHEDULES."""
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")

_NOT_A_MEMBER = -100  # torch.distributed.GroupMember.NON_GROUP_MEMBER
_MACHINES_X_RANKS = re.compile(r"([1-9]\d*)x([1-9]\d*)(?::.+)?")


class Wire(NamedTuple):
    """How the chunks of attentions are written while they travel, by tensor: "same" as the model computes in, "bf16",
    or "fp8" (e4m3 with a scale for every token and head; runtime/program/formats.py)."""

    q: str = "same"
    k: str = "same"
    v: str = "same"
    o: str = "same"

    def __str__(self) -> str:
        """What is not "same", tensors of one kind together."""
        kinds = [kind for kind in WIRES[1:] if kind in self]
        named = list(zip(self._fields, self, strict=True))
        by_kind = {kind: ", ".join(name.upper() for name, its in named if its == kind) for kind in kinds}
        return "; ".join(f"{names} as {kind}" for kind, names in by_kind.items()) or "same"


AS_IT_IS = Wire()
"""Nothing is written otherwise than it was computed."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; every field has a default. Build it with `from_dict`, which validates.

    Attributes:
        topology: "auto" (machines found from torchrun, links and compute measured), "auto:assumed" (not measured),
            "NxM" (N machines of M ranks each), "NxM:preset", a .toml file, or a Topology object.
        mesh: {"ulysses": P_u, "ring": P_r} with P_u * P_r = world size, or with a "batch" degree as a third factor;
            None: the planner chooses. Or a torch DeviceMesh or ProcessGroup: its ranks compute the model together, and
            other groups may run beside it (sfcompile/groups.py).
        group: the ranks of that mesh, in its order; None: the whole job. Not an option of its own.
        schedule: how attention runs: "auto" (the planner's choice) | "torus" | "ulysses" | "ring" | "usp".
        transport: "auto" (shared memory and TCP between CPU ranks; between GPU ranks the first that starts of the
            following) | "shm" (CPU ranks of one machine) | "c10d" (gloo, CPU ranks) | "nvshmem" | "symm_mem" (stores
            into the memory of GPUs of a machine, NCCL between machines) | "nccl".
        attention: "auto" (generated kernels on GPUs with NVSHMEM, else torch's flash attention) | "aten" | "triton" (on
            CPUs: Triton's interpreter, for checking kernels, slow).
        wire: what travels between ranks for an attention: "same" as it is computed | "bf16" | "fp8", for all of it or
            by tensor: {"kv": "fp8", "qo": "bf16"}; tensors that are not named travel as they are.
        inner: what runs the local graph: "auto" | "inductor" | "eager".
        compile_blocks: "auto" (Inductor compiles repeated blocks of the local graph once, where that spares much; where
            none repeats, ranks compile a stretch each) | "off" (it gets the graph in one piece).
        placement: "auto" (by cost) | "shard" (all that has a rule, whatever it costs).
        inputs: "checked" (ranks compare samples of weights at the compile, and of inputs at every call) | "trusted"
            (nothing is compared) | "rank0" (rank 0's inputs are sent to all before every step, whatever the others
            were given; shapes must be equal, weights are compared).
        weights: "whole" (every rank holds all of them) | "sharded" (all ranks together hold the large ones once) |
            "sharded-by-machine" (the ranks of each machine do). On GPUs either, over several machines "sharded" needs
            sfcompile.shard_weights or sfcompile.load_sharded.
        boundaries: "whole" (where a graph ends at a break, its results are whole on every rank) | "shards" (each rank
            keeps its rows of them; what reads one in Python gathers it, which all ranks have to do together) |
            "regions" (so does what functions return that were compiled by themselves: compile_repeated_blocks).
        strict: raise when anything is left replicated.
        verify: so many first calls of every graph are computed whole too, by every rank, and compared.
        timeout_s: longest wait on a peer, in seconds: 0.1 to a week.
        dump: directory that receives graphs, schedules, kernels and plans, or None.
        passes: names of the passes to run, in order (sfcompile/extend.py); empty: the compiler's own list.
        mode: the `mode=` of torch.compile, handed to Inductor; not an option of ours.
    """

    topology: object = field(default="auto", hash=False)
    mesh: dict[str, int] | Any | None = field(default=None, hash=False)
    schedule: str = "auto"
    transport: str = "auto"
    attention: str = "auto"
    wire: Wire = AS_IT_IS
    inner: str = "auto"
    compile_blocks: str = "auto"
    placement: str = "auto"
    inputs: str = "checked"
    weights: str = "whole"
    boundaries: str = "whole"
    strict: bool = False
    verify: int = 0
    timeout_s: float = 60.0
    dump: Path | None = None
    passes: tuple[str, ...] = ()
    mode: str | None = None
    group: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Validated options.

        Raises:
            OptionError: an unknown key or a bad value; the message lists what is allowed.
        """
        asked = named_options(options)
        for key in asked:
            if key not in _VALIDATORS:
                raise _unknown_key(key)
        if mode is not None and mode not in MODES:
            raise _bad_value("mode", mode, MODES)
        checked = cls(**{key: _VALIDATORS[key](key, value) for key, value in asked.items()}, mode=mode)
        if checked.boundaries != "whole" and checked.inputs == "rank0":
            raise OptionError(
                f"boundaries={checked.boundaries!r} together with inputs='rank0'",
                "what crosses between graphs in shards is whole on no rank, so rank 0 cannot send it to the others",
                "leave one of the two out",
            )
        return checked

    def check_world(self, world_size: int) -> None:
        """Check mesh and topology against the number of ranks.

        Raises:
            MeshError: the mesh's axes do not multiply to `world_size`.
            TopologyError: the topology "NxM" does not have `world_size` ranks.
        """
        if isinstance(self.mesh, dict):
            ulysses, ring = self.mesh["ulysses"] * self.mesh.get(BATCH_AXIS, 1), self.mesh["ring"]
            if ulysses * ring != world_size:
                legal = ", ".join(
                    f"{{'ulysses': {u}, 'ring': {world_size // u}}}"
                    for u in range(1, world_size + 1)
                    if world_size % u == 0
                )
                raise MeshError(
                    f"mesh={self.mesh!r} has {ulysses} x {ring} = {ulysses * ring} ranks, but {world_size} ranks run",
                    "The axes of the mesh must multiply to the number of ranks",
                    f"Use one of {legal}, or leave mesh out",
                )
        num_ranks = _num_ranks(self.topology)
        if num_ranks is not None and num_ranks != world_size:
            raise TopologyError(
                f"topology={self.topology!r} has {num_ranks} ranks, but {world_size} ranks run",
                '"NxM" means N machines of M ranks each, all of them in use',
                'Use a topology with as many ranks as torchrun starts, or "auto"',
            )

    def as_dict(self) -> dict[str, Any]:
        """Field name -> value, in the order of the fields; for comparing ranks and for dumps."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def named_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options as a dict of one's own.

    Raises:
        OptionError: they are no dict.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f"options={options!r} is a {type(options).__name__}",
            "options are named",
            "write a dict, such as options={'schedule': 'torus'}",
        )
    return dict(options or {})


def _num_ranks(topology: object) -> int | None:
    """Ranks of a topology; None for "auto", "auto:assumed" and for files, which are read later.

    Topology lies above this leaf, so it is known by what we use of it.
    """
    if isinstance(topology, str):
        match = _MACHINES_X_RANKS.fullmatch(topology)
        return int(match[1]) * int(match[2]) if match else None
    num_ranks = getattr(topology, "num_ranks", None)
    return num_ranks if isinstance(num_ranks, int) else None


def _unknown_key(key: object) -> StreamFusionError:
    allowed = ", ".join(_VALIDATORS)
    if key == "mode":
        return OptionError(
            "'mode' is not an option of the streamfusion backend",
            "It is an argument of torch.compile itself",
            'Write torch.compile(model, backend="streamfusion", mode=...)',
        )
    close = difflib.get_close_matches(str(key), _VALIDATORS, n=1)
    return OptionError(
        f"Unknown option {key!r} of the streamfusion backend",
        f"Did you mean {close[0]!r}?" if close else "",
        f"Allowed options: {allowed}",
    )


def _bad_value(key: str, value: object, allowed: tuple[str, ...] | str) -> StreamFusionError:
    listed = allowed if isinstance(allowed, str) else ", ".join(repr(entry) for entry in allowed)
    close = (
        difflib.get_close_matches(value, allowed, n=1)
        if isinstance(value, str) and not isinstance(allowed, str)
        else []
    )
    return OptionError(
        f"Bad value for option {key!r}: got {value!r}",
        f"Did you mean {close[0]!r}?" if close else "",
        f"Allowed: {listed}",
    )


def _choice(allowed: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _bad_value(key, value, allowed)
        return value

    return check


def _schedule(key: str, value: object) -> str:
    if isinstance(value, str) and value in REGISTERED_SCHEDULES:
        return value
    return _choice((*SCHEDULES, *sorted(REGISTERED_SCHEDULES)))(key, value)


def _passes(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise _bad_value(key, value, "a list of names of passes, see sfcompile.extend.passes()")
    return tuple(value)


def _topology(key: str, value: object) -> object:
    allowed = '"auto", "auto:assumed", "NxM" (N machines of M ranks each), "NxM:preset", a .toml file or a Topology'
    named = isinstance(value, str) and (value in ("auto", ASSUMED) or value.endswith(".toml"))
    if named or _num_ranks(value):
        return value
    raise _bad_value(key, value, allowed)


def _mesh(key: str, value: object) -> object:
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    if hasattr(value, "mesh_dim_names") or type(value).__name__ == "ProcessGroup":
        return value  # of torch.distributed: groups.py reads it
    if isinstance(value, int) and value == _NOT_A_MEMBER:
        raise OptionError(
            f"mesh={value!r}",
            "that is what torch.distributed.new_group returns to ranks outside of the group",
            "give each rank the group that it is in, and do not call the model on other ranks",
        )
    allowed = (
        "a dict such as {'ulysses': 4, 'ring': 2} or {'batch': 2, 'ulysses': 4}, axes at least 1, "
        "a torch DeviceMesh or ProcessGroup, or None"
    )
    if not isinstance(value, Mapping) or not value or not set(value) <= {*MESH_AXES, BATCH_AXIS}:
        raise _bad_value(key, value, allowed)
    if any(isinstance(degree, bool) or not isinstance(degree, int) or degree < 1 for degree in value.values()):
        raise _bad_value(key, value, allowed)
    batch = {BATCH_AXIS: value[BATCH_AXIS]} if BATCH_AXIS in value else {}
    return {axis: value.get(axis, 1) for axis in MESH_AXES} | batch


def _wire(key: str, value: object) -> Wire:
    kinds = ", ".join(map(repr, WIRES))
    allowed = f"one of {kinds}, or one for each of the tensors q, k, v, o, such as {{'kv': 'fp8', 'qo': 'bf16'}}"
    if isinstance(value, Wire):
        value = value._asdict()
    if isinstance(value, str) and value not in WIRES:
        raise _bad_value(key, value, WIRES)
    if isinstance(value, str):
        return Wire(*[value] * len(Wire._fields))
    if not isinstance(value, Mapping) or not value or not all(isinstance(names, str) and names for names in value):
        raise _bad_value(key, value, allowed)
    kind_of: dict[str, str] = {}
    for names, kind in value.items():
        unknown = sorted(set(names) - set(Wire._fields))
        if unknown or not isinstance(kind, str) or kind not in WIRES:
            raise _bad_value(key, value, allowed)
        for name in names:
            if name in kind_of:
                raise _bad_value(key, value, f"{allowed}; {name} is named twice")
            kind_of[name] = kind
    return Wire(**kind_of)


def _strict(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _bad_value(key, value, "True or False")
    return value


def _verify(key: str, value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise _bad_value(key, value, "a number of calls, 0 for none")
    return int(value)


def _timeout_s(key: str, value: object) -> float:
    shortest, longest = TIMEOUT_BOUNDS_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not shortest <= value <= longest:
        raise _bad_value(key, value, f"a number of seconds from {shortest:g} to {longest:g} (a week)")
    return float(value)


def _dump(key: str, value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | Path) or str(value) == "":
        raise _bad_value(key, value, "a directory (str or Path), or None")
    path = Path(value)
    if path.exists() and not path.is_dir():
        raise _bad_value(key, value, "a directory; this is a file")
    return path


_VALIDATORS: dict[str, Callable[[str, object], Any]] = {
    "topology": _topology,
    "mesh": _mesh,
    "schedule": _schedule,
    "transport": _choice(TRANSPORTS),
    "attention": _choice(ATTENTIONS),
    "wire": _wire,
    "inner": _choice(INNERS),
    "compile_blocks": _choice(COMPILE_BLOCKS),
    "placement": _choice(PLACEMENTS),
    "inputs": _choice(INPUTS),
    "weights": _choice(WEIGHTS),
    "boundaries": _choice(BOUNDARIES),
    "strict": _strict,
    "verify": _verify,
    "timeout_s": _timeout_s,
    "dump": _dump,
    "passes": _passes,
}
