"""``sfcompile doctor``: what this machine has, what ranks on it will use and why not the rest, and cures for problems.

Torch is imported when the command runs: the command line itself must stay quick. With ``--measure`` ranks are started
that measure what they compute and move, and write a topology file (measure.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sfcompile.commands.checks import check_writable
from sfcompile.commands.launch import check_places, launch, num_cores
from sfcompile.commands.models import positive
from sfcompile.commands.screen import show
from sfcompile.errors import StreamFusionError
from sfcompile.version import TORCH, __version__, torch_range

SHM = Path("/dev/shm")
SECRET = "SFCOMPILE_SECRET"
"""Of this variable a report, which is pasted into issues, says no more than how long it is."""
ROOM_BYTES = 1 << 30
"""Less room than this in /dev/shm is a problem: heaps of a few ranks and the loaders of a training job share it."""
TIMEOUT_S = 5.0
"""Longest wait for a helper program, in seconds: the checks together must stay quick."""
_NUMBERS = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``cure`` is the command that mends it; a finding with a cure is a problem."""

    area: str
    name: str
    value: str
    cure: str = ""

    @property
    def is_problem(self) -> bool:
        """Whether there is something to mend."""
        return bool(self.cure)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sfcompile doctor``."""
    parser.description = (
        "Versions, processors, links, memory; what ranks here will use and why not the rest; for each problem the "
        "command that mends it. The exit code is 1 if there is a problem. With --measure, ranks are started that "
        "measure what they compute and move, and write a topology file for options and --topology."
    )
    parser.add_argument("--measure", action="store_true", help="also measure links and compute, and write the file")
    parser.add_argument("--ranks", type=positive, default=2, help="processes that measure (default 2)")
    parser.add_argument(
        "--machines", type=positive, default=1, help="machines that the ranks believe they sit on (default 1)"
    )
    parser.add_argument("--out", type=Path, default=Path("cluster.toml"), help="the file (default cluster.toml)")


def run_doctor(args: argparse.Namespace) -> int:
    """``sfcompile doctor``: 0, 1 if there is a problem, or the exit code of the ranks that measured."""
    if args.measure:
        check_places(args.ranks, args.machines)
        check_writable(args.out, "--out")
    findings = examine()
    show(report(findings))
    sys.stdout.flush()
    problems = int(any(finding.is_problem for finding in findings))
    if not args.measure:
        print("\nlinks were not measured; say --measure [--ranks N] [--machines M]")
        return problems
    where = f"{args.ranks} ranks of this machine"
    if args.machines > 1:
        where += f", which believe they sit on {args.machines} machines"
    print(f"\nmeasuring {where}; on a cluster run torchrun ... -m sfcompile.commands.measure instead", flush=True)
    code = launch(["-m", "sfcompile.commands.measure", "--out", str(args.out.absolute())], args.ranks, args.machines)
    return code or problems


def examine() -> list[Finding]:
    """Every finding; a check that fails itself becomes one."""
    checks: list[Callable[[], list[Finding]]] = [
        versions, processors, gpus, links, memory, shared_memory, nvshmem, environment, choices,
    ]  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # a broken driver or package must not hide what else there is to say
            name = check.__name__.replace("_", " ")
            findings.append(Finding(name, "check failed", f"{type(error).__name__}: {error}"[:200]))
    return findings


def report(findings: Sequence[Finding]) -> str:
    """Findings by area, and at the end the problems with their cures."""
    lines: list[str] = []
    width = max((len(finding.name) for finding in findings), default=0)
    for area in dict.fromkeys(finding.area for finding in findings):
        lines.append(area)
        for finding in (f for f in findings if f.area == area):
            mark = "!" if finding.is_problem else " "
            first, *more = finding.value.splitlines() or [""]
            lines += [f" {mark} {finding.name:<{width}} {first}", *(f"   {'':<{width}} {line}" for line in more)]
    problems = [finding for finding in findings if finding.is_problem]
    lines.append("")
    if not problems:
        return "\n".join([*lines, "no problems found"])
    lines.append(f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    for finding in problems:
        lines += [f" ! {finding.name}: {finding.value.splitlines()[0]}", f"     {finding.cure}"]
    return "\n".join(lines)


# ---------------------------------------------------------------------- checks


def versions() -> list[Finding]:
    """Python and the packages that matter, with the ranges that are supported."""
    area = "versions"
    findings = [Finding(area, "sfcompile", __version__), Finding(area, "python", _python())]
    wanted = (
        ("torch", *TORCH, f"pip install '{torch_range()}'", True),
        ("triton", (3, 6), (3, 10), "pip install 'triton>=3.6,<3.10'", False),
        ("nvshmem4py-cu13", None, None, "", False),
        ("nvidia-nvshmem-cu13", None, None, "", False),
        ("diffusers", None, None, "", False),
        ("matplotlib", None, None, "", False),
    )
    for name, least, below, cure, needed in wanted:
        installed = _version(name)
        if installed is None:
            findings.append(Finding(area, name, "not installed", cure if needed else ""))
            continue
        numbers = _numbers(installed)
        outside = least is not None and below is not None and not least <= numbers < below
        span = f", supported: {_dots(least)} to below {_dots(below)}" if least and below else ""
        findings.append(Finding(area, name, installed + (span if outside else ""), cure if outside else ""))
    return findings


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def processors() -> list[Finding]:
    """The processor, its cores, and the compiler of Inductor's CPU code."""
    area = "processor"
    machine = platform.machine()
    direct = machine.lower() in ("x86_64", "amd64")
    more = "" if direct else ": no direct stores between ranks, their ordering rests on x86's"
    findings = [Finding(area, "kind", machine + more), Finding(area, "cores", str(num_cores()))]
    compiler = next((path for name in _compilers() if (path := shutil.which(name))), None)
    if compiler is None:
        cure = "apt-get install -y g++    (or conda install -c conda-forge cxx-compiler)"
        text = f"none of {', '.join(_compilers())}: local graphs of CPU ranks would run eagerly"
        return [*findings, Finding(area, "C++ compiler", text, cure)]
    said = _output([compiler, "--version"]).splitlines()
    return [*findings, Finding(area, "C++ compiler", f"{compiler}: {said[0] if said else 'says no version'}")]


def _compilers() -> list[str]:
    return list(dict.fromkeys([os.environ.get("CXX") or "g++", "g++", "clang++"]))


def gpus() -> list[Finding]:
    """GPUs that torch sees, and why it sees none although there are some."""
    import torch

    area = "GPUs"
    if torch.cuda.is_available():
        findings = []
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
            findings.append(Finding(area, f"GPU {index}", text))
        return findings + _kinds(torch) + _peers(torch)
    there = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not there:
        return [Finding(area, "GPUs", "none: ranks run on the CPU")]
    if torch.version.cuda is None:
        cure = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return [Finding(area, "GPUs", f"{len(there)} are there, but this torch is a CPU build", cure)]
    cure = "nvidia-smi    (it must list the GPUs; if not, install or reload the driver, or start with --gpus all)"
    text = f"{len(there)} are there, but CUDA {torch.version.cuda} does not start{_why_not_started(torch)}"
    return [Finding(area, "GPUs", text, cure)]


def _why_not_started(torch: Any) -> str:
    """What torch says of it: an old driver, say."""
    try:
        torch.cuda.init()
    except Exception as error:  # what a broken driver makes of it
        return f": {' '.join(str(error).split())}"[:300]
    return ""


def _kinds(torch: Any) -> list[Finding]:
    names = Counter(torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count()))
    if len(names) < 2:
        return []
    listed = ", ".join(f"{count} x {name}" for name, count in names.items())
    return [Finding("GPUs", "kinds", f"{listed}: ranks share the work evenly, so all go at the pace of the slowest")]


def _peers(torch: Any) -> list[Finding]:
    count = torch.cuda.device_count()
    if count < 2:
        return []
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    direct = sum(bool(torch.cuda.can_device_access_peer(a, b)) for a, b in pairs)
    text = f"{direct} of {len(pairs)} pairs of GPUs map each other's memory"
    table = _output(["nvidia-smi", "topo", "-m"])
    return [Finding("GPUs", "peer access", text), *([Finding("GPUs", "links", table)] if table else [])]


def links(system: Path = Path("/sys/class")) -> list[Finding]:
    """Network interfaces and InfiniBand cards, with the speed that they report."""
    area = "links"
    findings = []
    for path in sorted((system / "net").glob("*")):
        if path.name == "lo" or _read(path / "operstate") == "down":
            continue
        speed = _read(path / "speed")
        known = speed.isdecimal() and int(speed) > 0
        findings.append(Finding(area, path.name, f"{int(speed) / 1000:g} Gbit/s" if known else "speed unknown"))
    for path in sorted((system / "infiniband").glob("*")):
        rates = [_read(port / "rate") for port in sorted(path.glob("ports/*"))]
        findings.append(Finding(area, path.name, ", ".join(filter(None, rates)) or "InfiniBand, rate unknown"))
    return findings or [Finding(area, "network", "no interface besides lo: one machine only")]


def memory() -> list[Finding]:
    """Main memory, and how much of it may be locked (InfiniBand registers memory)."""
    area = "memory"
    text = _read(Path("/proc/meminfo"))
    sizes = {name: int(kib) for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    findings = [
        Finding(area, "RAM", f"{sizes['MemAvailable'] / 2**20:.1f} of {sizes['MemTotal'] / 2**20:.1f} GiB available")
    ] * ({"MemAvailable", "MemTotal"} <= set(sizes))
    if not any(Path("/sys/class/infiniband").glob("*")):
        return findings
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit in (resource.RLIM_INFINITY, -1):
        return [*findings, Finding(area, "locked memory", "unlimited")]
    cure = "ulimit -l unlimited    (in a container: docker run --ulimit memlock=-1)"
    text = f"at most {limit / 2**20:.0f} MiB: InfiniBand cannot register a heap"
    return [*findings, Finding(area, "locked memory", text, cure)]


def shared_memory(folder: Path = SHM) -> list[Finding]:
    """Room for the heaps of CPU ranks."""
    area = "shared memory"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        cure = f"mount -t tmpfs -o size=8g tmpfs {folder}"
        return [Finding(area, str(folder), f"cannot be used: {error}", cure)]
    text = f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free"
    cure = ""
    if usage.free < ROOM_BYTES:
        text += ": heaps may not fit"
        cure = f"mount -o remount,size=8g {folder}    (in a container: docker run --shm-size=8g)"
    return [Finding(area, str(folder), text, cure)]


def nvshmem() -> list[Finding]:
    """NVSHMEM's packages, whether they fit Triton, and whether they load."""
    from sfcompile.codegen.toolchain.nvshmem_bitcode import refuse_pair, wheel

    area, findings = "NVSHMEM", []
    has_gpus = _has_gpus()
    installed = wheel()
    cure = "pip install nvidia-nvshmem-cu13==3.4.5" if has_gpus else ""
    if installed is None:
        findings.append(Finding(area, "device library", "not installed", cure))
    else:
        triton = _version("triton")
        text, cure = f"{installed[0]} {installed[1]}", ""
        if triton is not None:
            try:
                refuse_pair(triton, installed[1])
            except StreamFusionError as error:
                text, cure = f"{text}: {error.what}", error.fix
        findings.append(Finding(area, "device library", text, cure))
    try:
        import nvshmem.core  # noqa: F401
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in ("nvshmem", "nvshmem.core")
        said = f"nvshmem4py does not load: {' '.join(str(error).split())}"[:160]
        cure = "pip install nvshmem4py-cu13" if missing else "pip install nvshmem4py-cu13 nvidia-nvshmem-cu13==3.4.5"
        findings.append(
            Finding(area, "host library", "nvshmem4py is not installed" if missing else said, cure if has_gpus else "")
        )
    else:
        findings.append(Finding(area, "host library", f"nvshmem4py {_version('nvshmem4py-cu13') or ''} loads"))
    return findings


def environment() -> list[Finding]:
    """What torchrun said, if this runs under it; whether gloo can find this machine."""
    area = "environment"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")
    ours = sorted(name for name in os.environ if name.startswith(("SFCOMPILE_", "NVSHMEM_", "GLOO_", "NCCL_")))
    said = {name: os.environ[name] for name in (*names, *ours) if name in os.environ}
    if SECRET in said:
        said[SECRET] = f"set, {len(said[SECRET].encode())} bytes"
    findings = [Finding(area, name, value) for name, value in said.items()]
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return findings
    try:
        address = _address()
        loop = " (loopback: with several machines set GLOO_SOCKET_IFNAME)" if address.startswith("127.") else ""
        findings.append(Finding(area, "host name", f"{socket.gethostname()} is {address}{loop}"))
    except OSError as error:
        cure = "export GLOO_SOCKET_IFNAME=eth0    (the interface that the other machines reach)"
        text = f"{socket.gethostname()} cannot be resolved ({error}): gloo will not find its address"
        findings.append(Finding(area, "host name", text, cure))
    return findings


def _address() -> str:
    return socket.gethostbyname(socket.gethostname())


def choices() -> list[Finding]:
    """What ``"auto"`` becomes on this machine, and why the other values do not."""
    import torch

    from sfcompile.codegen.engines.choice import choose_attention
    from sfcompile.codegen.engines.target import KernelTarget
    from sfcompile.commands.gpu_transport import gpu_transport

    area, device = "what ranks will use", "cuda" if _has_gpus() else "cpu"
    hindrance, arch = "", 0
    if device == "cuda":
        transport, hindrance = gpu_transport()
        kinds = [KernelTarget(torch.device(device, index)) for index in range(torch.cuda.device_count())]
        arch = max(target.architecture for target in kinds)  # one rank that may not run kernels decides for all
    elif platform.machine().lower() in ("x86_64", "amd64"):
        transport = "shm inside a machine, TCP between machines\nnot nvshmem: it moves data between GPUs, none here"
    else:
        transport = "c10d (gloo)\nnot shm: it needs an x86-64 processor; not nvshmem: it needs GPUs"
    attention, why = choose_attention("auto", [], device, hindrance, _faster_attention, arch)
    compiler = device == "cuda" or any(shutil.which(name) for name in _compilers())
    inner = "inductor" if compiler else "eager\nnot inductor: there is no C++ compiler"
    return [
        Finding(area, "transport", transport),
        Finding(area, "attention", f"{attention}: {why}"),
        Finding(area, "inner", inner),
    ]


def _faster_attention() -> tuple[str, str]:
    """What is known before any attention of a model can be timed."""
    import torch

    from sfcompile.codegen.toolchain.gpu_results import result_of

    gpu = torch.cuda.get_device_name()
    result = result_of(gpu)
    rates = "" if result is None else "; ".join(
        f"head size {size}: " + ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in of.items())
        for size, of in sorted(result.rates.items())
    )  # fmt: skip
    known = f"gpu-check of {result.measured}: {rates}" if result else f"gpu-check was not run on {gpu}"
    return "triton or aten", f"the faster one, timed when a model is compiled ({known})"


# ---------------------------------------------------------------------- helpers


def _has_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, int]:
    match = _NUMBERS.match(text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _dots(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _output(command: Sequence[str]) -> str:
    """What a helper program prints; "" if it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
