"""How a tiny model is declared, built and given its weights; ``ZOO`` maps a name to a builder.

A declaration is a function of a :class:`Draw` that returns the class's configuration and forward()'s keyword
arguments. Weights and inputs depend on the name only, so every process builds the same model. No layer stays
zero-initialised and no norm at one: a wrong shard shows in the output at order one.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HEADS, HEAD_DIM = 4, 16
HIDDEN = HEADS * HEAD_DIM
TEXT = 24
Inputs = dict[str, Any]
Declaration = Callable[["Draw"], tuple[dict[str, Any], Inputs]]
ZOO: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}
CLASSES: dict[str, str] = {}
"""Name -> the model's class in diffusers, where it is one."""


class Draw:
    """Random inputs of one model."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Integers of ``[0, high)``."""
        return torch.randint(0, high, shape, generator=self._generator)


def case(name: str, class_name: str, module: str = "diffusers.models.transformers") -> Callable[[Declaration], None]:
    """Register a declaration of ``class_name`` under ``name``."""

    def register(declare: Declaration) -> None:
        def build() -> tuple[nn.Module, Inputs]:
            seed = zlib.crc32(name.encode())
            state = torch.random.get_rng_state()
            try:
                torch.manual_seed(seed)
                config, inputs = declare(Draw(seed))
                model = getattr(importlib.import_module(module), class_name)(**config)
                redraw(model)
            finally:
                torch.random.set_rng_state(state)
            return model.eval(), inputs

        if name in ZOO:
            raise ValueError(f"two models are named {name}")
        ZOO[name] = build
        if module.startswith("diffusers."):
            CLASSES[name] = class_name

    return register


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """New values for every parameter: matrices keep the scale of their input, vectors move off their start."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
        else:
            parameter.copy_(torch.nan_to_num(parameter) + 0.1 * noise)


def key_mask(*lengths: int, total: int = TEXT) -> torch.Tensor:
    """A boolean mask [B, total], true for the first ``lengths[b]`` tokens of sample ``b``."""
    return torch.arange(total)[None, :] < torch.tensor(lengths)[:, None]
