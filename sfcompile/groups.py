"""Groups of ranks: which ranks of the job compute a model together, where they are not all of them.

``options={"mesh": ...}`` takes a torch DeviceMesh or ProcessGroup beside a dict of degrees. Its ranks then form a job
of their own: they have their own session, heap and connections, and several groups run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import torch.distributed as dist

from sfcompile.errors import OptionError, RankMismatchError, StreamFusionError
from sfcompile.options import BATCH_AXIS, MESH_AXES, Options
from sfcompile.runtime.rank.process_group import ProcessWorld, group_name
from sfcompile.runtime.rank.session import Members, Session, existing_session, get_session, sessions


def in_group(asked: Options) -> Options:
    """The options as they are inside the group that they name: degrees as a dict, the group's ranks in ``group``.

    Options without a group stay as they are. A folder for dumps becomes one of the group's own.

    Raises:
        OptionError: this rank is not in the group, the mesh has axes that mean nothing here, or its job has ended.
    """
    if asked.mesh is None or isinstance(asked.mesh, dict):
        return asked
    members = ranks_of(asked.mesh)
    if dist.get_rank() not in members:
        raise OptionError(
            f"rank {dist.get_rank()} calls a model whose mesh holds ranks {', '.join(map(str, members))}",
            "only ranks of the mesh compute the model",
            "give each rank the mesh that it is in, e.g. init_device_mesh(...)['sp'], which differs by rank",
        )
    degrees = _degrees_of(asked.mesh)
    if members == tuple(range(dist.get_world_size())):
        return replace(asked, mesh=degrees)
    dump = None if asked.dump is None else asked.dump / group_name(members)
    return replace(asked, mesh=degrees, group=members, dump=dump)


def world_size(asked: Options) -> int:
    """How many ranks compute a model: the group, or the whole job as a process group or torchrun says.

    Raises:
        OptionError: torchrun's variable is no number.
    """
    if asked.group is not None:
        return len(asked.group)
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal() or int(said) < 1:
        raise OptionError(
            f"WORLD_SIZE={said!r} in the environment",
            "it is the number of ranks, which torchrun sets",
            "start the ranks with torchrun or sfcompile run, or unset it",
        )
    return int(said)


def session_for(asked: Options) -> Session:
    """This process's session among the ranks that the options name; collective there at the first call."""
    return get_session(lambda: ProcessWorld(asked.transport, asked.timeout_s, asked.group), asked.group)


def refuse(error: StreamFusionError, options: Mapping[str, Any] | None, described: dict[str, str]) -> NoReturn:
    """Before this rank has a session for what it was asked for: it refuses, and tells the ranks that wait for it, if it
    is known who they are.

    Args:
        options: as they were given.
        described: what is compared with the other ranks, in words.

    Raises:
        StreamFusionError: ``error``.
    """
    try:
        session = session_of_refused(options)
    except StreamFusionError as absent:
        raise error from absent
    if session is None:
        raise error
    with session.turn(), session.guard():
        refuse_together(error, session, described)


def refuse_together(error: StreamFusionError, session: Session, described: dict[str, str]) -> NoReturn:
    """Collective: where ranks agree on what they do, this one says that it refuses, so that nobody waits for it.

    What was compiled before goes on running. Ranks that do not refuse get a RankMismatchError that holds this one's.

    Raises:
        StreamFusionError: ``error``.
    """
    described = described | {"outcome": f"refused ({error.what})"}
    try:
        session.agree(f"refused: {error.what}", described)
    except RankMismatchError as mismatch:
        error.on_every_rank = mismatch.on_every_rank
        raise error from mismatch
    except StreamFusionError as absent:  # they are not there; what is wrong here is this rank's own
        raise error from absent
    error.on_every_rank = True
    raise error


def session_of_refused(options: Mapping[str, Any] | None) -> Session | None:
    """The session of the ranks that wait for this one, whose options were refused; None: it is not known who they are.

    Collective where this process has no session yet: the others make theirs in the same compile.

    Raises:
        StreamFusionError: they could not be reached.
    """
    asked = _readable(options) if isinstance(options, Mapping) else Options()
    if asked is None:
        return sessions()[0] if len(sessions()) == 1 else None
    return session_for(asked) if world_size(asked) > 1 else None


def _readable(options: Mapping[str, Any]) -> Options | None:
    """Of refused options what says where the other ranks are and how to reach them; None: nothing does."""
    values: dict[str, Any] = {}
    for key in ("mesh", "transport", "timeout_s"):
        with suppress(OptionError):
            values[key] = getattr(Options.from_dict({key: options[key]} if key in options else {}), key)
    mesh, named = values.pop("mesh", None), options.get("mesh")
    asked = Options(**values)
    if mesh is None or isinstance(mesh, dict):
        in_groups = bool(sessions()) and existing_session() is None
        unknown = mesh is None and named not in (None, "auto") and not isinstance(named, Mapping)
        return None if in_groups or unknown else asked
    try:
        members = ranks_of(mesh)
    except OptionError:
        return None
    if dist.get_rank() not in members:
        return None
    return asked if members == tuple(range(dist.get_world_size())) else replace(asked, group=members)


def ranks_of(mesh: Any) -> Members:
    """The ranks of a torch DeviceMesh or ProcessGroup, by their numbers in the whole job.

    Raises:
        OptionError: its job has ended.
    """
    if not dist.is_initialized():
        raise OptionError(
            "options={'mesh': ...} names a mesh or group of a job that has ended",
            "torch.distributed.destroy_process_group() was called, or never init_process_group()",
            "make the mesh in the job that runs the model",
        )
    if isinstance(mesh, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(mesh))
    return tuple(int(rank) for rank in mesh.mesh.flatten().tolist())


def _degrees_of(mesh: Any) -> dict[str, int] | None:
    """The degrees that a mesh's axes give; None: it has one axis, or is a process group."""
    if isinstance(mesh, dist.ProcessGroup) or mesh.ndim == 1:
        return None
    names, known = mesh.mesh_dim_names or (), {*MESH_AXES, BATCH_AXIS}
    if len(names) != mesh.ndim or not set(names) <= known:
        raise OptionError(
            f"the device mesh has {mesh.ndim} axes, named {', '.join(names) or 'nothing'}",
            f"a mesh of several axes gives their degrees, by the names {', '.join(sorted(known))}",
            "hand in the submesh of the ranks that share a sample, e.g. mesh['sp'], or name the axes so",
        )
    sizes = dict(zip(names, mesh.mesh.shape, strict=True))
    batch = {BATCH_AXIS: sizes[BATCH_AXIS]} if BATCH_AXIS in sizes else {}
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES} | batch
