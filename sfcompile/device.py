"""GPU ranks: which GPU a graph is on, NVSHMEM started for the session, engines for its sites."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from sfcompile.codegen.engines.choice import choose_attention
from sfcompile.codegen.engines.cpu_engine import InterpreterEngine
from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.device_state import fill_device_state, leave_device_state
from sfcompile.errors import OptionError, UnsupportedError
from sfcompile.options import Options
from sfcompile.runtime.gpu.device_run import DeviceEngine
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.nvshmem import Nvshmem
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.engine import Engine
from sfcompile.runtime.rank.session import Session, sessions

log = logging.getLogger("sfcompile")
PRESET_OF = {"A100": "a100-efa", "H100": "h100-ib", "H200": "h100-ib", "A10": "a10-ethernet"}
"""GPUs by a part of their names -> preset whose constants describe them best."""


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Where a graph runs: the one GPU that inputs lie on, else the CPU.

    Raises:
        UnsupportedError: several GPUs, or another kind of device.
    """
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    others = {device for device in devices if device.type not in ("cpu", "meta", "cuda")}
    gpus = devices - others - {device for device in devices if device.type != "cuda"}
    if others or len(gpus) > 1:
        listed = ", ".join(sorted(map(str, others or gpus)))
        raise UnsupportedError(
            f"graph inputs are on {listed}, and several ranks run",
            "a rank computes on one GPU or on the CPU",
            "move the model and its inputs to one device per rank (torch.cuda.set_device(LOCAL_RANK))",
        )
    return next(iter(gpus), torch.device("cpu"))


def dtype_of(inputs: Sequence[Any]) -> torch.dtype:
    """What a graph computes in: the floating dtype of most elements of its inputs, weights among them; else fp32."""
    elements: Counter[torch.dtype] = Counter()
    for value in inputs:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            elements[value.dtype] += value.numel()
    return max(elements, key=lambda dtype: elements[dtype], default=torch.float32)


def start(device: torch.device, session: Session, asked: Options) -> None:
    """Collective: make the session ready for graphs on a device.

    Raises:
        OptionError: a transport that does not reach between such ranks.
        UnsupportedError, HeapError: NVSHMEM is missing or does not start.
    """
    if device.type != "cuda":
        if asked.transport == "nvshmem":
            raise OptionError(
                "transport='nvshmem' with CPU ranks",
                "NVSHMEM moves data between GPUs, and the model's inputs are on the CPU",
                "use transport='auto', or move the model to GPUs",
            )
        return
    if asked.transport not in ("auto", "nvshmem"):
        raise OptionError(
            f"transport={asked.transport!r} with GPU ranks",
            "GPU ranks store into each other's memory through NVSHMEM; shared memory and TCP serve CPU ranks",
            "use transport='auto' or 'nvshmem'",
        )
    if session.side.device.type == "cpu":
        if any(other.side.device.type == "cuda" for other in sessions()):
            raise UnsupportedError(
                "a process in two groups of GPU ranks",
                "NVSHMEM joins a process to one job and cannot be started twice",
                "use one mesh for every model of a process on GPUs",
                rank=session.rank,
            )
        nvshmem = Nvshmem(session.rank, session.topology.num_ranks, device, session.exchange)
        fill_device_state(nvshmem.bindings.cumodule_init, nvshmem.bindings.cumodule_finalize)

        def make_release(domains: Sequence[int]) -> ReleaseKernel:
            target = KernelTarget.of(device, domains)
            return ReleaseKernel(session.rank, session.topology.num_ranks, target, domains)

        side = NvshmemSide(
            nvshmem,
            session.topology,
            session.exchange,
            make_release,
            asked.timeout_s,
            trouble=session.trouble,
            leave=leave_device_state,
        )
        session.use_side(side)


def engines_for(
    programs: dict[str, list[Schedule]],
    device: torch.device,
    session: Session,
    asked: Options,
    masks: Mapping[tuple[str, int], tuple[str, bool]] = MappingProxyType({}),
) -> tuple[dict[str, list[Engine | DeviceEngine | None]], str]:
    """By program and site what runs it (None: the executor), and a line for the report that says what and why.

    Args:
        masks: by program and site the kind of mask that an attention's calls bring; left out: none.

    Raises:
        CodegenError, UnsupportedError: generated kernels were asked for and cannot be had.
    """
    every = [schedule for schedules in programs.values() for schedule in schedules]
    sites = [schedule.site for schedule in every if isinstance(schedule, AttentionSchedule)]
    chosen, why = choose_attention(asked.attention, sites, device.type)
    line = f"{chosen} ({why})"
    shared: dict[Schedule, KernelEngine] = {}
    kinds: dict[Schedule, list[tuple[str, bool]]] = {}
    for program, schedules in programs.items():
        for site, schedule in enumerate(schedules):
            kinds.setdefault(schedule, []).append(masks.get((program, site), ("none", True)))

    def engine(schedule: Schedule) -> Engine | DeviceEngine | None:
        if chosen == "aten":
            return None
        if device.type == "cpu":
            rank = schedule.members(session.rank)[0]
            return InterpreterEngine(schedule, rank) if isinstance(schedule, AttentionSchedule) else None
        domains = session.side.domains
        # Sites of one geometry share their kernels and workspace: calls of a stream follow each other.
        if schedule not in shared:
            target = KernelTarget.of(device, domains)
            shared[schedule] = KernelEngine(schedule, session.rank, target, domains, kinds[schedule])
        return shared[schedule]

    return {program: [engine(schedule) for schedule in schedules] for program, schedules in programs.items()}, line


def topology_for(device: torch.device, job: Topology) -> Topology:
    """The job's machines with constants for the GPU at hand, as far as they are known."""
    if device.type != "cuda":
        return job
    name = torch.cuda.get_device_name(device)
    preset = next((preset for part, preset in PRESET_OF.items() if part in name), None)
    if preset is None:
        preset = "h100-ib"
        log.warning("no constants are known for %s: planned as %s; give options={'topology': ...}", name, preset)
    return Topology.parse(f"1x1:{preset}").on(job.machine_of)
