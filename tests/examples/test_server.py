"""examples/server.py with real clients: several at once, one that hangs up, nonsense, and a clean end."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks
FOLDER = Path(__file__).resolve().parents[2] / "examples"
SFCOMPILE = str(Path(sys.executable).with_name("sfcompile"))
LIMIT_S = 300.0


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [SFCOMPILE, "run", "--ranks", "2", str(FOLDER / "server.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "listening on port" in line), "")
            assert line, "the server ended before it listened"
            yield process, int(line.rsplit(" ", 1)[1])
        finally:
            process.kill()


def ask(port: int, body: str) -> tuple[int, str]:
    client = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    client.request("POST", "/", body)
    response = client.getresponse()
    return response.status, response.read().decode()


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
    return latents[0, 0, 0]


def test_requests_of_many_clients_are_computed_by_all_ranks(server: tuple[subprocess.Popen[str], int]) -> None:
    process, port = server
    assert ask(port, json.dumps({"seed": 5, "steps": 1}))[0] == 200
    with socket.create_connection(("127.0.0.1", port)) as hasty:  # asks for very much and hangs up
        body = json.dumps({"seed": 9, "steps": 1000})
        hasty.sendall(f"POST / HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(1.0)
    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(ask, port, json.dumps({"seed": seed, "steps": 2})) for seed in range(4)]
        for seed, answer in enumerate(asked):
            status, text = answer.result()
            assert status == 200, text
            torch.testing.assert_close(torch.tensor(json.loads(text)["row"]), one_process(seed, 2), rtol=0, atol=1e-4)
    for nonsense in ("{}", "[1]", "seed", json.dumps({"seed": "x", "steps": 1})):
        assert ask(port, nonsense)[0] == 400
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert "seed 9: given up" in said and "seed 3: done" in said, said
    assert "Traceback" not in said, said
    with pytest.raises(ConnectionRefusedError):
        ask(port, "{}")
