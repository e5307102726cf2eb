"""Models of packed sequences, lists of items, block masks or caches, and image models with position ids."""

from __future__ import annotations

from typing import Any

import torch

from .registry import HEAD_DIM, HEADS, HIDDEN, TEXT, Draw, Inputs, case, key_mask

BATCH = 2
CHANNELS = 4
PATCH = 2
IMAGE = (1, 8, 10)
VIDEO = (4, 4, 10)
AUDIO = 72
TEXT_DIM = 32
AXES = (4, 6, 6)  # of the rotary embedding, HEAD_DIM in all
PATCH_DIM = CHANNELS * PATCH**2


def _grid(*sizes: int) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def _tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def _latents(r: Draw, grid: tuple[int, int, int], channels: int = CHANNELS) -> torch.Tensor:
    frames, height, width = grid
    return r.normal(channels, frames, height * PATCH, width * PATCH)


def _text_ids() -> torch.Tensor:
    return torch.arange(TEXT)[:, None] * torch.tensor([0, 1, 1])


def _image_ids() -> torch.Tensor:
    return _grid(*IMAGE) + torch.tensor([1, 0, 0])


def _inputs(r: Draw, tokens: int, **more: Any) -> Inputs:
    common = dict(
        hidden_states=r.normal(BATCH, tokens, PATCH_DIM), encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        timestep=torch.tensor([0.2, 0.9]), return_dict=False,
    )  # fmt: skip
    return common | more


@case("krea2", "Krea2Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    text_layers = 3
    config = dict(
        in_channels=PATCH_DIM, num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, intermediate_size=96, timestep_embed_dim=40, text_hidden_dim=TEXT_DIM,
        num_text_layers=text_layers, text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=48,
        num_layerwise_text_blocks=2, num_refiner_text_blocks=2, axes_dims_rope=AXES,
    )  # fmt: skip
    return config, _inputs(
        r,
        _tokens(IMAGE),
        encoder_hidden_states=r.normal(BATCH, TEXT, text_layers, TEXT_DIM),
        position_ids=torch.cat([torch.zeros(TEXT, 3, dtype=torch.long), _grid(*IMAGE)]),
        encoder_attention_mask=key_mask(TEXT, 17),
    )


@case("longcat_image", "LongCatImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        patch_size=1, in_channels=PATCH_DIM, num_layers=2, num_single_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=list(AXES),
    )  # fmt: skip
    return config, _inputs(r, _tokens(IMAGE), txt_ids=_text_ids(), img_ids=_image_ids())


@case("ovis_image", "OvisImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        patch_size=1, in_channels=PATCH_DIM, out_channels=PATCH_DIM, num_layers=2, num_single_layers=2,
        attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=TEXT_DIM, axes_dims_rope=AXES,
    )  # fmt: skip
    return config, _inputs(r, _tokens(IMAGE), txt_ids=_text_ids(), img_ids=_image_ids())


@case("qwen_image21", "QwenImage21Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        patch_size=1, in_channels=PATCH_DIM, out_channels=PATCH_DIM, num_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, context_in_dim=TEXT_DIM, mlp_ratio=2, axes_dims_rope=AXES,
    )  # fmt: skip
    # Text, a condition image, text, the target image; the text encoder has one slot for 2 x 2 image tokens.
    condition = (1, 4, 4)
    slots, target_slots = _tokens(condition) // 4, _tokens(IMAGE) // 4
    layout = [False] * 8 + [True] * slots + [False] * (TEXT - 8) + [True] * target_slots
    return config, _inputs(
        r,
        _tokens(condition) + _tokens(IMAGE),
        encoder_hidden_states=r.normal(BATCH, TEXT + slots, TEXT_DIM),
        encoder_hidden_states_mask=key_mask(TEXT + slots, 21, total=TEXT + slots),
        img_shapes=[[condition, IMAGE]] * BATCH,
        img_mask=torch.tensor([layout] * BATCH),
    )


@case("omnigen", "OmniGenTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    factors = [1.0] * (HEAD_DIM // 2)
    config = dict(
        in_channels=CHANNELS, patch_size=PATCH, hidden_size=HIDDEN, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=96, num_layers=2, pad_token_id=0, vocab_size=100,
        max_position_embeddings=1024, original_max_position_embeddings=256,
        rope_scaling=dict(short_factor=factors, long_factor=factors), pos_embed_max_size=16, time_step_dim=40,
    )  # fmt: skip
    # Causal over the text, padded on the left; the time token and the image see everything but the padding.
    total = TEXT + 1 + _tokens(IMAGE)
    mask = torch.ones(BATCH, total, total).tril()
    mask[:, TEXT:] = 1
    padding = 7
    mask[1, :, :padding] = 0
    mask[1, :padding] = 1
    text = 1 + r.integers(99, BATCH, TEXT)
    text[1, :padding] = 0
    return config, dict(
        hidden_states=torch.stack([_latents(r, IMAGE)[:, 0] for _ in range(BATCH)]), timestep=torch.tensor([0.2, 0.9]),
        input_ids=text, input_img_latents=[], input_image_sizes={}, attention_mask=mask,
        position_ids=torch.arange(total).repeat(BATCH, 1), return_dict=False,
    )  # fmt: skip


def _z_image(r: Draw, items: list[tuple[tuple[int, int, int], int]]) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        all_patch_size=(PATCH,), all_f_patch_size=(1,), in_channels=CHANNELS, dim=HIDDEN, n_layers=2,
        n_refiner_layers=2, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=TEXT_DIM, axes_dims=list(AXES),
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    return config, dict(
        x=[_latents(r, grid) for grid, _ in items],
        t=torch.tensor([0.2, 0.9]),
        cap_feats=[r.normal(text, TEXT_DIM) for _, text in items],
        return_dict=False,
    )


@case("z_image", "ZImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _z_image(r, [(IMAGE, TEXT), (IMAGE, TEXT)])


@case("z_image_ragged", "ZImageTransformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _z_image(r, [(IMAGE, TEXT), ((1, 6, 8), 37)])


@case("minimax_h3", "MiniMaxH3Transformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, hidden_size=HIDDEN, num_layers=2, num_refiner_layers=2,
        ffn_dim=96, in_channels=CHANNELS, audio_in_channels=8, patch_size=(1, PATCH, PATCH), text_dim=TEXT_DIM,
        freq_dim=40, time_embed_hidden_dim=HIDDEN, time_embed_dim=48, rope_freq_dim=2,
    )  # fmt: skip
    video = _tokens(VIDEO)
    lengths = torch.tensor([TEXT, AUDIO, video])
    text_rows, audio_rows, video_rows = torch.arange(int(lengths.sum())).split(lengths.tolist())
    line = torch.tensor([1, 0, 0])
    return config, _inputs(
        r,
        video,
        audio_hidden_states=r.normal(BATCH, AUDIO, 8),
        timestep=torch.tensor([0.0, 0.3, 0.8]),
        timestep_indices=torch.tensor([0, 1, 2]).repeat_interleave(lengths),
        token_tags=torch.tensor([1, 2, 0]).repeat_interleave(lengths),
        position_ids=torch.cat(
            [torch.arange(TEXT)[:, None] * line, torch.arange(AUDIO)[:, None] * line + TEXT, _grid(*VIDEO) + TEXT]
        ),
        text_indices=text_rows,
        audio_indices=audio_rows,
        video_indices=video_rows,
    )


@case("cosmos3", "Cosmos3OmniTransformer")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        head_dim=HEAD_DIM, hidden_size=HIDDEN, intermediate_size=96, latent_channel=CHANNELS, latent_patch_size=PATCH,
        num_attention_heads=HEADS, num_hidden_layers=2, num_key_value_heads=HEADS // 2, patch_latent_dim=PATCH_DIM,
        vocab_size=100, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    video = _tokens(VIDEO)
    rows = torch.arange(TEXT, TEXT + video)
    positions = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), _grid(*VIDEO) + torch.tensor([TEXT, 0, 0])])
    return config, dict(
        input_ids=r.integers(100, TEXT), text_indexes=torch.arange(TEXT), position_ids=positions.T, und_len=TEXT,
        sequence_length=TEXT + video, vision_tokens=[_latents(r, VIDEO)[None]], vision_token_shapes=[VIDEO],
        vision_sequence_indexes=rows, vision_mse_loss_indexes=rows, vision_timesteps=torch.full((video,), 300.0),
        vision_noisy_frame_indexes=[torch.arange(VIDEO[0])], return_dict=False,
    )  # fmt: skip


@case("wan_animate2", "WanAnimate2Transformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    layers = 2
    config = dict(
        patch_size=(1, PATCH, PATCH), text_len=TEXT, in_dim=2 * CHANNELS, dim=HIDDEN, ffn_dim=96, freq_dim=40,
        text_dim=TEXT_DIM, out_dim=CHANNELS, num_heads=HEADS, num_layers=layers,
    )  # fmt: skip
    # The pass that fills the cache: the one after it needs compiled flex attention.
    return config, dict(
        hidden_states=[_latents(r, VIDEO) for _ in range(BATCH)], timestep=torch.tensor([17, 801]),
        encoder_hidden_states=[r.normal(TEXT, TEXT_DIM), r.normal(17, TEXT_DIM)],
        condition_latents=[_latents(r, VIDEO) for _ in range(BATCH)], kv_cache=WanAnimate2KVCache(layers),
        kv_cache_mode="extract", seq_len=_tokens(VIDEO), encoder_hidden_states_image=r.normal(BATCH, 12, 1280),
        offset_grid_sizes=torch.tensor([VIDEO] * BATCH), return_dict=False,
    )  # fmt: skip


@case("anyflow_far", "AnyFlowFARTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        patch_size=(1, PATCH, PATCH), compressed_patch_size=(1, 2 * PATCH, 2 * PATCH), num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=40,
        ffn_dim=96, num_layers=2, rope_max_seq_len=64, chunk_partition=(1, 1, 2),
    )  # fmt: skip
    frames, height, width = VIDEO
    return config, _inputs(
        r,
        _tokens(VIDEO),
        hidden_states=r.normal(BATCH, frames, CHANNELS, height * PATCH, width * PATCH),
        timestep=torch.tensor([[0.0, 200.0, 500.0, 500.0], [100.0, 300.0, 900.0, 900.0]]),
        r_timestep=torch.tensor([[0.0, 100.0, 400.0, 400.0], [0.0, 200.0, 600.0, 600.0]]),
        chunk_partition=[1, 1, 2],
    )


@case("kandinsky6_sr", "Kandinsky6SRTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, time_dim=48, patch_size=(1, 1, 1), model_dim=HIDDEN, ff_dim=96,
        num_visual_blocks=2, axes_dims=AXES, nabla_threshold=0.5, nabla_window=(3, 1, 1),
    )  # fmt: skip
    # Attention blocks are 8 x 8 tokens of a frame: two per frame.
    return config, dict(
        hidden_states=r.normal(BATCH, 4, 8, 16, 2 * CHANNELS + 1),
        timestep=torch.tensor([17.0, 801.0]),
        return_dict=False,
    )


def _cameras(r: Draw, frames: int, height: int, width: int) -> torch.Tensor:
    """Poses, flattened, and fx, fy, cx, cy: a camera that turns and moves a little from frame to frame."""
    skew = 0.2 * r.normal(BATCH, frames, 3, 3)
    poses = torch.eye(4).repeat(BATCH, frames, 1, 1)
    poses[..., :3, :3] = torch.linalg.matrix_exp(skew - skew.mT)
    poses[..., :3, 3] = 0.5 * r.normal(BATCH, frames, 3)
    lens = torch.tensor([width, width, width / 2, height / 2]).expand(BATCH, frames, 4)
    return torch.cat([poses.flatten(2), lens], dim=-1)


@case("sana_wm", "SanaWMTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    plucker = 6
    config = dict(
        in_channels=CHANNELS, num_layers=4, hidden_size=HIDDEN, num_attention_heads=HEADS, patch_size=(1, 1, 1),
        softmax_every_n=2, linear_head_dim=HEAD_DIM, chunk_plucker_channels=plucker, chunk_plucker_post_attn_blocks=4,
        caption_channels=TEXT_DIM, mlp_ratio=2.0,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, CHANNELS, *VIDEO), timestep=r.integers(1000, BATCH, 1, VIDEO[0]),
        encoder_hidden_states=r.normal(BATCH, 1, TEXT, TEXT_DIM), encoder_attention_mask=key_mask(TEXT, 17),
        camera_conditions=_cameras(r, *VIDEO), chunk_plucker=r.normal(BATCH, plucker, *VIDEO), return_dict=False,
    )  # fmt: skip


@case("sana_wm_refiner", "SanaWMLTX2RefinerTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    config = dict(
        in_channels=PATCH_DIM, out_channels=PATCH_DIM, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8, audio_cross_attention_dim=32, num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    video = _tokens(VIDEO)
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(dim=HIDDEN, num_attention_heads=HEADS)
    return config, _inputs(
        r,
        video,
        timestep=r.integers(1000, BATCH, VIDEO[0]).repeat_interleave(video // VIDEO[0], dim=1),
        video_rotary_emb=rope(rope.prepare_video_coords(BATCH, *VIDEO, device="cpu")),
        encoder_attention_mask=key_mask(TEXT, 17),
    )
