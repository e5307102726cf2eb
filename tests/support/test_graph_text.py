"""The textual form of graphs: it is read back as it was written, and a line that lies is refused."""

from __future__ import annotations

import pytest
import torch
from graph_text import parse, same, text_of
from helpers import captured
from models import build


def test_the_form_of_the_head() -> None:
    parsed = parse(
        """
        x: f32[1,8,4] = input
        y: f32[1,8,4] = aten.relu(x)
        a: (f32[1,8,2], f32[1,8,2]) = aten.split.Tensor(y, 2, -1)
        b: f32[1,8,2] = a[0]
        return b
        """
    )
    x, y = parsed["x"], parsed["y"]
    assert y.target is torch.ops.aten.relu.default and y.args == (x,)
    value = torch.randn(1, 8, 4)
    assert torch.equal(parsed.gm(value)[0], value.relu()[..., :2])


def test_arguments_of_all_kinds_are_read_back() -> None:
    text = (
        "x: f32[2,3] = input\n"
        "y: bf16[2,3] = aten._to_copy(x, dtype=torch.bfloat16)\n"
        "z: f32[1] = aten.zeros([1], dtype=torch.float32)\n"
        "c: f32[2,6] = aten.cat([x, x], -1)\n"
        "d: f32[2,6] = aten.clamp(c, None, 0.5)\n"
        "p: i64[1] = aten.zeros([1], dtype=torch.int64)\n"
        "q: i64[1] = streamfusion.attend(p, None, 'key', 0)\n"
        "return d, y\n"
    )
    assert text_of(parse(text).gm.graph) == text
    same(parse(text).gm.graph, "\n".join("    " + line for line in text.splitlines()))


def test_a_captured_model_is_read_back() -> None:
    model, inputs = build("joint")
    text = text_of(captured(model, *inputs).gm.graph)
    assert text_of(parse(text).gm.graph) == text and "scaled_dot_product_attention" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("y: f32[3,2] = aten.relu(x)", r"y: f32\[2,3\], not what the line says"),
        ("y = aten.relu(x)", "not of the form"),
        ("y: f32[2,3] = x", "neither a call"),
    ],
)
def test_a_line_that_lies_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"x: f32[2,3] = input\n{line}\nreturn y")


def test_another_graph_is_shown() -> None:
    with pytest.raises(AssertionError, match="it reads:\nx: f32"):
        same(parse("x: f32[2] = input\nreturn x").gm.graph, "x: f32[3] = input\nreturn x")
