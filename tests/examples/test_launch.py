"""examples/launch: what Slurm and Kubernetes are told parses, holds together, and starts ranks as torchrun would."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "launch"

# What sbatch takes, of all that it takes, and how it is written.
DIRECTIVES = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "output": r"[\w%.-]+",
    "signal": r"(B:)?[A-Z]+@\d+",
}


def started(words: list[str]) -> Any:
    """torchrun's own reading of its command line; the script takes its own."""
    args = get_args_parser().parse_args(words)
    script = ROOT / args.training_script
    assert script.is_file()
    said = script.read_text(encoding="utf-8")
    for word in args.training_script_args:
        assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in said, word
    return args


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))


def test_every_file_is_tried_here() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == ["kubernetes.yaml", "slurm.sbatch"]


def test_the_batch_script_parses_and_its_directives_are_sbatchs() -> None:
    path = FOLDER / "slurm.sbatch"
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    first_command = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives == [line for line in lines[:first_command] if line.startswith("#SBATCH")], "sbatch reads no later"
    for line in directives:
        key, _, value = line.removeprefix("#SBATCH --").partition("=")
        assert re.fullmatch(DIRECTIVES[key], value), line


def test_the_batch_script_runs_torchrun_on_every_machine() -> None:
    text = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    (inner,) = re.findall(r"bash -c '(.*?)'", text, re.DOTALL)
    for name, value in {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "machine0"}.items():
        assert f'"${name}"' in inner
        inner = inner.replace(f'"${name}"', value)
    words = shlex.split(inner.replace("\\\n", " "))
    assert words[:2] == ["exec", "torchrun"]
    args = started(words[2:])
    assert (args.nnodes, args.node_rank, args.master_addr) == ("2", 1, "machine0")


def test_the_job_of_kubernetes_runs_torchrun_on_every_machine() -> None:
    job = next(document for document in documents() if document["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    named = {entry["name"] for entry in container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= named
    args = started([word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]])
    assert int(args.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert args.node_rank == 1
    name, subdomain = args.master_addr.split(".")
    assert name == f"{job['metadata']['name']}-0"
    assert subdomain == job["spec"]["template"]["spec"]["subdomain"]
    assert int(args.training_script_args[0]) == container["ports"][0]["containerPort"]


def test_services_of_kubernetes_lead_to_the_ranks() -> None:
    job = next(document for document in documents() if document["kind"] == "Job")
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    services = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "Service"}
    assert template["spec"]["subdomain"] in services
    given = {"batch.kubernetes.io/job-completion-index": "0"}  # by Kubernetes, to the first machine's pod
    for service in services.values():
        assert service["selector"].items() <= (template["metadata"]["labels"] | given).items()
        ports = {port["targetPort"] for port in service.get("ports", ())}
        assert ports <= {port["name"] for port in container["ports"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"]: "/dev/shm" for volume in template["spec"]["volumes"]}
    probe = container["readinessProbe"]["httpGet"]
    assert f'["{probe["path"].strip("/")}"]' in (ROOT / "examples/serving/door.py").read_text(encoding="utf-8")
