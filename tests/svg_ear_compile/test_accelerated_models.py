"""`accelerate` beside what else is done to models: offloading, adapters, quantisation, Ulysses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate as hf_accelerate
import diffusers
import pytest
import tiny_pipelines as tiny
import torch
import torch.distributed as dist
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from process_groups import spawn
from torch import Tensor, nn

from svg_ear_compile import Accelerated, accelerate, backend

pytestmark = pytest.mark.usefixtures("without_inductor")

CPU = torch.device("cpu")
BEFORE_OR_AFTER = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


def accelerated(
    change: Callable[[Any], None], before: bool, make: Callable[[], Any] = tiny.wan
) -> tuple[Any, Accelerated]:
    """A pipeline that is changed before it is accelerated, or after its first call."""
    pipe = make()
    if before:
        change(pipe)
    handle = accelerate(pipe, density=0.3, options=tiny.OPTIONS)
    if not before:
        tiny.generate(pipe, tiny.wan_call())
        change(pipe)
    return pipe, handle


def assert_sparse(handle: Accelerated, identity: str = "parameter") -> None:
    for model in handle.report().models:
        assert model.sparse == 2
        assert {layer.identity for layer in model.layers} == {identity}
        # A layer that is taken for another starts from wrong clusters, or cold.
        assert [layer.cold for layer in model.layers] == [1, 1]
        assert model.reused_fraction > 0.5


def by_model(pipe: Any) -> None:
    hf_accelerate.cpu_offload_with_hook(pipe.transformer, CPU)


def by_block(pipe: Any) -> None:
    apply_group_offloading(
        pipe.transformer, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def by_leaf(pipe: Any) -> None:
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_type="leaf_level")


def by_layer(pipe: Any) -> None:
    hf_accelerate.cpu_offload(pipe.transformer, CPU)


@BEFORE_OR_AFTER
@pytest.mark.parametrize("offload", [by_model, by_block])
def test_models_and_blocks_are_offloaded(offload: Callable[[Any], None], before: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*moved between devices")
        pipe, handle = accelerated(offload, before)
        found = tiny.generate(pipe, tiny.wan_call())
    assert_sparse(handle)
    handle.detach()
    plain = tiny.wan()
    with accelerate(plain, density=0.3, options=tiny.OPTIONS):
        assert torch.equal(tiny.generate(plain, tiny.wan_call()), found)


@pytest.mark.parametrize("offload", [by_model, by_block])
def test_a_model_compiled_as_a_whole_is_offloaded(offload: Callable[[Any], None]) -> None:
    pipe = tiny.cogvideox()
    offload(pipe)
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        found = tiny.generate(pipe, tiny.cogvideox_call())
        assert not handle.report().models[0].regional
    assert_sparse(handle)
    plain = tiny.cogvideox()
    with accelerate(plain, density=0.3, options=tiny.OPTIONS):
        wanted = tiny.generate(plain, tiny.cogvideox_call())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_pipeline_made_of_the_same_models_runs_sparse_too() -> None:
    pipe = tiny.wan()
    # The calls of the other pipeline do not tell their number of steps.
    with accelerate(pipe, density=0.3, early_factor=1.0, options=tiny.OPTIONS) as handle:
        found = tiny.generate(pipe, tiny.wan_call())
        other = diffusers.WanPipeline.from_pipe(pipe)
        assert torch.equal(tiny.generate(other, tiny.wan_call()), found)
        assert handle.report().calls == 1
        assert torch.equal(tiny.generate(pipe, tiny.wan_call()), found)
    assert type(other) is diffusers.WanPipeline


@pytest.mark.slow
@BEFORE_OR_AFTER
@pytest.mark.parametrize("offload", [by_leaf, by_layer])
def test_layers_are_offloaded_with_one_warning(
    offload: Callable[[Any], None], before: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe, handle = accelerated(offload, before)
        found = tiny.generate(pipe, tiny.wan_call())
        assert torch.equal(tiny.generate(pipe, tiny.wan_call()), found)
    said = [str(w.message) for w in caught if "moved between devices one by one" in str(w.message)]
    assert len(said) == 1
    assert_sparse(handle, "order")
    handle.detach()
    dense = tiny.generate(pipe, tiny.wan_call())
    assert torch.equal(dense, tiny.generate(tiny.wan(), tiny.wan_call()))


def add_lora(pipe: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.transformer.add_adapter(config)
    pipe.transformer.eval()


def fuse_lora(pipe: Any) -> None:
    add_lora(pipe)
    pipe.transformer.fuse_lora()


@BEFORE_OR_AFTER
@pytest.mark.parametrize("adapt", [add_lora, fuse_lora])
def test_adapters(adapt: Callable[[Any], None], before: bool) -> None:
    pipe, handle = accelerated(adapt, before)
    found = tiny.generate(pipe, tiny.wan_call())
    assert_sparse(handle)
    handle.detach()
    dense = tiny.generate(pipe, tiny.wan_call())
    assert (found - dense).norm() < 0.05 * dense.norm()
    assert not torch.equal(dense, tiny.generate(tiny.wan(), tiny.wan_call()))


def test_adapters_come_and_go_while_accelerated() -> None:
    pipe = tiny.wan()
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        first = tiny.generate(pipe, tiny.wan_call())
        add_lora(pipe)
        adapted = tiny.generate(pipe, tiny.wan_call())
        assert_sparse(handle)
        pipe.transformer.delete_adapters("default")
        assert torch.equal(tiny.generate(pipe, tiny.wan_call()), first)
        assert_sparse(handle)
    assert not torch.equal(adapted, first)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each output, as weight-only libraries."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(pipe: Any) -> None:
    for block in pipe.transformer.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, Int8Linear(module))


@BEFORE_OR_AFTER
def test_quantised_linear_layers(before: bool) -> None:
    pipe, handle = accelerated(quantise, before)
    found = tiny.generate(pipe, tiny.wan_call())
    assert_sparse(handle)
    handle.detach()
    dense = tiny.generate(pipe, tiny.wan_call())
    assert (found - dense).norm() < 0.05 * dense.norm()


def test_a_model_that_is_replaced_warns() -> None:
    pipe, handle = accelerated(lambda pipe: None, True)
    pipe.transformer = tiny.wan_transformer(seed=3)
    with pytest.warns(UserWarning, match="transformer of this WanPipeline was replaced") as told:
        found = tiny.generate(pipe, tiny.wan_call())
    assert told[0].filename == tiny.__file__  # the line that called the pipeline
    first, second = str(handle.report()).splitlines()
    assert first.startswith("call 1: no step of its denoising models ran, ")
    assert second == "transformer (WanTransformer3DModel): not called"
    handle.detach()
    assert torch.equal(tiny.generate(pipe, tiny.wan_call()), found)


def test_blocks_that_are_compiled_again_warn_and_are_left_to_who_did() -> None:
    pipe, handle = accelerated(lambda pipe: None, True)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.warns(UserWarning, match="blocks of this WanPipeline were compiled again"):
        tiny.generate(pipe, tiny.wan_call())
    handle.detach()
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)


def worker(rank: int, ranks: int, folder: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    # diffusers counts accelerators to choose a device; a CPU is none.
    torch.accelerator.device_count = lambda: 1
    backend.compile_fx = lambda gm, inputs, **given: gm.forward
    pipe = tiny.wan()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS) as handle:
        found = tiny.generate(pipe, tiny.wan_call())
        assert_sparse(handle)
    torch.save((found, tiny.generate(pipe, tiny.wan_call())), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_ulysses_equal_one_process(tmp_path: Path) -> None:
    spawn(worker, (2, str(tmp_path)), 2)
    pipe = tiny.wan()
    with accelerate(pipe, density=0.3, options=tiny.OPTIONS):
        wanted = tiny.generate(pipe, tiny.wan_call())
    dense = tiny.generate(pipe, tiny.wan_call())
    for rank in range(2):
        sparse_there, dense_there = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(sparse_there, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense_there, dense, rtol=1e-4, atol=1e-4)
