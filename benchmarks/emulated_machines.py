"""A small cluster on one Linux box: every machine is a network namespace, its uplink shaped by a token bucket.

    python benchmarks/emulated_machines.py --machines 2 --ranks 2 --rate 200mbit SCRIPT [ARGUMENT...]

runs ``torchrun --nnodes 2 --nproc-per-node 2 SCRIPT`` over the machines. Ranks of one machine share memory; ranks of
different machines meet only on the shaped links. Needs root, ``ip`` and ``tc``. Machine i is pinned to core i modulo
the cores, so that machines compete for links and not for one another's processor.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


def shape_command(rate: str) -> list[str]:
    """What shapes a machine's uplink, run inside the machine."""
    shape = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "128kb"]
    return [*shape, "latency", "200ms"]


class CannotEmulate(RuntimeError):
    """This machine cannot make network namespaces; the message says what is missing."""


@dataclass(frozen=True)
class Cluster:
    """Running namespaces ``{prefix}{i}`` with addresses ``10.{net}.0.{i + 1}``."""

    prefix: str
    net: int
    machines: int

    def torchrun(
        self,
        ranks: int,
        argv: Sequence[str],
        env: dict[str, str] | None = None,
        heard: Callable[[int, str], None] | None = None,
    ) -> tuple[int, list[str]]:
        """Run torchrun on every machine; torchrun's exit code (the first that is not 0) and each machine's output.

        Args:
            heard: is told every line when it comes, with the machine that printed it.
        """
        port = str(random.randrange(20000, 40000))
        cores = sorted(os.sched_getaffinity(0))
        running = []
        for machine in range(self.machines):
            command = [
                "ip",
                "netns",
                "exec",
                f"{self.prefix}{machine}",
                "taskset",
                "-c",
                str(cores[machine % len(cores)]),
            ]
            command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.machines)]
            command += ["--nproc-per-node", str(ranks), "--node-rank", str(machine)]
            command += ["--master-addr", f"10.{self.net}.0.1", "--master-port", port, *argv]
            variables = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"} | (env or {})
            variables.setdefault("OMP_NUM_THREADS", "1")
            running.append(
                subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        outputs: list[list[str]] = [[] for _ in running]

        def follow(machine: int) -> None:
            for line in running[machine].stdout or ():
                outputs[machine].append(line)
                if heard is not None:
                    heard(machine, line.rstrip())

        readers = [threading.Thread(target=follow, args=(machine,), daemon=True) for machine in range(len(running))]
        try:
            for reader in readers:
                reader.start()
            for process, reader in zip(running, readers, strict=True):
                process.wait()
                reader.join()
        except BaseException:  # also where the user stops it: no rank stays behind
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
        return next((process.returncode for process in running if process.returncode), 0), list(map("".join, outputs))


@contextmanager
def emulated_machines(machines: int, rate: str) -> Iterator[Cluster]:
    """Make ``machines`` namespaces with uplinks of ``rate`` (tc's notation: 200mbit) and remove them at the end.

    Raises:
        CannotEmulate: not root, or ``ip`` / ``tc`` / ``taskset`` are missing or refused.
    """
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise CannotEmulate(
            "needs root" if not missing else f"needs {', '.join(missing)} (Debian: iproute2, util-linux)"
        )
    # Not the process: the kernel frees names a while after they were deleted, and a process may emulate again.
    token = f"{random.randrange(16**5):05x}"
    cluster = Cluster(f"sfe{token}x", random.randrange(80, 250), machines)
    bridge = f"sfb{token}"
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for i in range(machines):
            space, near = f"{cluster.prefix}{i}", f"sfv{token}x{i}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", near, "master", bridge, "up")
            _run("ip", "-n", space, "addr", "add", f"10.{cluster.net}.0.{i + 1}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "netns", "exec", space, *shape_command(rate))
        yield cluster
    finally:
        for i in range(machines):
            subprocess.run(["ip", "netns", "del", f"{cluster.prefix}{i}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotEmulate(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> int:
    """The command line; the exit code of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="ranks per machine")
    parser.add_argument("--rate", default="200mbit", help="uplink of each machine")
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="SCRIPT")
    args = parser.parse_args()
    with emulated_machines(args.machines, args.rate) as cluster:
        code, outputs = cluster.torchrun(args.ranks, args.argv)
    for machine, output in enumerate(outputs):
        print("".join(f"[machine {machine}] {line}\n" for line in output.splitlines()), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
