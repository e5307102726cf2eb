"""Which device a graph runs on, what is refused there, which engines its sites get."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_ranks import Job, make_site
from random_sites import gather_site

from sfcompile import device
from sfcompile.codegen.engines.cpu_engine import InterpreterEngine
from sfcompile.codegen.engines.device_engine import KernelEngine
from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.schedule.exchange import build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.device import device_of, engines_for, refuse_transport, start, topology_for
from sfcompile.errors import CodegenError, OptionError, UnsupportedError
from sfcompile.options import Options
from sfcompile.runtime.gpu.message_side import MessageSide
from sfcompile.runtime.gpu.status import DeviceStatus
from sfcompile.runtime.program.topology import Topology

CPU = torch.device("cpu")
TORUS = Job("torus", 2, 1, 2, 1, make_site(8, 2)).schedule()
GATHER = build_exchange(gather_site(2), Mesh.of(Topology.grid(1, 2), 2, 1))


def tensor_on(*names: str) -> list[Any]:
    """What lies on devices that are not here."""
    return [SimpleTensor(torch.empty(1), name) for name in names]


class SimpleTensor(torch.Tensor):
    """A tensor that says it lies somewhere else."""

    @staticmethod
    def __new__(cls: type[SimpleTensor], data: torch.Tensor, name: str) -> SimpleTensor:
        elsewhere = torch.Tensor._make_subclass(cls, data)
        elsewhere.place = torch.device(name)  # type: ignore[attr-defined]
        return elsewhere

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place  # type: ignore[attr-defined,no-any-return]


def test_the_device_of_a_graph() -> None:
    assert device_of([torch.empty(2), 3, torch.empty(1, device="meta")]) == CPU
    assert device_of([torch.empty(2), *tensor_on("cuda:1", "cuda:1")]) == torch.device("cuda:1")
    with pytest.raises(UnsupportedError, match="cuda:0, cuda:1"):
        device_of(tensor_on("cuda:0", "cuda:1"))
    with pytest.raises(UnsupportedError, match="xpu:0"):
        device_of(tensor_on("xpu:0"))


def test_transports_that_do_not_reach_are_refused() -> None:
    session: Any = SimpleNamespace(side=SimpleNamespace(on_gpu=False))
    start(CPU, session, Options())
    refuse_transport(CPU, "auto")
    for transport in ("nvshmem", "symm_mem", "nccl"):
        with pytest.raises(OptionError, match=f"transport='{transport}' with CPU ranks"):
            refuse_transport(CPU, transport)
    for transport in ("shm", "c10d"):
        with pytest.raises(OptionError, match="Use transport='auto', or one of 'nvshmem', 'symm_mem', 'nccl'"):
            refuse_transport(torch.device("cuda"), transport)


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a GPU where there is none, and in a build of torch that knows none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (8, 0))


@pytest.mark.usefixtures("a100")
def test_engines_by_device_and_option() -> None:
    programs = {"p": [TORUS, GATHER, replace(TORUS)]}
    session: Any = SimpleNamespace(rank=1, side=SimpleNamespace(domains=(0, 0), no_kernels=""))
    engines, line = engines_for(programs, CPU, session, Options())
    assert engines == {"p": [None, None, None]} and line.startswith("aten (on CPU ranks")
    engines, line = engines_for(programs, CPU, session, Options(attention="triton"))
    assert isinstance(engines["p"][0], InterpreterEngine) and engines["p"][1] is None and line == "triton (asked for)"
    engines, line = engines_for(programs, torch.device("cuda"), session, Options(attention="aten"))
    assert engines == {"p": [None, None, None]}


@pytest.mark.usefixtures("a100")
def test_without_nvshmem_the_library_attends() -> None:
    side = MessageSide(0, Topology((0, 0)), CPU, DeviceStatus(0, CPU, 1.0), None, lambda: None)
    session: Any = SimpleNamespace(rank=0, side=side)
    engines, line = engines_for({"p": [TORUS]}, torch.device("cuda"), session, Options())
    assert engines == {"p": [None]} and line == "aten (no NVSHMEM carries what kernels put)"
    with pytest.raises(UnsupportedError, match="attention='triton', and no NVSHMEM"):
        engines_for({"p": [TORUS]}, torch.device("cuda"), session, Options(attention="triton"))


def test_a_carrier_is_started_and_its_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them fail here, where there is no GPU: in words, and one that is made to start is taken."""
    used: list[Any] = []
    session: Any = SimpleNamespace(
        rank=0, global_rank=0, side=SimpleNamespace(on_gpu=False), topology=Topology((0,)), use_side=used.append,
        exchange=lambda value, doing: [value],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    cuda = torch.device("cuda", 0)
    with pytest.raises(UnsupportedError, match="needs nvshmem4py"):
        start(cuda, session, Options(transport="nvshmem"))
    side, outside = SimpleNamespace(carried_by=""), list[bool]()
    made = {"nccl": lambda: outside.append(not torch.is_inference_mode_enabled()) or side}
    monkeypatch.setattr(device, "carriers_for", lambda *args: made)
    with torch.inference_mode():  # of a first call: what is made for all later ones is written to outside of it too
        start(cuda, session, Options())
    assert outside == [True] and used == [side] and side.carried_by == "nccl: messages between all ranks"


def test_gpus_that_do_not_map_each_others_memory_need_the_device_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one machine too: NVSHMEM is left before any program is loaded, so that another carrier can be tried."""
    closed, asked = list[bool](), list[str]()

    def refuse(host: str) -> None:
        asked.append(host)
        raise CodegenError("the host library is another", "", "")

    for domains, refused in (((0, 1), True), ((0, 0), False)):
        side = SimpleNamespace(domains=domains, close=lambda failed: closed.append(failed))
        bindings = SimpleNamespace(cumodule_init=None, cumodule_finalize=None)
        library = SimpleNamespace(version=lambda: "3.3.9", bindings=bindings)
        monkeypatch.setattr(device, "Nvshmem", lambda *args, library=library, **kwargs: library)
        monkeypatch.setattr(device, "NvshmemSide", lambda *args, side=side, **kwargs: side)
        monkeypatch.setattr(device, "fill_device_state", lambda *args: None)
        monkeypatch.setattr(device, "refuse_other_host", refuse)
        session: Any = SimpleNamespace(
            rank=0, global_rank=0, topology=Topology((0, 0)), exchange=lambda value, doing: [value] * 2, trouble=None
        )
        nvshmem = device.carriers_for(torch.device("cuda", 0), session, 5.0)["nvshmem"]
        if refused:
            with pytest.raises(CodegenError, match="the host library is another"):
                nvshmem()
        else:
            assert nvshmem() is side  # type: ignore[comparison-overlap]
    assert closed == [False] and asked == ["3.3.9"]


@pytest.mark.usefixtures("a100")
def test_sites_of_one_geometry_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def engine(schedule: Any, *args: Any, **kwargs: Any) -> KernelEngine:
        built.append((args, kwargs))
        return KernelEngine(schedule, 0, KernelTarget(CPU), (0, 0))

    asked: list[Any] = []

    def decide(session: Any, where: Any, work: Any, measure: bool) -> tuple[str, str]:
        asked.append(([entry[1:] for entry in work], measure))
        return "triton", "puts, waits"

    monkeypatch.setattr(device, "KernelEngine", engine)
    monkeypatch.setattr(device, "decide_attention", decide)
    monkeypatch.delenv("SFCOMPILE_LINKS", raising=False)  # tests assume links
    session: Any = SimpleNamespace(
        rank=0, side=SimpleNamespace(domains=(0, 0), no_kernels=""), exchange=lambda value, doing: [value] * 2
    )
    engines, line = engines_for({"p": [TORUS, GATHER, replace(TORUS)]}, torch.device("cuda"), session, Options())
    assert engines["p"][0] is engines["p"][2] and len(built) == 2 and line.startswith("triton (puts, waits")
    kinds = {("p", 0): ("key", True)}
    engines_for({"p": [TORUS, GATHER, replace(TORUS)]}, torch.device("cuda"), session, Options(), kinds)
    engines_for({"p": [TORUS]}, torch.device("cuda"), session, Options(topology="auto:assumed"))
    none, key = ("none", True), ("key", True)
    assert asked == [([(none, 2)], True), ([(key, 1), (none, 1)], True), ([(none, 1)], False)]
    assert [list(args[-1]) for args, _ in built[2:4]] == [[("key", True), ("none", True)], [("none", True)]]


def test_gpus_of_several_kinds_run_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank may not run, none runs, and none times it: timing is a step of all ranks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (8, 0))
    timed: list[Any] = []
    monkeypatch.setattr(device, "decide_attention", lambda *given: timed.append(given) or ("triton", "timed"))
    monkeypatch.setattr(device, "KernelEngine", lambda *given: given)
    session: Any = SimpleNamespace(rank=0, side=SimpleNamespace(domains=(0, 0), no_kernels=""))
    told: list[Any] = [("triton", ""), ("aten", "Triton 3.7.0 compiles kernels for sm_90 that read chunks too early")]

    def run(attention: str, other: Any) -> tuple[Any, str]:
        session.exchange = lambda value, doing: [value, other]
        return engines_for({"p": [TORUS]}, torch.device("cuda"), session, Options(attention=attention))

    engines, line = run("auto", told[1])
    assert engines == {"p": [None]} and line.startswith("aten (rank 1: Triton 3.7.0 compiles") and not timed
    assert run("auto", told[0])[1] == "triton (timed)" and len(timed) == 1
    assert run("triton", None)[1] == "triton (asked for)"
    with pytest.raises(UnsupportedError, match="rank 1: attention='triton', and Triton 3.7.0"):
        run("triton", ("attention='triton', and Triton 3.7.0 compiles kernels that read too early", "", ""))


def test_nvshmem_needs_triton_whatever_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    session: Any = SimpleNamespace(rank=0, topology=Topology((0, 0)), exchange=lambda value, doing: [value] * 2)
    with pytest.raises(UnsupportedError, match="transport='nvshmem' needs Triton"):
        device.carriers_for(torch.device("cuda", 0), session, 5.0)["nvshmem"]()


def test_constants_follow_the_gpus_name(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Topology((0, 0, 1, 1))
    assert topology_for(CPU, job) is job
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA A100-SXM4-40GB")
    known = topology_for(torch.device("cuda"), job)
    assert known.machine_of == job.machine_of
    assert known == Topology.parse("1x1:a100-efa").on(job.machine_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Some GPU")
    assert topology_for(torch.device("cuda"), job).flops_per_s > 1e13
