"""Image models: 80 tokens of 8 x 10, patched from latents [4, 16, 20] unless the class takes tokens."""

from __future__ import annotations

from typing import Any

import torch

from .registry import HEAD_DIM, HEADS, HIDDEN, TEXT, Draw, Inputs, case, key_mask

BATCH = 2
CHANNELS = 4
GRID = (8, 10)
TOKENS = GRID[0] * GRID[1]
HEIGHT, WIDTH = 2 * GRID[0], 2 * GRID[1]
PATCH_DIM = CHANNELS * 4
TEXT_DIM, GLYPH_DIM = 32, 40
GLYPHS = 16  # tokens of a second text encoder
AXES = (4, 6, 6)  # of the rotary embedding, HEAD_DIM in all
TIMES = (17.0, 801.0)
FRACTIONS = (0.2, 0.9)  # for the classes whose time runs over [0, 1]


def _latents(r: Draw) -> torch.Tensor:
    return r.normal(BATCH, CHANNELS, HEIGHT, WIDTH)


def _text(r: Draw) -> torch.Tensor:
    return r.normal(BATCH, TEXT, TEXT_DIM)


def _image_ids(axes: int = 3, first: int = 0, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """Position ids [tokens, axes]: ``first``, row, column, then zeros."""
    rows, columns = torch.cartesian_prod(*(torch.arange(size) for size in grid)).unbind(1)
    zeros = torch.zeros_like(rows)
    return torch.stack([zeros + first, rows, columns] + [zeros] * (axes - 3), dim=1)


def _text_ids(axes: int = 4) -> torch.Tensor:
    """Position ids [TEXT, axes]: the token's number on the last axis."""
    return torch.arange(TEXT)[:, None] * (torch.arange(axes) == axes - 1)


def _inputs(r: Draw, times: tuple[float, float] = TIMES, **more: Any) -> Inputs:
    common = dict(
        hidden_states=_latents(r), encoder_hidden_states=_text(r), timestep=torch.tensor(times), return_dict=False
    )
    return common | more


def _token_inputs(r: Draw, **more: Any) -> Inputs:
    return _inputs(r, FRACTIONS, hidden_states=r.normal(BATCH, TOKENS, PATCH_DIM)) | more


@case("dreamlite", "DreamLiteTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=HIDDEN, num_layers=2, norm_num_groups=8,
        cross_attention_dim=TEXT_DIM, use_linear_projection=True, qk_norm="rms_norm", ff_mult=3,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, HIDDEN, *GRID),
        encoder_hidden_states=_text(r),
        encoder_attention_mask=key_mask(TEXT, 17),
        return_dict=False,
    )


def _bria(**more: Any) -> dict[str, Any]:
    common = dict(
        in_channels=PATCH_DIM, num_layers=2, num_single_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_DIM, axes_dims_rope=AXES,
    )  # fmt: skip
    return common | more


def _bria_inputs(r: Draw, **more: Any) -> Inputs:
    ids = dict(img_ids=_image_ids(), txt_ids=torch.zeros(TEXT, 3))
    return _inputs(r, hidden_states=r.normal(BATCH, TOKENS, PATCH_DIM)) | ids | more


@case("bria", "BriaTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _bria(), _bria_inputs(r)


@case("bria_fibo", "BriaFiboTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    blocks = 4
    return _bria(text_encoder_dim=GLYPH_DIM), _bria_inputs(
        r, text_encoder_layers=[r.normal(BATCH, TEXT, GLYPH_DIM) for _ in range(blocks)]
    )


@case("bria_fibo2", "BriaFibo2Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # 24 text tokens, halfway between the shortest and the longest text, make 16 gist tokens.
    injected = (1, 3)
    config = dict(
        in_channels=CHANNELS, dim=HIDDEN, n_layers=4, n_refiner_layers=2, n_heads=HEADS, cap_feat_dim=TEXT_DIM,
        injection_layer_ids=injected, perceiver_num_layers=2, min_num_gist_tokens=8, max_num_gist_tokens=24,
        gist_step=8, gist_min_text_len=16, gist_max_text_len=32, axes_dims=AXES, axes_lens=(32, 16, 16),
    )  # fmt: skip
    return config, _inputs(r, FRACTIONS, encoder_hidden_states=r.normal(BATCH, 1 + len(injected), TEXT, TEXT_DIM))


def _cogview(**more: Any) -> dict[str, Any]:
    common = dict(
        patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, text_embed_dim=TEXT_DIM, time_embed_dim=40, condition_dim=16,
    )  # fmt: skip
    return common | more


def _cogview_inputs(r: Draw, **more: Any) -> Inputs:
    sizes = torch.tensor([[HEIGHT, WIDTH]] * BATCH) * 8.0
    conditions = dict(original_size=sizes, target_size=sizes, crop_coords=torch.tensor([[0.0, 0.0], [3.0, 5.0]]))
    return _inputs(r) | conditions | more


@case("cogview3_plus", "CogView3PlusTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _cogview(pos_embed_max_size=16, sample_size=WIDTH), _cogview_inputs(r)


@case("cogview4", "CogView4Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _cogview(rope_axes_dim=(16, 16)), _cogview_inputs(r)


@case("cogview4_mask", "CogView4Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _cogview(rope_axes_dim=(16, 16)), _cogview_inputs(r, attention_mask=key_mask(TEXT, 17))


@case("glm_image", "GlmImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    codes = 50
    inputs = _cogview_inputs(
        r,
        prior_token_id=r.integers(codes, BATCH, TOKENS),
        prior_token_drop=r.integers(4, BATCH, TOKENS) == 0,
    )
    del inputs["original_size"]
    return _cogview(prior_vq_quantizer_codebook_size=codes), inputs


@case("flux2", "Flux2Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=PATCH_DIM, num_layers=2, num_single_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_DIM, timestep_guidance_channels=40,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return config, _token_inputs(
        r,
        img_ids=_image_ids(4).repeat(BATCH, 1, 1),
        txt_ids=_text_ids().repeat(BATCH, 1, 1),
        guidance=torch.tensor([4.0, 2.5]),
    )


@case("flux3", "Flux3Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # With the tokens of a reference image of 4 x 10, which have blocks of their own.
    reference = (4, 10)
    config = dict(
        in_channels=PATCH_DIM, cond_in_channels=PATCH_DIM, num_layers=2, num_single_layers=2,
        attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=TEXT_DIM, timestep_channels=40,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return config, _token_inputs(
        r,
        img_ids=_image_ids(4),
        txt_ids=_text_ids(),
        image_cond_hidden_states=r.normal(BATCH, reference[0] * reference[1], PATCH_DIM),
        image_cond_ids=_image_ids(4, 10, reference),
    )


def _hunyuan(**more: Any) -> dict[str, Any]:
    common = dict(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        num_layers=2, num_single_layers=2, num_refiner_layers=2, patch_size=(2, 2), text_embed_dim=TEXT_DIM,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    return common | more


@case("hunyuan_image", "HunyuanImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _hunyuan(), _inputs(r, encoder_attention_mask=key_mask(TEXT, 17))


@case("hunyuan_image_byt5", "HunyuanImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _hunyuan(text_embed_2_dim=GLYPH_DIM), _inputs(
        r,
        encoder_attention_mask=key_mask(TEXT, 17),
        encoder_hidden_states_2=r.normal(BATCH, GLYPHS, GLYPH_DIM),
        encoder_attention_mask_2=key_mask(5, GLYPHS, total=GLYPHS),
    )


@case("ideogram4", "Ideogram4Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    from diffusers.models.transformers import transformer_ideogram4 as ideogram

    config = dict(
        in_channels=PATCH_DIM, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        intermediate_size=96, adaln_dim=40, llm_features_dim=TEXT_DIM, mrope_section=(4, 2, 2),
    )  # fmt: skip
    total = TEXT + TOKENS
    positions = torch.zeros(BATCH, total, 3, dtype=torch.long)
    positions[:, TEXT:] = _image_ids() + ideogram.IMAGE_POSITION_OFFSET
    segments = torch.ones(BATCH, total, dtype=torch.long)
    roles = torch.full((BATCH, total), ideogram.OUTPUT_IMAGE_INDICATOR)
    # The text is padded on the left.
    for sample, padding in enumerate((0, 7)):
        positions[sample, padding:TEXT] = torch.arange(TEXT - padding)[:, None]
        segments[sample, :padding] = ideogram.SEQUENCE_PADDING_INDICATOR
        roles[sample, :TEXT] = ideogram.LLM_TOKEN_INDICATOR
        roles[sample, :padding] = 0
    return config, dict(
        hidden_states=r.normal(BATCH, total, PATCH_DIM),
        encoder_hidden_states=r.normal(BATCH, total, TEXT_DIM),
        timestep=torch.tensor(FRACTIONS),
        position_ids=positions,
        segment_ids=segments,
        indicator=roles,
        return_dict=False,
    )


def _joy() -> dict[str, Any]:
    return dict(
        patch_size=[1, 2, 2], in_channels=CHANNELS, hidden_size=HIDDEN, num_attention_heads=HEADS, text_dim=TEXT_DIM,
        num_layers=2, rope_dim_list=list(AXES),
    )  # fmt: skip


@case("joy_image_edit", "JoyImageEditTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    items = 2  # a reference image and the target: 160 tokens
    return _joy(), _inputs(r, hidden_states=r.normal(BATCH, items, CHANNELS, 1, HEIGHT, WIDTH))


@case("joy_image_edit_plus", "JoyImageEditPlusTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # The target, then a reference image; the second sample's is smaller, so its sequence is padded.
    shapes = [[(1, *GRID), (1, *GRID)], [(1, *GRID), (1, 6, 10)]]
    return _joy(), _inputs(
        r,
        hidden_states=r.normal(BATCH, 2 * TOKENS, CHANNELS, 1, 2, 2),
        encoder_hidden_states_mask=key_mask(TEXT, 17),
        shape_list=shapes,
    )
