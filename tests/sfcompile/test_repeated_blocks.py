"""Each kind of block is compiled once, in place; a value goes from block to block in shards."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import boundary_cases
import pytest
import torch
from processes import preload, run_processes
from torch import nn

import sfcompile
from sfcompile.errors import OptionError
from sfcompile.pipelines import CompiledMethod
from sfcompile.repeated_blocks import repeated_blocks

preload("boundary_cases", "model_cases", "sfcompile.backend", "sfcompile.repeated_blocks")


@pytest.mark.ranks
@pytest.mark.parametrize("homes", [[0, 0], [0, 0, 1]])
def test_blocks_hand_on_shards(homes: list[int]) -> None:
    run_processes(len(homes), boundary_cases.run, ("regions",), homes, timeout_s=120.0)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ["of_many_kinds", "in_a_pipeline"])
def test_blocks_of_many_kinds_and_of_a_pipelines_network(case: str) -> None:
    run_processes(2, boundary_cases.run, (f"regions_{case}",), [0, 0], timeout_s=120.0)


@pytest.mark.ranks
def test_a_second_start_takes_the_plans_of_regions(tmp_path: Path) -> None:
    run_processes(2, boundary_cases.run, ("regions_started_again", str(tmp_path)), [0, 0], timeout_s=120.0)


def layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU())


class Named(nn.Module):
    """A block that is no list."""

    def __init__(self, width: int, more: bool = False) -> None:
        super().__init__()
        self.inside = nn.Linear(width, width)
        self.more = nn.Linear(width, width) if more else None
        self.parts = nn.ModuleList([layers(2), layers(2)])


def test_blocks_are_the_outermost_members_that_repeat() -> None:
    model = nn.Module()
    model.embed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.blocks = nn.ModuleList([Named(4), Named(4), nn.Linear(4, 4)])
    assert list(repeated_blocks(model)) == list(model.blocks)[:2], "single layers are no blocks"
    assert list(repeated_blocks(nn.Sequential(layers(3), layers(3)))), "the model may be the list"


def test_blocks_that_are_lists_of_parts_are_as_many_regions() -> None:
    model = nn.ModuleList([nn.ModuleList([layers(4), Named(4)]) for _ in range(3)])
    assert list(repeated_blocks(model)) == [part for block in model for part in block]
    alone = nn.ModuleList([nn.ModuleList([layers(4), Named(4)]), nn.ModuleList([layers(5)])])
    assert list(repeated_blocks(alone)) == list(alone[0][1].parts)


def test_of_a_list_in_which_some_repeat_the_others_are_blocks_too() -> None:
    first, second, odd = Named(4), Named(4), layers(4)
    assert list(repeated_blocks(nn.ModuleList([odd, first, second]))) == [odd, first, second]
    stage = nn.Sequential(Named(8), Named(8))  # it has repeats of its own
    assert list(repeated_blocks(nn.ModuleList([stage, first, second]))) == [*stage, first, second]
    of_other_sizes = nn.ModuleList([Named(4), Named(8)])
    assert list(repeated_blocks(of_other_sizes)) == [part for block in of_other_sizes for part in block.parts]


def test_what_does_not_repeat_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(OptionError, match="no blocks that repeat"):
        sfcompile.compile_repeated_blocks(model)
    deep = nn.Sequential(layers(4), layers(4))
    before = deep[0].forward
    with pytest.raises(OptionError, match="boundaries='regions' together with inputs='rank0'"):
        sfcompile.compile_repeated_blocks(deep, options={"boundaries": "regions", "inputs": "rank0"})
    assert deep[0].forward == before


def test_one_process_compiles_blocks_by_themselves_and_twice_is_once() -> None:
    torch._dynamo.reset()
    deep, x = nn.Sequential(layers(4), layers(4)), torch.randn(3, 4)
    with torch.no_grad():
        want = deep(x)
        for _ in range(2):
            assert sfcompile.compile_repeated_blocks(deep, options={"inner": "eager"}) is deep
            torch.testing.assert_close(deep(x), want)


def test_copies_have_their_own_weights() -> None:
    """A copy's blocks were the first one's, and drew with its weights; a pickled model is as it was written."""
    torch._dynamo.reset()
    deep, x = nn.Sequential(layers(4), layers(4)), torch.randn(3, 4)
    plain = copy.deepcopy(deep)
    sfcompile.compile_repeated_blocks(deep, options={"inner": "eager"})
    copied = copy.deepcopy(deep)
    with torch.no_grad():
        for model in (copied, other := copy.deepcopy(plain)):
            for parameter in model.parameters():
                parameter.mul_(0.5)
        torch.testing.assert_close(copied(x), other(x))
        torch.testing.assert_close(deep(x), plain(x))
        assert isinstance(copied[0].forward, CompiledMethod)
        again = pickle.loads(pickle.dumps(copied))
        assert not isinstance(again[0].forward, CompiledMethod)
        torch.testing.assert_close(again(x), other(x))


def test_a_mode_goes_without_options_as_torch_has_it() -> None:
    torch._dynamo.reset()
    deep, x = nn.Sequential(layers(4), layers(4)), torch.randn(3, 4)
    with pytest.raises(OptionError, match="not both"):
        sfcompile.compile_repeated_blocks(deep, mode="reduce-overhead", options={"inner": "eager"})
    with pytest.raises(OptionError, match="is a list"):
        sfcompile.compile_repeated_blocks(deep, options=["inner"])  # type: ignore[arg-type]
    with torch.no_grad():
        want = deep(x)
        torch.testing.assert_close(sfcompile.compile_repeated_blocks(deep, mode="default")(x), want)
