"""A server: HTTP requests come to rank 0 and are computed by all ranks in one order.

    sfcompile run --ranks 2 examples/server.py 8000          then: curl -d '{"seed": 1, "steps": 4}' localhost:8000

Rank 0 has a thread for each client, and none of them calls the model: the main thread takes their jobs from a queue and
gives *orders*: start with this seed, one more step, idle, stop. Every rank, rank 0 too, obeys every order, so all make
the same calls with equal inputs. The job of a client that hangs up ends between two steps. SIGTERM or Ctrl-C: the queue
is emptied, then every rank ends.
"""

import json
import queue
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from hello import DiT

from sfcompile.errors import StreamFusionError

ORDER_BYTES = 1024


class Job:
    """One request; ``answer`` is there once it is ``done``."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.seed, self.steps = int(asked["seed"]) % 2**63, min(max(int(asked["steps"]), 1), 1000)
        self.done, self.given_up, self.answer = threading.Event(), False, {}


class Door(BaseHTTPRequestHandler):
    """A thread for each client queues its job and answers when it is done."""

    jobs, stopping = queue.Queue[Job](maxsize=64), False

    def do_POST(self) -> None:
        try:
            job = Job(json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), ORDER_BYTES))))
            if self.stopping or self.jobs.full():
                return self.send_error(503, "too many requests wait, or the server is about to stop")
        except (KeyError, TypeError, ValueError):
            return self.send_error(400, 'send {"seed": 1, "steps": 4}')
        self.jobs.put(job)
        self.connection.settimeout(0.02)
        while not job.done.wait(0.05):
            try:
                job.given_up |= self.connection.recv(1) == b""  # so reads a client that has hung up
            except OSError as error:
                job.given_up |= not isinstance(error, TimeoutError)
        if not job.given_up:
            self.connection.settimeout(10.0)
            self.send_response(500 if "error" in job.answer else 200)
            self.end_headers()
            self.wfile.write(json.dumps(job.answer).encode())


def orders(state: dict[str, Any]) -> Any:
    """Rank 0: what all ranks do next, in the end to stop. ``state`` is what obeying leaves on this rank."""
    while not (Door.stopping and Door.jobs.empty()):
        try:
            job = Door.jobs.get(timeout=1.0)
        except queue.Empty:
            yield {"do": "idle"}  # the other ranks wait for orders, and the process group has a time limit
            continue
        yield {"do": "start", "seed": job.seed}
        for step in range(job.steps):
            if not job.given_up and "error" not in state:
                yield {"do": "step", "t": 1000.0 * (1 - step / job.steps), "of": job.steps}
        job.answer = {"error": state["error"]} if "error" in state else {"row": state["latents"][0, 0, 0].tolist()}
        print(f"seed {job.seed}: {'given up' if job.given_up else job.answer.get('error', 'done')}", flush=True)
        job.done.set()
    yield {"do": "stop"}


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
        except StreamFusionError as error:  # every rank gets one, here or at its next call; then all start afresh
            state["error"] = str(error)


@torch.no_grad()
def main() -> None:
    """Open the door on rank 0, and obey until told to stop."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, state = torch.compile(DiT().eval(), backend="streamfusion", options={"placement": "shard"}), {}
    first, given = dist.get_rank() == 0, orders(state)
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher tells every rank: the others wait for rank 0's order
        signal.signal(number, (lambda *_: setattr(Door, "stopping", True)) if first else signal.SIG_IGN)
    if first:
        Door.jobs.put(Job({"seed": 0, "steps": 1}))  # compile before the first client comes
        server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Door)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"listening on port {server.server_port}", flush=True)
    while (order := heard(next(given) if first else None))["do"] != "stop":
        obey(model, order, state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
