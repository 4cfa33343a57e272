"""What stands beside the backend in a pipeline, as its users set it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Prepare = Callable[[Any], None]
"""Changes a pipeline whose transformer is on its device already."""


@dataclass(frozen=True)
class Neighbour:
    """One thing that people use already.

    Attributes:
        title: its row.
        prepare: sets it up in a pipeline, before the pipeline is compiled.
        mode: mode of `torch.compile`, for dense and sparse alike.
        needs_gpu: why it cannot run on a CPU, or "".
    """

    title: str
    prepare: Prepare
    mode: str | None = None
    needs_gpu: str = ""


def _nothing(pipe: Any) -> None:
    """The pipeline as it was loaded."""


def _float8_layers(pipe: Any) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    quantize_(pipe.transformer.blocks, Float8DynamicActivationFloat8WeightConfig())


def _int8_weights(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # With torchao's settings Inductor searched for over nine minutes, dense, on one H200.
    quantize_(pipe.transformer.blocks, Int8WeightOnlyConfig(set_inductor_config=False))


def _adapter(pipe: Any) -> None:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    # Small enough that the activations of random weights stay as they are.
    config = LoraConfig(r=16, lora_alpha=1, target_modules=targets, init_lora_weights="gaussian")
    pipe.transformer.add_adapter(config, "style")


def _group_offload(pipe: Any) -> None:
    pipe.transformer.to("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1,
        use_stream=True,
    )  # fmt: skip


def _first_block_cache(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))


NEIGHBOURS = {
    "alone": Neighbour("alone", _nothing),
    "float8": Neighbour(
        "FP8 linear layers (torchao)", _float8_layers, needs_gpu="FP8 products run on GPUs alone"
    ),
    "lora": Neighbour("a LoRA, unmerged (peft)", _adapter),
    "offload": Neighbour(
        "group offload by blocks, with a stream", _group_offload,
        needs_gpu="offload moves weights to a GPU",
    ),
    "step-cache": Neighbour("FirstBlockCache, threshold 0.05", _first_block_cache),
    "int8": Neighbour("int8 weights (torchao)", _int8_weights),
    "max-autotune": Neighbour(
        "`mode=\"max-autotune-no-cudagraphs\"`", _nothing, "max-autotune-no-cudagraphs"
    ),
}  # fmt: skip
