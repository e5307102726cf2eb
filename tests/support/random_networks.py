"""Random convolutional networks: ``RandomNetwork(seed)`` is a module, and ``inputs()`` what it is called with.

A network is a list of steps. Each makes a new value of one that was made before, most often the last: convolutions of
every kind, norms, resampling, padding, attention, moved rows, skips to values of the same size. Sizes are small and
divide by nothing, so that ranks have few rows, or none. All is fp64: what differs by more than rounding is wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Values = list[torch.Tensor]
Step = Callable[[Values], torch.Tensor]
Maker = Callable[["RandomNetwork", torch.Tensor, int], Step]
"""Of a network, a value and its place, a step that makes something of it; ValueError: it cannot."""

MAKERS: list[Maker] = []
CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOLS: dict[int, tuple[Any, Any]] = {
    1: (F.avg_pool1d, F.max_pool1d), 2: (F.avg_pool2d, F.max_pool2d), 3: (F.avg_pool3d, F.max_pool3d),
}  # fmt: skip
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
MOST_ELEMENTS, MOST_CHANNELS, LARGEST = 40_000, 32, 1e4


def maker(times: int = 1) -> Callable[[Maker], Maker]:
    """Register a maker, which is drawn so many times as often as others."""

    def register(make: Maker) -> Maker:
        MAKERS.extend([make] * times)
        return make

    return register


class RandomNetwork(nn.Module):
    """See the head of the file. ``steps`` says in words what was drawn."""

    def __init__(self, seed: int, length: int | None = None) -> None:
        super().__init__()
        self.random, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        draw = self.random
        self.space = draw.choice([1, 2, 2, 2, 3])
        most = {1: 30, 2: 16, 3: 8}[self.space]
        self.size = (draw.choice([1, 1, 2]), draw.choice([4, 8]), *(draw.randint(2, most) for _ in range(self.space)))
        self.weights = nn.ParameterList()
        self.steps: list[str] = []
        self._run: list[Step] = []
        self._x = self.tensor(*self.size)
        values = [self._x]
        wanted, tries = length or draw.randint(3, 9), 0
        while len(self._run) < wanted and tries < 300:
            tries += 1
            make, weights = draw.choice(MAKERS), len(self.weights)
            source = len(values) - 1 if draw.random() < 0.75 else draw.randrange(len(values))
            try:
                step = make(self, values[source], source)
                out = step(values)
                if out.dim() != self.space + 2 or not 0 < out.numel() <= MOST_ELEMENTS or out.shape[1] > MOST_CHANNELS:
                    raise ValueError("another kind of value")
                if not 1e-6 < float(out.abs().max()) < LARGEST:
                    raise ValueError("too large or too small")
            except (ValueError, RuntimeError, IndexError):  # torch's own refusals of sizes too
                self.weights = nn.ParameterList(list(self.weights)[:weights])
                continue
            self._run.append(step)
            self.steps.append(f"{make.__name__}({source}) -> {list(out.shape)}")
            values.append(out)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def weight(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Callable[[], torch.Tensor]:
        """A new parameter, as a function: it may have been moved or cast when it is read."""
        self.weights.append(nn.Parameter(self.tensor(*shape) * scale + offset, requires_grad=False))
        place = len(self.weights) - 1
        return lambda: self.weights[place]

    def kernel(self, out: int, each: int, taps: list[int]) -> Callable[[], torch.Tensor]:
        """The weight of a convolution whose results are as large as what it reads."""
        return self.weight(out, each, *taps, scale=1 / math.sqrt(each * math.prod(taps)))

    def inputs(self) -> Values:
        return [self._x]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for step in self._run:
            values.append(step(values))
        return values[-1], values[len(values) // 2] * 1.0


def _each(net: RandomNetwork, *choices: int) -> list[int]:
    return [net.random.choice(choices) for _ in range(net.space)]


@maker(4)
def convolution(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    draw, channels, run = net.random, x.shape[1], CONVOLUTIONS[net.space]
    taps, stride, apart = _each(net, 1, 2, 3, 3, 3, 4, 5), _each(net, 1, 1, 1, 2, 3), _each(net, 1, 1, 1, 2, 3)
    if draw.random() < 0.3:
        stride = list(taps)
    padding: Any = [draw.randint(0, n) for n in taps]
    if draw.random() < 0.4:
        padding = [(n - 1) * d // 2 for n, d in zip(taps, apart, strict=True)]
    elif draw.random() < 0.3 and set(stride) == {1}:
        padding = "same"
    groups = draw.choice([1, 1, 2, channels])
    out = draw.choice([n for n in (4, 8, channels) if n % groups == 0])
    weight, bias = net.kernel(out, channels // groups, taps), net.weight(out)
    return lambda v: run(v[at], weight(), bias(), stride, padding, apart, groups)


@maker()
def transposed_convolution(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    draw, channels, run = net.random, x.shape[1], TRANSPOSED[net.space]
    taps, stride, apart = _each(net, 1, 2, 3, 4, 5), _each(net, 1, 2, 2, 3), _each(net, 1, 1, 2)
    padding, groups = _each(net, 0, 1, 2), draw.choice([1, 1, 2])
    more = [draw.randrange(max(a, b)) for a, b in zip(stride, apart, strict=True)]
    weight, bias = net.kernel(channels, 4, taps), net.weight(4 * groups)
    return lambda v: run(v[at], weight(), bias(), stride, padding, more, groups, apart)


@maker(3)
def norm(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    kind, channels = net.random.choice(["group", "group", "instance", "channels", "all", "rms", "batch"]), x.shape[1]
    shape = {"all": x.shape[1:], "rms": x.shape[1:]}.get(kind, (channels,))
    scale, shift = net.weight(*shape, scale=0.2, offset=1.0), net.weight(*shape, scale=0.2)
    groups, affine = net.random.choice([1, 2, 4]), net.random.random() < 0.6
    both: Callable[[], Any] = lambda: (scale(), shift()) if affine else (None, None)  # noqa: E731
    kinds: dict[str, Step] = {
        "group": lambda v: F.group_norm(v[at], groups, *both(), 1e-3),
        "instance": lambda v: F.instance_norm(v[at], None, None, *both(), eps=1e-3),
        "channels": lambda v: F.layer_norm(v[at].movedim(1, -1), shape, *both(), 1e-3).movedim(-1, 1),
        "all": lambda v: F.layer_norm(v[at], shape, *both(), 1e-3),
        "rms": lambda v: F.rms_norm(v[at], shape, both()[0], 1e-3),
        "batch": lambda v: F.batch_norm(v[at], shift(), scale().abs() + 0.1, *both()),
    }
    return kinds[kind]


@maker(2)
def pointwise(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    fn: Any = net.random.choice([F.silu, torch.tanh, lambda x: x.softmax(1), lambda x: x.clamp(-1, 1) * 2 + 1])
    return lambda v: fn(v[at])


@maker(3)
def residual_block(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """Norm, activation, convolution, twice: what reads the first norm are one, two or three readers of other windows;
    or another norm stands behind it."""
    draw, channels, run = net.random, x.shape[1], CONVOLUTIONS[net.space]
    wide = draw.choice([1, 3, 5])
    first, second, third = (net.kernel(channels, channels, [n] * net.space) for n in (3, 3, wide))
    two, residual, norms = (draw.random() < 0.3 for _ in range(3))

    def block(v: Values) -> torch.Tensor:
        h = F.group_norm(v[at], 2, eps=1e-3)
        h = F.silu(F.instance_norm(h + 0.1 * v[at], eps=1e-3) if norms else h)
        y = run(h, first(), None, 1, 1)
        y = y + run(h, third(), None, 1, wide // 2) if two else y
        y = y + h if residual else y
        return v[at] + run(F.silu(F.group_norm(y, 2, eps=1e-3)), second(), None, 1, 1)

    return block


@maker()
def padding(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    mode = net.random.choice(["constant", "constant", "reflect", "replicate", "circular"])
    least = -1 if mode == "constant" else 0
    amounts = [net.random.randint(least, 3) for _ in range(2 * net.space)]
    return lambda v: F.pad(v[at], amounts, mode, 1.5 if mode == "constant" else None)


@maker(2)
def interpolation(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    draw, mode = net.random, net.random.choice(["nearest", "nearest-exact", "linear", "linear", "area", "bicubic"])
    named: dict[str, Any] = {"mode": {"linear": LINEAR[net.space]}.get(mode, mode)}
    if mode in ("linear", "bicubic"):
        named["align_corners"] = draw.random() < 0.2
    if draw.random() < 0.7:
        named["scale_factor"] = draw.choice([2.0, 2.0, 3.0, 0.5, 1.5, 2.5, 0.25])
    else:
        named["size"] = [draw.randint(1, 20) for _ in range(net.space)]
    return lambda v: F.interpolate(v[at], **named)


@maker()
def pooling(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    draw, sizes, steps = net.random, _each(net, 1, 2, 2, 3), _each(net, 1, 2, 2, 3)
    amounts = [draw.randint(0, n // 2) for n in sizes]
    average, largest = POOLS[net.space]
    ceil, counted = draw.random() < 0.2, draw.random() < 0.6
    if draw.random() < 0.5:
        return lambda v: average(v[at], sizes, steps, amounts, ceil, counted)
    return lambda v: largest(v[at], sizes, steps, amounts, 1, ceil)


@maker(2)
def shuffle(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    if net.space != 2:
        raise ValueError("for images")
    n, (b, c, h, w) = net.random.choice([2, 2, 3]), x.shape
    kinds: list[Step] = [
        lambda v: F.pixel_shuffle(v[at], n),
        lambda v: F.pixel_unshuffle(v[at], n),
        lambda v: v[at].view(b, c // (n * n), n, n, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, h * n, w * n),
        lambda v: v[at].view(b, c, h // n, n, w // n, n).permute(0, 3, 5, 1, 2, 4).reshape(b, -1, h // n, w // n),
    ]
    return net.random.choice(kinds)


@maker(2)
def skip(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """Beside another value: added, joined by channels, or first brought to this one's size."""
    other = net.random.randrange(at + 1)
    size, kind = list(x.shape[2:]), net.random.randrange(4)
    kinds: list[Step] = [
        lambda v: v[at] + v[other] * 0.5,
        lambda v: torch.cat([v[at], v[other]], 1),
        lambda v: v[at] + F.interpolate(v[other], size=size, mode="nearest"),
        lambda v: v[at] + F.interpolate(v[other], size=size, mode=LINEAR[net.space]),
    ]
    return kinds[kind]


@maker()
def attention(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """Over all places of the grid, or along one of its dims; as one op, or spelled out."""
    channels, heads, axis = x.shape[1], net.random.choice([1, 2, 4]), net.random.choice([None, 2])
    weight, by_hand = net.weight(3 * channels, channels, scale=channels**-0.5), net.random.random() < 0.3
    if axis is None and math.prod(x.shape[2:]) > 300:
        raise ValueError("too many tokens")

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in F.linear(x, weight()).chunk(3, -1))
        if by_hand:
            out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def along(v: Values) -> torch.Tensor:
        y = v[at].movedim((2, 1), (-2, -1))
        return v[at] + attend(y.flatten(0, -3)).view(y.shape).movedim((-2, -1), (2, 1))

    def over_all(v: Values) -> torch.Tensor:
        y = attend(v[at].flatten(2).transpose(1, 2))
        return v[at] + y.transpose(1, 2).unflatten(2, v[at].shape[2:])

    return over_all if axis is None else along


@maker(2)
def moved_rows(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    d, k = net.random.randrange(2, 2 + net.space), net.random.randint(1, 3)
    n = x.shape[d]
    kinds: list[Step] = [
        lambda v: v[at].flip(d),
        lambda v: v[at].roll(k, d),
        lambda v: v[at].roll((k, 1), (2, -1)),
        lambda v: v[at].transpose(d, -1)[..., ::k].transpose(d, -1),
        lambda v: v[at].narrow(d, k, n - k),
        lambda v: torch.cat([v[at], v[at].flip(d)], d),
        lambda v: torch.cat([*[v[at].narrow(d, 0, 1)] * k, v[at]], d),
        lambda v: v[at].repeat_interleave(2, d),
        lambda v: v[at].transpose(2, -1),
        lambda v: torch.cat(v[at].tensor_split(2, d)[::-1], d),
        lambda v: torch.cat([v[at].narrow(d, 0, 1), v[at].narrow(d, 1, n - 1) - v[at].narrow(d, 0, n - 1)], d),
        lambda v: v[at].unflatten(d, (n // 2, 2)).sum(d + 1),
    ]
    return net.random.choice(kinds)


@maker()
def over_space(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """What is made of all rows goes back to each."""
    dims = tuple(range(2, 2 + net.space))
    kinds: list[Step] = [
        lambda v: v[at] * torch.sigmoid(v[at].mean(dims, keepdim=True)),
        lambda v: v[at] * torch.sigmoid(v[at].amax(dims, keepdim=True)),
        lambda v: v[at] / (v[at].std(dims, keepdim=True) + 0.5),
        lambda v: v[at] - v[at].sum(2, keepdim=True) * 0.05,
        lambda v: v[at] - v[at].mean((1, *dims), keepdim=True),
    ]
    return net.random.choice(kinds)


@maker()
def causal(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """Behind rows of zeros, or copies of the first."""
    taps, apart, channels, copies = net.random.randint(2, 4), net.random.randint(1, 2), x.shape[1], net.random.random()
    weight, run = net.kernel(channels, channels, [taps] + [1] * (net.space - 1)), CONVOLUTIONS[net.space]
    reach, stride = (taps - 1) * apart, [net.random.choice([1, 2])] + [1] * (net.space - 1)

    def step(v: Values) -> torch.Tensor:
        first = v[at][:, :, :1].expand(-1, -1, reach, *x.shape[3:]) * (1.0 if copies < 0.5 else 0.0)
        return run(torch.cat([first, v[at]], 2), weight(), None, stride, 0, [apart] + [1] * (net.space - 1))

    return step


@maker()
def tiles(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """A convolution tile by tile, each with a row of its neighbours."""
    n, channels, run = x.shape[2], x.shape[1], CONVOLUTIONS[net.space]
    weight, size = net.kernel(channels, channels, [3] * net.space), net.random.randint(2, max(2, n // 2))

    def step(v: Values) -> torch.Tensor:
        outs = []
        for start in range(0, n, size):
            low, high = max(0, start - 1), min(n, start + size + 1)
            outs.append(run(v[at][:, :, low:high], weight(), None, 1, 1).narrow(2, start - low, min(size, n - start)))
        return torch.cat(outs, 2)

    return step


@maker(2)
def frames(net: RandomNetwork, x: torch.Tensor, at: int) -> Step:
    """Frames in the batch of a norm and an image's convolution; then pixels in that of one along time."""
    if net.space != 3:
        raise ValueError("for videos")
    b, c, f, h, w = x.shape
    image, time = net.kernel(c, c, [3, 3]), net.kernel(c, c, [3])

    def step(v: Values) -> torch.Tensor:
        y = F.silu(F.group_norm(v[at].transpose(1, 2).flatten(0, 1), 2))
        y = F.conv2d(y, image(), padding=1).view(b, f, c, h, w).permute(0, 3, 4, 2, 1).reshape(b * h * w, c, f)
        return v[at] + F.conv1d(y, time(), padding=1).view(b, h, w, c, f).permute(0, 3, 4, 1, 2)

    return step
