"""The reference of what wires cost is fp64 throughout, also where a model asks for fp32 by name."""

from __future__ import annotations

import torch
from torch import nn
from wires import in_double


class ByName(nn.Module):
    """Angles in fp32, a norm in fp32, and back: as models have it whose weights are bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rates = torch.exp(-torch.arange(4, dtype=torch.float32))
        angles = torch.outer(t.to(torch.float32), rates)
        assert angles.dtype == rates.dtype
        y = self.time(torch.cat([angles.sin(), angles.cos()], -1).float())
        return self.norm(x.float() + y).type_as(x)


def test_what_is_asked_for_in_fp32_is_fp64() -> None:
    model, x, t = ByName(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    (out,) = in_double(model, {"x": x, "t": t})
    angles = torch.outer(t.double(), torch.exp(-torch.arange(4).double()))
    y = nn.functional.linear(
        torch.cat([angles.sin(), angles.cos()], -1), model.time.weight.double(), model.time.bias.double()
    )
    want = nn.functional.layer_norm(x.double() + y, (8,))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, want, rtol=1e-13, atol=1e-13)
    assert model.norm.weight.dtype == torch.get_default_dtype() == torch.float32
