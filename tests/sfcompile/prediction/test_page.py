"""Style and script of the page fit its markup."""

from __future__ import annotations

import re

from models import build

from sfcompile.prediction.explain import explain
from sfcompile.prediction.page import SCRIPT, STYLE


def test_braces_and_variables() -> None:
    assert STYLE.count("{") == STYLE.count("}") and SCRIPT.count("{") == SCRIPT.count("}")
    used, defined = set(re.findall(r"var\((--\w+)\)", STYLE)), re.findall(r"(--\w+):", STYLE)
    assert used == set(defined)
    assert all(defined.count(name) == 2 for name in used), "each colour has a light and a dark form"


def test_every_class_and_id_of_the_markup_is_known() -> None:
    model, inputs = build("cross")
    text = explain(model, *inputs, topology="2x2", placement="shard").to_html()
    body = re.sub(r"<(style|script).*?</\1>", "", text, flags=re.DOTALL)
    classes = {name for value in re.findall(r'class="([^"]*)"', body) for name in value.split()}
    known = set(re.findall(r"\.([a-z][\w-]*)", STYLE)) | set(re.findall(r'"\.?([a-z][\w-]*)"', SCRIPT))
    assert classes <= known | {"views", "find", "w-sharded"}, classes - known
    for name in re.findall(r'getElementById\("(\w+)"\)', SCRIPT):
        assert f'id="{name}"' in body
