"""A server to start from: HTTP on rank 0, and all ranks compute what it is asked for, in one order.

    sfcompile run --ranks 2 examples/server.py 8000          then open http://localhost:8000, or
    curl -d '{"seed": 1, "steps": 4}' localhost:8000

Clients' threads (serving/door.py lists the addresses) queue jobs and never call the model. The main thread takes them
from the queue and gives *orders*: start with this seed, one more step, idle, stop. Every rank, rank 0 too, obeys every
order, so all make the same calls with equal inputs. Rank 0 alone looks whether one is cancelled, between orders: no
rank can be a step behind. SIGTERM or Ctrl-C: no new jobs; what waits has ``--stop-within`` seconds. A rank that dies:
every client gets an error and every rank ends, so that what started them may start them again. Pictures need pillow.
"""

import argparse
import datetime
import io
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from hello import DiT
from PIL import Image
from serving.door import Server
from serving.job import Job
from serving.jobs import Jobs

from sfcompile.errors import PeerDiedError, StreamFusionError

ORDER_BYTES, IDLE_S = 1024, 1.0


def orders(jobs: Jobs, state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rank 0: what all ranks do next, in the end to stop. ``state`` is what obeying leaves on this rank."""
    while not jobs.over():
        if (job := jobs.next(IDLE_S)) is None:
            yield {"do": "idle"}  # the other ranks wait for orders: so they hear that rank 0 lives, and it that they do
            continue
        if not job.start():
            continue
        yield {"do": "start", "seed": job.seed}
        for step in range(job.steps):
            if job.cancelled or "error" in state or time.monotonic() > jobs.stop_at:
                break
            yield {"do": "step", "t": 1000.0 * (1 - step / job.steps), "of": job.steps}
            if "error" not in state:
                job.tell("step", step=step + 1, of=job.steps)
        else:
            if "error" not in state:
                jobs.ready, job.picture = True, picture(state["latents"])
                job.tell("done", row=state["latents"][0, 0, 0].tolist(), picture=f"/jobs/{job.id}/picture")
        job.tell("cancelled") if job.cancelled else job.tell("error", error=state.get("error", "the server stops"))
        print(f"seed {job.seed}: {job.last_event}", flush=True)
    yield {"do": "stop"}


def picture(latents: torch.Tensor) -> bytes:
    """A PNG of the first three channels of [1, 4, height, width]; a decoder belongs here."""
    shown = ((latents[0, :3].permute(1, 2, 0) / 3).tanh() * 127.5 + 127.5).to(torch.uint8)
    png = io.BytesIO()
    Image.fromarray(shown.numpy()).save(png, "PNG")
    return png.getvalue()


def heard(order: dict[str, Any] | None) -> dict[str, Any]:
    """Rank 0's order on every rank, as JSON: unlike a pickle it cannot make a rank run code."""
    sent = torch.frombuffer(bytearray(json.dumps(order).encode().ljust(ORDER_BYTES)), dtype=torch.uint8)
    dist.broadcast(sent, 0)
    return dict(json.loads(bytes(sent.tolist())))


def obey(model: Any, order: dict[str, Any], state: dict[str, Any]) -> None:
    """The same on every rank."""
    if order["do"] == "start":
        state.clear()
        state["latents"] = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(order["seed"]))
    elif order["do"] == "step" and "error" not in state:
        try:
            state["latents"] -= model(state["latents"], torch.tensor([order["t"]])) / order["of"]
        except PeerDiedError:
            raise  # nobody can start without it
        except StreamFusionError as error:  # every rank gets one, here or at its next call; then all start afresh
            state["error"] = str(error)


@torch.no_grad()
def main() -> None:
    """Open the door on rank 0, and obey until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int, help="0: any that is free")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--stop-within", type=float, default=3.0, help="seconds; sfcompile run allows 5 in all")
    parser.add_argument("--options", type=json.loads, default={"placement": "shard"}, help="of the backend, as JSON")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    torch.manual_seed(0)
    model, state, jobs = torch.compile(DiT().eval(), backend="streamfusion", options=args.options), {}, Jobs()
    first, given, why = dist.get_rank() == 0, orders(jobs, state), ""
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher tells every rank: the others wait for rank 0's order
        signal.signal(number, (lambda *_: jobs.stop(args.stop_within)) if first else signal.SIG_IGN)
    if first:
        jobs.put(Job({"seed": 0, "steps": 1}))  # compile before the first client comes
        server = Server(args.host, args.port, jobs)
    try:
        while (order := heard(next(given) if first else None))["do"] != "stop":
            obey(model, order, state)
    except RuntimeError as error:  # a StreamFusionError, or the broadcast's: a rank has gone
        why = f"rank {dist.get_rank()} cannot go on: {error}"
    if first:
        server.end(why or "the server stops")
    if why:
        sys.exit(why)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
