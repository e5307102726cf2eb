"""Autoencoders on ranks: peak memory of activations, and seconds, beside one process and beside tiles by hand.

    python benchmarks/vae_ranks.py [--ranks 4] [--machines 1] [--rate 1gbit] [--times 3] [--out FILE] [names ...]

Coders of diffusers with random weights at sizes at which activations are most of the memory (64 to 512 MiB). Three
jobs each: one process; ranks with this backend (``placement="auto"``, on a topology that is assumed); ranks that divide
diffusers' tiles by hand, as DistVAE does for whole images: each rank decodes every P-th tile of ``enable_tiling``'s
grid, all gather them, each blends them. Tiles are normalised alone, so that is not exact. With --machines 2 (root) the
ranks lie on emulated machines with a core each and links of --rate.

    MiB     the most that tensors which a call makes hold at a time, each memory once: of the rank that holds most, at
            the second call
    part    of that over the even share of one process's
    RSS     the most that the call has resident beyond what was there before it, in MiB: with what kernels reserve for
            themselves, and libraries choose other kernels for other sizes. Freed memory goes back at once
            (MALLOC_MMAP_THRESHOLD_), so it is not counted twice.
    seconds of the slowest rank, the least of --times calls; all processes have a thread each
    error   the largest difference from one process, of the output's scale
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers_zoo.convolutional import Coder
from emulated_machines import emulated_machines
from torch.utils._python_dispatch import TorchDispatchMode

from sfcompile.backend import reports, streamfusion_backend

ROOT = Path(__file__).resolve().parents[1]
SAID = "coder of a rank: "
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
KL = dict(
    kind="AutoencoderKL", block_out_channels=(32, 64, 128, 128), layers_per_block=1, norm_num_groups=8,
    latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    sample_size=256,
)  # fmt: skip
WAN = dict(kind="AutoencoderKLWan", base_dim=16, num_res_blocks=1)
HUNYUAN = dict(
    kind="AutoencoderKLHunyuanVideo", block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4
)
LTX = dict(
    kind="AutoencoderKLLTXVideo", latent_channels=32, block_out_channels=(32, 64, 128, 128),
    decoder_block_out_channels=(32, 64, 128, 128), layers_per_block=(1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1, 1),
)  # fmt: skip
COGVIDEO = dict(
    kind="AutoencoderKLCogVideoX", block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=4
)
DC = dict(
    kind="AutoencoderDC", latent_channels=16, attention_head_dim=16,
    encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    encoder_block_out_channels=(32, 64, 128, 128), decoder_block_out_channels=(32, 64, 128, 128),
    encoder_layers_per_block=(1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,), (5,)), decoder_qkv_multiscales=((), (), (5,), (5,)),
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "kl_decoder": ("decode", KL, (1, 4, 80, 64)),
    "kl_encoder": ("encode", KL, (1, 3, 640, 512)),
    "wan_decoder": ("decode", WAN, (1, 16, 3, 40, 32)),
    "wan_encoder": ("encode", WAN, (1, 3, 9, 320, 256)),
    "hunyuan_decoder": ("decode", HUNYUAN, (1, 16, 3, 32, 24)),
    "ltx_decoder": ("decode", LTX, (1, 32, 3, 16, 12)),
    "cogvideo_decoder": ("decode", COGVIDEO, (1, 16, 2, 40, 32)),
    "dc_decoder": ("decode", DC, (1, 16, 80, 64)),
    "dc_encoder": ("encode", DC, (1, 3, 640, 512)),
}
TILED = ("kl_decoder",)
"""Whose tiles are divided by hand too."""


def model_of(name: str) -> tuple[Coder, torch.Tensor]:
    """A coder and what goes in; the same in every process."""
    method, config, shape = CASES[name]
    torch.manual_seed(0)
    coder = Coder(method=method, **config).eval()
    with torch.no_grad():
        for parameter in coder.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return coder, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _resident_kib(entry: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def peak_bytes(run: Callable[[], torch.Tensor]) -> int:
    """The most that a call has resident beyond what was there before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
    before = _resident_kib("VmRSS")
    run()
    return max(0, _resident_kib("VmHWM") - before) << 10


class Held(TorchDispatchMode):
    """Counts the bytes of the memory that ops make while it is on, until it is freed; ``most`` at a time."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
                self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        return out

    def _freed(self, storage: int) -> None:
        self._now -= self._live.pop(storage)


def looked_at(looks: list[Held]) -> Callable[..., Any]:
    """This backend, whose graphs run under what is in the list: under a mode from outside Dynamo would not trace."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        run = streamfusion_backend(gm, inputs, options={"inner": "eager", "timeout_s": 300.0})

        def called(*args: Any) -> Any:
            with looks[0] if looks else nullcontext():
                return run(*args)

        return called

    return backend


def tiles_by_hand(coder: Coder, latents: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A decode whose tiles are divided over the ranks: each decodes its own, gives them to all, and blends them all."""
    vae = coder.coder
    vae.enable_tiling()
    decoder, ranks, rank = vae.decoder, dist.get_world_size(), dist.get_rank()
    tiles: list[torch.Tensor] = []
    decoded: list[torch.Tensor] = []

    def through(forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        vae.decoder = _Calls(forward)
        try:
            out: torch.Tensor = coder(latents)
            return out
        finally:
            vae.decoder = decoder

    def look(tile: torch.Tensor) -> torch.Tensor:
        tiles.append(tile)
        decoded.append(decoder(tile))
        return decoded[-1].clone()

    through(look)
    shapes = [tile.shape for tile in decoded]

    def run() -> torch.Tensor:
        own = {at: decoder(tile) for at, tile in enumerate(tiles) if at % ranks == rank}
        decoded[:] = [own[at] if at in own else torch.empty(shape) for at, shape in enumerate(shapes)]
        own.clear()
        for at, tile in enumerate(decoded):
            dist.broadcast(tile, at % ranks)
        out = through(lambda tile: decoded.pop(0))
        return out

    decoded.clear()
    return run


class _Calls(torch.nn.Module):
    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._call(*args, **kwargs)


@torch.no_grad()
def one_job(name: str, kind: str, times: int) -> None:
    """One process, or one rank of a job: prints what it measured as a line."""
    torch.set_num_threads(1)
    coder, given = model_of(name)
    want = coder(given) if kind != "one" else None
    rank = int(os.environ.get("RANK", "0"))
    looks: list[Held] = []
    run: Callable[[], torch.Tensor]
    if kind == "tiles":
        dist.init_process_group("gloo")
        run = tiles_by_hand(coder, given)
    elif kind == "ranks":
        compiled = torch.compile(coder, backend=looked_at(looks))
        run = lambda: compiled(given)  # noqa: E731
    else:
        run = lambda: coder(given)  # noqa: E731
    got = run()
    held = Held([given, *coder.parameters(), *coder.buffers()])
    looks.append(held)
    with nullcontext() if kind == "ranks" else held:
        run()
    looks.clear()
    resident, seconds = peak_bytes(run), list[float]()
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    error = 0.0 if want is None else float((got - want).abs().max() / want.abs().max())
    said = {"rank": rank, "held": held.most, "resident": resident, "seconds": min(seconds), "error": error}
    if kind == "ranks":
        said |= {"share": reports()[-1].share, "gathers": len(reports()[-1].gathered)}
    os.write(1, f"\n{SAID}{json.dumps(said)}\n".encode())


def run_job(args: argparse.Namespace, name: str, kind: str) -> dict[str, Any]:
    """A job of its own; the worst of its ranks.

    Raises:
        SystemExit: it ended without a result; its last lines are shown.
    """
    script = [str(Path(__file__).resolve()), "--job", kind, "--times", str(args.times), name]
    env = {**OWN_PAGES, "SFCOMPILE_LOG": "error", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1",
           "SFCOMPILE_LINKS": "assumed", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}  # fmt: skip
    if kind != "one" and args.machines > 1:
        with emulated_machines(args.machines, args.rate) as cluster:
            _, outputs = cluster.torchrun(args.ranks // args.machines, script, env)
        lines = [line for output in outputs for line in output.splitlines()]
    else:
        launcher = [] if kind == "one" else ["-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
        done = subprocess.run(
            [sys.executable, *launcher, *script], env=os.environ | env, capture_output=True, text=True, check=False
        )
        lines = (done.stdout + done.stderr).splitlines()
    said = [json.loads(line.split(SAID, 1)[1]) for line in lines if SAID in line]
    if not said:
        raise SystemExit("\n".join([*lines[-30:], "The job ended without a result; its last lines are above."]))
    return {key: max(one[key] for one in said) for key in said[0] if key != "rank"}


def _columns(job: dict[str, Any]) -> str:
    return f"{job['held'] / 2**20:>6.1f} {job['resident'] / 2**20:>5.0f} {job['seconds']:>6.2f}"


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="of all machines together")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--rate", default="1gbit", help="of each emulated machine's link, in tc's notation")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help="a file for the result")
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.job:
        one_job(args.names[0], args.job, args.times)
        return 0
    where = f"{args.machines}x{args.ranks // args.machines}"
    lines = [
        f"python benchmarks/vae_ranks.py --ranks {args.ranks} --machines {args.machines} --rate {args.rate} --times "
        f"{args.times}, {time.strftime('%Y-%m-%d')}, {where}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        f"{'':<18} {'one process':>19} {'a rank':>51} {'tiles by hand':>28}",
        f"{'model':<18} {'MiB':>6} {'RSS':>5} {'s':>6} {'MiB':>6} {'part':>6} {'RSS':>5} {'s':>6} {'error':>8} "
        f"{'share':>6} {'gathers':>8} {'MiB':>6} {'RSS':>5} {'s':>6} {'error':>8}",
    ]
    print("\n".join(lines), flush=True)
    for name in args.names or CASES:
        one, ours = run_job(args, name, "one"), run_job(args, name, "ranks")
        part = ours["held"] * args.ranks / one["held"]
        row = (
            f"{name:<18} {_columns(one)} {ours['held'] / 2**20:>6.1f} {part:>6.2f} {ours['resident'] / 2**20:>5.0f} "
            f"{ours['seconds']:>6.2f} {ours['error']:>8.1e} {ours['share']:>6.3f} {ours['gathers']:>8}"
        )
        if name in TILED:
            tiles = run_job(args, name, "tiles")
            row += f" {_columns(tiles)} {tiles['error']:>8.1e}"
        lines.append(row)
        print(row, flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
