"""The page: well formed, complete, and nothing on it can ask another machine for anything."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import build

from sfcompile.prediction import html
from sfcompile.prediction.explain import ExplainedGraph, Explanation, explain
from sfcompile.prediction.html import bytes_rows, page

STYLE, SCRIPT = (Path(html.__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
VOID = {"meta", "link", "br", "input", "rect", "line"}


class Reader(HTMLParser):
    """Checks that tags close in order; keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID or (tag in ("rect",)):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def found() -> Explanation:
    model, inputs = build("joint")
    return explain(model, *inputs, topology="2x2", placement="shard", name="<b>joint</b> & co")


@pytest.fixture(scope="module")
def read(found: Explanation) -> Reader:
    reader = Reader()
    reader.feed(page(found))
    assert not reader.open
    return reader


def test_nothing_is_loaded_from_elsewhere(found: Explanation, read: Reader) -> None:
    loads = [(t, n, v) for t, n, v in read.attributes if n in ("src", "href", "srcset", "action", "data", "poster")]
    assert loads == [("link", "href", "data:,")]
    assert not re.search(r"url\(|@import|//[a-z]", read.text["style"])
    assert not re.search(r"fetch|XMLHttp|import|WebSocket|https?:", read.text["script"].split('"use strict"')[1])
    (policy,) = [v for t, n, v in read.attributes if t == "meta" and n == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none'")


def test_the_embedded_json_is_the_explanation(found: Explanation) -> None:
    text = page(found)
    (data,) = re.findall(r'<script type="application/json" id="explanation">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data) == json.loads(found.to_json())


def test_plan_timeline_and_graph_are_there(found: Explanation, read: Reader) -> None:
    (kind,) = found.graphs[0].attentions
    text = page(found)
    assert text.count('class="taken"') == 1 and all(str(row.candidate) in text for row in kind.plan.rows)
    drawn = {value for tag, name, value in read.attributes if tag == "rect" and name == "class"}
    assert {"l-compute", "l-send", "block", "p-wire"} <= drawn
    bars = [value for tag, name, value in read.attributes if tag == "rect" and name in ("x", "width")]
    assert bars and all(0.0 <= float(value.rstrip("%")) <= 100.0 for value in bars)
    code = read.text["code"]
    assert "put_q(" in code and "attend(" in code and "collect = collect(" in code
    assert kind.inside[0] in code and "self.image_out(out[:, count:])" in code


def test_names_of_users_are_text(found: Explanation) -> None:
    text = page(found)
    assert "&lt;b&gt;joint&lt;/b&gt; &amp; co" in text and "<b>joint" not in text.split("<script")[0]


def test_refused_graphs_and_a_stopped_trace_are_said(found: Explanation) -> None:
    graph = ExplainedGraph(1, None, break_reason="a <break>", refused="no sizes")
    text = page(Explanation("m", "1x2", found.topology, 0, (graph, *found.graphs), 0, 0.1, "RuntimeError: item()"))
    assert "a &lt;break&gt;" in text and "Runs unsharded: no sizes" in text and "RuntimeError: item()" in text
    assert "Graph 1 of 2" in text


def test_a_page_without_attention() -> None:
    text = page(explain(torch.nn.Linear(4, 4), torch.zeros(2, 4), topology="1x2"))
    assert "predicted timeline" not in text and "linear(" in text


def test_bytes_go_where_the_rank_sends_them(found: Explanation) -> None:
    (graph,) = found.graphs
    rows = bytes_rows(graph)
    assert {"put", "gather"} <= {name for name, *_ in rows}
    sent, across = graph.sent
    assert sum(inside + away for _, inside, away, _ in rows) == sent
    assert sum(away for _, _, away, _ in rows) == across > 0


def test_every_bar_of_the_graph_opens_a_block_that_is_there(found: Explanation, read: Reader) -> None:
    ids = {value for _, name, value in read.attributes if name == "id"}
    named = {value for _, name, value in read.attributes if name == "data-block"}
    assert named and named <= ids
    assert {value for _, name, value in read.attributes if name == "data-of"} <= ids


def test_braces_and_colours_of_the_style() -> None:
    assert STYLE.count("{") == STYLE.count("}") and SCRIPT.count("{") == SCRIPT.count("}")
    used, defined = set(re.findall(r"var\((--\w+)\)", STYLE)), re.findall(r"(--\w+):", STYLE)
    assert used == set(defined)
    assert all(defined.count(name) == 2 for name in used), "each colour has a light and a dark form"


def test_every_class_of_the_markup_is_known(found: Explanation) -> None:
    body = re.sub(r"<(style|script).*?</\1>", "", page(found), flags=re.DOTALL)
    classes = {name for value in re.findall(r'class="([^"]*)"', body) for name in value.split()}
    known = set(re.findall(r"\.([a-z][\w-]*)", STYLE)) | set(re.findall(r'"\.?([a-z][\w-]*)[" ]', SCRIPT))
    assert classes <= known, classes - known
