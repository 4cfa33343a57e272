"""The joint text and video model: its prompts, its sizes, and that the backend knows its text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svg_ear_compile
from benchmarks.video_dit.data import CAMERA_FIELDS, LABELS, draw_clips, load_photo_bank
from benchmarks.video_dit.joint import JointDiT, JointDiTConfig
from benchmarks.video_dit.sample import generate
from benchmarks.video_dit.train import flow_matching_loss, make_optimizer, training_step
from benchmarks.video_dit.zoo import MODELS
from svg_ear_compile.kernels.kinds import exact_at_ends
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention

FULL = MODELS["joint"]
TINY = FULL.shrunk()


def untrained(seed: int = 0) -> JointDiT:
    """A tiny model whose zero-initialised layers are filled, so that every input matters."""
    torch.manual_seed(seed)
    model = JointDiT(TINY.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def inputs(model: JointDiT, frames: int = 3, rows: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, frames, 6 * rows, 6 * rows, generator=generator)
    camera = torch.tensor([[0.5, -1.0, 0.0, 0.01, 1.0]])
    return x, torch.tensor([500.0]), *model.conditions(torch.tensor([3]), camera)


def test_a_prompt_names_the_class_and_every_motion() -> None:
    model = JointDiT(TINY.config)
    label = torch.tensor([3, TINY.config.null_label])
    camera = torch.tensor([[0.5, -1.0, 0.0, 0.01, 1.0]]).expand(2, -1)
    (prompt,) = model.conditions(label, camera)
    words = [[model.config.vocabulary[i] for i in line] for line in prompt]
    assert words[0][:6] == [LABELS[3], "pan_x+4", "pan_y-8", "_", "rotation+1", "sprite+8"]
    assert set(words[0][6:]) | set(words[1]) == {"_"}
    assert len(words[0]) == TINY.config.text_tokens
    assert len(set(model.config.vocabulary)) == model.words_in.num_embeddings


def test_the_last_words_of_the_vocabulary_can_be_said() -> None:
    config = JointDiTConfig(class_names=("a",), camera_fields=("x", "y"))
    (prompt,) = JointDiT(config).conditions(torch.tensor([0]), torch.tensor([[-1.0, 1.0]]))
    assert [config.vocabulary[i] for i in prompt[0, :3]] == ["a", "x-8", "y+8"]
    assert int(prompt.max()) == len(config.vocabulary) - 1


def test_full_size(tmp_path: Path) -> None:
    model = FULL.build()
    model.save(tmp_path)
    assert len(model.blocks) >= 10
    frames, rows, columns = model.grid(FULL.long)
    assert frames * rows * columns >= 16_000
    loaded = JointDiT.from_pretrained(tmp_path)
    assert loaded.config == FULL.config
    assert torch.equal(loaded.words_in.weight, model.words_in.weight.bfloat16().float())


def test_committed_weights_are_of_the_models_as_they_are() -> None:
    for model in MODELS.values():
        loaded = model.load(device="cpu", dtype=torch.float32)
        assert loaded.config == model.config
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())


def test_the_backend_takes_it_for_joint_and_keeps_its_text_exact(
    monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    model = untrained()
    arguments = inputs(model, frames=5, rows=7)
    options = {"density": 0.3, "min_tokens": 64, "q_clusters": 4, "k_clusters": 9}
    sites = svg_ear_compile.explain(model, *arguments, options=options).sites
    assert [site.layer for site in sites] == ["dual_blocks.0.attn", "single_blocks.0.attn"]
    for site in sites:
        assert site.role == "joint"
        assert site.exact == (TINY.config.text_tokens,) * 2
        assert site.plan is not None
    compiled = torch.compile(model, backend="svg_ear", fullgraph=True, options=options)
    with svg_ear_compile.bind(compiled) as session:
        found = compiled(*arguments)
        # What a budget is made for must be what a running model is asked for.
        assert [layer.path for layer in session.report()] == [site.layer for site in sites]

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = AttentionPlan(density=0.3, q_clusters=4, k_clusters=9)
        kinds = exact_at_ends(q, k, 0, TINY.config.text_tokens)
        return sparse_attention(q, k, v, plan, kinds=kinds).out

    dense = model(*arguments)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    torch.testing.assert_close(found, model(*arguments))
    assert not torch.allclose(found, dense)


def test_every_word_and_every_token_reaches_the_velocity() -> None:
    model = untrained()
    x, timestep, prompt = inputs(model)
    before = model(x, timestep, prompt)
    other = prompt.clone()
    other[0, 1] += 1
    assert not torch.equal(model(x, timestep, other), before)
    moved = x.clone()
    moved[..., -1, -1] += 1  # one pixel of the last token
    change = (model(moved, timestep, prompt) - before).abs().amax(dim=(0, 1, 3, 4))
    assert (change > 0).all()


def test_training_lowers_the_loss_of_one_batch() -> None:
    torch.manual_seed(0)
    model = JointDiT(TINY.config)
    optimizer = make_optimizer(model, 3e-3)
    bank = load_photo_bank(48)
    clips = draw_clips(bank, 4, (3, 48, 48), torch.Generator().manual_seed(0))

    def measured() -> float:
        with torch.no_grad():
            return flow_matching_loss(model, clips, torch.Generator().manual_seed(0)).item()

    before = measured()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        training_step(model, optimizer, clips, generator)
    assert measured() < 0.9 * before


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generation_follows_the_prompt(guidance: float) -> None:
    model = untrained()

    def run(label: int) -> Tensor:
        return generate(
            model, label=label, camera=[0.5] * len(CAMERA_FIELDS), seed=0, steps=2,
            guidance=guidance, shape=(2, 24, 24), device="cpu", dtype=torch.float32,
        )  # fmt: skip

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
