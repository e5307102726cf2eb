"""sfcompile: `torch.compile(model, backend="streamfusion")` shards a Diffusion Transformer along tokens.

torch finds the backend through the entry point in pyproject.toml, so a user never has to import this package.
It stays light on purpose: importing it loads neither torch nor any of our phases.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout passes/, codegen/ and runtime/ lie beside this folder; in a wheel they lie inside it.
_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))


# Loaded on first use: they need torch. A file may not be named like a function, which it would hide once imported.
_DOORS = {
    "export": ("sfcompile.export_package", "export"),
    "load": ("sfcompile.load_package", "load"),
    "simulate": ("sfcompile.predict", "simulate"),
}


def __getattr__(name: str) -> object:
    """`sfcompile.simulate`, `sfcompile.export` and `sfcompile.load`."""
    if name in _DOORS:
        import importlib

        module, attribute = _DOORS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
