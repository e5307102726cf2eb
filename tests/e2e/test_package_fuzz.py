"""Packages with random changes: a PackageError, an InputError or a result; no crash, no other error, no file touched.

Changes are made to what a package decodes to, its hashes mended (by somebody who knows the format), and to its bytes
(damage). They run in batches in a process of its own, whose memory is bounded and whose folder is watched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from threads import run_threads
from torch import nn

from sfcompile.errors import InputError, PackageError, PeerFailedError, RankMismatchError
from sfcompile.package.export import export
from sfcompile.package.file import MANIFEST, SEAL, to_json
from sfcompile.package.load import load

SUPPORT = Path(__file__).resolve().parents[1] / "support"
VICTIM = b"important"
MEMORY = 8 << 30
"""Bytes of address space that a batch may take beyond what it has at its start."""
Place = tuple[Any, Any]
"""A container and a key of it."""

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 3, 64, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 10**30, 0.5, -1e300, "",
    "VICTIM", "../VICTIM", "/dev/zero", "__class__", "x=__import__('os').system('touch PWNED')", "cpu", "cuda",
    "float64", "quint8", "aten.from_file.default", "aten.fill_.Scalar", "aten.as_strided.default",
    "aten.set_.source_Tensor",
    "aten.mm.default", "aten.native_group_norm.default", "aten.convolution.default", "aten.embedding.default",
    "inductor._reinterpret_tensor.default", "streamfusion.opaque.default", "streamfusion.put_q.default",
    "getitem", "a b", "x",
    [], {}, [[]], [0] * 100, [2**40, 2**20], {"node": "x"}, {"tuple": []}, {"float": "nan"}, {"tensor": 0},
    {"tensor": -1},
]  # fmt: skip


class Two(nn.Module):
    """What the one-rank package holds: calls of many kinds, a constant, an input that is written to, plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, log: torch.Tensor, *, scale: float = 2.0, flip: bool = True) -> Any:
        y = self.norm(self.conv(self.linear(x))) * torch.tensor([1.0, 2.0] * 4)
        log.copy_(y.sum(-1))
        a, b = torch.cat([y, x], -1).softmax(-1).chunk(2, -1)
        picked = a[:, [2, 0, 1]].flip(-1) if flip else a
        return {"out": (torch.einsum("bid,bjd->bij", picked, b), [y.to(torch.float16)]), "scale": scale}


def arguments(name: str) -> tuple[torch.Tensor, ...]:
    if name == "one":
        return torch.ones(2, 4, 8), torch.zeros(2, 4)
    return build("cross")[1]


def write(folder: Path) -> None:
    """The packages that are changed."""
    torch.manual_seed(0)
    export(Two().eval(), arguments("one"), {}, folder / "one.sf", topology="1x1", inner="eager")
    export(build("cross")[0], arguments("two"), {}, folder / "two.sf", topology="1x2", inner="eager", placement="shard",
           mesh={"ulysses": 2, "ring": 1})  # fmt: skip


# ---------------------------------------------------------------------- changes


def places(tree: Any) -> list[Place]:
    """Every place of a structure."""
    found: list[Place] = []
    todo = [tree]
    while todo:
        inner = todo.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            todo.append(inner[key])
    return found


def change(tree: Any, rng: random.Random) -> None:
    """One random change somewhere in a structure."""
    all_places = places(tree)
    if not all_places:
        return
    inner, key = rng.choice(all_places)
    match rng.randrange(8):
        case 0 | 1:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
        case 2:
            del inner[key]
        case 3:
            other, at = rng.choice(all_places)
            inner[key] = copy.deepcopy(other[at])
        case 4 if isinstance(inner, list):
            inner.insert(key, copy.deepcopy(rng.choice(inner)))
        case 5 if isinstance(inner, dict):
            inner[str(rng.choice(VALUES))] = inner.pop(key)
        case 6 if isinstance(inner[key], int):
            inner[key] += rng.choice((-2, -1, 1, 2, 2**20, -(2**20)))
        case 7 if isinstance(inner[key], str) and inner[key]:
            at = rng.randrange(len(inner[key]))
            inner[key] = inner[key][:at] + rng.choice(("", "'", "\0", "é", "/", ".", "__", "a")) + inner[key][at + 1 :]
        case _:
            inner[key] = copy.deepcopy(rng.choice(VALUES))


def changed(source: Path, target: Path, rng: random.Random) -> None:
    """A package with one to three changes in what it decodes to, and the hashes of a good one."""
    with zipfile.ZipFile(source) as old:
        members = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(members.pop(MANIFEST))
    members.pop(SEAL)
    text = [name for name in members if name.endswith(".json")]
    headers = [name for name in members if name.endswith(".safetensors")]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("graph", "graph", "graph", "manifest", "signature", "schedules", "header"))
        if kind in ("manifest", "signature"):
            change(manifest["signature"] if kind == "signature" and "signature" in manifest else manifest, rng)
        elif kind == "header":
            name = rng.choice(headers)
            length = int.from_bytes(members[name][:8], "little")
            header = json.loads(members[name][8 : 8 + length])
            change(header, rng)
            encoded = json.dumps(header).encode()
            encoded += b" " * (-(len(encoded) + 8) % 64)
            members[name] = len(encoded).to_bytes(8, "little") + encoded + members[name][8 + length :]
        else:
            name = rng.choice([name for name in text if ("graph" in name) == (kind == "graph")])
            data = json.loads(members[name])
            change(data, rng)
            members[name] = json.dumps(data).encode()
    if isinstance(manifest.get("members"), dict):
        for name, data in members.items():
            manifest["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    seal = to_json(manifest)
    with zipfile.ZipFile(target, "w") as new:
        for name, data in (members | {MANIFEST: seal, SEAL: hashlib.sha256(seal).hexdigest().encode()}).items():
            new.writestr(name, data)


def damaged(source: Path, target: Path, rng: random.Random) -> None:
    """A package with bytes changed, cut out or repeated."""
    data = bytearray(source.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 64))):
        at, other = rng.randrange(len(data)), rng.randrange(len(data))
        match rng.randrange(5):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + 8] = rng.randbytes(8)
            case 3:
                del data[at : at + rng.randrange(1, 300)]
            case _:
                data[at:at] = data[other : other + rng.randrange(1, 300)]
    target.write_bytes(data)


# ---------------------------------------------------------------------- a batch, in a process of its own


def outcome(path: Path, name: str, verify: bool) -> str:
    """How a package loads and runs."""

    def work(rank: int) -> str:
        try:
            load(path, timeout_s=20, verify=verify)(*arguments(name))
        except (PackageError, InputError, PeerFailedError, RankMismatchError) as error:
            return type(error).__name__
        return "result"

    if name == "one":
        return work(0)
    return min(run_threads(2, work, timeout_s=20), key=["PackageError", "InputError", "RankMismatchError",
                                                       "PeerFailedError", "result"].index)  # fmt: skip


def batch(folder: Path, seeds: Sequence[int]) -> None:
    """Make, load and call the packages of some seeds; a line of each: seed, kind, outcome."""
    torch.set_num_threads(1)
    outcome(folder.parent / "one.sf", "one", True)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(("one", "one", "two"))
        raw = seed >= 10**6
        path = folder / f"{seed}.sf"
        (damaged if raw else changed)(folder.parent / f"{name}.sf", path, rng)
        before = path.read_bytes()
        print(seed, "damaged" if raw else "changed", end=" ", flush=True)
        try:
            said = outcome(path, name, verify=rng.random() < 0.7)
        except BaseException as error:
            said = f"{type(error).__name__}:{str(error)[:200]!r}"
        print(said, flush=True)
        assert path.read_bytes() == before, "the package was written to"
        path.unlink()


def run(folder: Path, seeds: Sequence[int], seconds: float) -> Counter[str]:
    """Outcomes of some seeds."""
    inside = folder / f"batch{seeds[0]}"
    inside.mkdir()
    (inside / "VICTIM").write_bytes(VICTIM)
    (folder / "VICTIM").write_bytes(VICTIM)
    before = sorted(path.name for path in folder.iterdir())
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{SUPPORT}", "SFCOMPILE_LOG": "error"}
    argv = [sys.executable, __file__, str(inside), *map(str, seeds)]
    done = subprocess.run(argv, cwd=inside, env=env, capture_output=True, text=True, timeout=seconds)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]} {done.stderr[-3000:]}"
    assert len(lines) == len(seeds)
    assert (inside / "VICTIM").read_bytes() == (folder / "VICTIM").read_bytes() == VICTIM
    assert [path.name for path in inside.iterdir()] == ["VICTIM"]
    assert sorted(path.name for path in folder.iterdir()) == before
    odd = [line for line in lines if line.split()[2] not in ("PackageError", "InputError", "result")]
    assert not odd, odd
    return Counter(" ".join(line.split()[1:]) for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    write(made)
    return made


def test_changed_and_damaged_packages(folder: Path) -> None:
    assert sum(run(folder, [*range(30), *range(10**6, 10**6 + 10)], 300).values()) == 40


@pytest.mark.thorough
def test_a_thousand_changed_and_three_hundred_damaged_packages(folder: Path) -> None:
    total: Counter[str] = Counter()
    for first in range(1000, 2000, 100):
        total += run(folder, range(first, first + 100), 900)
    for first in range(10**6 + 1000, 10**6 + 1300, 100):
        total += run(folder, range(first, first + 100), 900)
    print(dict(total))
    assert sum(total.values()) == 1300 and total["damaged PackageError"] > 200


if __name__ == "__main__":
    batch(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]])
