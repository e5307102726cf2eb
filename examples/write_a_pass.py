"""A compiler pass of your own: gathers travel in bfloat16, half the bytes, and the graph says so.

    sfcompile run --ranks 2 examples/write_a_pass.py

The pass stands after ``rewrite_local``, which wrote this rank's graph, and before ``build_schedules``, which builds the
schedules of what it finds there. ``dump`` writes the graph after every pass; look at what ours changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hello import DiT

from sfcompile import extend

ops, aten = torch.ops.streamfusion, torch.ops.aten


def gathers_in_bf16(state: extend.State) -> None:
    """Cast a shard before it is gathered, and the whole value after: the site's dtype follows, so its schedule does."""
    graph, sites = state.local.graph, state.local.sites
    for start in list(graph.nodes):
        if start.target is not ops.exchange_start.default or not sites[start.args[3]].is_gather:
            continue
        shard, ticket, program, site = start.args
        if sites[site].dtype is not torch.float32:
            continue
        finish = next(user for user in start.users if user.target is ops.exchange_finish.default)
        whole = next(user for user in finish.users if user.args[1] == 0)
        with graph.inserting_before(start):
            small = graph.call_function(aten._to_copy.default, (shard,), {"dtype": torch.bfloat16})
            small.meta["val"] = shard.meta["val"].to(torch.bfloat16)
        start.args = (small, ticket, program, site)
        finish.args = (*finish.args[:-1], torch.bfloat16)
        with graph.inserting_after(whole):
            wide = graph.call_function(aten._to_copy.default, (whole,), {"dtype": torch.float32})
        wide.meta["val"] = whole.meta["val"]
        whole.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
        whole.meta["val"] = whole.meta["val"].to(torch.bfloat16)
        finish.meta["val"] = (whole.meta["val"], finish.meta["val"][1])
        sites[site] = replace(sites[site], dtype=torch.bfloat16)


@torch.no_grad()
def main() -> None:
    """Register, name the order, compile with it and without it."""
    extend.register_pass(gathers_in_bf16, why="before schedules are built for the dtypes it leaves")
    order = extend.passes()
    order.remove("choose_axes")  # nothing to choose in this model: one attention axis
    order.insert(order.index("build_schedules"), "gathers_in_bf16")

    torch.manual_seed(0)
    model = DiT(width=128, depth=2).eval()
    latents, t = torch.randn(1, 4, 32, 32), torch.tensor([500.0])
    want = model(latents, t)
    folder = Path(tempfile.gettempdir()) / f"gathers-{os.environ['MASTER_PORT']}"  # options are the same on all ranks
    errors = []
    for more in ({}, {"passes": order, "dump": folder}):
        torch.compiler.reset()
        options = {"placement": "shard", "inner": "eager", **more}
        got = torch.compile(model, backend="streamfusion", options=options)(latents, t)
        errors.append(float((got - want).abs().max() / want.abs().max()))
    if os.environ["RANK"] == "0":
        (text,) = (path.read_text() for path in folder.glob("*/*_gathers_in_bf16.txt"))
        print("".join(line + "\n" for line in text.splitlines() if line.startswith("#")), end="")
        print(f"difference from one process: {errors[0]:.1e} of the output's scale; {errors[1]:.1e} with bf16 gathers")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
