"""examples/server.py with real clients: twenty at once, one that cancels, one that hangs up, nonsense, a rank that is
killed, and a clean end.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import rank_workers
import torch
from PIL import Image
from processes import Outcome, free_port, preload, run_outcomes

pytestmark = pytest.mark.ranks
FOLDER = Path(__file__).resolve().parents[2] / "examples"
SFCOMPILE = str(Path(sys.executable).with_name("sfcompile"))
LIMIT_S = 300.0
CLIENTS = 20

preload("sfcompile.backend", "PIL.Image")


class Running:
    """The server's ranks, forked; the compile is eager, for what is tried here is what is around the model."""

    def __init__(self, ranks: int, folder: Path) -> None:
        self.port, self.folder, self.outcomes = free_port(), folder, list[Outcome]()
        options = json.dumps({"placement": "shard", "inner": "eager"})
        args = (str(FOLDER / "server.py"), (str(self.port), "--options", options, "--stop-within", "0.5"), str(folder))
        self._thread = threading.Thread(
            target=lambda: self.outcomes.extend(run_outcomes(ranks, rank_workers.program, args, timeout_s=LIMIT_S))
        )
        self._thread.start()

    def send(self, rank: int, number: int) -> None:
        os.kill(int((self.folder / f"{rank}.pid").read_text()), number)

    def end(self) -> list[Outcome]:
        self._thread.join()
        return self.outcomes

    def wait_until_ready(self) -> None:
        while self._thread.is_alive():
            try:
                if ask(self.port, "GET", "/health")[0] == 200:
                    return
            except ConnectionRefusedError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.outcomes)


@contextmanager
def serving(ranks: int, folder: Path) -> Iterator[Running]:
    running = Running(ranks, folder)
    try:
        running.wait_until_ready()
        yield running
    finally:
        for rank in range(ranks):
            try:
                running.send(rank, signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError):
                pass  # as it should be
        running.end()


def ask(
    port: int, method: str, path: str, body: str | None = None, headers: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, bytes]:
    client = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    client.request(method, path, body, dict(headers))
    response = client.getresponse()
    return response.status, response.read()


def post(port: int, path: str, **asked: Any) -> tuple[int, dict[str, Any]]:
    status, body = ask(port, "POST", path, json.dumps(asked))
    return status, json.loads(body)


def follow(port: int, job_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a job, to the last."""
    status, body = ask(port, "GET", f"/jobs/{job_id}/events")
    assert status == 200
    told = re.findall(r"^id: (\d+)\nevent: (\w+)\ndata: (.*)\n\n", body.decode(), re.MULTILINE)
    assert [int(number) for number, *_ in told] == list(range(len(told)))
    return [(event, json.loads(data)) for _, event, data in told]


def draw(port: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """What a page does: ask, and follow the events."""
    status, told = post(port, "/jobs", seed=seed, steps=2)
    assert status == 202, told
    return follow(port, told["id"])


def until(port: int, job_id: str, event: bytes) -> None:
    """Return at the first event of that name; the connection is closed in the middle of the stream."""
    with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
        client.sendall(f"GET /jobs/{job_id}/events HTTP/1.0\r\n\r\n".encode())
        with client.makefile("rb") as lines:
            assert any(line.startswith(b"event: " + event) for line in lines)


def trickle(port: int) -> None:
    """A client that is never done with what it sends, until it is cut off."""
    with socket.create_connection(("127.0.0.1", port)) as client, suppress(OSError):
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        while True:
            client.sendall(b"x")
            time.sleep(0.2)


@torch.no_grad()
def one_process(seed: int, steps: int) -> torch.Tensor:
    """What a request should get."""
    spec = importlib.util.spec_from_file_location("hello_of_the_server", FOLDER / "hello.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.DiT().eval()
    latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        latents = latents - model(latents, torch.tensor([1000.0 * (1 - step / steps)])) / steps
    return latents


def test_twenty_clients_one_cancels_and_one_rank_is_killed(tmp_path: Path) -> None:
    with serving(4, tmp_path) as running, ThreadPoolExecutor(CLIENTS) as clients:
        _, long = post(running.port, "/jobs", seed=99, steps=1000)
        until(running.port, long["id"], b"step")  # it runs, so what follows waits
        drawn = [clients.submit(draw, running.port, seed) for seed in range(CLIENTS)]
        assert ask(running.port, "DELETE", f"/jobs/{long['id']}")[0] == 202
        *steps, (event, _) = follow(running.port, long["id"])
        assert event == "cancelled" and 1 < len(steps) < 1000
        for seed, job in enumerate(drawn):
            events = job.result()
            assert [name for name, _ in events] == ["queued", "step", "step", "done"], events
            want = one_process(seed, 2)
            torch.testing.assert_close(torch.tensor(events[-1][1]["row"]), want[0, 0, 0], rtol=0, atol=1e-4)
        status, png = ask(running.port, "GET", events[-1][1]["picture"])
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        brightness = (want[0, :3].permute(1, 2, 0) / 3).tanh().numpy() * 127.5 + 127.5
        assert status == 200 and pixels.shape == (32, 32, 3) and np.abs(pixels - brightness).max() < 1.01

        _, long = post(running.port, "/jobs", seed=99, steps=1000)
        waiting = [clients.submit(post, running.port, "/", seed=seed, steps=2) for seed in range(CLIENTS - 1)]
        until(running.port, long["id"], b"step")
        running.send(3, signal.SIGKILL)
        assert follow(running.port, long["id"])[-1][0] == "error"
        for job in waiting:
            status, told = job.result()
            assert status in (500, 503) and "error" in told, told
        outcomes = running.end()
    assert outcomes[3].exit_code == -signal.SIGKILL
    for outcome in outcomes[:3]:
        assert isinstance(outcome.error, SystemExit), outcome
        assert str(outcome.error).startswith(f"rank {outcome.rank} cannot go on: ")


def test_who_hangs_up_cancels_nonsense_is_refused_and_a_signal_ends_all(tmp_path: Path) -> None:
    with serving(2, tmp_path) as running:
        port = running.port
        assert b"EventSource" in ask(port, "GET", "/")[1]
        with socket.create_connection(("127.0.0.1", port)) as hasty:  # asks for very much and hangs up
            body = json.dumps({"seed": 9, "steps": 1000})
            hasty.sendall(f"POST / HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(0.2)
        status, told = post(port, "/", seed=3, steps=1)
        assert status == 200, told
        for nonsense in ("{}", "[1]", "seed", json.dumps({"seed": "x", "steps": 1}), "x" * 5000, "[" * 1000):
            assert ask(port, "POST", "/", nonsense)[0] == 400
        for method, path in (("GET", "/jobs/0/events"), ("GET", "/jobs"), ("DELETE", "/"), ("GET", "/jobs/0/picture")):
            assert ask(port, method, path)[0] == 404
        for method, body in (("GET", b'{"ready": true}'), ("HEAD", b"")):
            assert ask(port, method, "/health?who=probe") == (200, body)
        status, resumed = ask(port, "GET", f"/jobs/{told['id']}/events")
        assert status == 200 and resumed.count(b"event: ") == 3
        for last, events in (
            ("0", 2),
            ("2", 0),
            ("999", 0),
            ("9" * 5000, 3),
        ):  # who has had the last one waits for none
            status, resumed = ask(port, "GET", f"/jobs/{told['id']}/events", headers={"Last-Event-ID": last})
            assert status == 200 and resumed.count(b"event: ") == events
        with ThreadPoolExecutor(3) as clients:
            endless = [clients.submit(post, port, "/", seed=seed, steps=1000) for seed in (7, 8)]
            clients.submit(trickle, port)  # the end waits for no such client
            time.sleep(0.2)
            for rank in (1, 0):
                running.send(rank, signal.SIGTERM)
            assert [job.result()[0] for job in endless] == [500, 500]
        outcomes = running.end()
    assert [outcome.error for outcome in outcomes] == [None, None], outcomes
    said = outcomes[0].log
    assert "seed 9: cancelled" in said and "seed 3: done" in said and "Traceback" not in said, said
    with pytest.raises(ConnectionRefusedError):
        ask(port, "GET", "/")


@pytest.mark.thorough  # as its page says, with Inductor
def test_the_command_of_the_page(tmp_path: Path) -> None:
    command = [SFCOMPILE, "run", "--ranks", "2", str(FOLDER / "server.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "listening on port" in line), "")
            assert line, "the server ended before it listened"
            port = int(line.rsplit(" ", 1)[1])
            status, told = post(port, "/", seed=5, steps=2)
            assert status == 200, told
            torch.testing.assert_close(torch.tensor(told["row"]), one_process(5, 2)[0, 0, 0], rtol=0, atol=1e-4)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=LIMIT_S)
            assert "seed 5: done" in said and "Traceback" not in said, said
        finally:
            process.kill()
