"""The examples: how each is started, and what it prints at least."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """With one rank: as a plain program. Servers run until they are told to stop: they have tests of their own."""

    says: str
    ranks: int = 2
    machines: int = 1
    is_server: bool = False


EXAMPLES = {
    "hello": Example("difference from one process"),
    "diffusers_pipeline": Example("picture (1, 3, 32, 40), difference from one process"),
    "own_dit": Example("2 programs, largest difference from one process"),
    "one_value": Example("rank 0 attends to them where they lie", ranks=1),
    "explain_plan": Example("explained for 4x8:a100-efa", ranks=1),
    "export_and_load": Example("another size is refused: latents must be float32[1, 4, 32, 32]"),
    "write_a_pass": Example("with bf16 gathers"),
    "write_a_schedule": Example("the mistake is refused"),
    "server": Example("listening on port", is_server=True),
    "two_machines": Example("ranks sit on machines (0, 0, 1, 1)", ranks=4, machines=2),
}
