"""Options: what is allowed, what is refused and with which words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfcompile.errors import MeshError, OptionError, TopologyError
from sfcompile.options import _VALIDATORS, MODES, Options, Wire


@dataclass(frozen=True)
class FakeTopology:
    """As much of a topology as options look at."""

    num_ranks: int


def test_nothing_given_is_all_defaults() -> None:
    assert Options.from_dict(None) == Options.from_dict({}) == Options()
    assert Options().timeout_s == 60.0


def test_every_field_but_mode_has_a_validator() -> None:
    assert set(Options().as_dict()) - {"mode", "group"} == set(_VALIDATORS)


@pytest.mark.parametrize("key", sorted(_VALIDATORS))
def test_defaults_are_allowed_values(key: str) -> None:
    default = getattr(Options(), key)
    assert getattr(Options.from_dict({key: default}), key) == default


@pytest.mark.parametrize(
    ("key", "given_value", "want"),
    [
        ("mesh", {"ulysses": 2, "ring": 2}, {"ulysses": 2, "ring": 2}),
        ("mesh", {"ring": 3}, {"ulysses": 1, "ring": 3}),
        ("mesh", "auto", None),
        ("topology", "2x4", "2x4"),
        ("topology", "2x4:a100-efa", "2x4:a100-efa"),
        ("topology", "cluster.toml", "cluster.toml"),
        ("schedule", "usp", "usp"),
        ("topology", FakeTopology(4), FakeTopology(4)),
        ("schedule", "torus", "torus"),
        ("transport", "c10d", "c10d"),
        ("attention", "aten", "aten"),
        ("wire", "fp8", Wire("fp8", "fp8", "fp8", "fp8")),
        ("wire", {"kv": "fp8", "qo": "bf16"}, Wire("bf16", "fp8", "fp8", "bf16")),
        ("wire", {"v": "fp8"}, Wire("same", "same", "fp8", "same")),
        ("inner", "eager", "eager"),
        ("placement", "shard", "shard"),
        ("strict", True, True),
        ("timeout_s", 5, 5.0),
        ("dump", "some/where", Path("some/where")),
    ],
)
def test_good_values(key: str, given_value: object, want: object) -> None:
    assert getattr(Options.from_dict({key: given_value}), key) == want


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mesh", {}),
        ("mesh", {"tp": 2}),
        ("mesh", {"ulysses": 0}),
        ("mesh", {"ulysses": True}),
        ("mesh", {"ulysses": 2.0}),
        ("mesh", 4),
        ("mesh", np.ones(2)),
        ("topology", "0x4"),
        ("topology", "dgx-h100"),
        ("topology", "cluster.json"),
        ("topology", 4),
        ("topology", np.ones(2)),
        ("topology", None),
        ("schedule", "torsu"),
        ("transport", None),
        ("attention", "flash"),
        ("wire", "fp16"),
        ("wire", {}),
        ("wire", {"kvx": "fp8"}),
        ("wire", {"kv": "fp4"}),
        ("wire", {"": "fp8"}),
        ("wire", {"kv": "fp8", "vo": "bf16"}),
        ("wire", ("fp8", "fp8")),
        ("inner", "inductr"),
        ("placement", True),
        ("strict", 1),
        ("timeout_s", 0),
        ("timeout_s", 1e-9),
        ("timeout_s", 0.09),
        ("timeout_s", 604801),
        ("timeout_s", 1e300),
        ("timeout_s", 10**400),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("timeout_s", "60"),
        ("timeout_s", True),
        ("dump", 3),
        ("dump", ""),
        ("dump", __file__),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(key: str, value: object) -> None:
    with pytest.raises(OptionError, match="Allowed: ") as caught:
        Options.from_dict({key: value})
    assert repr(key) in str(caught.value)


def test_unknown_key_lists_all_and_guesses_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'timeout_s'") as caught:
        Options.from_dict({"timeout": 3})
    assert all(key in str(caught.value) for key in _VALIDATORS)


@pytest.mark.parametrize("options", [["mesh"], "torus", 3])
def test_options_are_named(options: Any) -> None:
    with pytest.raises(OptionError, match="Write a dict, such as"):
        Options.from_dict(options)


def test_mode_is_passed_on_and_is_no_option() -> None:
    assert Options.from_dict({}, mode="max-autotune").mode == "max-autotune"
    with pytest.raises(OptionError, match="argument of torch.compile itself"):
        Options.from_dict({"mode": "max-autotune"})
    with pytest.raises(OptionError, match="max-autotune-no-cudagraphs"):
        Options.from_dict({}, mode="fastest")


def test_modes_are_those_of_inductor() -> None:
    from torch import _inductor

    # A newer torch may know more; every mode of the installed one must be allowed.
    assert set(_inductor.list_mode_options()) <= set(MODES)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 36))
def test_mesh_must_multiply_to_the_world(ulysses: int, ring: int, world_size: int) -> None:
    options = Options.from_dict({"mesh": {"ulysses": ulysses, "ring": ring}})
    if ulysses * ring == world_size:
        options.check_world(world_size)
        return
    with pytest.raises(MeshError, match=f"but {world_size} ranks run") as caught:
        options.check_world(world_size)
    assert f"{{'ulysses': {world_size}, 'ring': 1}}" in str(caught.value)


@pytest.mark.parametrize("topology", ["2x4", FakeTopology(8)])
def test_topology_must_have_all_ranks(topology: Any) -> None:
    options = Options.from_dict({"topology": topology})
    options.check_world(8)
    with pytest.raises(TopologyError, match="8 ranks, but 4 ranks run"):
        options.check_world(4)


def test_auto_fits_every_world() -> None:
    Options().check_world(1)
    Options().check_world(7)


def test_options_can_be_compared_and_hashed() -> None:
    mesh = {"mesh": {"ulysses": 2, "ring": 2}}
    assert Options.from_dict(mesh) == Options.from_dict(mesh)
    assert hash(Options.from_dict(mesh)) == hash(Options.from_dict(mesh))
