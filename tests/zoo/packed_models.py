"""Model classes of the newest kinds: packed modalities, histories, conditions among the tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

HEADS, HEAD_DIM, CHANNELS, TEXT, TEXT_WIDTH = 2, 32, 4, 9, 16

_WAN_LIKE: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


def minimax_h3() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """MiniMax-H3: 9 text, 7 audio and 192 video tokens, placed in this order by index tensors."""
    video, audio = 192, 7
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=CHANNELS,
        audio_in_channels=6,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=4,
    )
    tokens = TEXT + audio + video
    places = torch.arange(tokens).split([TEXT, audio, video])
    tags = torch.cat([torch.full((n,), tag) for n, tag in ((TEXT, 1), (audio, 2), (video, 0))])
    return model, (), {
        "hidden_states": torch.randn(1, video, CHANNELS * 4),
        "audio_hidden_states": torch.randn(1, audio, 6),
        "encoder_hidden_states": torch.randn(1, TEXT, TEXT_WIDTH),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(tokens, dtype=torch.long),
        "token_tags": tags,
        "position_ids": torch.arange(tokens)[:, None].expand(tokens, 3).clone(),
        "text_indices": places[0],
        "audio_indices": places[1],
        "video_indices": places[2],
    }  # fmt: skip


def helios() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Helios: three histories of frames, each patched by a convolution of its own, in front."""
    model = diffusers.HeliosTransformer3DModel(**_WAN_LIKE, rope_dim=(8, 12, 12))
    clips = {
        f"latents_history_{name}": torch.randn(1, CHANNELS, frames, 16, 16)
        for name, frames in (("short", 1), ("mid", 2), ("long", 4))
    }
    places = {
        "indices_hidden_states": torch.arange(7, 10)[None],
        "indices_latents_history_long": torch.arange(4)[None],
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "indices_latents_history_short": torch.arange(6, 7)[None],
    }
    inputs = (
        torch.randn(1, CHANNELS, 3, 16, 16),
        torch.tensor([500]),
        torch.randn(1, TEXT, TEXT_WIDTH),
    )
    return model, inputs, clips | places


def chronoedit() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """ChronoEdit: Wan's image-to-video whose positions jump from the image to its edit."""
    model = diffusers.ChronoEditTransformer3DModel(
        **_WAN_LIKE, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=HEADS * HEAD_DIM
    )
    inputs = (
        torch.randn(1, CHANNELS, 3, 16, 16),
        torch.tensor([500.0]),
        torch.randn(1, 512, TEXT_WIDTH),
    )
    return model, inputs, {"encoder_hidden_states_image": torch.randn(1, 5, 16)}


def kandinsky6() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Kandinsky 6, without sound; its latents are (1, 3, 16, 16, 4)."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=8,
        time_dim=16,
        model_dim=HEADS * HEAD_DIM,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
        visual_cond=False,
    )
    inputs = (
        torch.randn(1, 3, 16, 16, CHANNELS),
        torch.randn(1, TEXT, TEXT_WIDTH),
        torch.randn(1, 8),
        torch.tensor([500.0]),
    )
    places = (torch.arange(3), torch.arange(8), torch.arange(8))
    return model, inputs, {"visual_rope_pos": places}


def cosmos3() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Cosmos 3 (Omni): 9 text, 192 video and 7 sound tokens in one sequence without a batch.

    Text attends to itself, causally; video and sound attend to the keys of all.
    """
    video, sound = 192, 7
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=HEAD_DIM,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=32,
        latent_channel=CHANNELS,
        patch_latent_dim=CHANNELS * 4,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        num_key_value_heads=1,
        sound_dim=6,
        sound_gen=True,
        vocab_size=40,
        rope_axes_dim=(4, 6, 6),
    )
    tokens = TEXT + video + sound
    text_at, video_at, sound_at = torch.arange(tokens).split([TEXT, video, sound])
    return model, (), {
        "input_ids": torch.randint(40, (TEXT,)),
        "text_indexes": text_at,
        "position_ids": torch.arange(tokens).expand(3, tokens).clone(),
        "und_len": TEXT,
        "sequence_length": tokens,
        "vision_tokens": [torch.randn(1, CHANNELS, 3, 16, 16)],
        "vision_token_shapes": [(3, 8, 8)],
        "vision_sequence_indexes": video_at,
        "vision_mse_loss_indexes": video_at,
        "vision_timesteps": torch.full((video,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(3)],
        "sound_tokens": [torch.randn(6, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": sound_at,
        "sound_mse_loss_indexes": sound_at,
        "sound_timesteps": torch.full((sound,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
        "return_dict": False,
    }  # fmt: skip
