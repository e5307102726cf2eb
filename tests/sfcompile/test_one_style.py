"""Inputs and options in the style of torch.compile and torch.export, beside the older spellings."""

from __future__ import annotations

import pytest
import torch

from sfcompile.errors import OptionError
from sfcompile.one_style import check_model, merged, model_call


@pytest.mark.parametrize(
    "call",
    [
        ((1, 2), {"t": 3}, None, None),
        ((), {}, (1, 2), {"t": 3}),
        ((), {"t": 3}, [1, 2], None),
        ((1, 2), {}, None, {"t": 3}),
    ],
)
def test_inputs_are_the_same_however_they_are_given(call: tuple) -> None:
    assert model_call(abs, *call) == ((1, 2), {"t": 3})


def test_inputs_given_twice_or_not_as_a_tuple_are_refused() -> None:
    with pytest.raises(OptionError, match="2 inputs stand behind the model, and args= holds 1"):
        model_call(abs, (1, 2), {}, (3,), None)
    with pytest.raises(OptionError, match="1 inputs stand behind the model, and kwargs= holds 1"):
        model_call(abs, (), {"a": 1}, None, {"a": 1})
    with pytest.raises(OptionError, match=r"Write args=\(x,\)"):
        model_call(abs, (), {}, "x", None)


def test_options_and_keywords_are_one() -> None:
    default = {"schedule": "auto", "mesh": None}
    assert merged(None, {"schedule": "auto", "mesh": None}, default) == {}
    assert merged({"wire": "bf16"}, {"schedule": "ring", "mesh": None}, default) == {"wire": "bf16", "schedule": "ring"}
    assert merged({"schedule": "ring"}, {"schedule": "auto", "mesh": None}, default) == {"schedule": "ring"}
    with pytest.raises(OptionError, match="schedule is given twice: schedule='usp' and options=.*'ring'"):
        merged({"schedule": "ring"}, {"schedule": "usp"}, default)


def test_what_is_no_model_and_options_that_are_misspelt_are_told() -> None:
    with pytest.raises(OptionError, match="'flux' is str, no model"):
        model_call("flux", (1,), {}, None, None)
    with pytest.raises(OptionError, match="'flux' is str, no model"):
        check_model("flux", modules=True)
    with pytest.raises(OptionError, match="Did you mean 'schedule'"):
        model_call(torch.nn.Linear(2, 2), (1,), {"shedule": "torus"}, None, None)
    assert model_call(torch.nn.Linear(2, 2), (), {"input": 1}, None, None) == ((), {"input": 1})
