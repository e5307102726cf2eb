"""What people put around and into a model, on two ranks; docs/composition.md is the list of what is tried here."""

from __future__ import annotations

from pathlib import Path

import compositions
import pytest
from processes import preload, run_processes

pytestmark = pytest.mark.ranks

preload("compositions", "diffusers_models", "sfcompile.backend")

TOGETHER = {
    "weights": ("lora_scale", "lora_fused", "state_dict", "dynamic_int8", "weights_of_a_subclass"),
    "around": ("blocks_only", "step_cache", "controlnet", "checkpointing", "channels_last", "offloading"),
}
ALONE = ("layerwise_casting", "first_block_cache", "fsdp", "modes")


def ran(rank: int, *cases: str) -> None:
    """Cases one after the other on one rank; the log says which began last."""
    for case in cases:
        print(f"case {case}", flush=True)
        compositions.run(rank, case)


@pytest.mark.parametrize("name", TOGETHER)
def test_with_what_is_in_a_model_and_around_it(name: str) -> None:
    run_processes(2, ran, TOGETHER[name], [0, 0], timeout_s=200.0)


@pytest.mark.parametrize(
    "case", [case if case == "fsdp" else pytest.param(case, marks=pytest.mark.thorough) for case in ALONE]
)
def test_with_other_libraries(case: str) -> None:
    run_processes(2, ran, (case,), [0, 0], timeout_s=200.0)


def test_every_case_is_run_and_stands_on_the_page() -> None:
    cases = {name.removeprefix("case_") for name in vars(compositions) if name.startswith("case_")}
    assert cases == {case for together in TOGETHER.values() for case in together} | {*ALONE}
    page = (Path(__file__).parents[2] / "docs" / "composition.md").read_text()
    assert not [case for case in cases if f"`{case}`" not in page]
