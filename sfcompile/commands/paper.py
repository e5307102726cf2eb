"""The ablation table of the StreamFusion paper (arXiv 2601.20273), and what our simulator predicts for it.

The paper measured 8 x A100 40 GB per machine with NVSwitch and up to 400 Gb/s of EFA: step latency of USP over that of
three cumulative steps. We describe each workload by its shapes, run USP and each step on the simulator with the
constants of the preset ``a100-paper``, one set for the whole table, and compare ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfcompile.codegen.plan.simulator import simulate
from sfcompile.codegen.plan.step import layer
from sfcompile.codegen.schedule.builders import build
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.runtime.program.intervals import Runs
from sfcompile.runtime.program.sites import AttentionSite
from sfcompile.runtime.program.topology import Topology

PRESET = "a100-paper"
COLUMNS = ("TAS", "+ Torus (NCCL)", "+ one-sided")


@dataclass(frozen=True)
class Workload:
    """One row: a model's shapes on so many machines of 8, and the published ratios over USP.

    ``width`` is the hidden size; a layer's matmuls are 24 width^2 FLOPs a token (projections and an MLP of 4 x width).
    """

    name: str
    machines: int
    tokens: int
    heads: int
    head_dim: int
    published: tuple[float, float, float]

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.heads * self.head_dim


# 57 layers of 3072 with 24 heads x 128 and 512 text tokens, patches of 16 pixels; 42 layers of 3072 with 48 heads x 64
# and 226 text tokens, 48 x 85 patches a latent frame, 41 latent frames for 20 s and 81 for 40 s.
TABLE = (
    Workload("image 3072, 3 machines", 3, 192**2 + 512, 24, 128, (1.11, 1.01, 1.11)),
    Workload("image 3072, 4 machines", 4, 192**2 + 512, 24, 128, (1.64, 1.06, 1.77)),
    Workload("image 4096, 4 machines", 4, 256**2 + 512, 24, 128, (1.62, 1.49, 1.61)),
    Workload("video 20 s, 3 machines", 3, 41 * 4080 + 226, 48, 64, (1.08, 1.26, 1.22)),
    Workload("video 40 s, 3 machines", 3, 81 * 4080 + 226, 48, 64, (1.06, 1.16, 1.17)),
)


@dataclass(frozen=True)
class Row:
    """Predicted ratios over USP of one workload."""

    workload: Workload
    predicted: tuple[float, float, float]

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative errors of the three ratios."""
        return tuple(p / q - 1.0 for p, q in zip(self.predicted, self.workload.published, strict=True))


def even_positions(tokens: int, ranks: int) -> tuple[Runs, ...]:
    """Tokens in contiguous shards, sizes within one of each other."""
    ends = [rank * tokens // ranks for rank in range(ranks + 1)]
    return tuple(((ends[r], ends[r + 1] - ends[r]),) for r in range(ranks))


def predict(workload: Workload, topology: Topology) -> Row:
    """Seconds per layer of USP and of the paper's three steps, as ratios."""
    ranks, inside = topology.num_ranks, topology.num_ranks // topology.num_machines
    places = even_positions(workload.tokens, ranks)
    site = AttentionSite(
        workload.name, 1, workload.heads, workload.heads, workload.head_dim, workload.head_dim, torch.bfloat16,
        places, places, workload.head_dim**-0.5,
    )  # fmt: skip
    other = 24.0 * workload.width**2 * workload.tokens / ranks / topology.flops_per_s
    ulysses = math.gcd(ranks, workload.heads)

    def seconds(kind: str, mesh: Mesh, two_sided: bool) -> float:
        return simulate(layer(build(kind, site, mesh), 1, before_s=other), topology, two_sided).seconds

    usp = seconds("usp", Mesh.of(topology, inside, topology.num_machines, "ring"), True)
    lanes = max(1, ulysses // topology.num_machines)
    mesh = Mesh.of(topology, ulysses, ranks // ulysses, "ulysses", lanes)
    steps = seconds("tas", mesh, True), seconds("torus", mesh, True), seconds("torus", mesh, False)
    tas, torus, one_sided = (usp / step for step in steps)
    return Row(workload, (tas, torus, one_sided))


def predict_table(constants: Topology | None = None) -> list[Row]:
    """Every row, with the constants of the preset or of another topology."""
    rows = []
    for workload in TABLE:
        topology = Topology.parse(f"{workload.machines}x8:{PRESET}")
        if constants is not None:
            topology = constants.on(topology.machine_of)
        rows.append(predict(workload, topology))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Predicted against published, side by side, and the errors."""
    lines = [
        f"Speed over USP, predicted with one set of constants ({PRESET}) / published (arXiv 2601.20273)",
        f"{'workload':<24}" + "".join(f"{column:>24}" for column in COLUMNS),
    ]
    for row in rows:
        cells = [
            f"{p:.2f} / {q:.2f} ({error:+.0%})"
            for p, q, error in zip(row.predicted, row.workload.published, row.errors, strict=True)
        ]
        lines.append(f"{row.workload.name:<24}" + "".join(f"{cell:>24}" for cell in cells))
    errors = [abs(error) for row in rows for error in row.errors]
    close = sum(error <= 0.15 for error in errors)
    lines.append(f"{close} of {len(errors)} ratios within 15 %; largest error {max(errors):.0%}")
    return "\n".join(lines)
