"""The examples: how each is started, and what it prints at least."""

from __future__ import annotations

EXAMPLES = {
    "hello": (["--ranks", "2"], "difference from one process"),
    "diffusers_pipeline": (["--ranks", "2"], "picture (1, 3, 32, 40), difference from one process"),
    "own_dit": (["--ranks", "2"], "2 programs, largest difference from one process"),
    "one_value": ([], "rank 0 attends to them where they lie"),
    "explain_plan": ([], "explained for 4x8:a100-efa"),
    "export_and_load": (["--ranks", "2"], "another size is refused: latents must be float32[1, 4, 32, 32]"),
    "write_a_pass": (["--ranks", "2"], "with bf16 gathers"),
    "write_a_schedule": (["--ranks", "2"], "the mistake is refused"),
    "two_machines": (["--ranks", "4", "--machines", "2"], "ranks sit on machines (0, 0, 1, 1)"),
}
