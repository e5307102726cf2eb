"""``sfcompile.load``: a package under torchrun becomes a callable, with no model source, no trace and no pickle.

Every rank reads, checks and builds its own part first; then the ranks tell each other whether that went well, so a file
that is bad on one machine is an error on every rank and not a hang.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

import sfcompile.runtime.rank.ops  # noqa: F401  registers the operators that graphs of packages call
from sfcompile import __version__
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.errors import OptionError, PackageError, StreamFusionError
from sfcompile.options import Options
from sfcompile.package.call import Signature, restore
from sfcompile.package.file import Package, file_hash, processor
from sfcompile.package.graph import empty_of, graph_from_json
from sfcompile.package.schedules import schedule_from_json
from sfcompile.package.tensors import map_file, read_tensors
from sfcompile.runtime.rank.process_group import ProcessWorld
from sfcompile.runtime.rank.session import existing_session, get_session
from sfcompile.torch_private import autocast_off

INNERS = ("auto", "inductor", "eager", "aoti")


class LoadedModel:
    """A package that is ready to run: call it as the model was called at the export.

    Attributes:
        manifest: what the package says of itself (JSON): versions, ranks, mesh, signature, members with their hashes.
        plan: the plan as text.
        run: the local graph: its placeholders' values to its outputs.
    """

    run: Callable[..., Any]

    def __init__(self, manifest: Mapping[str, Any], plan: str, weights: Mapping[str, torch.Tensor]) -> None:
        self.manifest = manifest
        self.plan = plan
        self._signature = Signature(manifest["signature"])
        self._result = manifest["result"]
        self._strides = [tuple(facts["stride"]) for facts in manifest["signature"]["tensors"]]
        self._slots = [
            (place, source) for place, (kind, source) in enumerate(manifest["placeholders"]) if kind == "input"
        ]
        self._values: list[Any] = [
            weights[source] if kind == "weight" else None for kind, source in manifest["placeholders"]
        ]
        self._written: list[int] = manifest["written"]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on inputs of the exported shapes. Collective: all ranks call with equal inputs and get all outputs.

        Dataclasses and named tuples of the result come as :class:`sfcompile.package.call.Record`.

        Raises:
            InputError: other shapes, dtypes, constants or arguments than at the export.
        """
        tensors = self._signature.tensors(args, kwargs)
        values = list(self._values)
        for place, source in self._slots:
            values[place] = _with_strides(tensors[source], self._strides[source])
        with autocast_off():  # the casts of autocast stand in the graph
            outputs = list(self.run(*values))
        kept = len(outputs) - len(self._written)
        for place, value in zip(self._written, outputs[kept:], strict=True):
            target = dict(self._slots).get(place)
            (values[place] if target is None else tensors[target]).copy_(value)
        return restore(self._result, [*outputs[:kept], *tensors])

    def __repr__(self) -> str:
        return f"LoadedModel({self.manifest['model']}, {self.manifest['ranks']} ranks: {self.manifest['plan']})"


def load(
    path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    inner: str | None = None,
    transport: str = "auto",
    timeout_s: float = 60.0,
    verify: bool = True,
) -> LoadedModel:
    """A package that :func:`sfcompile.export` wrote, ready on this rank. Collective.

    Args:
        weights: the safetensors file beside the package, if it was moved since.
        inner: what runs the local graph: "aoti" (if exported so), "inductor", "eager" or "auto"; None: as exported.
        transport, timeout_s: as in the backend's options.
        verify: check the hashes of everything that is read. Without it a damaged weight goes unnoticed.

    Raises:
        PackageError: damaged, changed, of another version, or made for another number of ranks; on every rank.
        RankMismatchError: ranks load different packages.
    """
    if inner is not None and inner not in INNERS:
        raise OptionError(f"Bad value for inner: got {inner!r}", "", f"Allowed: {', '.join(map(repr, INNERS))}")
    asked = Options.from_dict({"transport": transport, "timeout_s": timeout_s})
    session = existing_session()
    ranks = session.topology.num_ranks if session is not None else world_size()
    if ranks == 1:
        return _open(Path(path), 0, 1, weights, inner, verify).finish(None)
    session = get_session(lambda: ProcessWorld(asked.transport, asked.timeout_s))
    session.reconfigure(asked.transport, asked.timeout_s)
    part: _Part | None = None
    problem: StreamFusionError | None = None
    try:
        part = _open(Path(path), session.rank, ranks, weights, inner, verify)
    except StreamFusionError as error:
        problem = error
    found = session.exchange("" if problem is None else str(problem), "load a package")
    if problem is not None:
        raise problem
    for other, text in enumerate(found):
        if text:
            raise PackageError(
                f"rank {other} cannot load {path}: {text.splitlines()[0]}",
                "a package runs on all of its ranks or on none",
                "mend it there",
                rank=session.rank,
            )
    assert part is not None
    with session.guard():
        session.agree(
            f"package {part.package.digest} {part.inner}", {"package": f"{path} ({part.package.digest[:12]})"}
        )
        return part.finish(session)


def world_size() -> int:
    """How many ranks run, as a process group or torchrun says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _open(
    path: Path, rank: int, ranks: int, weights: str | os.PathLike[str] | None, inner: str | None, verify: bool
) -> _Part:
    """A part; whatever is wrong with the package is a PackageError."""
    try:
        return _Part(path, rank, ranks, weights, inner, verify)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PackageError(
            f"{path} does not describe itself as a package should ({type(error).__name__}: {error})",
            "it was changed by hand, or another version wrote it",
            "export the model again",
        ) from error


class _Part:
    """One rank's part of a package, read, checked and built; nothing collective happens here."""

    def __init__(
        self,
        path: Path,
        rank: int,
        ranks: int,
        weights: str | os.PathLike[str] | None,
        inner: str | None,
        verify: bool,
    ) -> None:
        self.package = package = Package(path, verify)
        self.manifest = manifest = package.manifest
        self.rank = rank
        _check_versions(path, manifest)
        if manifest["ranks"] != ranks:
            raise PackageError(
                f"{path} is for {manifest['ranks']} ranks, and {ranks} run",
                "its graphs and schedules are those of that many ranks",
                f"start {manifest['ranks']} ranks (sfcompile run --ranks {manifest['ranks']} script.py), or export for "
                f"topology '1x{ranks}'",
            )
        self.inner = inner or str(manifest["inner"])
        number = manifest["graphs"][rank]
        self._aoti = f"aoti/{number}.pt2"
        if self.inner == "aoti" and self._aoti not in package.names:
            raise PackageError(
                f"{path} holds no compiled objects", "it was exported without inner='aoti'", "load it with inner='auto'"
            )
        if self.inner == "aoti" and manifest["native"] != processor():
            raise PackageError(
                f"{path} holds objects compiled for {manifest['native']}, and this is {processor()}",
                "native code runs on the kind of processor that it was compiled for",
                "load it with inner='auto' or 'eager', or export it on such a machine",
            )
        data = package.json(f"graphs/{number}.json")
        constants = read_tensors(package.memory, *package.place("constants.safetensors"), f"constants of {path}")
        prefix = f"{number}/"
        own = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
        self._facts = data["inputs"]
        self.gm: fx.GraphModule = graph_from_json(data, own)
        self.programs = self._schedules(ranks)
        self._weights = self._read_weights(None if weights is None else Path(weights), verify)
        self.plan = package.read("plan.txt").decode()
        self.model = LoadedModel(manifest, self.plan, self._weights)
        self._check_inputs()

    def _check_inputs(self) -> None:
        """What the graph takes is what the manifest will give it."""
        given = {"input": self.manifest["signature"]["tensors"], "weight": self.manifest["weights"]["tensors"]}
        said = [given[kind][source] for kind, source in self.manifest["placeholders"]]
        keys = ("shape", "stride", "dtype")
        if [[facts[key] for key in keys] for facts in said] != [[facts[key] for key in keys] for facts in self._facts]:
            raise PackageError(
                f"{self.package.path}: the graph takes other tensors than the manifest names", "it was changed by hand",
                "export the model again",
            )  # fmt: skip

    def _schedules(self, ranks: int) -> dict[str, list[Schedule]]:
        data = self.package.json("schedules.json")
        mine = {name: data["programs"][name] for name in self.manifest["programs"][self.rank]}
        used = {index for sites in mine.values() for index in sites}
        built = {index: schedule_from_json(data["schedules"][index], ranks) for index in used}
        return {name: [built[index] for index in sites] for name, sites in mine.items()}

    def _read_weights(self, given: Path | None, verify: bool) -> dict[str, torch.Tensor]:
        entry = self.manifest["weights"]
        if entry["file"] is None and given is None:
            source = f"weights of {self.package.path}"
            held = read_tensors(self.package.memory, *self.package.place("weights.safetensors"), source)
        else:
            path = given or self.package.path.parent / entry["file"]
            memory = map_file(path)
            if verify and "sha256" in entry and file_hash(path) != entry["sha256"]:
                raise PackageError(
                    f"{path} is not the file that {self.package.path} was exported with: its hash differs",
                    "other weights would give other results",
                    "name the right file, or export again",
                )
            held = read_tensors(memory, 0, len(memory), str(path))
        found = {}
        for name, facts in entry["tensors"].items():
            have = held.get(name)
            said = None if have is None else (str(have.dtype).removeprefix("torch."), list(have.shape))
            if have is None or said != (facts["dtype"], facts["shape"]):
                raise PackageError(
                    f"weight {name} must be {facts['dtype']}{facts['shape']}, the file has {said or 'no such name'}",
                    "it does not belong to this package",
                    "name the right file: sfcompile.load(path, weights=...)",
                )
            found[name] = _with_strides(have, tuple(facts["stride"]))
        return found

    def finish(self, session: Any) -> LoadedModel:
        """Register the programs and make the local graph's callable; collective."""
        if session is not None:
            engines = self._engines(session)
            for program, schedules in self.programs.items():
                session.load(program, schedules, engines.get(program))
        self.model.run = self._inner()
        if session is not None:
            session.meet()
        return self.model

    def _engines(self, session: Any) -> dict[str, list[Any]]:
        attention = self.manifest["attention"]
        if attention != "triton":
            return {}
        from sfcompile.device import engines_for  # loads the generator, which other packages do without

        asked = Options.from_dict({"attention": attention})
        return engines_for(self.programs, torch.device("cpu"), session, asked)[0]

    def _inner(self) -> Callable[..., Any]:
        if self.inner == "eager":
            return self.gm.forward
        if self.inner == "aoti":
            from sfcompile.torch_private import aoti_load

            # torch's loader unpacks the file to a folder of its own.
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "graph.pt2"
                path.write_bytes(self.package.read(self._aoti))
                return aoti_load(path)
        from sfcompile.lowering.inner import run_inner
        from sfcompile.torch_private import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            inputs = [empty_of(facts) for facts in self._facts]
        return run_inner(self.gm, inputs, mode, Options.from_dict({"inner": self.inner}))


def _with_strides(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The tensor with the strides that its graph was compiled for; itself if it has them."""
    same = all(n < 2 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))
    if same:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _check_versions(path: Path, manifest: Mapping[str, Any]) -> None:
    written = manifest["versions"]
    here = {"sfcompile": __version__, "torch": _minor(torch.__version__)}
    for name, version in here.items():
        if (_minor(written[name]) if name == "torch" else written[name]) != version:
            raise PackageError(
                f"{path} was exported with {name} {written[name]}, and this is {name} {version}",
                "operators and schedules may differ between versions",
                f"install {name} {written[name]}, or export the model again",
            )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
