"""What would run on a cluster that you do not have: one process, no GPU, no weights.

    python examples/explain_plan.py

A large DiT on the meta device, planned for four machines of eight GPUs. The report prints as tables; it can also write
itself as one page of HTML or as JSON. Change the topology or the model and look at what changes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hello import DiT

import sfcompile

TOPOLOGY = "4x8:a100-efa"


def main() -> None:
    """Explain, print, write."""
    with torch.device("meta"):
        model = DiT(width=3072, heads=24, depth=2, side=256).to(torch.bfloat16).eval()
        latents, t = torch.empty(1, 4, 256, 256, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    report = sfcompile.explain(model, args=(latents, t), topology=TOPOLOGY)
    print(report)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plan.html"
        report.to_html(page)
        print(f"explained for {TOPOLOGY}; as a page: {page.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
