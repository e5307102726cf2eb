"""A diffusion transformer of the installed diffusers, by the name a user types, on the meta device with its inputs.

Nothing here knows a model. The class is looked up among those that diffusers exports; the inputs come from the names
and annotations of forward()'s parameters and from `model.config`, which follow one convention across diffusers. Where
that leaves a choice (is the noisy input [B, L, C] or [B, C, H, W]?), the first candidate that runs on meta is kept.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from sfcompile.commands.model_names import best_match, missing
from sfcompile.errors import OptionError

_TRIES_PER_LAYOUT, _MAX_REPAIRS, _OMIT = 12, 4, object()
_MAX_FRAMES, _MIN_FRAME_TOKENS, _IMAGE_TOKENS = 16, 256, 257

# One letter per dimension of the noisy input; N is batch times frames, L the whole sequence.
_LAYOUTS = ("BLC", "BCHW", "BCFHW", "BFCHW", "BFHWC", "BCL", "NCHW")
# Sizes for what a default config leaves open (None); only the fields that a class has and leaves open are used.
_FILL_INS: tuple[dict[str, Any], ...] = (
    {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    {"in_channels": 64},
    {"in_channels": 16, "patch_size": 2, "caption_channels": 4096},
)
# Parameter of forward() -> patterns of the config's fields that hold its last dimension, best first.
_WIDTHS = {
    "encoder_hidden_states": "caption_channels text_embed_dim text_dim text_hidden_dim text_in_dim in_text_dim "
    "joint_attention_dim context_in_dim cap_feat_dim llm_features_dim encoder_hidden_size cross_attention_input_dim "
    "cond_token_dim cross_attention_dim *_text_dim condition_dim hidden_size",
    "audio_encoder_hidden_states": "audio_caption_channels caption_channels",
    "encoder_hidden_states_2": "text_embed_2_dim",
    "encoder_hidden_states_t5": "*_dim_t5",
    "encoder_hidden_states_image": "image_dim",
    "pooled_projections": "pooled_projection_dim in_text_dim2",
    "global_hidden_states": "global_states_input_dim global_cond_dim",
    "audio_hidden_states": "audio_in_channels in_audio_dim",
    "control_hidden_states": "*_in_channels",
}
_NOISY_WIDTH = "in_channels in_visual_dim io_channels in_dim latent_dim *_channels"
# Parameter -> shapes to try, one letter per dimension: T text, S text and noisy tokens, A axes of positions.
_SHAPES = dict.fromkeys(("timestep", "timestep_r", "r_timestep"), "B BF")
_SHAPES |= {"class_labels": "B", "style": "B", "text_lens": "B", "text_rope_pos": "T", "image_meta_size": "B6"}
_SHAPES |= {"img_ids": "LA BLA", "txt_ids": "TA BTA", "position_ids": "SA BSA"}
_SHAPES |= dict.fromkeys(("original_size", "target_size", "crop_coords"), "B2")
_ALIASES = {"x": "hidden_states", "t": "timestep", "timesteps": "timestep"}
_ALIASES |= dict.fromkeys(("cap_feats", "text_bth"), "encoder_hidden_states")
_FOLLOWED = ("__getitem__", "flatten", "to", "bool", "int", "long", "float", "view", "reshape", "sum")
# Optional parameters that are left out first; the others are given where a value is known.
_RARE = re.compile("timestep_r|control|image_embeds|_image$")


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device, in eval mode, and forward()'s keyword arguments: meta tensors and plain values."""

    class_name: str
    model: torch.nn.Module
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Site:
    """What the shapes of one candidate follow from. `grid` is the frames, rows and columns of tokens."""

    config: Mapping[str, Any]
    batch: int
    text: int
    layout: str
    grid: tuple[int, int, int]
    mask: str

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def tensor(self, shape: str, dtype: torch.dtype = torch.float32, width: int | None = None) -> torch.Tensor:
        """A meta tensor with a dimension for each letter of `shape` (`_SHAPES`, `_LAYOUTS`); `width` is that of C."""
        (along_time, patch), (frames, rows, columns) = _patch(self.config), self.grid
        axes = next((v for k, v in self.config.items() if re.search("axes_dim|rope_dim_list", k)), None)
        sizes = {"B": self.batch, "N": self.batch * frames, "T": self.text, "L": self.tokens, "A": len(axes or "123")}
        sizes |= {"F": frames * along_time, "H": rows * patch, "W": columns * patch, "S": self.text + self.tokens}
        sizes |= {"C": width or self.width(_NOISY_WIDTH) or 1, "K": self.config.get("num_text_layers") or 1}
        return _tensor(*(int(letter) if letter.isdigit() else sizes[letter] for letter in shape), dtype=dtype)

    def width(self, patterns: str) -> int | None:
        """The number in the first field of the config that is set and matches; None where there is none."""
        for pattern, (key, value) in itertools.product(patterns.split(), self.config.items()):
            value = value[0] if isinstance(value, Sequence) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and fnmatchcase(key, pattern):
                return value
        return None


def find_class(name: str) -> type[torch.nn.Module]:
    """The transformer class of diffusers with the shortest name that starts with `name`, but for case and punctuation.

    Raises:
        OptionError: diffusers is missing, or no class has such a name (the message lists close ones).
    """
    classes = _classes()
    return classes[best_match(name, classes)]


def build_meta_model(
    name: str, tokens: int, batch: int = 1, text_tokens: int = 512, config: Mapping[str, Any] | None = None
) -> MetaModel:
    """The class that `name` names at its default size, with inputs of about `tokens` noisy tokens; both on meta.

    The model has run once with these inputs. A class that runs only with a text length of its own gets that. Where a
    default config leaves a size open, or its tables of positions are too small, those fields are filled in; sizes of
    weights that the default sets stay. `config` replaces fields of the default config.

    Raises:
        OptionError: no such class, a size below one, or no config and inputs that it runs with; lists what was tried.
    """
    if min(tokens, batch, text_tokens) < 1:
        raise OptionError(f"A size below one: {tokens=}, {batch=}, {text_tokens=}", "", "Give at least 1 for each")
    cls = find_class(name)
    _check_fields(cls, config or {})
    tried: list[str] = []
    for fields in _configs(cls, tokens, dict(config or {})):
        try:
            with torch.device("meta"):
                model = cls(**fields).eval()
        except Exception as error:
            tried.append(f"config {fields}: {_brief(error)}")
            continue
        kwargs = _working_inputs(model, batch, tokens, text_tokens, tried)
        if kwargs is not None:
            return MetaModel(cls.__name__, model, kwargs)
    listed = "".join(f"\n    {line}" for line in list(dict.fromkeys(tried))[-16:])
    raise OptionError(
        f"No inputs found for {cls.__name__} with {tokens} tokens; {len(tried)} candidates failed",
        f"They are guessed from the signature of forward() and the config, which was not enough here:{listed}\n ",
        "Give the sizes that its default config leaves open (--config KEY=VALUE), or choose another model",
    )


def _check_fields(cls: type[torch.nn.Module], config: Mapping[str, Any]) -> None:
    known = inspect.signature(cls.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for key in config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise OptionError(
                f"The config of {cls.__name__} has no field {key!r}",
                f"Did you mean {close[0]!r}?" if close else "",
                f"Its fields: {', '.join(name for name in known if name != 'self')}",
            )


def _classes() -> dict[str, type[torch.nn.Module]]:
    try:
        from diffusers.models import transformers
        from diffusers.models.modeling_utils import ModelMixin
    except ImportError as error:
        raise missing(str(error)) from error
    classes = (v for v in vars(transformers).values() if inspect.isclass(v) and issubclass(v, torch.nn.Module))
    return {value.__name__: value for value in classes if issubclass(value, ModelMixin)}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:160]


def _configs(cls: type[torch.nn.Module], tokens: int, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The default config, then what it leaves open filled in; each also with larger tables of positions."""
    defaults = {key: value.default for key, value in inspect.signature(cls.__init__).parameters.items()}
    for fill in ({}, *_FILL_INS):
        fields = {**{key: value for key, value in fill.items() if defaults.get(key, 0) is None}, **sizes}
        wide = max(_grid(tokens, video=False)) * _patch({**defaults, **fields})[1]
        tables = [key for key in ("sample_size", "pos_embed_max_size") if isinstance(defaults.get(key), int)]
        yield fields
        if tables:
            yield {**dict.fromkeys(tables, wide), **fields}


def _patch(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent frames per token, and latent rows (and columns) per token."""
    size = config.get("patch_size") or config.get("all_patch_size") or 1
    sizes = list(size) if isinstance(size, Sequence) else [size]
    return int(sizes[0] if len(sizes) == 3 else config.get("patch_size_t") or 1), int(sizes[-1])


def _grid(tokens: int, video: bool) -> tuple[int, int, int]:
    """Frames, rows and columns of tokens: nearly square, and exactly `tokens` where it divides well."""
    frames = 1
    while video and frames < _MAX_FRAMES and tokens % (2 * frames) == 0 and tokens >= 2 * frames * _MIN_FRAME_TOKENS:
        frames *= 2
    each, root = tokens // frames, math.isqrt(tokens // frames)
    rows = next((row for row in range(root, root // 2, -1) if each % row == 0), root)
    return frames, rows, round(each / rows)


def _working_inputs(
    model: torch.nn.Module, batch: int, tokens: int, text: int, tried: list[str]
) -> dict[str, Any] | None:
    config = dict(getattr(model, "config", {}))
    parameters = inspect.signature(model.forward).parameters
    own = [config[key] for key in ("max_text_seq_length", "text_len", "max_sequence_length") if config.get(key)]
    lengths = dict.fromkeys([text, *own, tokens])
    masks = ("left out", "unknown", "ones") if any("mask" in key for key in parameters) else ("left out",)
    for length, layout, mask in itertools.product(lengths, _LAYOUTS, masks):
        grid = _grid(tokens, video="F" in layout or "num_frames" in parameters)
        site = _Site(config, batch, length, layout, grid, mask)
        for kwargs in _candidates(site, parameters):
            for _ in range(_MAX_REPAIRS):
                error = _run(model, kwargs)
                if error is None:
                    return kwargs
                tried.append(f"[{', '.join(layout)}], text of {length}, masks {mask}: {_brief(error)}")
                kwargs = _repaired(kwargs, str(error), layout)
                if not kwargs:
                    break
    return None


def _run(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Exception | None:
    try:
        with torch.no_grad():
            model(**kwargs)
    except Exception as error:
        if re.search("unsupported (scalarType|autocast device)", str(error)) and torch.autocast is not _MetaAutocast:
            torch.autocast = _MetaAutocast  # type: ignore[misc]
            return _run(model, kwargs)
        return error
    return None


class _MetaAutocast(torch.autocast):
    """torch.autocast, which does nothing on the meta device instead of refusing it; it stays for the process."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            device_type, args, kwargs = "cpu", (), {"enabled": False}
        super().__init__(device_type, *args, **kwargs)


def _candidates(site: _Site, parameters: Mapping[str, inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """Keyword arguments: first choices of all parameters, then one second choice, then more of them."""
    choices = {key: _choices(site, p) for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    ranks = itertools.product(*(range(len(values)) for values in choices.values()))
    for rank in sorted(itertools.islice(ranks, 4096), key=sum)[:_TRIES_PER_LAYOUT]:
        picked = zip(rank, choices.items(), strict=True)
        yield {key: values[i] for i, (key, values) in picked if values[i] is not _OMIT}


def _repaired(kwargs: Mapping[str, Any], message: str, layout: str) -> dict[str, Any]:
    """The arguments with the width that the error of a linear layer asks for; empty where it asks for none."""
    match = re.search(r"\[?\d+(?:x|, )(\d+)\]? (?:and|X) \[?(\d+)(?:x|, )\d+", message)
    old, new = (int(match[1]), int(match[2])) if match else (0, 0)
    fixed: dict[str, Any] = {}
    for key, value in kwargs.items():
        if match and isinstance(value, torch.Tensor) and value.ndim > 1:
            noisy, width = _ALIASES.get(key, key) == "hidden_states", value.shape[-1]
            volume = old // width if noisy and old % width == 0 else 1
            if width * volume == old and new % volume == 0 and (layout[-1] == "C" or not noisy):
                fixed[key] = _tensor(*value.shape[:-1], new // volume, dtype=value.dtype)
    return {**kwargs, **fixed} if fixed else {}


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _choices(site: _Site, parameter: inspect.Parameter) -> list[Any]:
    """Values to try for one parameter, best first; `_OMIT` leaves it out."""
    name = _ALIASES.get(parameter.name, parameter.name)
    annotation = str(parameter.annotation).strip("'").lower()
    values = _values(site, name, annotation)
    if annotation.startswith("list[torch.tensor"):
        values = [list(value) if isinstance(value, torch.Tensor) else value for value in values]
    if parameter.default is parameter.empty:
        return values or [None]
    if "mask" in name and site.mask == "left out":
        return [_OMIT]
    return [_OMIT, *values] if _RARE.search(name) else [*values, _OMIT] if "rotary" in name else values or [_OMIT]


def _values(site: _Site, name: str, annotation: str) -> list[Any]:
    frames, rows, columns = site.grid
    known: dict[str, list[Any]] = {
        "return_dict": [False],
        "hidden_states": [site.tensor(site.layout)],
        "guidance": [site.tensor("B")] if site.config.get("guidance_embeds") else [],
        "added_cond_kwargs": [{"resolution": site.tensor("B2"), "aspect_ratio": site.tensor("B1")}],
        "img_shapes": [[[(frames, rows, columns)]] * site.batch, [(frames, rows, columns)] * site.batch],
        "visual_rope_pos": [tuple(_tensor(size, dtype=torch.int64) for size in site.grid)],
    }
    known |= {"num_frames": [frames], "height": [rows], "width": [columns], "audio_num_frames": [site.text]}
    if name in known:
        return known[name]
    own = site.config.get("text_len_" + name.rsplit("_", 1)[-1])
    site = replace(site, text=_IMAGE_TOKENS if "image" in name else own or site.text)
    if "mask" in name:
        whole = site.tensor("BT", torch.bool)
        return [whole.as_subclass(_Ones) if site.mask == "ones" else whole]
    if "rotary" in name or name in _WIDTHS:
        return _rotary(site, "tuple" in annotation) if "rotary" in name else _conditions(site, name)
    dtype = torch.int64 if name in ("class_labels", "style", "text_lens", "text_rope_pos") else torch.float32
    return [site.tensor(shape, dtype) for shape in _SHAPES.get(name, "").split()]


def _conditions(site: _Site, name: str) -> list[Any]:
    shapes = {"control": site.layout, "pooled": "BC", "global": "B1C BC"}.get(name.split("_")[0])
    shapes = shapes or ("BTKC" if site.config.get("num_text_layers") else "BTC")
    width = site.width(_WIDTHS[name])
    return [site.tensor(shape, width=width) for shape in shapes.split()] if width else []


def _rotary(site: _Site, pair_first: bool) -> list[Any]:
    if site.config.get("use_rotary_positional_embeddings") is False:
        return []
    heads = site.width("num_attention_heads num_heads n_heads") or 1
    width = site.width("attention_head_dim head_dim") or (site.width("hidden_size dim") or heads) // heads
    shapes = [(site.tokens, width), (site.batch, site.tokens, heads * width), (site.tokens + 1, width)]
    pairs = [(_tensor(*shape), _tensor(*shape)) for shape in shapes]
    table = site.tensor("HWC", torch.complex64, width // 2)
    return [*pairs, table] if pair_first else [table, *pairs]


class _Ones(torch.Tensor):
    """A mask of ones on the meta device, for a forward() that reads the lengths of texts out of a mask."""

    each = 1

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, mask = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(mask, _Ones) and name == "nonzero":
            return _tensor(mask.numel(), mask.ndim, dtype=torch.int64)
        if isinstance(mask, _Ones) and name in ("tolist", "item"):
            return getattr(torch.full(mask.shape, mask.each), name)()
        result = super().__torch_function__(func, types, args, kwargs or {})
        if not isinstance(result, _Ones) or not isinstance(mask, _Ones) or name not in _FOLLOWED:
            return result.as_subclass(torch.Tensor) if isinstance(result, _Ones) else result
        result.each = mask.each * (mask.numel() // result.numel() if name == "sum" else 1)
        return result
