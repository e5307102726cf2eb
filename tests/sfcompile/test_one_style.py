"""Inputs and options in the style of torch.compile and torch.export, beside the older spellings."""

from __future__ import annotations

import pytest

from sfcompile.errors import OptionError
from sfcompile.one_style import merged, model_call


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
    assert model_call(*call) == ((1, 2), {"t": 3})


def test_inputs_given_twice_or_not_as_a_tuple_are_refused() -> None:
    with pytest.raises(OptionError, match="2 inputs stand behind the model, and args= holds 1"):
        model_call((1, 2), {}, (3,), None)
    with pytest.raises(OptionError, match="1 inputs stand behind the model, and kwargs= holds 1"):
        model_call((), {"a": 1}, None, {"a": 1})
    with pytest.raises(OptionError, match=r"write args=\(x,\)"):
        model_call((), {}, "x", None)


def test_options_and_keywords_are_one() -> None:
    default = {"schedule": "auto", "mesh": None}
    assert merged(None, {"schedule": "auto", "mesh": None}, default) == {}
    assert merged({"wire": "bf16"}, {"schedule": "ring", "mesh": None}, default) == {"wire": "bf16", "schedule": "ring"}
    assert merged({"schedule": "ring"}, {"schedule": "auto", "mesh": None}, default) == {"schedule": "ring"}
    with pytest.raises(OptionError, match="schedule is given twice: schedule='usp' and options=.*'ring'"):
        merged({"schedule": "ring"}, {"schedule": "usp"}, default)
