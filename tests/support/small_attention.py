"""The smallest model that packages are tried on: one attention between a buffer and a tensor that it merely holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    """One attention; what is done around it is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.table = nn.Buffer(torch.randn(8, 16))
        self.loose = torch.ones(16)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.attend(x + self.table) * self.loose
