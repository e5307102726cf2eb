"""How long our passes take on a full-size Flux graph built on the meta device, by number of blocks.

    python benchmarks/pass_time.py [--blocks 8 16 32 57] [--topology 4x8]

Dynamo's own tracing is shown for scale and is not ours. The goal: 57 blocks in under 15 s, time linear in the blocks.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sfcompile.capture.graph import capture
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import State
from sfcompile.runtime.program.topology import Topology


def build(blocks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Flux.1 at its real width with ``blocks`` blocks (a third of them dual-stream), 4096 image + 512 text tokens."""
    from diffusers import FluxTransformer2DModel

    dual = max(1, round(blocks * 19 / 57))
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=dual, num_single_layers=blocks - dual, guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
            "guidance": torch.empty(1),
            "return_dict": False,
        }
    return model.eval(), inputs


def measure(blocks: int, topology: Topology, rank: int) -> tuple[dict[str, float], Compiled, int]:
    """Seconds per phase, the compiled rank, and the number of captured nodes."""
    model, inputs = build(blocks)
    seconds: dict[str, float] = {}
    result: list[Compiled] = []
    nodes = 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal nodes
        start = time.perf_counter()
        captured = capture(gm, example_inputs)
        seconds["capture"] = time.perf_counter() - start
        nodes = len(captured.gm.graph.nodes)
        result.append(run_pipeline(State(captured.gm, captured.mode, topology, rank)))
        seconds["passes"] = time.perf_counter() - start - seconds["capture"]
        outputs = [n.meta["val"] for n in captured.gm.graph.output_node().all_input_nodes]
        seconds["dynamo"] = start - began
        return lambda *args: tuple(torch.empty(v.shape, device="meta") for v in outputs)

    torch._dynamo.reset()
    began = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return seconds, result[0], nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 57])
    parser.add_argument("--topology", default="4x8")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    topology = Topology.parse(args.topology)
    print(f"{'blocks':>6} {'nodes':>6} {'capture s':>9} {'passes s':>9} {'sum s':>7} {'s/block':>8} {'Dynamo s':>9}")
    measure(2, topology, rank=0)  # imports and caches warm up on a small graph
    for blocks in args.blocks:
        seconds, compiled, nodes = measure(blocks, topology, rank=topology.num_ranks // 2)
        ours = seconds["capture"] + seconds["passes"]
        print(
            f"{blocks:>6} {nodes:>6} {seconds['capture']:>9.2f} {seconds['passes']:>9.2f} {ours:>7.2f} "
            f"{ours / blocks:>8.3f} {seconds['dynamo']:>9.2f}",
            flush=True,
        )
    print(compiled.report)


if __name__ == "__main__":
    main()
