"""What a user's code raises under a command is told in a sentence with its line; what is ours is not."""

from __future__ import annotations

import logging
from pathlib import Path
from types import CodeType

import pytest

from sfcompile.commands import own_code as ours
from sfcompile.commands.own_code import own_code
from sfcompile.errors import MeshError, OptionError


def code_of(file: Path, text: str) -> CodeType:
    """As a file would be loaded."""
    file.write_text(text)
    return compile(text, str(file), "exec")


def test_a_users_mistake_is_told_with_its_line(tmp_path: Path) -> None:
    code = code_of(tmp_path / "own.py", "import json\n\njson.loads('')\n")
    with pytest.raises(OptionError) as caught, own_code("own.py is loaded, and"):
        exec(code, {})
    assert str(caught.value).startswith("own.py is loaded, and that raises JSONDecodeError: Expecting value")
    assert caught.value.source is not None and "own.py:3: json.loads('')" in caught.value.source


def test_dynamo_names_the_line_itself() -> None:
    text = 'no such sizes\n\nfrom user code:\n   File "/a/own.py", line 4, in forward\n    return x @ y\n'
    with pytest.raises(OptionError, match="that raises RuntimeError: no such sizes. Mend that") as caught:
        with own_code("it is traced, and", alone=False):
            raise RuntimeError(text)
    assert caught.value.source == "/a/own.py:4: return x @ y"


def test_who_leaves_the_process_is_held(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="left the process with exit code 3. Put what a script does under"):
        with own_code("own.py is loaded, and"):
            raise SystemExit(3)


def test_our_errors_and_our_mistakes_are_let_go() -> None:
    with pytest.raises(MeshError), own_code("it is traced, and"):
        raise MeshError("2 x 2")
    broken = compile("assert False", str(Path(ours.__file__).with_name("models.py")), "exec")
    with pytest.raises(AssertionError), own_code("it is traced, and", alone=False):
        exec(broken, {})


def test_torch_logs_no_frames_of_a_model_that_is_traced(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with pytest.raises(OptionError, match="bad sizes"), own_code("model.py:make is traced, and", alone=False):
        log.error("frames")
        exec(compile("raise RuntimeError('bad sizes')", "model.py", "exec"))
    assert "frames" not in caplog.text and not log.disabled
