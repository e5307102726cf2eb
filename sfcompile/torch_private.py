"""Everything private that we need of torch (2.11 to 2.13), in one place. Leaf file: imports torch, nothing of ours.

When a new torch moves one of these, this is the only file to mend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor
from torch._functorch._aot_autograd.functional_utils import has_data_mutation
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.distributed import distributed_c10d
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes as no_modes

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TracingContext",
    "compile_fx",
    "dispatch_functionalize",
    "fused_attention",
    "fused_encoder_layer",
    "has_data_mutation",
    "inductor_mode_options",
    "job_store",
    "make_fx",
    "no_modes",
    "symbol_hint",
    "tracing",
]

fused_attention: Any = torch._native_multi_head_attention
fused_encoder_layer: Any = torch._transformer_encoder_layer_fwd
"""What ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call at inference."""


def symbol_hint(size: Any) -> Any:
    """The present value of a symbolic number, without adding a guard; None if it has none (it depends on data)."""
    node = size.node
    return node.hint if node.has_hint() else None


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's config for a ``mode`` of torch.compile."""
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    return options


def job_store(prefix: str) -> Any:
    """The key-value store of the default process group, under a prefix of our own."""
    return distributed_c10d.PrefixStore(prefix, distributed_c10d._get_default_store())
