"""sfcompile: `torch.compile(model, backend="streamfusion")` shards a Diffusion Transformer along tokens.

torch finds the backend through the entry point in pyproject.toml, so a user never has to import this package. It stays
light on purpose: importing it loads neither torch nor any of our rooms; its functions load theirs on first use.

The files beside this one are the door: backend.py (start there), graph_call.py (what a call does around its graph),
groups.py (which ranks compute together), shared_inputs.py (rank 0's inputs for all), device.py and extend.py; and the
leaves, which every room may import: errors.py, options.py, version.py and torch_private.py. The rooms are the folders.

May import: everything; nothing imports this file.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from sfcompile.version import __version__ as __version__

# In a checkout passes/, codegen/ and runtime/ lie beside this folder; in a wheel they lie inside it.
_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))


# Loaded on first use, as they need torch: name -> module. A file may not be named like a function, which it would hide
# once imported.
_LAZY = {
    "explain": "sfcompile.prediction.explain",
    "export": "sfcompile.package.export",
    "load": "sfcompile.package.load",
    "progress": "sfcompile.commands.progress_bar",
    "simulate": "sfcompile.prediction.predict",
    "trace": "sfcompile.tracing.trace",
}


def __getattr__(name: str) -> object:
    """`sfcompile.explain`, `simulate`, `export`, `load`, `trace` and `progress`."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
