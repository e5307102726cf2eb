"""A loaded model's calls: strides, failures inside, the other ranks told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import build
from threads import run_threads

from sfcompile.errors import InputError, PackageError, PeerFailedError, RankMismatchError
from sfcompile.package.export import export
from sfcompile.package.load import load
from sfcompile.package.model import with_strides


def test_strides() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert with_strides(x, (3, 1)) is x
    turned = with_strides(x, (1, 2))
    assert turned.stride() == (1, 2) and torch.equal(turned, x)


def test_an_input_that_was_expanded_at_the_export_must_be_again(tmp_path: Path) -> None:
    x = torch.ones(1, 3).expand(4, 3)

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = load(export(Double(), (x,), {}, tmp_path / "p.sf", topology="1x1", inner="eager"))
    assert torch.equal(model(x), x * 2)
    with pytest.raises(InputError, match=r"input 0 has strides \[3, 1\], and at the export it had \[0, 1\]"):
        model(torch.ones(4, 3))


def test_a_failure_inside_a_call_is_named_and_the_other_ranks_are_told(tmp_path: Path) -> None:
    model, inputs = build("cross")
    path = export(model, inputs, {}, tmp_path / "p.sf", topology="1x2", placement="shard", inner="eager")

    def work(rank: int) -> str:
        loaded = load(path)
        if rank == 1:
            real = loaded.run

            def fails(*values: torch.Tensor) -> list[torch.Tensor]:
                return real(*(torch.zeros(1) for _ in values))

            loaded.run = fails
        with pytest.raises((PackageError, PeerFailedError)) as caught:
            loaded(*inputs)
        return str(caught.value)

    told, own = run_threads(2, work, timeout_s=20)
    assert "a call of the package failed" in own and "at node `" in own
    assert "a call of the package failed" in told and "rank 1" in told


@pytest.mark.parametrize("asked", ["checked", "trusted", "rank0"])
def test_how_ranks_come_to_equal_inputs_is_part_of_a_package(tmp_path: Path, asked: str) -> None:
    """Ranks with inputs of their own: an error on all, nothing at all (attention of a mixture), or what rank 0 gets."""
    model, inputs = build("self")
    path = export(
        model, inputs, {}, tmp_path / "p.sf", topology="1x2", placement="shard", inner="eager", inputs=asked
    )  # fmt: skip
    with torch.no_grad():
        want = model(*inputs)

    def work(rank: int) -> float:
        loaded, mine = load(path), [value + rank for value in inputs]
        before = [value.clone() for value in mine]
        if asked == "checked":
            with pytest.raises((RankMismatchError, PeerFailedError)):
                loaded(*mine)
            return 0.0
        got = loaded(*mine)
        assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
        return float((got - want).abs().max())

    differences = run_threads(2, work, timeout_s=20)
    assert max(differences) < 1e-5 or asked == "trusted", differences
