"""GPU ranks: which GPU a graph is on, what carries chunks between them, engines for the sites."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from sfcompile.codegen.engines.choice import choose_attention
from sfcompile.codegen.engines.cpu_engine import InterpreterEngine
from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.engines.transfers import ReleaseKernel, TellKernel, WaitKernel
from sfcompile.codegen.schedule.attention import AttentionSchedule
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.toolchain.device_state import fill_device_state, leave_device_state
from sfcompile.codegen.toolchain.nvshmem_bitcode import refuse_other_host, require_library
from sfcompile.errors import OptionError, StreamFusionError, UnsupportedError
from sfcompile.measuring.attention import attention_work, decide_attention
from sfcompile.measuring.auto import resolved
from sfcompile.options import ASSUMED, Options
from sfcompile.runtime.gpu.carriers import CARRIERS, choose_carrier
from sfcompile.runtime.gpu.device_run import DeviceEngine
from sfcompile.runtime.gpu.device_side import NvshmemSide
from sfcompile.runtime.gpu.message_side import MessageSide
from sfcompile.runtime.gpu.nccl import connect
from sfcompile.runtime.gpu.nvshmem import Nvshmem
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.gpu.streams import CudaSideStream
from sfcompile.runtime.gpu.symmetric import memory_maker
from sfcompile.runtime.gpu.symmetric_side import SymmetricSide
from sfcompile.runtime.gpu.together import together
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.engine import Engine
from sfcompile.runtime.rank.session import Session, sessions
from sfcompile.runtime.wires.c10d import PairedTransport

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


def refuse_transport(device: torch.device, transport: str) -> None:
    """Before a session settles for a transport, which it keeps: that it reaches between ranks on such devices.

    Raises:
        OptionError: it does not.
    """
    if device.type != "cuda" and transport in CARRIERS:
        raise OptionError(
            f"transport={transport!r} with CPU ranks",
            "it moves data between GPUs, and the model's inputs are on the CPU",
            "use transport='auto', or move the model to GPUs",
        )
    if device.type == "cuda" and transport not in ("auto", *CARRIERS):
        raise OptionError(
            f"transport={transport!r} with GPU ranks",
            "shared memory, TCP and gloo serve CPU ranks",
            f"use transport='auto', or one of {', '.join(map(repr, CARRIERS))}",
        )


def start(device: torch.device, session: Session, asked: Options) -> None:
    """Collective: make the session ready for graphs on a device.

    Raises:
        UnsupportedError, HeapError: nothing that may carry chunks between GPU ranks starts.
    """
    if device.type == "cuda" and not session.side.on_gpu:
        with torch.inference_mode(False):  # words that were made in it could be written in it only
            chosen = choose_carrier(asked.transport, carriers_for(device, session, asked.timeout_s))
        chosen.side.carried_by = chosen.line
        session.use_side(chosen.side)


def carriers_for(
    device: torch.device, session: Session, timeout_s: float
) -> dict[str, Callable[[], NvshmemSide | MessageSide]]:
    """What starts each of CARRIERS for a session's ranks, all of them together."""
    rank, topology, share = session.rank, session.topology, session.exchange

    def nvshmem() -> NvshmemSide:
        together(share, "look for NVSHMEM", lambda: _refuse_nvshmem(session, topology))
        nvshmem = Nvshmem(rank, topology.num_ranks, device, share, limit_s=timeout_s)
        if topology.num_machines > 1:
            together(share, "compare NVSHMEM's libraries", lambda: refuse_other_host(nvshmem.version()))
        fill_device_state(nvshmem.bindings.cumodule_init, nvshmem.bindings.cumodule_finalize)

        def make_kernels(domains: Sequence[int]) -> tuple[ReleaseKernel, WaitKernel]:
            target = KernelTarget.of(device, domains)
            return ReleaseKernel(rank, topology.num_ranks, target, domains), WaitKernel(rank, target)

        def linked() -> None:
            refuse_other_host(nvshmem.version())
            KernelTarget.of(device, side.domains)

        side = NvshmemSide(
            nvshmem, topology, share, make_kernels, timeout_s, trouble=session.trouble, leave=leave_device_state
        )
        if len(set(side.domains)) > 1:  # of one machine too, if its GPUs do not map each other's memory
            try:
                together(share, "link NVSHMEM's device code", linked)
            except StreamFusionError:
                side.close(failed=False)
                raise
        return side

    def messages(members: Sequence[int], status: DeviceStatus) -> PairedTransport:
        group = connect(rank, members, device, timeout_s, share)
        return PairedTransport(rank, group, timeout_s, status.notice, status.words)

    def symm_mem() -> MessageSide:
        members, status = share(session.global_rank, "name their ranks"), DeviceStatus(rank, device, timeout_s)
        make_memory = memory_maker(rank, topology, members, device, timeout_s)

        def make_words() -> tuple[TellKernel, WaitKernel]:
            _require_triton("symm_mem", rank)
            return TellKernel(rank, KernelTarget(device)), WaitKernel(rank, KernelTarget(device))

        pairs = messages(members, status) if topology.num_machines > 1 else None
        stream = CudaSideStream(device)
        return SymmetricSide(
            rank, topology, device, status, pairs, make_memory, make_words, stream, share, session.trouble
        )

    def nccl() -> MessageSide:
        members, status = share(session.global_rank, "name their ranks"), DeviceStatus(rank, device, timeout_s)
        return MessageSide(rank, topology, device, status, messages(members, status), session.trouble)

    return {"nvshmem": nvshmem, "symm_mem": symm_mem, "nccl": nccl}


def _refuse_nvshmem(session: Session, topology: Topology) -> None:
    """What is known to be in the way before NVSHMEM is started.

    Raises:
        UnsupportedError: another group of ranks has started it, or there is no Triton.
        CodegenError: kernels that put between machines cannot be linked with its device code.
    """
    if any(other.side.on_gpu for other in sessions()):
        raise UnsupportedError(
            "a process in two groups of GPU ranks",
            "NVSHMEM joins a process to one job and cannot be started twice",
            "use one mesh for every model of a process on GPUs, or transport='nccl'",
            rank=session.rank,
        )
    _require_triton("nvshmem", session.rank)
    if topology.num_machines > 1:
        require_library()


def _require_triton(transport: str, rank: int) -> None:
    if find_spec("triton") is None:
        raise UnsupportedError(
            f"transport={transport!r} needs Triton, which is not installed",
            "waits and credits are generated kernels, whatever attends",
            "pip install 'triton>=3.6'",
            rank=rank,
        )


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
    shared: dict[Schedule, KernelEngine] = {}
    kinds: dict[Schedule, list[tuple[str, bool]]] = {}
    for program, schedules in programs.items():
        for site, schedule in enumerate(schedules):
            kinds.setdefault(schedule, []).append(masks.get((program, site), ("none", True)))

    def faster() -> tuple[str, str]:
        """Collective."""
        measure = resolved(asked.topology) != ASSUMED
        return decide_attention(session, device, attention_work(kinds), measure)

    chosen, why = _agreed_attention(asked.attention, sites, device, session, faster)
    line = f"{chosen} ({why})"

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


def _agreed_attention(
    asked: str,
    sites: Sequence[AttentionSite],
    device: torch.device,
    session: Session,
    faster: Callable[[], tuple[str, str]],
) -> tuple[str, str]:
    """Collective on GPUs: what choose_attention says, the same on every rank: GPUs of several kinds, or machines with
    other releases of Triton, may run different things.

    Raises:
        CodegenError, UnsupportedError: generated kernels were asked for, and some rank cannot have them.
    """
    hindrance, arch = session.side.no_kernels, KernelTarget(device).architecture

    def own() -> tuple[str, str]:
        return choose_attention(asked, sites, device.type, hindrance, lambda: ("triton", ""), arch)

    if device.type == "cpu" or hindrance or asked == "aten":
        return own()
    doing = "choose what runs the attentions"
    if asked != "auto":
        return together(session.exchange, doing, own)
    for rank, (chosen, why) in enumerate(session.exchange(own(), doing)):
        if chosen == "aten":
            return "aten", f"rank {rank}: {why}"
    return faster()


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
