"""Music and speech models (72 tokens), priors, UNet blocks, proteins, and video by linear or sparse attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .registry import HEAD_DIM, HEADS, HIDDEN, TEXT, Draw, Inputs, case, key_mask

BATCH = 2
AUDIO = 72
GRID_H, GRID_W = 8, 10
FRAMES = 4
TEXT_DIM, POOLED_DIM = 32, 40
LATENT = 8


def _two_times() -> torch.Tensor:
    """Noise levels of [0, 1]."""
    return torch.tensor([0.3, 0.9])


@case("ace_step", "AceStepTransformer1DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # One layer with the window, one without; fewer key heads than query heads.
    config = dict(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS, head_dim=HEAD_DIM,
        num_key_value_heads=2, in_channels=3 * LATENT, audio_acoustic_hidden_dim=LATENT, patch_size=2,
        sliding_window=20, encoder_hidden_size=TEXT_DIM,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, 2 * AUDIO, LATENT),
        context_latents=r.normal(BATCH, 2 * AUDIO, 2 * LATENT),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        timestep=_two_times(),
        timestep_r=torch.tensor([0.1, 0.4]),
        return_dict=False,
    )


@case("minimax_music3_rvq", "MiniMaxMusic3RVQDepthDecoder")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    # The released model reads one token per codebook, 16 at most; here the sequence is as long as the other audio.
    config = dict(
        hidden_size=HIDDEN, num_layers=2, num_attention_heads=HEADS, intermediate_size=96, audio_vocab_size=50,
        num_codebooks=3, max_position_embeddings=AUDIO + 8,
    )  # fmt: skip
    return config, dict(inputs_embeds=r.normal(BATCH, AUDIO, HIDDEN))


@case("minimax_music3", "MiniMaxMusic3Transformer1DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=LATENT, condition_dim=TEXT_DIM, num_layers=2, num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM, ff_inner_dim=96, rotary_dim=8, fourier_embedding_dim=40,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, LATENT, AUDIO),
        timestep=_two_times(),
        encoder_hidden_states=r.normal(BATCH, AUDIO, TEXT_DIM),
        return_dict=False,
    )


@case("prior", "PriorTransformer")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    added = 4
    text = TEXT - added
    config = dict(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2, embedding_dim=TEXT_DIM,
        num_embeddings=text, additional_embeddings=added,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, TEXT_DIM),
        timestep=torch.tensor([17, 801]),
        proj_embedding=r.normal(BATCH, TEXT_DIM),
        encoder_hidden_states=r.normal(BATCH, text, TEXT_DIM),
        attention_mask=key_mask(text, 13, total=text),
        return_dict=False,
    )


@case("t5_film", "T5FilmDecoder")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        input_dims=LATENT, targets_length=AUDIO + 8, d_model=HIDDEN, num_layers=2, num_heads=HEADS, d_kv=HEAD_DIM,
        d_ff=96,
    )  # fmt: skip
    context = 32
    return config, dict(
        encodings_and_masks=[
            (r.normal(BATCH, TEXT, HIDDEN), key_mask(TEXT, 17).float()),
            (r.normal(BATCH, context, HIDDEN), key_mask(21, context, total=context).float()),
        ],
        decoder_input_tokens=r.normal(BATCH, AUDIO, LATENT),
        decoder_noise_time=_two_times(),
    )


def _longcat_audio(r: Draw, text_conv: bool) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        dit_dim=HIDDEN, dit_depth=2, dit_heads=HEADS, dit_text_dim=TEXT_DIM, latent_dim=LATENT, text_conv=text_conv,
        ff_mult=2.0,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, AUDIO, LATENT),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        encoder_attention_mask=key_mask(TEXT, 17),
        timestep=_two_times(),
        attention_mask=key_mask(AUDIO, 61, total=AUDIO),
        latent_cond=r.normal(BATCH, AUDIO, LATENT),
        return_dict=False,
    )


@case("longcat_audio", "LongCatAudioDiTTransformer")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _longcat_audio(r, text_conv=False)


@case("longcat_audio_conv", "LongCatAudioDiTTransformer")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    return _longcat_audio(r, text_conv=True)


@case("stable_audio3", "StableAudio3DiTModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    local = 9
    config = dict(
        io_channels=LATENT, embed_dim=HIDDEN, depth=2, num_heads=HEADS, cond_token_dim=TEXT_DIM,
        global_cond_dim=POOLED_DIM, local_add_cond_dim=local, timestep_features_dim=20, ff_mult=2.0,
        num_memory_tokens=8,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, LATENT, AUDIO),
        timestep=_two_times(),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        global_hidden_states=r.normal(BATCH, POOLED_DIM),
        encoder_attention_mask=key_mask(TEXT, 17),
        local_add_cond=r.normal(BATCH, local, AUDIO),
        return_dict=False,
    )


def _unet_block(**more: Any) -> dict[str, Any]:
    common = dict(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2, norm_num_groups=8, attention_bias=True
    )
    return common | more


@case("transformer_temporal", "TransformerTemporalModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    channels = 32
    return _unet_block(in_channels=channels), dict(
        hidden_states=r.normal(BATCH * FRAMES, channels, 4, GRID_W), num_frames=FRAMES, return_dict=False
    )


@case("dual_transformer2d", "DualTransformer2DModel", module="diffusers.models.transformers.dual_transformer_2d")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    channels = 32
    # The class cuts its text at 77 and takes the next 257 tokens for the second transformer.
    return _unet_block(in_channels=channels, cross_attention_dim=POOLED_DIM), dict(
        hidden_states=r.normal(BATCH, channels, GRID_H, GRID_W),
        encoder_hidden_states=r.normal(BATCH, 77 + 257, POOLED_DIM),
        return_dict=False,
    )


@case("transformer2d_vq", "Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    edge, classes = 12, 30
    config = _unet_block(
        sample_size=edge, num_vector_embeds=classes + 1, num_embeds_ada_norm=100, norm_type="ada_norm",
        cross_attention_dim=POOLED_DIM,
    )  # fmt: skip
    # AdaLayerNorm takes one step for the whole batch.
    return config, dict(
        hidden_states=r.integers(classes + 1, BATCH, edge * edge),
        encoder_hidden_states=r.normal(BATCH, TEXT, POOLED_DIM),
        timestep=torch.tensor(17),
        return_dict=False,
    )


@case("transformer2d_patch", "Transformer2DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = _unet_block(
        sample_size=2 * GRID_W, patch_size=2, in_channels=4, out_channels=8, norm_type="ada_norm_single",
        norm_elementwise_affine=False, cross_attention_dim=HIDDEN, caption_channels=TEXT_DIM,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, 4, 2 * GRID_H, 2 * GRID_W),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        timestep=torch.tensor([17, 801]),
        encoder_attention_mask=key_mask(TEXT, 17),
        return_dict=False,
    )


@case("sana_video", "SanaVideoTransformer3DModel")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=HEAD_DIM, cross_attention_dim=HIDDEN,
        caption_channels=TEXT_DIM, mlp_ratio=2.0, rope_max_seq_len=32,
    )  # fmt: skip
    return config, dict(
        hidden_states=r.normal(BATCH, 4, FRAMES, 8, 2 * GRID_W),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        timestep=torch.tensor([17, 801]),
        encoder_attention_mask=key_mask(TEXT, 17),
        return_dict=False,
    )


def flexible_kandinsky5(**config: Any) -> nn.Module:
    """A Kandinsky5Transformer3DModel whose visual self-attention takes block masks."""
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.transformers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(**config)
    # set_attention_backend() would change the backend of every other model of the process too.
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
    return model


@case("kandinsky5_nabla", "flexible_kandinsky5", module=__name__)
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    config = dict(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT_DIM, in_text_dim2=POOLED_DIM, time_dim=40,
        model_dim=HIDDEN, ff_dim=96, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6),
        attention_type="nabla",
    )  # fmt: skip
    # Attention blocks are 8 x 8 tokens of a frame: two per frame.
    grid = (FRAMES, 8, 16)
    frame = torch.arange(FRAMES).repeat_interleave(2)
    near = (frame[:, None] - frame[None, :]).abs() <= 1
    # Flex attention run eagerly skips no block, so P keeps them all: compiled code must then give the same numbers.
    return config, dict(
        hidden_states=r.normal(BATCH, FRAMES, 2 * grid[1], 2 * grid[2], 4),
        encoder_hidden_states=r.normal(BATCH, TEXT, TEXT_DIM),
        timestep=torch.tensor([17, 801]),
        pooled_projections=r.normal(BATCH, POOLED_DIM),
        visual_rope_pos=tuple(torch.arange(size) for size in grid),
        text_rope_pos=torch.arange(TEXT),
        sparse_params=dict(sta_mask=near[None, None], to_fractal=True, P=1.0),
        return_dict=False,
    )


@case("rfd4", "RFD4ProteinaTransformer")
def _(r: Draw) -> tuple[dict[str, Any], Inputs]:
    from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

    tokens, atoms = 80, 37
    config = dict(
        nlayers=3, token_dim=HIDDEN, nheads=HEADS, dim_cond=48, pair_repr_dim=20, latent_dim=LATENT,
        token_type_emb_dim=12, cath_emb_dim=6, t_emb_dim=40, seq_sep_dim=10, xt_pair_dist_dim=14,
        update_pair_repr_every_n=1, tri_mult_c=28, num_sequence_classes=50, recycle_conditioning_dim=3,
    )  # fmt: skip
    by_key = {
        name: r.integers(4, BATCH, tokens, atoms)
        for name in ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal_coord", "hotspot")
    }
    by_key |= dict(
        coordinates=10 * r.normal(BATCH, tokens, atoms, 3),
        secondary_structure=r.integers(4, BATCH, tokens),
        index_group=r.integers(5, BATCH, tokens),
        cath=r.integers(5, BATCH, tokens, 3),
    )
    bonds = r.integers(2, BATCH, tokens, tokens)
    conditioning = {CONDITION_KEYS[name]: value for name, value in by_key.items()} | dict(
        is_in_context_conditioning=key_mask(5, 0, total=tokens),
        supports_local_latent=key_mask(tokens, 60, total=tokens),
        molecule_iid=r.integers(4, BATCH, tokens),
        molecule_entity_id=r.integers(3, BATCH, tokens),
        token_bond_path_length=r.integers(12, BATCH, tokens, tokens),
        bond_mask=bonds,
        bond_order=bonds * r.integers(5, BATCH, tokens, tokens),
        charge=r.integers(7, BATCH, tokens, atoms) - 3,
        element=r.integers(20, BATCH, tokens, atoms),
    )
    return config, dict(
        bb_ca=r.normal(BATCH, tokens, 3),
        local_latents=r.normal(BATCH, tokens, LATENT),
        bb_ca_time=_two_times(),
        local_latents_time=torch.tensor([0.2, 0.7]),
        padding_mask=key_mask(tokens, 69, total=tokens),
        token_type=r.integers(7, BATCH, tokens),
        atom37_mask=r.integers(2, BATCH, tokens, atoms).bool(),
        conditioning=conditioning,
        recycle_depth=2,
        return_dict=False,
    )
