"""Ranks that hold the large weights of a model once for every machine, and what they see of each other's writes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import sfcompile
from sfcompile.backend import last_report
from sfcompile.errors import StreamFusionError
from sfcompile.package.tensors import write_tensors

HEADS, WIDTH, TOKENS = 4, 160, 24
EAGER = {"inner": "eager", "placement": "shard", "topology": "auto:assumed", "timeout_s": 20.0}
BY_MACHINE = {**EAGER, "weights": "sharded-by-machine"}


class Block(nn.Module):
    """Attention with large weights, small ones, a persistent buffer, and tied projections out."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.out.weight
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.scale * self.again(self.out(out))


def model_of(seed: int, device: str = "cpu") -> nn.Module:
    """Two blocks."""
    torch.manual_seed(seed)
    with torch.device(device):
        return nn.Sequential(Block(), Block()).eval().requires_grad_(False)


def inputs_of() -> torch.Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def write_files(folder: Path, seed: int) -> None:
    """The model's weights in two files; of each block's tied weights one name."""
    entries = {name: value for name, value in model_of(seed).state_dict().items() if "again" not in name}
    for block in "01":
        with (folder / f"part-{block}.safetensors").open("wb") as file:
            write_tensors(file, {name: value for name, value in entries.items() if name.startswith(block)})


def own_bytes(model: nn.Module) -> int:
    """Of the memory that the large weights lie in, bytes that are this process's alone: pages that it has written."""
    places = [weight.data_ptr() for weight in model.parameters() if weight.numel() * weight.element_size() >= 1 << 16]
    own, inside, found = 0, False, 0
    with open("/proc/self/smaps", encoding="ascii") as file:
        for line in file:
            name, *rest = line.split()
            if "-" in name and not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                hits = sum(first <= place < last for place in places)
                inside, found = hits > 0, found + hits
            elif inside and name == "Anonymous:":
                own += int(rest[0]) << 10
    assert found == len(places)
    return own


def one_copy(rank: int, folder: str) -> dict[str, Any]:
    """Load, call, fuse and unfuse a change, load other weights: largest difference to one process, and own bytes."""
    files, seen = Path(folder), dict[str, Any]()
    model, eager, x = model_of(0, "meta"), model_of(0), inputs_of()
    assert sfcompile.load_sharded(model, files, options=BY_MACHINE) is model
    run = torch.compile(model, backend="streamfusion", options=BY_MACHINE)

    def step(name: str) -> None:
        before = own_bytes(model)
        with torch.inference_mode():
            got = run(x)
        with torch.no_grad():
            worst = float((got - eager(x)).abs().max())
        seen[name] = (worst, before > 0, own_bytes(model) > 0)

    step("loaded")
    memory = [weight.data_ptr() for weight in model.parameters()]
    step("again")
    seen["moved"] = memory != [weight.data_ptr() for weight in model.parameters()]
    seen["tied"] = model[0].again.weight is model[0].out.weight  # type: ignore[union-attr, union-attr]
    for each in (model, eager):
        each[0].qkv.weight.data += 0.25  # type: ignore[index, union-attr, operator]
    step("fused")
    step("shared again")
    for each in (model, eager):
        with torch.no_grad():
            each[0].qkv.weight -= 0.25  # type: ignore[index, union-attr, operator]
    step("unfused")
    others = model_of(5).state_dict()
    for each in (model, eager):
        each.load_state_dict(others)
    step("other weights")
    report = last_report()
    assert report is not None
    seen["line"] = report.weights
    seen["saved"] = len(model.state_dict()["0.qkv.weight"].untyped_storage()) == 3 * WIDTH * WIDTH * 4
    return seen


def faults(rank: int, folder: str) -> list[StreamFusionError]:
    """What every rank raises when one of two is given something else; then all goes well."""
    errors = list[StreamFusionError]()
    x = inputs_of()

    def call(model: nn.Module, **options: Any) -> None:
        try:
            with torch.no_grad():
                torch.compile(model, backend="streamfusion", options={**BY_MACHINE, **options})(x)
        except StreamFusionError as error:
            errors.append(error)

    def load(model: nn.Module, files: Any, **options: Any) -> None:
        try:
            sfcompile.load_sharded(model, files, options={**BY_MACHINE, **options})
        except StreamFusionError as error:
            errors.append(error)

    parts = sorted(Path(folder).glob("*.safetensors"))
    load(model_of(0, "meta"), parts[: 2 - rank])
    load(model_of(0, "meta")[:1] if rank else model_of(0, "meta"), parts[:1] if rank else parts)  # type: ignore[index]
    load(model_of(0, "meta"), parts, transport="c10d")
    odd = model_of(0)
    odd[1].out.weight[1, 1 + rank] += rank  # type: ignore[index, union-attr]
    call(odd)
    call(model_of(0), transport="c10d")
    right = model_of(0, "meta")
    load(right, parts)
    call(right)
    return errors


def killed(rank: int, folder: str) -> None:
    """Rank 1 ends while rank 0 waits for its part of the weights."""
    from sfcompile.runtime.rank import shared_weights

    if rank == 1:
        shared_weights.shared_file = lambda nbytes: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    shared_weights.BUNDLE_BYTES = 1  # so that ranks take turns
    sfcompile.load_sharded(model_of(0, "meta"), Path(folder), options={"timeout_s": 20.0})
