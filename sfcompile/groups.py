"""Groups of ranks: which ranks of the job compute a model together, where they are not all of them.

``options={"mesh": ...}`` takes a torch DeviceMesh or ProcessGroup beside a dict of degrees. Its ranks then form a job
of their own: they have their own session, heap and connections, and several groups run side by side.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from sfcompile.errors import OptionError
from sfcompile.options import BATCH_AXIS, MESH_AXES, Options
from sfcompile.runtime.rank.process_group import ProcessWorld, group_name
from sfcompile.runtime.rank.session import Members, Session, get_session


def in_group(asked: Options) -> Options:
    """The options as they are inside the group that they name: degrees as a dict, the group's ranks in ``group``.

    Options without a group stay as they are. A folder for dumps becomes one of the group's own.

    Raises:
        OptionError: this rank is not in the group, the mesh has axes that mean nothing here, or its job has ended.
    """
    if asked.mesh is None or isinstance(asked.mesh, dict):
        return asked
    members, degrees = _members(asked.mesh)
    if dist.get_rank() not in members:
        raise OptionError(
            f"rank {dist.get_rank()} calls a model whose mesh holds ranks {', '.join(map(str, members))}",
            "only ranks of the mesh compute the model",
            "give each rank the mesh that it is in, e.g. init_device_mesh(...)['sp'], which differs by rank",
        )
    if members == tuple(range(dist.get_world_size())):
        return replace(asked, mesh=degrees)
    dump = None if asked.dump is None else asked.dump / group_name(members)
    return replace(asked, mesh=degrees, group=members, dump=dump)


def world_size(asked: Options) -> int:
    """How many ranks compute a model: the group, or the whole job as a process group or torchrun says."""
    if asked.group is not None:
        return len(asked.group)
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def session_for(asked: Options) -> Session:
    """This process's session among the ranks that the options name; collective there at the first call."""
    return get_session(lambda: ProcessWorld(asked.transport, asked.timeout_s, asked.group), asked.group)


def _members(mesh: Any) -> tuple[Members, dict[str, int] | None]:
    """The ranks of a mesh or process group, and the degrees that the mesh's axes give."""
    if not dist.is_initialized():
        raise OptionError(
            "options={'mesh': ...} names a mesh or group of a job that has ended",
            "torch.distributed.destroy_process_group() was called, or never init_process_group()",
            "make the mesh in the job that runs the model",
        )
    if isinstance(mesh, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(mesh)), None
    members = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    if mesh.ndim == 1:
        return members, None
    names, known = mesh.mesh_dim_names or (), {*MESH_AXES, BATCH_AXIS}
    if len(names) != mesh.ndim or not set(names) <= known:
        raise OptionError(
            f"the device mesh has {mesh.ndim} axes, named {', '.join(names) or 'nothing'}",
            f"a mesh of several axes gives their degrees, by the names {', '.join(sorted(known))}",
            "hand in the submesh of the ranks that share a sample, e.g. mesh['sp'], or name the axes so",
        )
    sizes = dict(zip(names, mesh.mesh.shape, strict=True))
    batch = {BATCH_AXIS: sizes[BATCH_AXIS]} if BATCH_AXIS in sizes else {}
    return members, {axis: sizes.get(axis, 1) for axis in MESH_AXES} | batch
