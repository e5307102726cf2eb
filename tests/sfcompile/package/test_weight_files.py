"""Files of weights against a model: what fits is read, what does not is said by name. With ranks:
tests/e2e/test_sharded_weights.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_weight_ranks import Block, model_of, write_files
from torch import nn

import sfcompile
from sfcompile.errors import OptionError, WeightsError
from sfcompile.package.tensors import write_tensors


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors)
    return path


def test_one_rank_alone_reads_a_folder(tmp_path: Path) -> None:
    """Tied weights stay one parameter, whether they want gradients stays too, and every value is the file's."""
    write_files(tmp_path, 3)
    model, wanted = model_of(0, "meta"), model_of(3)
    model[0].qkv.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    assert sfcompile.load_sharded(model, tmp_path) is model
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())
    for block in model:
        assert isinstance(block, Block) and block.again.weight is block.out.weight
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == ["0.qkv.weight"]


def test_values_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    """Wherever they lie in the file: the second tensor begins at an odd byte."""
    path = write(tmp_path / "x.safetensors", {"bias": torch.arange(3.0), "weight": torch.ones(3, 3)})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    with torch.device("meta"):
        model = nn.Linear(3, 3).to(torch.bfloat16)
    sfcompile.load_sharded(model, path)
    assert model.bias.dtype is torch.bfloat16 and model.bias.tolist() == [0, 1, 2]
    assert model.weight.tolist() == [[1.0] * 3] * 3


def linear(**changed: Any) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(3, 3), "bias": torch.ones(3), **changed}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"bias": torch.ones(3)}, "1 of 2 weights do not fit: weight is in none of the files"),
        (linear(weight=torch.ones(3, 4)), r"weight is \[3, 3\] in the model and \[3, 4\] in x.safetensors"),
        (linear(weight=torch.ones(3, 3, dtype=torch.int8)), "weight is torch.float32 in the model and torch.int8"),
        (linear(odd=torch.ones(1)), "odd is in x.safetensors and not in the model"),
    ],
)
def test_what_does_not_fit_is_said_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    path = write(tmp_path / "x.safetensors", tensors)
    model = nn.Linear(3, 3, device="meta")
    with pytest.raises(WeightsError, match=text):
        sfcompile.load_sharded(model, path)
    assert model.weight.is_meta and model.bias.is_meta  # nothing was put


def test_names_of_one_weight_hold_the_same(tmp_path: Path) -> None:
    """Which of two would count is nobody's guess; complex numbers would lose a half."""
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
        model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    model[1].weight = model[0].weight
    held = {"0.weight": torch.ones(3, 3), "1.weight": torch.ones(3, 3), "count": torch.arange(2)}
    sfcompile.load_sharded(model, write(tmp_path / "x.safetensors", held))
    assert model[0].weight is model[1].weight and not model[0].weight.is_meta
    odd = held | {"1.weight": torch.ones(3, 3).index_fill(0, torch.tensor([2]), 3.0), "count": torch.ones(2) + 0j}
    with pytest.raises(WeightsError, match=r"0.weight and 1.weight are one weight.*count is torch.int64 in the model"):
        sfcompile.load_sharded(model, write(tmp_path / "x.safetensors", odd))


def test_files_that_are_none(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, device="meta")
    with pytest.raises(WeightsError, match="no safetensors files in"):
        sfcompile.load_sharded(model, tmp_path)
    with pytest.raises(WeightsError, match="No such file"):
        sfcompile.load_sharded(model, [tmp_path / "x.safetensors"])
    (tmp_path / "y.safetensors").write_bytes(b"no header here")
    with pytest.raises(WeightsError, match="not in safetensors' format"):
        sfcompile.load_sharded(model, tmp_path)
    one = write(tmp_path / "y.safetensors", linear())
    with pytest.raises(WeightsError, match="both hold"):
        sfcompile.load_sharded(model, [one, one])


def test_what_no_file_can_fill_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", linear())
    model = nn.Linear(3, 3, device="meta")
    model.register_buffer("table", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(WeightsError, match="table is on the meta device and in no state_dict"):
        sfcompile.load_sharded(model, path)
    model.weight = nn.Parameter(type("Odd", (torch.Tensor,), {})(torch.ones(3, 3)))
    with pytest.raises(WeightsError, match="weight is a "):
        sfcompile.load_sharded(model, path)


def test_options_are_the_backends(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Did you mean 'weights'"):
        sfcompile.load_sharded(nn.Linear(3, 3), tmp_path, options={"weight": "sharded"})
