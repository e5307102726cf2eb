"""Names of models without importing their library."""

from __future__ import annotations

import importlib.util

import pytest

from sfcompile.commands import meta_model, model_names
from sfcompile.commands.model_names import best_match, check_model_name, class_names
from sfcompile.errors import OptionError


def test_every_class_that_can_be_built_is_named() -> None:
    assert set(meta_model._classes()) <= set(class_names())
    check_model_name("flux")


def test_the_shortest_name_that_fits_is_taken() -> None:
    known = ["AlphaTransformer3DModel", "AlphaBetaTransformer2DModel", "Gamma2Model"]
    assert best_match("alpha", known) == "AlphaTransformer3DModel"
    assert best_match("alpha_beta", known) == "AlphaBetaTransformer2DModel"
    assert best_match("GAMMA-2", known) == "Gamma2Model"
    with pytest.raises(OptionError, match="Did you mean AlphaTransformer3DModel"):
        best_match("alfa", known)
    for typed in ("", "--"):
        with pytest.raises(OptionError, match="No transformer class"):
            best_match(typed, known)


def test_a_missing_library_and_one_that_looks_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "class_names", list)
    check_model_name("anything")  # whoever imports it will know
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"sfcompile\[diffusers\]"):
        check_model_name("flux")
