"""HTTP in front of the queue: a thread for each client, none of which calls the model.

    GET    /                  a page: ask, watch the steps, see the picture
    POST   /jobs              {"seed": 1, "steps": 4} -> 202 and {"id": ...}
    GET    /jobs/ID/events    server-sent events: queued, step, and last done, cancelled or error
    GET    /jobs/ID/picture   a PNG, once the job is done
    DELETE /jobs/ID           cancel it
    POST   /                  as /jobs, but answers at the end of the job; hanging up cancels it
    GET    /health            200 while jobs can be computed, 503 before the compile and at the end

It knows nobody's name and no password: leave it on 127.0.0.1, or put a proxy that does in front of it. HEAD is answered
as GET is, without a body.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serving.job import Job
from serving.jobs import Jobs, Refused

PAGE = Path(__file__).with_name("page.html")
BODY_BYTES = 1024
END_S = 1.0  # at the end, for clients that have not taken their answer


class Server(ThreadingHTTPServer):
    """Listens on ``host:port`` from here on, and says so."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, jobs: Jobs) -> None:
        try:
            super().__init__((host, port), Door)
        except (OSError, OverflowError) as error:
            raise SystemExit(f"nobody can ask on port {port} of {host} ({error}): name another one, or 0") from None
        self.jobs, self.clients = jobs, list[threading.Thread]()
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        print(f"listening on port {self.server_port}", flush=True)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each client, for which the program does not wait for ever."""
        client = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.clients = [*(other for other in self.clients if other.is_alive()), client]
        client.start()

    def end(self, why: str) -> None:
        """Tell ``why`` to those who still wait, and return when clients have their answers, or take none."""
        self.jobs.close(why)
        self.shutdown()
        self.server_close()
        until = time.monotonic() + END_S
        for client in self.clients:
            client.join(max(0.0, until - time.monotonic()))


class Door(BaseHTTPRequestHandler):
    """One request of one client."""

    server: Server
    timeout = 5.0  # for a client that neither sends nor takes

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # it has gone
            super().handle()

    @property
    def place(self) -> list[str]:
        """The path by its parts, without what stands behind a question mark."""
        return self.path.partition("?")[0].strip("/").split("/")

    def do_GET(self) -> None:
        match self.place:
            case [""]:
                self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
            case ["health"]:
                self._answer(200 if self.server.jobs.ready else 503, {"ready": self.server.jobs.ready})
            case ["jobs", job_id, "events"] if job := self.server.jobs.get(job_id):
                self._events(job)
            case ["jobs", job_id, "picture"] if (job := self.server.jobs.get(job_id)) and job.picture:
                self._send(200, job.picture, "image/png")
            case _:
                self._answer(404, {"error": f"nothing at {self.path}, or not yet, or no more"})

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        match self.place:
            case ["jobs", job_id] if job := self.server.jobs.get(job_id):
                job.cancel()
                self._answer(202, {"id": job.id})
            case _:
                self._answer(404, {"error": f"no job at {self.path}"})

    def do_POST(self) -> None:
        try:
            length = int(self.headers["Content-Length"])
            if not 0 < length <= BODY_BYTES:
                raise ValueError(f"{length} bytes")
            job = Job(json.loads(self.rfile.read(length)))
            if self.place not in ([""], ["jobs"]):
                return self._answer(404, {"error": f"nothing at {self.path}"})
            self.server.jobs.put(job)
        except Refused as why:
            return self._answer(503, {"error": f"not taken: {why}"})
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return self._answer(400, {"error": 'send {"seed": 1, "steps": 4}'})
        if self.place == ["jobs"]:
            return self._answer(202, {"id": job.id})
        last = None
        for last in job.events(every_s=0.05):  # noqa: B007  # steps may come faster than that, so every event asks
            if not job.cancelled and self._hung_up():
                job.cancel()
        _, name, data = last or (0, "error", {})
        self._answer({"done": 200, "cancelled": 409}.get(name, 500), {"id": job.id} | data)

    def _hung_up(self) -> bool:
        self.connection.settimeout(0.0)
        try:
            return self.connection.recv(1) == b""
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        finally:
            self.connection.settimeout(self.timeout)

    def _events(self, job: Job) -> None:
        """All events from the one after the client's last; a comment now and then shows whether it is still there."""
        last = self.headers.get("Last-Event-ID", "")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        first = int(last) + 1 if last.isascii() and last.isdigit() and len(last) < 10 else 0
        for event in job.events(first) if self.command != "HEAD" else ():
            if event is None:
                self.wfile.write(b": nothing new\n\n")
            else:
                number, name, data = event
                self.wfile.write(f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode())

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        self._send(status, json.dumps(data).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Jobs are logged, requests are not."""
