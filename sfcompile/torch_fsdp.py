"""What ``fully_shard`` keeps of a model, and how it comes off again: private to torch, as torch_private.py is."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

__all__ = ["fully_shard_asks", "leave_fully_shard"]


def fully_shard_asks(model: torch.nn.Module) -> str:
    """What torch's ``fully_shard`` was asked for, beside shards, that a model would lose with its hooks; "" if nothing.

    Afterwards all of its parameters are in shards: the root keeps whole ones after a call.
    """
    for module, state in _fully_sharded(model).items():
        module.reshard()
        policy = state._mp_policy
        if policy.param_dtype is not None or policy.output_dtype is not None:
            return f"mp_policy={policy}"
        if any(param.offload_to_cpu for group in _groups_of(state) for param in group.fsdp_params):
            return "an offload_policy that keeps parameters on the CPU"
    return ""


def leave_fully_shard(model: torch.nn.Module) -> int:
    """Take ``fully_shard`` off a model: its hooks, classes and marks, on how many modules. Parameters stay DTensors."""
    states = _fully_sharded(model)
    for state in states.values():
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in _groups_of(state):
            for param in group.fsdp_params:
                param._post_load_hook_handle.remove()
    if states:
        composable = importlib.import_module("torch.distributed._composable_state")
        contract = importlib.import_module("torch.distributed._composable.contract")
        for module, state in states.items():
            module.__class__ = type(module).__bases__[1]  # FSDPLinear(FSDPModule, Linear)
            composable._module_state_mapping.pop(module, None)
            module.__dict__.get(contract.REGISTRY_KEY, {}).pop("fully_shard", None)
            kept = module.__dict__.get(contract.STATE_KEY, {})
            for function in [function for function, its in kept.items() if its is state]:
                del kept[function]  # it holds torch's shards
        for module in model.modules():
            for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
                module.__dict__.pop(mark, None)
    return len(states)


def _fully_sharded(model: torch.nn.Module) -> dict[Any, Any]:
    """The modules that ``fully_shard`` was called on, with what it keeps of each."""
    if "torch.distributed.fsdp" not in sys.modules:
        return {}
    kind = importlib.import_module("torch.distributed.fsdp").FSDPModule
    return {module: module._get_fsdp_state() for module in model.modules() if isinstance(module, kind)}


def _groups_of(state: Any) -> list[Any]:
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
