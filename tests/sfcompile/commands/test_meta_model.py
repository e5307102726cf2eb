"""Models of diffusers by name, on the meta device. Full-size classes: no storage, a second each."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sfcompile.commands import meta_model
from sfcompile.commands.meta_model import build_meta_model, find_class
from sfcompile.errors import OptionError

pytest.importorskip("diffusers")

NAMES = {
    "flux": "FluxTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "cogvideox": "CogVideoXTransformer3DModel",
    "hunyuanvideo": "HunyuanVideoTransformer3DModel",
    "ltxvideo": "LTXVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
    "qwenimage": "QwenImageTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "sana": "SanaTransformer2DModel",
}


@pytest.fixture(autouse=True)
def _autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", torch.autocast)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in values for tensor in _tensors(part)]


def _longest(model: torch.nn.Module, kwargs: dict[str, Any]) -> int:
    """The longest sequence that a linear layer sees."""
    seen = [0]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2] if args[0].ndim > 1 else 0))
    with torch.no_grad():
        model(**kwargs)
    return max(seen)


QUICK = ("flux", "sd3", "cogvideox", "lumina2", "sana")  # images, a video, one stream, no softmax


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES]
)
def test_a_model_runs_at_full_size_with_the_tokens_asked_for(name: str) -> None:
    made = build_meta_model(name, 4096)
    assert made.class_name == NAMES[name]
    assert not made.model.training
    assert sum(parameter.numel() for parameter in made.model.parameters()) > 5e8
    tensors = [*_tensors(made.kwargs), *made.model.parameters(), *made.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert 4096 <= _longest(made.model, made.kwargs) <= 4096 + 512


@pytest.mark.parametrize(("name", "tokens"), [("flux", 36864), ("sd3", 36864), ("wan", 3600), ("sana", 1000)])
def test_the_sequence_is_about_as_long_as_asked(name: str, tokens: int) -> None:
    made = build_meta_model(name, tokens, text_tokens=16)
    assert _longest(made.model, made.kwargs) == pytest.approx(tokens, rel=0.05)


def test_batch_text_and_config_are_taken() -> None:
    made = build_meta_model("flux", 256, batch=3, text_tokens=40, config={"num_layers": 1, "guidance_embeds": True})
    assert made.kwargs["hidden_states"].shape == (3, 256, 64)
    assert made.kwargs["encoder_hidden_states"].shape == (3, 40, 4096)
    assert made.kwargs["guidance"].shape == (3,)
    assert made.kwargs["return_dict"] is False
    assert len(made.model.transformer_blocks) == 1


def test_masks_and_batches_of_a_model_that_reads_lengths() -> None:
    made = build_meta_model("mochi", 256, batch=2, text_tokens=32, config={"num_layers": 2})
    assert made.kwargs["encoder_attention_mask"].sum(dim=1).tolist() == [32, 32]


@pytest.mark.parametrize("typed", ["Flux", "FLUX", "flux-transformer", "FluxTransformer2DModel"])
def test_case_and_punctuation_do_not_count(typed: str) -> None:
    assert find_class(typed).__name__ == "FluxTransformer2DModel"


@pytest.mark.parametrize("typed", ["fluks", "", "resnet50"])
def test_an_unknown_name_lists_classes(typed: str) -> None:
    with pytest.raises(OptionError, match="Transformer2DModel") as caught:
        find_class(typed)
    assert ("mean FluxTransformer2DModel" in str(caught.value)) == (typed == "fluks")


def test_errors_say_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="tokens=0"):
        build_meta_model("flux", 0)
    with pytest.raises(OptionError, match="config .*'num_layers': 'x'"):
        build_meta_model("flux", 256, config={"num_layers": "x"})
    with pytest.raises(OptionError, match="has no field 'num_layrs'. Did you mean 'num_layers'"):
        build_meta_model("flux", 256, config={"num_layrs": 1})
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(OptionError, match=r'pip install "sfcompile\[diffusers\]"'):
        find_class("flux")


def test_no_model_is_named_in_the_source() -> None:
    text = Path(str(meta_model.__file__)).read_text().lower()
    names = {re.split(r"\d?transformer|\dd", name.lower())[0] for name in meta_model._classes()} | set(NAMES)
    assert [name for name in names if name and re.search(rf"(?<![a-z]){name}(?![a-z])", text)] == []
