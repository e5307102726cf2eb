"""``sfcompile.export``: every rank's program in one file, made in one process with no GPU and no ranks.

The model is traced once and nothing is computed (traced.py); the passes then run for every rank. What is written is
what a compile would have run: the same captured graph, plan and passes, so a loaded package gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import Captured
from sfcompile.errors import InternalError, OptionError, PackageError
from sfcompile.lowering.rank_graph import compile_alike, run_passes
from sfcompile.one_style import check_model, merged
from sfcompile.options import WEIGHTS, Options
from sfcompile.package.disk import file_hash, open_regular, refusing, writing
from sfcompile.package.file import PackageWriter, processor, to_json
from sfcompile.package.graph import empty_of, graph_from_json, graph_to_json, libraries_of, tensor_facts
from sfcompile.package.manifest import INNERS
from sfcompile.package.schedules import schedule_to_json
from sfcompile.package.tensors import map_open, read_tensors, write_tensors
from sfcompile.package.traced import Traced, trace
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.topology import Topology
from sfcompile.sharded_weights import refuse_shares
from sfcompile.torch_private import aoti_compile
from sfcompile.version import __version__

log = logging.getLogger("sfcompile")

INSIDE = "inside"


def export(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "",
    *,
    topology: Topology | str,
    weights: str | os.PathLike[str] = INSIDE,
    options: Mapping[str, Any] | None = None,
    **spelled: Any,
) -> Path:
    """Write a package that runs ``model`` on the ranks of a topology, without the model's source and without a trace.

    Args:
        model: in eval mode. On the meta device only if ``weights`` names a file that holds its values.
        args, kwargs: what it is called with; only shapes and dtypes of tensors matter, everything else is a constant.
        path: the file to write.
        topology: "2x4", "4x8:a100-efa", a file or a Topology: as many ranks as will run.
        weights: "inside", or a safetensors file: used as it is if it exists (and holds every weight by its name in
            ``model.state_dict()``), else written. It is found beside the package, under its own name, or where
            ``sfcompile.load(weights=...)`` says.
        options: those of the backend, as a dict or ``spelled`` as keywords; ``inner`` may also be "aoti": the local
            graphs are compiled now, to native code for this machine's kind of processor (needs a C++ compiler).

    Returns:
        The path.

    Raises:
        OptionError: a bad option, one that is given twice, or no path.
        UnsupportedError: the model has a graph break, keeps state, or calls what no package can hold.
        PackageError: a file cannot be written, or ``weights`` does not fit the model.
    """
    if weights in WEIGHTS:
        raise OptionError(
            f"weights={weights!r} at an export",
            "there it names a safetensors file; ranks of a machine share the pages of that file in any case",
            "leave it out, or name a file",
        )
    if not os.fspath(path):
        raise OptionError("export is not told where to write", "", 'say path="model.sf"')
    check_model(model)
    chosen = merged(options, spelled, {})
    inner = chosen.pop("inner", "auto")
    asked, where = _asked(topology, inner, chosen)
    refuse_shares(model)
    traced = trace(model, args, kwargs or {})
    ranks = compile_ranks(traced.captured, where, asked)
    with PackageWriter(Path(path)) as out:
        manifest = traced.as_json(model) | {
            "versions": {"sfcompile": __version__, "torch": torch.__version__},
            "ranks": where.num_ranks,
            "machine_of": list(where.machine_of),
            "topology": where.to_toml(),
            "inner": inner,
            "attention": asked.attention,
            "inputs": asked.inputs,
            "native": processor() if inner == "aoti" else None,
            "weights": _write_weights(out, traced, weights),
        }
        manifest |= _write_ranks(out, ranks, traced, inner == "aoti")
        if asked.attention == "triton":
            _write_kernels(out, ranks, where)
        out.finish(manifest)
    return Path(path)


def _asked(topology: Topology | str, inner: Any, options: Mapping[str, Any]) -> tuple[Options, Topology]:
    """The options as the backend reads them, and the ranks that will run."""
    if inner not in INNERS:
        allowed = ", ".join(map(repr, INNERS))
        raise OptionError(f"Bad value for option 'inner': got {inner!r}", "", f"Allowed: {allowed}")
    if isinstance(topology, str) and topology == "auto":
        raise OptionError(
            "export needs a topology, not 'auto'", "no ranks run from which it could be found", 'write e.g. "1x4"'
        )
    asked = Options.from_dict({"topology": topology, "inner": "auto" if inner == "aoti" else inner, **options})
    where = topology if isinstance(topology, Topology) else Topology.parse(topology)
    asked.check_world(where.num_ranks)
    return asked, where


# ---------------------------------------------------------------------- ranks


def compile_ranks(captured: Captured, topology: Topology, asked: Options) -> list[Compiled | None]:
    """Every rank's program; [None] for one rank, which runs the captured graph itself."""
    if topology.num_ranks == 1:
        return [None]

    def everyone(split_batch: bool) -> list[Compiled]:
        return [
            run_passes(captured, topology, rank, asked, lambda plan: plan(), split_batch, dump=rank == 0)
            for rank in range(topology.num_ranks)
        ]

    ranks = compile_alike(everyone, lambda ranks: [rank.order for rank in ranks])
    return [*ranks]


def _write_ranks(out: PackageWriter, ranks: Sequence[Compiled | None], traced: Traced, aoti: bool) -> dict[str, Any]:
    """Graphs, schedules and plan; the manifest's part about them. Ranks with equal graphs share one."""
    texts: dict[bytes, int] = {}
    programs: dict[str, list[int]] = {}
    known: dict[bytes, int] = {}
    constants: dict[str, torch.Tensor] = {}
    graph_of, programs_of = [], []
    for compiled in ranks:
        gm = traced.captured.gm if compiled is None else compiled.gm
        data, own = graph_to_json(gm)
        # A constant may differ between ranks (token positions): it is part of what makes graphs equal.
        key = to_json([data, {name: hashlib.sha256(_bytes(value)).hexdigest() for name, value in own.items()}])
        if key not in texts:
            index = texts[key] = len(texts)
            _check_readable(data, own)
            out.add_json(f"graphs/{index}.json", data)
            constants |= {f"{index}/{name}": value for name, value in own.items()}
            if aoti:
                _write_aoti(out, index, gm, data["inputs"])
        graph_of.append(texts[key])
        programs_of.append([] if compiled is None else list(compiled.programs))
        for program, schedules in ({} if compiled is None else compiled.programs).items():
            sites = [known.setdefault(to_json(schedule_to_json(schedule)), len(known)) for schedule in schedules]
            if programs.setdefault(program, sites) != sites:
                raise InternalError(f"ranks disagree about program {program}", "its key should tell them apart")
    out.add_tensors("constants.safetensors", constants)
    out.add_json("schedules.json", {"schedules": [json.loads(text) for text in known], "programs": programs})
    report = ranks[0].report if ranks[0] is not None else None
    if report is not None:
        report.pass_seconds = {}  # the same export gives the same bytes
    out.add("plan.txt", (f"{report}\n" if report else "one rank: the whole graph\n").encode(), deflate=True)
    mesh = {"batch": report.batch, "ulysses": report.ulysses, "ring": report.ring} if report else {}
    return {
        "graphs": graph_of,
        "programs": programs_of,
        "mesh": mesh,
        "plan": report.headline if report else "one rank",
    }


def _check_readable(data: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> None:
    """What is written can be loaded; who loads it must name the libraries that it needs."""
    libraries = libraries_of(data)
    graph_from_json(json.loads(to_json(data)), constants, libraries)
    if libraries:
        log.warning("the package calls operators of %s: load it with libraries=%r", ", ".join(libraries), libraries)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write_aoti(out: PackageWriter, index: int, gm: fx.GraphModule, inputs: Sequence[Mapping[str, Any]]) -> None:
    with refusing(Path(tempfile.gettempdir()) / "graph.pt2"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.pt2"
        aoti_compile(gm, [empty_of(facts) for facts in inputs], path)
        with path.open("rb") as file:
            out.add_file(f"aoti/{index}.pt2", file)


def _write_kernels(out: PackageWriter, ranks: Sequence[Compiled | None], topology: Topology) -> None:
    """The generated kernels of every attention, as source and, where Triton is installed, as cubins."""
    kernels: dict[str, bytes] = {}
    for compiled in ranks[:1]:
        if compiled is not None:
            kernels |= compiled.kernels(topology.machine_of)
    for name, data in kernels.items():
        out.add(f"kernels/{name}", data, deflate=True)


# ---------------------------------------------------------------------- weights


def _write_weights(out: PackageWriter, traced: Traced, weights: str | os.PathLike[str]) -> dict[str, Any]:
    """Weights inside or beside; the manifest's part about them."""
    facts = {name: tensor_facts(tensor) for name, tensor in traced.weights.items()}
    meta = [name for name, tensor in traced.weights.items() if tensor.is_meta]
    if weights == INSIDE:
        if meta:
            raise PackageError(
                f"{len(meta)} weights are on the meta device ({meta[0]}, ...) and have no values",
                "weights='inside' would have to write them",
                "name the safetensors file that holds them: weights='model.safetensors'",
            )
        out.add_tensors("weights.safetensors", traced.weights)
        return {"file": None, "tensors": facts}
    path = Path(weights)
    if not path.exists():
        if meta:
            raise PackageError(
                f"{path} does not exist and {len(meta)} weights are on the meta device ({meta[0]}, ...)",
                "there are no values to write",
                "name a safetensors file that holds them",
            )
        with writing(path) as file:
            write_tensors(file, traced.weights)
    with open_regular(path) as file:
        memory, digest = map_open(file, path), file_hash(file)
    held = read_tensors(memory, 0, len(memory), str(path))
    for name, tensor in traced.weights.items():
        have = held.get(name)
        wrong = have is None or have.shape != tensor.shape or have.dtype != tensor.dtype
        if have is None or wrong or (not tensor.is_meta and not _same(have, tensor)):
            raise PackageError(
                f"{path} does not hold weight {name} as the model has it",
                f"the model has {tensor.dtype} {list(tensor.shape)}, the file "
                + (
                    "nothing of that name"
                    if have is None
                    else f"{have.dtype} {list(have.shape)}" * wrong or "other values"
                ),
                "name the file that belongs to this model, or one that does not exist yet: it will be written",
            )
    return {"file": path.name, "sha256": digest, "tensors": facts}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _bytes(a) == _bytes(b)
