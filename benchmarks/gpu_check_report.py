"""What a section of benchmarks/gpu_check.py needs: where it runs, and a place for each of its results."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AttentionSite

T = TypeVar("T")
KINDS = ("ok", "FAIL", "skip", "MISS", "note")
"""Of results: MISS is a goal of speed that was not reached; it is told, and no failure."""


class Skip(Exception):
    """A case cannot run here; the text says why."""


@dataclass
class Bench:
    """Where a section runs and what it found; every result is written at once, so that a hang loses none.

    Attributes:
        dry: on the CPU, in Triton's interpreter, with tiny sizes.
        part, parts: this process does every ``parts``-th case, from ``part`` on.
    """

    lines: Path
    section: str
    dry: bool
    part: int = 0
    parts: int = 1
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device("cpu") if self.dry else torch.device("cuda", 0)

    def tell(self, kind: str, text: str) -> None:
        """Record a result."""
        assert kind in KINDS
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": self.section, "kind": kind, "text": text}) + "\n")

    def note(self, text: str) -> None:
        """A number that is no check."""
        self.tell("note", text)

    def figure(self, name: str, head_dim: int, value: Mapping[str, object]) -> None:
        """A figure for the result file that defaults are read from: an entry of GpuResult, for a head size."""
        said = ", ".join(
            f"{key} {entry:.3g}" if isinstance(entry, float) else f"{key} {entry}" for key, entry in value.items()
        )
        text = f"D={head_dim} {name}: {said}"
        with self.lines.open("a", encoding="utf-8") as file:
            figure = json.dumps([name, head_dim, dict(value)])
            file.write(json.dumps({"section": self.section, "kind": "note", "text": text, "figure": figure}) + "\n")

    def check(self, fine: bool, text: str) -> None:
        """A check's result with its numbers."""
        self.tell("ok" if fine else "FAIL", text)

    def mine(self, cases: Sequence[T]) -> Sequence[T]:
        """This process's part."""
        return cases[self.part :: self.parts]

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A case whose failure does not end the section, unless it broke the device."""
        try:
            yield
        except Skip as reason:
            self.tell("skip", f"{name}: {reason}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:400]
            self.tell("FAIL", f"{name}: {type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})")
            if "CUDA error" in said or "device-side" in said:
                raise  # nothing works in this process any more

    def sync(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize(self.device)


def name_of(dtype: torch.dtype) -> str:
    """ "bf16" and so on."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def site_of(
    tokens: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv_heads: int | None = None,
    causal: bool = False,
    mask: bool = False,
    batch: int = 1,
) -> AttentionSite:
    """Self-attention of some tokens per rank."""
    starts = [sum(tokens[:rank]) for rank in range(len(tokens))]
    places: tuple[Runs, ...] = tuple(((start, n),) if n else () for start, n in zip(starts, tokens, strict=True))
    return AttentionSite(
        "site", batch, heads, kv_heads or heads, head_dim, head_dim, dtype, places, places, head_dim**-0.5,
        causal=causal, mask="full" if mask else None,
    )  # fmt: skip


def inputs_of(site: AttentionSite, device: torch.device, seed: int = 7) -> list[torch.Tensor]:
    """Random whole q, k and v."""
    torch.manual_seed(seed)
    rows = sum(length for owned in site.q_positions for _, length in owned)
    shapes = [(site.batch, heads, rows, site.head_dim) for heads in (site.heads, site.kv_heads, site.kv_heads)]
    return [torch.randn(shape, device=device).to(site.dtype) for shape in shapes]


def exact(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and natural log-sum-exp in fp64; 0 and -inf for a query that sees nothing."""
    k, v = (x.repeat_interleave(site.heads // site.kv_heads, 1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * site.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if site.causal:
        hidden = torch.ones(scores.shape[-2:], device=q.device).triu(1).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def sdpa(
    site: AttentionSite, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """torch's answer in the site's dtype."""
    grouped, causal = site.heads != site.kv_heads, site.causal
    if causal and mask is not None:  # torch takes one of the two
        mask, causal = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=site.scale, enable_gqa=grouped)


def distance(out: torch.Tensor, want: torch.Tensor) -> float:
    """||out - want|| / ||want||."""
    return float((out.double() - want).norm() / want.norm())


def compare(
    bench: Bench, name: str, site: AttentionSite, out: torch.Tensor, want: torch.Tensor, theirs: torch.Tensor
) -> None:
    """The contract: fp32 within 1e-5 of fp64; half types within 1.2 times of what torch's own attention is off."""
    error, other = distance(out, want), distance(theirs.nan_to_num(0.0), want)
    limit = 1e-5 if site.dtype == torch.float32 else 1.2 * other
    if bench.dry:  # on CPUs torch computes half types in fp32 and rounds once
        limit = max(limit, {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[site.dtype])
    bench.check(error <= limit, f"{name}: error {error:.2e}, SDPA {other:.2e}, limit {limit:.2e}")
