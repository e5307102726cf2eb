"""`sfcompile kernels` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from sfcompile.commands.cli import main
from sfcompile.commands.kernels import Shape, add_arguments, arch, shape, sites_of
from sfcompile.commands.models import add_model
from sfcompile.errors import OptionError
from sfcompile.runtime.program.topology import Topology


def test_shapes_and_architectures_as_typed() -> None:
    assert shape("1x24x36864x128") == Shape(1, 24, 24, 36864, 128)
    assert shape("2x24/8x100x64") == Shape(2, 24, 8, 100, 64)
    assert shape("flux") is None
    for wrong in ("1x24/7x10x64", "1x0x10x64"):
        with pytest.raises(OptionError, match="is no attention"):
            shape(wrong)
    for wrong in ("1x24x4096", "24", "1x2x3x4x5", "1,24,4096,128", "1x24/8x4096"):
        with pytest.raises(OptionError, match="sizes and is no attention"):
            shape(wrong)
    assert [arch(text) for text in ("sm_90", "90", "sm_100a")] == [90, 90, 100]
    for wrong in ("sm_70", "hopper"):
        with pytest.raises(argparse.ArgumentTypeError):
            arch(wrong)


@pytest.mark.thorough  # a schedule between machines is compiled in tests/codegen/toolchain/test_listing.py
def test_a_shape_on_two_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["kernels", "1x4x512x64", "--arch", "sm_90", "--topology", "2x2:a100-efa", "--out", str(tmp_path)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "order in the code" in text and "attend" in text and f"wrote {tmp_path / 'attention'}" in text
    assert (tmp_path / "attention" / "table.txt").is_file()
    assert list((tmp_path / "attention").glob("attend*.sm_90.cubin"))


def test_the_attentions_of_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Own(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)\n"
        "        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)\n"
        "def make():\n"
        "    return Own(), (torch.empty(1, 65536, 256, device='meta'),), {}\n"
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    add_model(parser, named=False)
    args = parser.parse_args(["--model", f"{tmp_path}/own.py:make", "--topology", "1x4:h100-ib"])
    ((folder, site, _, _),) = sites_of(args, Topology.parse("1x4:h100-ib"))
    assert folder == "attention-1" and (site.heads, site.head_dim) == (4, 64)


def test_a_model_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "nosuchmodel"]) == 2
    assert "nosuchmodel" in capsys.readouterr().err
