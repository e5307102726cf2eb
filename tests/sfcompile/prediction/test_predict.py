"""Predictions: traced on the meta device, planned, priced, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import build
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sfcompile.errors import MeshError, OptionError, UnsupportedError
from sfcompile.prediction.predict import Prediction, simulate
from sfcompile.runtime.program.topology import Topology


def predicted(name: str = "joint", topology: str = "2x2", schedule: str = "auto") -> Prediction:
    model, inputs = build(name)
    return simulate(model, *inputs, topology=topology, schedule=schedule, placement="shard")


def test_a_step_is_the_sum_of_its_attentions() -> None:
    found = predicted()
    assert sum(found.choices.counts.values()) >= 1
    assert 0.0 < found.limit_s <= found.step_s and found.exposed_s < found.step_s
    text = str(found)
    assert "<- taken" in text and "between machines" in text and "ms predicted" in text and "of the limit" in text


def test_nothing_is_computed() -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(3072, 3 * 3072)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(2, (24, 128)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            return x + sdpa(q, k, v).transpose(1, 2).flatten(2)

    with torch.device("meta"):
        model, x = Wide().to(torch.bfloat16), torch.empty(1, 65536, 3072, dtype=torch.bfloat16)
    found = simulate(model, x, topology="4x8:a100-efa")
    (site,) = found.choices.sites.values()
    assert (site.heads, site.head_dim, site.dtype) == (24, 128, torch.bfloat16)
    assert found.choices.main is not None and found.choices.main.best.kind == "torus"


class Large(torch.nn.Module):
    """Weights of 256 KiB, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.small = (torch.nn.Linear(256, n) for n in (768, 256, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(2, (4, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.small(self.out(sdpa(q, k, v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("topology", ["2x1", "2x2", "1x2", "1x2:a100-efa"])
def test_weights_in_shares_are_part_of_the_step(topology: str) -> None:
    with torch.device("meta"):
        model, x = Large(), torch.empty(1, 4096, 256)
    whole, shares = (
        simulate(model, x, topology=topology, placement="shard", options={"weights": weights})
        for weights in ("whole", "sharded")
    )
    stages = [len(found.steps[0].stages) for found in (whole, shares)]
    # Each weight starts and ends once; CPU ranks of one machine share memory, GPUs do not.
    gathered = 0 if topology == "1x2" else 2
    assert stages[1] - stages[0] == 2 * gathered
    assert shares.step_s > whole.step_s if gathered else shares.step_s == whole.step_s


def test_what_was_asked_for() -> None:
    found = predicted(schedule="ring")
    assert all(plan.best.kind == "ring" for plan in found.choices.plans.values())
    with pytest.raises(MeshError, match="is not possible"):
        predicted(topology="5x1", schedule="ulysses")


def test_a_smaller_wire_is_priced_and_named() -> None:
    model, inputs = build("joint")
    topology = Topology.grid(2, 2, network_bytes_per_s=1e5)  # so slow that bytes are all that counts
    plain, coded = (
        simulate(model, *inputs, topology=topology, schedule="ulysses", placement="shard", wire=wire)
        for wire in ("same", {"qkvo": "bf16"})
    )
    sent = [sum(row.price.across_bytes for row in found.choices.plans.values()) for found in (plain, coded)]
    assert sent[1] * 2 == sent[0] > 0 and coded.step_s < 0.8 * plain.step_s
    assert "travels with Q, K, V, O as bf16, off by at most 2^-8 of an element" in str(coded)
    assert "travels" not in str(plain)
    with pytest.raises(OptionError, match="Bad value for option 'wire'"):
        simulate(model, *inputs, topology=topology, wire="fp4")


def test_options_are_those_of_the_backend_and_nothing_is_said_twice() -> None:
    model, inputs = build("joint")
    options = {"schedule": "ring", "placement": "shard", "timeout_s": 5.0}
    found = simulate(model, args=inputs, topology="2x2", options=options)
    assert found.step_s == predicted(schedule="ring").step_s
    for wrong, text in (
        ({"args": inputs}, "inputs stand behind the model, and args= holds"),
        ({"options": {"topology": "1x2"}}, "topology is an argument of its own"),
        ({"options": {"attention": "triton"}}, "attention='triton' cannot be predicted"),
        ({"options": {"boundaries": "shards"}}, "boundaries='shards' cannot be predicted"),
        ({"options": {"schedul": "ring"}}, "Did you mean 'schedule'"),
        ({"schedule": "usp", "options": options}, "schedule is given twice"),
    ):
        with pytest.raises(OptionError, match=text):
            simulate(model, *inputs, **{"topology": "2x2", **wrong})


def test_picture_and_trace(tmp_path: Path) -> None:
    png, trace = predicted(schedule="torus").write(tmp_path / "step")
    assert png.read_bytes()[:4] == b"\x89PNG"
    lanes = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"compute", "network"} <= lanes


def test_it_is_found_on_the_package() -> None:
    import sfcompile

    assert sfcompile.simulate is simulate
    with pytest.raises(AttributeError, match="no attribute 'stimulate'"):
        _ = sfcompile.stimulate


def test_a_guidance_pair_on_two_machines_is_split() -> None:
    model, inputs = build("self")
    assert len(inputs[0]) == 2
    found = simulate(model, *inputs, topology=Topology.grid(2, 2, network_bytes_per_s=1e5), placement="shard")
    assert found.choices.batch > 1 and "groups of" in str(found)
    assert found.timeline().topology.num_ranks == 4 // found.choices.batch


def test_what_is_cheaper_whole_is_said() -> None:
    model, inputs = build("self")
    found = simulate(model, *inputs, topology="2x2")
    assert "nothing was sharded" in str(found) and found.step_s > 0.0 and found.exposed_s == 0.0
    with pytest.raises(UnsupportedError, match="not sharded on this topology"):
        found.timeline()


def test_no_attention_is_said() -> None:
    found = simulate(torch.nn.Linear(4, 4), torch.zeros(2, 4), topology="2x2")
    assert "no attention can be sharded" in str(found) and found.exposed_s == 0.0
    assert found.step_s > 0.0  # every rank computes the whole model
    with pytest.raises(UnsupportedError, match="no attention that can be sharded"):
        found.timeline()
