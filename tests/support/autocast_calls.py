"""A call of every op that torch registers for autocast on CPUs, and of ops that hold such calls; for test_autocast.py.

The test walks torch's own registrations: an op that a later torch adds fails there until it has a call here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional as F

from sfcompile.capture.graph import capture
from sfcompile.errors import UnsupportedError
from sfcompile.torch_private import FakeTensorMode, autocast_off, enter_autocast, exit_autocast, tree_leaves

aten, fft, linalg = torch.ops.aten, torch.fft, torch.linalg
N = 6
S, C, R = (N, N), (N, N, N), (N,)
IMAGE, VIDEO = (2, 3, 8, 8), (2, 3, 6, 6, 6)


def good(x: torch.Tensor) -> torch.Tensor:
    """Symmetric, positive and well conditioned, for what solves and decomposes."""
    return (x + x.mT) * 0.1 + 3 * torch.eye(N, dtype=x.dtype)


def part(x: torch.Tensor) -> torch.Tensor:
    """Between 0 and 1."""
    return x.clamp(-1, 1) * 0.25 + 0.5


def classes(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.long)


def roots(x: torch.Tensor) -> torch.Tensor:
    """In torch 2.14 and later only."""
    return linalg.matrix_sqrth(good(x))


Case = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]


def each(name: str) -> Case:
    """A function of torch.fft."""
    return getattr(fft, name), (S,)


REGISTERED: dict[str, Case] = {
    "_addmm_activation": (lambda a, b, c: aten._addmm_activation(a, b, c, use_gelu=True), (S, S, S)),
    "_native_multi_head_attention": (
        lambda x, w, b, v, c: torch._native_multi_head_attention(x, x, x, N, 2, w, b, v, c, None, False)[0],
        ((2, 4, N), (3 * N, N), (3 * N,), S, R),
    ),
    "_lu_with_info": (lambda x: torch._lu_with_info(good(x)), (S,)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 3), (VIDEO,)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 3), (VIDEO,)),
    "addbmm": (torch.addbmm, (S, C, C)),
    "addmm": (torch.addmm, (S, S, S)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), (VIDEO,)),
    "baddbmm": (torch.baddbmm, (C, C, C)),
    "binary_cross_entropy": (lambda x, y: F.binary_cross_entropy(part(x), part(y)), (S, S)),
    "binary_cross_entropy_with_logits": (lambda x, y: F.binary_cross_entropy_with_logits(x, part(y)), (S, S)),
    "bmm": (torch.bmm, (C, C)),
    "cat": (lambda x, y: torch.cat([x.bfloat16(), y, x.half()]), (S, S)),
    "cdist": (torch.cdist, (S, S)),
    "cholesky": (lambda x: torch.cholesky(good(x)), (S,)),
    "cholesky_inverse": (lambda x: torch.cholesky_inverse(good(x)), (S,)),
    "cholesky_solve": (lambda x, y: torch.cholesky_solve(y, good(x)), (S, S)),
    "conv1d": (F.conv1d, ((2, 3, 8), (4, 3, 3))),
    "conv2d": (F.conv2d, (IMAGE, (4, 3, 3, 3))),
    "conv3d": (F.conv3d, (VIDEO, (4, 3, 2, 2, 2))),
    "conv1d.padding": (lambda x, w: F.conv1d(x, w, padding="same"), ((2, 3, 8), (4, 3, 3))),
    "conv2d.padding": (lambda x, w: F.conv2d(x, w, padding="same"), (IMAGE, (4, 3, 3, 3))),
    "conv3d.padding": (lambda x, w: F.conv3d(x, w, padding="valid"), (VIDEO, (4, 3, 2, 2, 2))),
    "conv_tbc": (torch.conv_tbc, ((5, 2, 3), (3, 3, 4), (4,))),
    "conv_transpose1d": (F.conv_transpose1d, ((2, 3, 8), (3, 4, 3))),
    "conv_transpose2d": (F.conv_transpose2d, (IMAGE, (3, 4, 3, 3))),
    "conv_transpose3d": (F.conv_transpose3d, (VIDEO, (3, 4, 2, 2, 2))),
    "cosine_embedding_loss": (lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(N)), (S, S)),
    "cross_entropy_loss": (lambda x: F.cross_entropy(x, classes(x)), (S,)),
    "fake_quantize_per_tensor_affine": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), (S,)),
    **{f"fft_{name}": each(name) for name in (
        "fft", "fft2", "fftn", "hfft", "ifft", "ifft2", "ifftn", "ihfft", "irfft", "irfft2", "irfftn", "rfft", "rfft2",
        "rfftn",
    )},
    "fractional_max_pool2d": (
        lambda x, s: aten.fractional_max_pool2d(x, [2, 2], [3, 3], part(s)), (IMAGE, (2, 3, 2)),
    ),
    "fractional_max_pool3d": (
        lambda x, s: aten.fractional_max_pool3d(x, [2, 2, 2], [3, 3, 3], part(s)), (VIDEO, (2, 3, 3)),
    ),
    "geqrf": (torch.geqrf, (S,)),
    "grid_sampler": (lambda x, g: F.grid_sample(x, g, align_corners=False), (IMAGE, (2, 5, 5, 2))),
    "grid_sampler_2d": (lambda x, g: aten.grid_sampler_2d(x, g, 0, 0, False), (IMAGE, (2, 5, 5, 2))),
    "grid_sampler_3d": (lambda x, g: aten.grid_sampler_3d(x, g, 0, 0, False), (VIDEO, (2, 2, 2, 2, 3))),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x, torch.ones(S)), (S,)),
    "huber_loss": (F.huber_loss, (S, S)),
    "index_copy": (lambda x, y: torch.index_copy(x, 0, torch.tensor([2, 1]), y[:2].bfloat16()), (S, S)),
    "inverse": (lambda x: torch.inverse(good(x)), (S,)),
    "kl_div": (lambda x, y: F.kl_div(x, part(y), reduction="sum"), (S, S)),
    "l1_loss": (F.l1_loss, (S, S)),
    "linalg_cholesky": (lambda x: linalg.cholesky(good(x)), (S,)),
    "linalg_cholesky_ex": (lambda x: linalg.cholesky_ex(good(x)), (S,)),
    "linalg_cond": (lambda x: linalg.cond(good(x)), (S,)),
    "linalg_cond.p_str": (lambda x: linalg.cond(good(x), "fro"), (S,)),
    "linalg_eig": (lambda x: linalg.eig(good(x)), (S,)),
    "linalg_eigh": (lambda x: linalg.eigh(good(x)), (S,)),
    "linalg_eigvals": (lambda x: linalg.eigvals(good(x)), (S,)),
    "linalg_eigvalsh": (lambda x: linalg.eigvalsh(good(x)), (S,)),
    "linalg_householder_product": (lambda x, t: linalg.householder_product(x, t), (S, R)),
    "linalg_inv": (lambda x: linalg.inv(good(x)), (S,)),
    "linalg_inv_ex": (lambda x: linalg.inv_ex(good(x)), (S,)),
    **({"linalg_matrix_sqrth": (roots, (S,))} if hasattr(linalg, "matrix_sqrth") else {}),
    "linalg_matrix_rank": (lambda x: linalg.matrix_rank(good(x), 0.1), (S,)),
    "linalg_matrix_rank.atol_rtol_float": (lambda x: linalg.matrix_rank(good(x), atol=0.1), (S,)),
    "linalg_matrix_rank.atol_rtol_tensor": (lambda x, t: linalg.matrix_rank(good(x), atol=part(t[0])), (S, R)),
    "linalg_matrix_rank.tol_tensor": (lambda x, t: linalg.matrix_rank(good(x), part(t[0])), (S, R)),
    "linalg_qr": (lambda x: linalg.qr(good(x)), (S,)),
    "linalg_solve": (lambda x, y: linalg.solve(good(x), y), (S, S)),
    "linalg_svd": (lambda x: linalg.svd(good(x)), (S,)),
    "linalg_svdvals": (lambda x: linalg.svdvals(good(x)), (S,)),
    "linalg_tensorinv": (lambda x: linalg.tensorinv(good(x), 1), (S,)),
    "linalg_tensorsolve": (lambda x, y: linalg.tensorsolve(good(x), y), (S, R)),
    "linalg_vecdot": (linalg.vecdot, (S, S)),
    "linear": (F.linear, (S, S, R)),
    "lu_solve": (lambda x, y: torch.lu_solve(y, *torch.lu(good(x))), (S, S)),
    "margin_ranking_loss": (lambda x, y: F.margin_ranking_loss(x, y, torch.ones(S)), (S, S)),
    "matmul": (torch.matmul, (C, S)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), (VIDEO,)),
    "max_unpool2d": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (IMAGE,)),
    "max_unpool3d": (lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), (VIDEO,)),
    "mm": (torch.mm, (S, S)),
    "mse_loss": (F.mse_loss, (S, S)),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x, classes(x)), (S,)),
    "multilabel_margin_loss": (lambda x: F.multilabel_margin_loss(x, torch.ones(S, dtype=torch.long)), (S,)),
    "multilabel_margin_loss_forward": (
        lambda x: aten.multilabel_margin_loss_forward(x, torch.ones(S, dtype=torch.long), 1), (S,),
    ),
    "nanquantile": (lambda x, q: torch.nanquantile(x, part(q)), (S, R)),
    "nanquantile.scalar": (lambda x: torch.nanquantile(x, 0.3), (S,)),
    "nll_loss": (lambda x: F.nll_loss(x, classes(x)), (S,)),
    "nll_loss2d": (lambda x: aten.nll_loss2d(x, classes(x)), (IMAGE,)),
    "orgqr": (torch.orgqr, (S, R)),
    "ormqr": (torch.ormqr, (S, R, S)),
    "pinverse": (lambda x: torch.pinverse(good(x)), (S,)),
    "poisson_nll_loss": (F.poisson_nll_loss, (S, S)),
    "polar": (torch.polar, (S, S)),
    "prelu": (F.prelu, (S, (1,))),
    "prod": (torch.prod, (S,)),
    "prod.dim_int": (lambda x: torch.prod(x, 1), (S,)),
    "qr": (lambda x: torch.qr(good(x)), (S,)),
    "quantile": (lambda x, q: torch.quantile(x, part(q)), (S, R)),
    "quantile.scalar": (lambda x: torch.quantile(x, 0.3), (S,)),
    "reflection_pad1d": (lambda x: F.pad(x, (1, 1), "reflect"), ((2, 3, 8),)),
    "reflection_pad2d": (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), (IMAGE,)),
    "replication_pad1d": (lambda x: F.pad(x, (1, 1), "replicate"), ((2, 3, 8),)),
    "replication_pad2d": (lambda x: F.pad(x, (1, 1, 1, 1), "replicate"), (IMAGE,)),
    "replication_pad3d": (lambda x: F.pad(x, (1,) * 6, "replicate"), (VIDEO,)),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, ((2, 2, 8, 8),) * 3),
    "smooth_l1_loss": (F.smooth_l1_loss, (S, S)),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, torch.ones(S)), (S,)),
    "stack": (lambda x, y: torch.stack([x.bfloat16(), y]), (S, S)),
    "stft": (lambda x: aten.stft(x, 4, None, None, None, False, True, True), ((2, 16),)),
    "stft.center": (lambda x: aten.stft.center(x, 4, return_complex=True), ((2, 16),)),
    "svd": (lambda x: torch.svd(good(x)), (S,)),
    "trace": (torch.trace, (S,)),
    "triangular_solve": (lambda x, y: torch.triangular_solve(y, good(x)), (S, S)),
    "triplet_margin_loss": (F.triplet_margin_loss, (S, S, S)),
    "view_as_complex": (torch.view_as_complex, ((4, 2),)),
}  # fmt: skip

UNREACHED = {
    "_grid_sampler_2d_cpu_fallback": "called by grid_sampler_2d, which has a case of its own",
    "_convolution.deprecated": "for TorchScript files of old",
    "ctc_loss.IntList": "its sizes depend on data: Dynamo breaks the graph",
    "ctc_loss.Tensor": "its sizes depend on data: Dynamo breaks the graph",
    "linalg_lstsq": "its sizes depend on data: Dynamo breaks the graph",
    "mkldnn_rnn_layer": "called by lstm, which has a case of its own",
    **dict.fromkeys(
        ("index_copy.dimname", "prod.dim_Dimname"), "in torch 2.11; dims have names: Dynamo breaks the graph"
    ),
}

HOLDING: dict[str, Case] = {
    "bilinear": (F.bilinear, ((4, 5), (4, N), (3, 5, N), (3,))),
    "a power of the inverse": (lambda x: linalg.matrix_power(good(x), -2), (S,)),
    "pinv": (lambda x: linalg.pinv(good(x)), (S,)),
    "multi_dot": (lambda x, y, z: linalg.multi_dot([x, y, z]), (S, S, S)),
    "matrix_exp": (lambda x: torch.matrix_exp(good(x)), (S,)),
    "determinant": (lambda x: linalg.det(good(x)), (S,)),
    "nuclear norm": (lambda x: linalg.matrix_norm(good(x), "nuc"), (S,)),
    "cosine_similarity": (F.cosine_similarity, (S, S)),
    "pairwise_distance": (F.pairwise_distance, (S, S)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), (IMAGE,)),
    "dot": (torch.dot, (R, R)),
    "addmv": (torch.addmv, (R, S, R)),
    "lstm": (
        lambda x, w, u, b: torch.lstm(x, [torch.zeros(1, 2, N)] * 2, [w, u, b, b], True, 1, 0.0, False, False, True)[0],
        ((2, 4, N), (4 * N, N), (4 * N, N), (4 * N,)),
    ),
    "group_norm": (lambda x: F.group_norm(x, 3), (IMAGE,)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), (IMAGE,)),
    "embedding_bag": (lambda w: F.embedding_bag(torch.tensor([[0, 2], [1, 3]]), w), (S,)),
}  # fmt: skip


def in_region(run: Callable[..., Any], inputs: int, low: torch.dtype) -> fx.GraphModule:
    """What Dynamo hands over for a region with one call in it."""
    graph = fx.Graph()
    given = tuple(graph.placeholder(f"x{i}") for i in range(inputs))
    region = graph.call_function(enter_autocast, ("cpu", low, True, True))
    out = graph.call_function(lambda *values: tuple(tensors_of(run(*values))), given)
    graph.call_function(exit_autocast, (region,))
    graph.output((out,))
    return fx.GraphModule(torch.nn.Module(), graph)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def differs(case: Case, given: torch.dtype, low: torch.dtype) -> str:
    """Where the captured graph differs from eager; "" where it does not, or where one of them is refused."""
    run, shapes = case
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(given) for shape in shapes]
    try:
        with torch.autocast("cpu", low):
            wanted = tensors_of(run(*inputs))
    except (RuntimeError, NotImplementedError):
        return ""
    try:
        captured = capture(in_region(run, len(inputs), low), inputs)
        with autocast_off():
            got = captured.gm(*(inputs[i] for i in captured.tensor_inputs))
    except (RuntimeError, UnsupportedError):
        return ""
    for mine, want in zip(tree_leaves(got), wanted, strict=True):
        if mine.dtype != want.dtype or not torch.equal(mine.nan_to_num(), want.nan_to_num()):
            return f"{mine.dtype} for {want.dtype}, off by {(mine.double() - want.double()).abs().max():.1e}"
    return ""


def reads_values(case: Case) -> bool:
    """Whether this torch looks at values before it computes, as 2.11 does for quantiles: Dynamo breaks the graph."""
    run, shapes = case
    try:
        with FakeTensorMode():
            run(*(torch.empty(shape) for shape in shapes))
    except DataDependentOutputException:
        return True
    except (RuntimeError, NotImplementedError):
        return False
    return False


def refused(case: Case, low: torch.dtype) -> bool:
    """Whether the capture, or what it made, refuses fp32 operands that eager takes."""
    run, shapes = case
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    try:
        with torch.autocast("cpu", low):
            run(*inputs)
    except RuntimeError:
        return False
    try:
        captured = capture(in_region(run, len(inputs), low), inputs)
        with autocast_off():
            captured.gm(*(inputs[i] for i in captured.tensor_inputs))
    except (RuntimeError, UnsupportedError):
        return True
    return False
