"""`sfcompile simulate` and `sfcompile explain`: models by name, their configs, what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfcompile.commands.cli import main
from sfcompile.commands.models import EXIT_USAGE, fields_of
from sfcompile.errors import OptionError

SMALL = "flux --config num_layers=1 --config num_single_layers=2 --tokens 1024 --topology 2x4:h100-ib"


def test_fields_of_a_config() -> None:
    given = ["num_layers=4", "patch_size=(1, 2, 2)", "norm=rms_norm", "eps=1e-6", "bias=False", "text="]
    want = {"num_layers": 4, "patch_size": (1, 2, 2), "norm": "rms_norm", "eps": 1e-6, "bias": False, "text": ""}
    assert fields_of(given) == want
    for pair in ("num_layers", "=4", "a b=1"):
        with pytest.raises(OptionError, match="is no KEY=VALUE"):
            fields_of([pair])


def test_explain_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--html", str(tmp_path / "plan.html"), "--json", str(tmp_path / "plan.json")]
    assert main(["explain", *SMALL.split(), *files]) == 0
    out = capsys.readouterr().out
    assert "3 attentions: 1536 tokens, 24 heads x 128" in out and "single_transformer_blocks.0" in out
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    plain = json.loads((tmp_path / "plan.json").read_text())
    assert plain["topology"]["asked"] == "2x4:h100-ib" and len(plain["graphs"]) == 1


OWN = """
import torch
class Own(torch.nn.Module):
    def forward(self, x, scale=1.0):
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return out.transpose(1, 2).flatten(2) * scale
def make():
    return Own(), (torch.empty(1, 4096, 256, device="meta"),), {"scale": 2.0}
"""


def test_a_model_of_ones_own_by_file_and_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own, flags = f"{tmp_path}/own.py:make", ["--topology", "1x4:h100-ib", "--placement", "shard"]
    assert main(["explain", own, *flags]) == 0
    assert "Own on 1x4:h100-ib" in (out := capsys.readouterr().out) and "4096 tokens, 4 heads x 64" in out
    assert main(["explain", own, *flags, "--weights", "sharded"]) == 0
    assert "none is large enough to be cut" in capsys.readouterr().out
    assert main(["simulate", own, *flags, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "Own-1x4-h100-ib.png").is_file()
    assert main(["explain", own, "--config", "a=1"]) == EXIT_USAGE
    assert main(["explain", f"{tmp_path}/gone.py:make"]) == EXIT_USAGE
    assert "gone.py is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["explain"], "name a model by"),
        (["explain", "--model", "flux", "--topology", "4x8:b300"], "preset 'b300' is unknown"),
        (["explain", "--model", "flux", "--config", "x"], "is no KEY=VALUE"),
        (["simulate", "--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_is_missing_is_said(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == EXIT_USAGE
    assert text in capsys.readouterr().err


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from sfcompile.commands import cli; cli.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
