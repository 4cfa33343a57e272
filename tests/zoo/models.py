"""Real model classes in tiny random configurations, with inputs.

A family is one builder and one entry of `FAMILIES`. Unless its docstring says otherwise a model
gets latents (1, 4, 3, 16, 16), which are 3 · 8 · 8 = 192 tokens, and text (1, 9, 16) of which 6
tokens are valid where it takes a mask; it has 2 heads of 32 channels and 2 blocks of each kind.

Longer than other files: it is one list of families, each with its configuration and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import original_styles
import packed_models
import torch
import transformers
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
CHANNELS = 4
FRAMES, SIDE = 3, 16
TEXT, VALID, TEXT_WIDTH = 9, 6, 16
IMAGE = 5
ROPE_AXES = (8, 12, 12)


@dataclass(frozen=True)
class Family:
    """One model class in one configuration.

    Attributes:
        name: unique.
        make: the model, its positional and its keyword inputs; `build` seeds it.
        kind: "video" models attend over video tokens, "image" ones over one picture's, "text" ones
            over words.
        fullgraph: `torch.compile(fullgraph=True)` takes the model. It captures data-dependent
            shapes, so some models that break without it do not with it.
        breaks: graph breaks of `torch.compile` by default [2.13]; graphs are one more.
        dynamo: settings for `torch._dynamo.config.patch` that take those breaks away, or all that
            can be.
    """

    name: str
    make: Callable[[], Made]
    kind: Literal["video", "image", "text"]
    fullgraph: bool = True
    breaks: int = 0
    dynamo: Mapping[str, bool] = field(default_factory=dict)

    def build(self) -> Made:
        """The model in evaluation mode, positional and keyword inputs: always the same numbers."""
        torch.manual_seed(0)
        model, args, kwargs = self.make()
        fill_zero_parameters(model)
        return model.eval(), args, kwargs


def fill_zero_parameters(model: nn.Module, std: float = 0.1) -> None:
    """Give all-zero parameters random values.

    Training starts with closed gates (Kandinsky's output would not depend on attention at all) and
    without positions (Mochi, Cosmos).
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=std, generator=generator)


def output_of(result: Any) -> Tensor:
    """The output tensor of a forward pass: the first of a tuple, list or model-output object."""
    return result if isinstance(result, Tensor) else output_of(result[0])


def latents(
    batch: int = 1, channels: int = CHANNELS, frames: int = FRAMES, side: int = SIDE
) -> Tensor:
    """Random video latents, (batch, channels, frames, side, side)."""
    return torch.randn(batch, channels, frames, side, side)


def text(batch: int = 1, tokens: int = TEXT) -> Tensor:
    """Random text embeddings, (batch, tokens, TEXT_WIDTH)."""
    return torch.randn(batch, tokens, TEXT_WIDTH)


def padding(*valid: int, tokens: int = TEXT) -> Tensor:
    """Mask of one row a sample: ones for its valid tokens, then zeros, (len(valid), tokens)."""
    return (torch.arange(tokens) < torch.tensor(valid)[:, None]).long()


_WAN: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan() -> Made:
    """Wan text-to-video."""
    model = diffusers.WanTransformer3DModel(**_WAN)
    return model, (latents(), torch.tensor([500.0]), text()), {}


def wan_image() -> Made:
    """Wan image-to-video, with 5 image tokens and 512 of text.

    The class takes the last 512 tokens for text: with fewer the image attention has no keys.
    """
    model = diffusers.WanTransformer3DModel(**_WAN, image_dim=16, added_kv_proj_dim=WIDTH)
    image = torch.randn(1, IMAGE, 16)
    inputs = (latents(), torch.tensor([500.0]), text(tokens=512))
    return model, inputs, {"encoder_hidden_states_image": image}


def wan_vace() -> Made:
    """Wan VACE: control blocks beside the others."""
    model = diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1], vace_in_channels=6)
    inputs = (latents(), torch.tensor([500.0]), text())
    return model, inputs, {"control_hidden_states": latents(channels=6)}


def skyreels() -> Made:
    """SkyReels-V2 with all frames denoised together."""
    model = diffusers.SkyReelsV2Transformer3DModel(**_WAN)
    return model, (latents(), torch.tensor([500]), text()), {}


def skyreels_causal() -> Made:
    """SkyReels-V2 diffusion forcing: blocks of 2 of 4 frames attend to themselves and backwards."""
    model = diffusers.SkyReelsV2Transformer3DModel(
        **_WAN, num_frame_per_block=2, inject_sample_info=True
    )
    timestep = torch.tensor([[300, 300, 700, 700]])
    inputs = (latents(frames=4), timestep, text())
    return model, inputs, {"enable_diffusion_forcing": True, "fps": torch.tensor([1])}


_HUNYUAN: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 1.0,
    "patch_size": 2,
    "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": ROPE_AXES,
}


def hunyuan() -> Made:
    """HunyuanVideo, two samples: 6 and 8 valid text tokens."""
    model = diffusers.HunyuanVideoTransformer3DModel(
        **_HUNYUAN, num_single_layers=2, pooled_projection_dim=8
    )
    kwargs = {
        "encoder_attention_mask": padding(VALID, 8),
        "pooled_projections": torch.randn(2, 8),
        "guidance": torch.tensor([1000.0, 1000.0]),
    }
    return model, (latents(batch=2), torch.tensor([500, 500]), text(batch=2)), kwargs


def hunyuan15() -> Made:
    """HunyuanVideo-1.5 text-to-video: 9 + 7 text tokens and 5 of an image that is not there."""
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **_HUNYUAN, text_embed_2_dim=8, image_embed_dim=16
    )
    kwargs = {
        "encoder_attention_mask": padding(VALID),
        "encoder_hidden_states_2": torch.randn(1, 7, 8),
        "encoder_attention_mask_2": padding(4, tokens=7),
        "image_embeds": torch.zeros(1, IMAGE, 16),
    }
    return model, (latents(), torch.tensor([500.0]), text()), kwargs


def framepack() -> Made:
    """HunyuanVideo-Framepack: 192 tokens to denoise behind 64 + 16 + 4 of history."""
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_HUNYUAN,
        num_single_layers=2,
        pooled_projection_dim=8,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    kwargs = {
        "encoder_attention_mask": padding(VALID),
        "pooled_projections": torch.randn(1, 8),
        "image_embeds": torch.randn(1, IMAGE, 16),
        "guidance": torch.tensor([1000.0]),
        "indices_latents": torch.arange(7, 10),
        "latents_clean": latents(frames=1),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": latents(frames=2),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": latents(frames=4),
        "indices_latents_history_4x": torch.arange(1, 5),
    }
    return model, (latents(), torch.tensor([500]), text()), kwargs


def cogvideox() -> Made:
    """CogVideoX with rotary embeddings (the 5B form), two samples."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=SIDE,
        sample_height=SIDE,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    rope = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (8, 8)), (8, 8), FRAMES)
    inputs = (latents(batch=2).transpose(1, 2), text(batch=2), torch.tensor([500, 500]))
    return model, inputs, {"image_rotary_emb": rope}


def ltx() -> Made:
    """LTX-Video; its latents come as tokens, (1, 192, 4)."""
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    inputs = (torch.randn(1, 192, CHANNELS), text(), torch.tensor([500]), padding(VALID))
    return model, inputs, {"num_frames": FRAMES, "height": 8, "width": 8}


def ltx2() -> Made:
    """LTX-2: 192 video and 11 audio tokens that attend to each other."""
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        audio_in_channels=CHANNELS,
        audio_out_channels=CHANNELS,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=HEAD_DIM,
        audio_cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    kwargs = {
        "encoder_attention_mask": padding(VALID),
        "audio_encoder_attention_mask": padding(VALID),
        "num_frames": FRAMES,
        "height": 8,
        "width": 8,
        "audio_num_frames": 11,
    }
    video, audio = torch.randn(1, 192, CHANNELS), torch.randn(1, 11, CHANNELS)
    return model, (video, audio, text(), text(), torch.tensor([500])), kwargs


def mochi() -> Made:
    """Mochi: every sample attends with its valid text tokens alone."""
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        pooled_projection_dim=TEXT_WIDTH,
        in_channels=CHANNELS,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
    )
    return model, (latents(), text(), torch.tensor([500]), padding(VALID).bool()), {}


def allegro(video_padding: bool = False) -> Made:
    """Allegro with its own head dim of 96: RoPE needs a multiple of 6."""
    head_dim = 96
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=HEADS * head_dim,
        caption_channels=TEXT_WIDTH,
    )
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        head_dim, ((0, 0), (8, 8)), (8, 8), FRAMES
    )
    positions = torch.cartesian_prod(t, h, w).long().T[:, None]
    kwargs: dict[str, Any] = {
        "encoder_attention_mask": padding(VALID),
        "image_rotary_emb": (tuple(frequencies), tuple(positions)),
    }
    if video_padding:
        visible = torch.ones(1, FRAMES, SIDE, SIDE)
        visible[:, :, 12:] = 0
        kwargs["attention_mask"] = visible
    return model, (latents(), text(), torch.tensor([500])), kwargs


def allegro_padded() -> Made:
    """Allegro with padded video tokens, which its class takes and its pipeline does not give."""
    return allegro(video_padding=True)


_COSMOS: dict[str, Any] = {
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "num_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
    "adaln_lora_dim": 8,
    "max_size": (4, 32, 32),
    # Concatenating one needs torchvision.
    "concat_padding_mask": False,
}


def cosmos1() -> Made:
    """Cosmos 1."""
    model = diffusers.CosmosTransformer3DModel(in_channels=CHANNELS, **_COSMOS)
    inputs = (latents(), torch.tensor([500]), text())
    return model, inputs, {"attention_mask": padding(VALID).bool(), "fps": 24}


def cosmos25() -> Made:
    """Cosmos 2.5: a timestep for each frame, projected text, and 5 image tokens."""
    model = diffusers.CosmosTransformer3DModel(
        in_channels=CHANNELS + 1,
        **_COSMOS,
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=24,
        encoder_hidden_states_channels=TEXT_WIDTH,
        img_context_dim_in=16,
        img_context_num_tokens=IMAGE,
        img_context_dim_out=WIDTH,
    )
    timestep = torch.tensor([0.1, 0.5, 0.5]).view(1, 1, FRAMES, 1, 1)
    context = (torch.randn(1, TEXT, 24), torch.randn(1, IMAGE, 16))
    condition = torch.zeros(1, 1, FRAMES, SIDE, SIDE)
    return model, (latents(), timestep, context), {"condition_mask": condition, "fps": 16}


def easyanimate() -> Made:
    """EasyAnimate: two blocks with projections of the text's own, two with shared ones."""
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
    )
    inputs = (latents(), torch.tensor([500.0]))
    return model, inputs, {"encoder_hidden_states": text()}


def latte() -> Made:
    """Latte: latents (1, 4, 3, 24, 24); blocks attend within 144-token frames, then across."""
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=WIDTH,
        attention_bias=True,
        sample_size=24,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_WIDTH,
        video_length=FRAMES,
    )
    return model, (latents(side=24), torch.tensor([500]), text()), {}


def kandinsky() -> Made:
    """Kandinsky 5; its latents are (1, 3, 16, 16, 4). Its RoPE rounds to bfloat16."""
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=CHANNELS,
        model_dim=WIDTH,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=ROPE_AXES,
    )
    kwargs = {
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(TEXT),
    }
    frames = torch.randn(1, FRAMES, SIDE, SIDE, CHANNELS)
    return model, (frames, text(), torch.tensor([500.0])), kwargs


def sana() -> Made:
    """SANA-Video: linear self-attention, softmax attention to the text only."""
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=SIDE,
        rope_max_seq_len=32,
    )
    inputs = (latents(), text(), torch.tensor([500]))
    return model, inputs, {"encoder_attention_mask": padding(VALID)}


def animatediff() -> Made:
    """AnimateDiff's UNet: latents (1, 4, 3, 12, 12), frames of 144 and 36 tokens."""
    model = diffusers.UNetMotionModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(WIDTH, WIDTH),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=HEADS,
        motion_num_attention_heads=HEADS,
    )
    # A text for each frame, as the pipeline repeats it.
    words = text().repeat(FRAMES, 1, 1)
    return model, (latents(side=12), torch.tensor([500]), words), {}


def svd() -> Made:
    """Stable Video Diffusion's UNet: latents (1, 3, 4, 12, 12); the image is one token."""
    model = diffusers.UNetSpatioTemporalConditionModel(
        in_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(WIDTH, WIDTH),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=HEADS,
        num_frames=FRAMES,
    )
    inputs = (latents(side=12).transpose(1, 2), torch.tensor([500.0]), torch.randn(1, 1, 16))
    return model, (*inputs, torch.tensor([[7.0, 127.0, 0.02]])), {}


def flux() -> Made:
    """Flux: a picture of 12 × 16 tokens, (1, 192, 4)."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=8,
        axes_dims_rope=ROPE_AXES,
    )
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    ids = torch.stack([torch.zeros(192), rows.flatten(), columns.flatten()], dim=1)
    kwargs = {
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, (torch.randn(1, 192, CHANNELS), text()), kwargs


def sd3() -> Made:
    """Stable Diffusion 3.5: a picture (1, 4, 32, 32) of 256 tokens; block 0 attends twice."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = (torch.randn(1, CHANNELS, 32, 32), text(), torch.randn(1, 8), torch.tensor([500]))
    return model, inputs, {}


_WORDS = 129
_TEXT_MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    # Transformers' own 0.02 makes attention nearly uniform at this width.
    "initializer_range": 0.2,
}


def _words() -> dict[str, Any]:
    """A batch of two texts, the shorter one padded, (2, 129) each."""
    ids = torch.randint(0, 64, (2, _WORDS))
    return {"input_ids": ids, "attention_mask": padding(_WORDS, 120, tokens=_WORDS)}


def llama() -> Made:
    """Llama: causal, two query heads a key head."""
    config = transformers.LlamaConfig(**_TEXT_MODEL, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config), (), {**_words(), "use_cache": False}


def qwen2() -> Made:
    """Qwen2: causal."""
    config = transformers.Qwen2Config(**_TEXT_MODEL, num_key_value_heads=2)
    return transformers.Qwen2ForCausalLM(config), (), {**_words(), "use_cache": False}


def bert() -> Made:
    """BERT: every word attends to every word that is not padding."""
    config = transformers.BertConfig(**_TEXT_MODEL)
    return transformers.BertModel(config, add_pooling_layer=False), (), _words()


def bert_unpadded() -> Made:
    """BERT without a mask: nothing but its embedding of words tells it from a video model."""
    model, args, kwargs = bert()
    return model, args, {"input_ids": kwargs["input_ids"]}


FAMILIES = {
    family.name: family
    for family in (
        Family("wan-t2v", wan, "video"),
        Family("wan-i2v", wan_image, "video"),
        Family("wan-vace", wan_vace, "video"),
        Family("skyreels-v2", skyreels, "video"),
        Family("skyreels-v2-causal", skyreels_causal, "video"),
        Family("hunyuan-video", hunyuan, "video"),
        # Branches on the image's values, then indexes with masks. Its blocks become one shared
        # graph, or with the setting one graph of all of them behind the one break that stays.
        Family(
            "hunyuan-video-1.5",
            hunyuan15,
            "video",
            fullgraph=False,
            breaks=2,
            dynamo={"capture_dynamic_output_shape_ops": True},
        ),
        # Cuts the text at a length that it reads from the mask; blocks are shared graphs of two
        # strides.
        Family(
            "hunyuan-framepack",
            framepack,
            "video",
            breaks=5,
            dynamo={"capture_scalar_outputs": True},
        ),
        Family("cogvideox", cogvideox, "video"),
        Family("ltx", ltx, "video"),
        Family("ltx2", ltx2, "video"),
        # Breaks inside attention, in a loop: without the setting no backend sees the SDPA.
        Family(
            "mochi",
            mochi,
            "video",
            breaks=10,
            dynamo={"capture_dynamic_output_shape_ops": True},
        ),
        Family("allegro", allegro, "video"),
        Family("allegro-padded", allegro_padded, "video"),
        Family("cosmos-1", cosmos1, "video"),
        Family("cosmos-2.5", cosmos25, "video"),
        Family("easyanimate", easyanimate, "video"),
        Family("latte", latte, "video"),
        Family("kandinsky-5", kandinsky, "video"),
        Family("sana-video", sana, "video"),
        Family("animatediff", animatediff, "video"),
        Family("svd", svd, "video"),
        Family("minimax-h3", packed_models.minimax_h3, "video"),
        Family("helios", packed_models.helios, "video"),
        Family("chronoedit", packed_models.chronoedit, "video"),
        Family("kandinsky-6", packed_models.kandinsky6, "video"),
        Family("cosmos-3", packed_models.cosmos3, "video"),
        Family("style-megatron", original_styles.megatron, "video"),
        Family("style-options-dict", original_styles.options_dict, "video"),
        Family("flux", flux, "image"),
        Family("sd3", sd3, "image"),
        Family("llama", llama, "text"),
        Family("qwen2", qwen2, "text"),
        Family("bert", bert, "text"),
        Family("bert-unpadded", bert_unpadded, "text"),
    )
}
