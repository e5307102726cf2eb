"""`sfcompile export` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfcompile.commands.cli import main

MODEL = """
import torch
class Tiny(torch.nn.Module):
    def forward(self, x, scale=2.0):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x) * scale
def make():
    return Tiny(), (torch.randn(1, 2, 8, 4),), {"scale": 3.0}
def wrong():
    return Tiny()
def one():
    return Tiny(), torch.randn(1, 2, 8, 4)
def fails():
    raise KeyError("weights")
def leaves():
    raise SystemExit(3)
"""


def test_a_package_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.py").write_text(MODEL)
    argv = [
        "export",
        f"{tmp_path}/tiny.py:make",
        "--topology",
        "1x2",
        "--out",
        f"{tmp_path}/tiny.sf",
        "--placement",
        "shard",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Tiny for 2 ranks" in out and "input 0: float32[1, 2, 8, 4]" in out and "schedules.json" in out
    assert main(["export", "--show", f"{tmp_path}/tiny.sf"]) == 0
    assert "Tiny for 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["x.py:f"], "needs MODEL, --topology and --out"),
        (["no.such:f", "--topology", "1x2", "--out", "p"], "'no.such:f' cannot be found"),
        (["{}/tiny.py:gone", "--topology", "1x2", "--out", "p"], "has no 'gone'"),
        (
            ["{}/tiny.py:one", "--topology", "1x2", "--out", "p"],
            "returned Tensor in place of the tuple",
        ),
        (["{}/tiny.py:fails", "--topology", "1x2", "--out", "p"], "raises KeyError: 'weights'. Mend that.\n  in "),
        (["{}/tiny.py:leaves", "--topology", "1x2", "--out", "p"], "left the process with exit code 3"),
        (["{}/tiny.py:wrong", "--topology", "1x2", "--out", "p"], "returned one object, of class Tiny"),
        (["--show", "{}/tiny.py"], "damaged or no package"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.py").write_text(MODEL)
    assert main(["export", *(arg.format(tmp_path) for arg in argv)]) == 2
    assert text in capsys.readouterr().err
