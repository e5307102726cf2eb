"""Parsers that guess what was meant, and a model by its place or by ``--model``."""

from __future__ import annotations

import pytest

from sfcompile.commands.parsing import Parser, add_model_name, model_name
from sfcompile.errors import OptionError


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="tool")
    add_model_name(parser, "a model")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--schedule", choices=("auto", "torus"))
    return parser


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("--token-s=4", "unrecognized arguments: --token-s=4. Did you mean --tokens?"),
        ("--schedule touris", "Did you mean torus?"),
        ("--schedule nothing-like-it", "nothing-like-it"),
        ("--qqq", "unrecognized arguments: --qqq"),
        ("--tokens four", "invalid int value: 'four'"),
    ],
)
def test_slips(parser: Parser, words: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words.split())
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert end in said and ("Did you mean" in end) == ("Did you mean" in said)


def test_a_model_is_named_either_way(parser: Parser) -> None:
    for words, want in (("big", "big"), ("--model big", "big"), ("big --model big", "big"), ("", None)):
        assert model_name(parser.parse_args(words.split())) == want
    with pytest.raises(OptionError, match="Two models are named: 'big' and --model 'small'"):
        model_name(parser.parse_args("big --model small".split()))
