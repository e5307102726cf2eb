"""Two machines on one box: the plan follows the links, and so do the bytes.

    sfcompile run --ranks 4 --machines 2 examples/two_machines.py

The ranks believe that they sit on two machines: stores inside a machine, messages between. For links that are really
slow, as root on Linux (network namespaces with shaped links and torchrun across them):

    python benchmarks/emulated_machines.py --machines 2 --ranks 2 --rate 200mbit examples/two_machines.py
"""

from __future__ import annotations

import os

import torch
from hello import DiT

SLOW_LINK = {"network_bytes_per_s": 2.5e7, "network_latency_s": 2e-4}  # 200 Mbit/s


@torch.no_grad()
def main() -> None:
    """Three ways to run one model; what crosses between machines, and that all are exact."""
    from sfcompile import extend

    extend.register_topology("slow-link", **SLOW_LINK)
    torch.manual_seed(0)
    model = DiT(width=128, depth=2).eval()
    latents, t = torch.randn(1, 4, 32, 32), torch.tensor([500.0])
    want = model(latents, t)
    ranks = int(os.environ["WORLD_SIZE"])
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "2"))
    worst = 0.0
    for schedule in ("auto", "torus", "ulysses", "ring"):
        torch.compiler.reset()
        options = {"placement": "shard", "inner": "eager", "schedule": schedule}
        options["topology"] = f"{machines}x{ranks // machines}:slow-link"
        fast = torch.compile(model, backend="streamfusion", options=options)
        worst = max(worst, float((fast(latents, t) - want).abs().max() / want.abs().max()))
        if os.environ["RANK"] == "0":
            from sfcompile.backend import last_report

            report = last_report()
            assert report is not None
            taken = report.plans[0].splitlines()
            print(*(taken[:2] if schedule == "auto" else taken[1:2]), sep="\n")
    if os.environ["RANK"] == "0":
        from sfcompile.runtime.rank.session import current_session

        print(f"ranks sit on machines {current_session().topology.machine_of}")
        print(f"difference from one process: {worst:.1e} of the output's scale")


if __name__ == "__main__":
    main()
