"""``sfcompile.load``: a package under torchrun becomes a callable, with no model source, no trace and no pickle.

Every rank reads, checks and builds its own part first; then the ranks tell each other whether that went well, so a file
that is bad on one machine is an error on every rank and not a hang. A package is data from anywhere: nothing in it is
believed, and nothing of it runs but operators that operators.py allows. Native code (``inner="aoti"``) is another
matter: it runs what it holds, so it is loaded only when the caller says so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfcompile.capture.randomness import call_draws
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import OptionError, PackageError, StreamFusionError
from sfcompile.groups import in_group, refuse, session_for, world_size
from sfcompile.one_style import merged
from sfcompile.options import Options
from sfcompile.package.disk import beside, file_hash, open_regular
from sfcompile.package.file import Package, processor
from sfcompile.package.fit import Geometry, check_fit
from sfcompile.package.graph import empty_of, graph_from_json
from sfcompile.package.limits import SCHEDULES, check_facts, dtype_of, entries, integer, refused, table
from sfcompile.package.manifest import INNERS, check_manifest, check_tree
from sfcompile.package.model import LoadedModel, with_strides
from sfcompile.package.schedules import schedule_from_json
from sfcompile.package.tensors import map_open, read_tensors
from sfcompile.runtime.rank.session import Session, existing_session, use_session
from sfcompile.shared_inputs import SharedInputs
from sfcompile.version import __version__


@dataclass(frozen=True)
class Wanted:
    """What the caller of :func:`load` asks for."""

    path: Path
    weights: Path | None
    inner: str | None
    verify: bool
    libraries: tuple[str, ...]


def load(
    path: str | os.PathLike[str],
    *,
    options: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    inner: str | None = None,
    transport: str = "auto",
    timeout_s: float = 60.0,
    verify: bool = True,
    libraries: Sequence[str] = (),
    mesh: object = None,
) -> LoadedModel:
    """A package that :func:`sfcompile.export` wrote, ready on this rank. Collective.

    Args:
        weights: the safetensors file, if it is not beside the package under its own name.
        inner: what runs the local graph: "inductor", "eager", "auto", or "aoti", the native code that the package
            holds, which runs what it likes: for packages of people you trust. None: as exported, but for "aoti".
        options: of the backend's, those that a package leaves open: inner, transport, timeout_s, mesh; as a dict, or
            each as the keyword of its name.
        transport, timeout_s: as in the backend's options.
        verify: check the hashes of everything that is read. Without it a damaged weight goes unnoticed.
        mesh: a torch DeviceMesh or ProcessGroup of the ranks that run the package; None: all ranks of the job.
        libraries: libraries of operators (namespaces of torch.ops) that you trust: their functional operators may be
            called too. They must be imported.

    Raises:
        PackageError: damaged, changed, of another version, or made for another number of ranks; on every rank.
        RankMismatchError: ranks load different packages.
    """
    spelled = {"inner": inner, "transport": transport, "timeout_s": timeout_s, "mesh": mesh}
    chosen: dict[str, Any] = {}
    try:
        chosen = merged(options, spelled, {"inner": None, "transport": "auto", "timeout_s": 60.0, "mesh": None})
        inner = chosen.pop("inner", None)
        _check_open(chosen)
        _check(inner, libraries)
        if not isinstance(path, str | os.PathLike):
            raise OptionError(
                f"load was given a {type(path).__name__}", "A package is a file", 'Write load("model.sf")'
            )
        asked = in_group(Options.from_dict(chosen))
    except OptionError as error:
        refuse(error, chosen or {name: value for name, value in spelled.items() if name != "inner"}, dict(_BEGIN))
    wanted = Wanted(Path(path), None if weights is None else Path(weights), inner, verify, tuple(libraries))
    session = existing_session(asked.group)
    ranks = session.topology.num_ranks if session is not None else world_size(asked)
    if ranks == 1:
        part = open_part(wanted, 0, 1)
        with _only_ours(wanted.path):
            return part.finish(None)
    session = session_for(asked)
    with (
        session.turn(),
        session.guard(),
        use_session(session),
    ):  # an interrupt while a part is read is told to the other ranks
        session.agree("load a package", dict(_BEGIN))  # gets over an earlier failure
        part = _open_with_others(wanted, session, asked)
        session.agree(
            f"package {part.package.digest} {part.inner}", {"package": f"{path} ({part.package.digest[:12]})"}
        )
        with _only_ours(wanted.path):
            return part.finish(session)


_BEGIN = {"what follows": "the load of a package"}
"""What ranks compare first, in words."""


_OPEN = ("inner", "transport", "timeout_s", "mesh")
"""Options of the backend that a package leaves to those who load it."""


def _check_open(options: Mapping[str, Any]) -> None:
    """That a package leaves these options open.

    Raises:
        OptionError: one of them was settled by the export.
    """
    settled = [name for name in options if name not in _OPEN]
    if settled:
        raise OptionError(
            f"load takes no option {settled[0]!r}",
            "a package keeps the options that it was exported with",
            f"leave it out, or export with it; open are {', '.join(_OPEN)}",
        )


def _check(inner: str | None, libraries: Sequence[str]) -> None:
    """Arguments of :func:`load` that are no options of the backend.

    Raises:
        OptionError: a bad value.
    """
    if inner is not None and inner not in INNERS:
        raise OptionError(f"Bad value for inner: got {inner!r}", "", f"Allowed: {', '.join(map(repr, INNERS))}")
    if isinstance(libraries, str) or not all(isinstance(name, str) and name.isidentifier() for name in libraries):
        raise OptionError(
            f"Bad value for libraries: got {libraries!r}", "it is a list of names", 'write e.g. libraries=("mylib",)'
        )


def _open_with_others(wanted: Wanted, session: Session, asked: Options) -> Part:
    """This rank's part, if every rank could open its own and all communicate in one order.

    Raises:
        OptionError, PackageError: on every rank.
    """
    part: Part | None = None
    problem: StreamFusionError | None = None
    try:
        if asked.transport not in ("auto", "shm", "c10d"):
            from sfcompile.device import refuse_transport  # loads the generator, which packages do without

            refuse_transport(torch.device("cpu"), asked.transport)
        session.reconfigure(asked.transport, asked.timeout_s)
        part = open_part(wanted, session.rank, session.topology.num_ranks)
    except StreamFusionError as error:
        problem = error
        error.on_every_rank = True
    order = [] if part is None else part.order
    everyone = session.exchange(("" if problem is None else str(problem), order), "load a package")
    if problem is not None:
        raise problem
    assert part is not None
    for other, (text, theirs) in enumerate(everyone):
        what = ""
        if text:
            what = f"rank {other} cannot load {wanted.path}: {text.splitlines()[0]}"
        elif len(theirs) != len(order) or theirs != everyone[0][1]:
            what = f"the graphs of rank 0 and rank {other} in {wanted.path} do not communicate in the same order"
        if what:
            refusal = PackageError(
                what, "a package runs on all of its ranks or on none", "mend it there", rank=session.rank
            )
            refusal.on_every_rank = True
            raise refusal
    return part


def open_part(wanted: Wanted, rank: int, ranks: int) -> Part:
    """A rank's part; whatever is wrong with the package is a PackageError."""
    with _only_ours(wanted.path):
        return Part(wanted, rank, ranks)


@contextmanager
def _only_ours(path: Path) -> Iterator[None]:
    """What a package makes others raise is a PackageError."""
    try:
        yield
    except StreamFusionError:
        raise
    except Exception as error:
        raise PackageError(
            f"{path} does not describe itself as a package should ({type(error).__name__}: {str(error)[:500]})",
            "it was changed by hand, or another version wrote it",
            "export the model again",
        ) from error


class Part:
    """One rank's part of a package, read, checked and built; nothing collective happens before :meth:`finish`."""

    def __init__(self, wanted: Wanted, rank: int, ranks: int) -> None:
        self.package = package = Package(wanted.path, wanted.verify)
        self.manifest = manifest = package.manifest
        self.rank = rank
        _check_versions(wanted.path, manifest)
        check_manifest(manifest)
        if manifest["ranks"] != ranks:
            raise PackageError(
                f"{wanted.path} is for {manifest['ranks']} ranks, and {ranks} run",
                "its graphs and schedules are those of that many ranks",
                f"start {manifest['ranks']} ranks (sfcompile run --ranks {manifest['ranks']} script.py), or export for "
                f"topology '1x{ranks}'",
            )
        number = manifest["graphs"][rank]
        self._aoti = f"aoti/{number}.pt2"
        self.inner = self._choose_inner(wanted)
        data = table(package.json(f"graphs/{number}.json"), "a graph")
        constants = read_tensors(package.memory, *package.place("constants.safetensors"), f"constants of {wanted.path}")
        prefix = f"{number}/"
        own = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
        self._facts = entries(data.get("inputs"), "the inputs of a graph")
        self._check_inputs()
        self.calls = graph_from_json(data, own, wanted.libraries)
        self.programs = self._schedules(ranks)
        outputs, self.order = check_fit(self.calls, self._facts, self.programs, rank)
        self._check_outputs(outputs)
        weights = self._read_weights(wanted)
        self.plan = package.read("plan.txt").decode()
        self.model = LoadedModel(manifest, self.plan, weights)

    def _choose_inner(self, wanted: Wanted) -> str:
        """What runs the graph.

        Raises:
            PackageError: native code that nobody asked for, or that does not run here.
        """
        path, inner = wanted.path, wanted.inner or str(self.manifest["inner"])
        if inner == "aoti" and wanted.inner is None:
            raise PackageError(
                f"{path} was exported with inner='aoti': it holds native code, which can do whatever its maker wanted",
                "a package is data unless you say otherwise, and another way to run it may take minutes to compile",
                "if you trust its maker: sfcompile.load(path, inner='aoti'); else inner='auto' runs its graph",
            )
        if inner == "aoti" and self._aoti not in self.package.names:
            raise PackageError(
                f"{path} holds no compiled objects", "it was exported without inner='aoti'", "load it with inner='auto'"
            )
        if inner == "aoti" and self.manifest["native"] != processor():
            raise PackageError(
                f"{path} holds objects compiled for {self.manifest['native']}, and this is {processor()}",
                "native code runs on the kind of processor that it was compiled for",
                "load it with inner='auto' or 'eager', or export it on such a machine",
            )
        return inner

    def _check_inputs(self) -> None:
        """What the graph takes is what the manifest will give it."""
        for facts in self._facts:
            check_facts(facts, "an input of a graph")
        known = {"input": self.manifest["signature"]["tensors"], "weight": self.manifest["weights"]["tensors"]}
        said = [known[kind][source] for kind, source in self.manifest["placeholders"]]
        keys = ("shape", "stride", "dtype")
        if [[facts[key] for key in keys] for facts in said] != [[facts[key] for key in keys] for facts in self._facts]:
            raise PackageError(
                f"{self.package.path}: the graph takes other tensors than the manifest names", "it was changed by hand",
                "export the model again",
            )  # fmt: skip

    def _check_outputs(self, outputs: Sequence[Geometry]) -> None:
        """What the graph gives is what the manifest will make of it: the result, then the inputs' new values."""
        written = self.manifest["written"]
        kept = len(outputs) - len(written)
        if kept < 0:
            raise refused(f"a graph gives {len(outputs)} values and {len(written)} are to be written")
        for place, (shape, dtype) in zip(written, outputs[kept:], strict=True):
            facts = self._facts[place]
            if (list(shape), dtype) != (facts["shape"], dtype_of(facts["dtype"])):
                raise refused(f"a graph writes {dtype}{list(shape)} to {facts['dtype']}{facts['shape']}")
        tensors = self.manifest["signature"]["tensors"]
        check_tree(self.manifest.get("result"), kept + len(tensors), "the result")

    def _schedules(self, ranks: int) -> dict[str, list[Schedule]]:
        data = table(self.package.json("schedules.json"), "the schedules")
        said, programs = entries(data["schedules"], "the schedules", SCHEDULES), table(data["programs"], "programs")
        mine = {name: entries(programs[name], "a program", SCHEDULES) for name in self.manifest["programs"][self.rank]}
        used = {integer(index, "a schedule", 0, len(said) - 1) for sites in mine.values() for index in sites}
        built = {index: schedule_from_json(said[index], ranks) for index in used}
        return {name: [built[index] for index in sites] for name, sites in mine.items()}

    def _read_weights(self, wanted: Wanted) -> dict[str, torch.Tensor]:
        entry = self.manifest["weights"]
        if entry["file"] is None and wanted.weights is None:
            source = f"weights of {self.package.path}"
            held = read_tensors(self.package.memory, *self.package.place("weights.safetensors"), source)
        else:
            held = self._read_beside(wanted, entry)
        weights = {}
        for name, facts in entry["tensors"].items():
            have = held.get(name)
            said = None if have is None else (str(have.dtype).removeprefix("torch."), list(have.shape))
            if have is None or said != (facts["dtype"], facts["shape"]):
                raise PackageError(
                    f"weight {name} must be {facts['dtype']}{facts['shape']}, the file has {said or 'no such name'}",
                    "it does not belong to this package",
                    "name the right file: sfcompile.load(path, weights=...)",
                )
            weights[name] = with_strides(have, tuple(facts["stride"]))
        return weights

    def _read_beside(self, wanted: Wanted, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of the file that the caller names, or that the package names and that lies beside it."""
        path = wanted.weights or beside(self.package.path, entry["file"])
        with open_regular(path, follow=wanted.weights is not None) as file:
            if wanted.verify and "sha256" in entry and file_hash(file) != entry["sha256"]:
                raise PackageError(
                    f"{path} is not the file that {self.package.path} was exported with: its hash differs",
                    "other weights would give other results",
                    "name the right file, or export again",
                )
            memory = map_open(file, path)
        return read_tensors(memory, 0, len(memory), str(path))

    def finish(self, session: Session | None) -> LoadedModel:
        """Register the programs and make the local graph's callable; collective."""
        if session is not None:
            engines = self._engines(session)
            for program, schedules in self.programs.items():
                session.load(program, schedules, engines.get(program))
        self.model.run = self._inner()
        self.model.session, self.model.name = session, f"package {self.package.digest}"
        if session is not None:
            self.model.draws = any(call_draws(call.target, call.args, call.kwargs) for call in self.calls.calls)
            if self.manifest["inputs"] == "rank0":
                self.model.shared = self._shared_inputs(session)
            session.meet()
        return self.model

    def _shared_inputs(self, session: Session) -> SharedInputs:
        """Collective: what gives every rank rank 0's inputs, and what the graph reads beside them."""
        tensors = self.manifest["signature"]["tensors"]
        facts = [(tuple(entry["shape"]), dtype_of(entry["dtype"])) for entry in tensors]
        facts += [(tuple(tensor.shape), tensor.dtype) for tensor in self.model.beside(whole=True)]
        shared = SharedInputs(self.model.name, facts, session.topology.num_ranks, torch.device("cpu"))
        session.load(shared.program, shared.schedules)
        return shared

    def _engines(self, session: Session) -> dict[str, list[Any]]:
        attention = self.manifest["attention"]
        if attention != "triton":
            return {}
        from sfcompile.device import engines_for  # loads the generator, which other packages do without

        asked = Options.from_dict({"attention": attention})
        return engines_for(self.programs, torch.device("cpu"), session, asked)[0]

    def _inner(self) -> Callable[..., Any]:
        if self.inner == "eager":
            return self.calls.runner()
        if self.inner == "aoti":
            from sfcompile.torch_private import aoti_load

            # torch's loader unpacks the file to a folder of its own.
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "graph.pt2"
                path.write_bytes(self.package.read(self._aoti))
                return aoti_load(path)
        from sfcompile.lowering.inner import run_inner, runs_eagerly
        from sfcompile.torch_private import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            inputs = [empty_of(facts) for facts in self._facts]
        asked = Options.from_dict({"inner": self.inner})
        return (
            self.calls.runner()
            if runs_eagerly(inputs, asked)
            else run_inner(self.calls.as_module(), inputs, mode, asked)
        )


def _check_versions(path: Path, manifest: Mapping[str, Any]) -> None:
    written = table(table(manifest, "the manifest").get("versions"), "versions")
    here = {"sfcompile": __version__, "torch": _minor(torch.__version__)}
    for name, version in here.items():
        have = str(written.get(name))
        if (_minor(have) if name == "torch" else have) != version:
            raise PackageError(
                f"{path} was exported with {name} {have}, and this is {name} {version}",
                "operators and schedules may differ between versions",
                f"install {name} {have}, or export the model again",
            )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
