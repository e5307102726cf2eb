"""sfcompile: `torch.compile(model, backend="streamfusion")` shards a Diffusion Transformer along tokens.

torch finds the backend through the entry point in pyproject.toml, so a user never has to import this package. It stays
light on purpose: importing it loads neither torch nor any of our rooms; its functions load theirs on first use.

The files beside this one are the door: backend.py (start there), graph_call.py (what a call does around its graph),
boundary.py (what crosses a graph break in shards), groups.py (which ranks compute together), shared_inputs.py (rank
0's inputs for all), verify.py (calls held against one process), sharded_weights.py (weights in shares),
torch_shards.py (those that torch has cut), pipelines.py (all networks of a diffusers pipeline), repeated_blocks.py
(each kind of block once), torch_logs.py (TORCH_LOGS), device.py, extend.py and rule_check.py (op rules held against
their ops); and the leaves, which every room may import: errors.py, one_style.py (arguments), options.py, version.py,
torch_private.py, torch_breaks.py, torch_start.py and torch_fsdp.py. The rooms are the folders.

May import: everything; nothing imports this file.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sfcompile import errors as errors
from sfcompile.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ below loads them
    from sfcompile import backend as backend
    from sfcompile import extend as extend
    from sfcompile.commands.progress_bar import progress as progress
    from sfcompile.package.export import export as export
    from sfcompile.package.load import load as load
    from sfcompile.package.weight_files import load_sharded as load_sharded
    from sfcompile.pipelines import compile_pipeline as compile_pipeline
    from sfcompile.prediction.explain import explain as explain
    from sfcompile.prediction.predict import simulate as simulate
    from sfcompile.repeated_blocks import compile_repeated_blocks as compile_repeated_blocks
    from sfcompile.sharded_weights import shard_weights as shard_weights
    from sfcompile.tracing.trace import trace as trace

__all__ = [
    "__version__",
    "backend",
    "compile_pipeline",
    "compile_repeated_blocks",
    "errors",
    "explain",
    "export",
    "extend",
    "load",
    "load_sharded",
    "progress",
    "shard_weights",
    "simulate",
    "trace",
]

# Who walks all our packages, as torch does for TORCH_LOGS="+sfcompile", meets this one again in a checkout's root.
if __name__ != "sfcompile":
    raise ImportError(f"{__name__} is sfcompile itself")

# In a checkout passes/, codegen/ and runtime/ lie beside this folder; in a wheel they lie inside it.
_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    __path__.append(str(_root))


# Loaded on first use, as they need torch: name -> module. A file may not be named like a function, which it would hide
# once imported.
_LAZY = {
    "compile_pipeline": "sfcompile.pipelines",
    "compile_repeated_blocks": "sfcompile.repeated_blocks",
    "explain": "sfcompile.prediction.explain",
    "export": "sfcompile.package.export",
    "load": "sfcompile.package.load",
    "load_sharded": "sfcompile.package.weight_files",
    "progress": "sfcompile.commands.progress_bar",
    "shard_weights": "sfcompile.sharded_weights",
    "simulate": "sfcompile.prediction.predict",
    "trace": "sfcompile.tracing.trace",
}
_LAZY_MODULES = {"backend": "sfcompile.backend", "extend": "sfcompile.extend"}


if not TYPE_CHECKING:  # a checker would take it for every name that is misspelt

    def __getattr__(name: str) -> object:
        """The functions and modules of ``__all__``, on their first use."""
        if name in _LAZY:
            return getattr(import_module(_LAZY[name]), name)
        if name in _LAZY_MODULES:
            return import_module(_LAZY_MODULES[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion; nothing is loaded for them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
