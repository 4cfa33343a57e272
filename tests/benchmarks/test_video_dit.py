"""The video DiT: its clips, its shapes, its file format, its sampler, and that it can learn."""

import pytest
import torch

from benchmarks.video_dit import stored_weights
from benchmarks.video_dit.data import (
    CAMERA_FIELDS,
    DEMO_SHAPE,
    LABELS,
    TRAIN_SHAPE,
    draw_clips,
    load_photo_bank,
)
from benchmarks.video_dit.model import VideoDiT, VideoDiTConfig
from benchmarks.video_dit.pixel_dit import velocity_target
from benchmarks.video_dit.sample import generate, shifted_sigmas
from benchmarks.video_dit.train import (
    flow_matching_loss,
    learning_rate_factor,
    make_optimizer,
    training_step,
)

FULL = VideoDiTConfig(class_names=LABELS, camera_fields=CAMERA_FIELDS)
TINY = VideoDiTConfig(
    class_names=LABELS,
    camera_fields=CAMERA_FIELDS,
    width=32,
    heads=1,
    layers=2,
    mlp_width=64,
    cond_width=16,
)


@pytest.fixture(scope="module")
def bank():
    return load_photo_bank(48)


def clips_from_seed(bank, seed, batch=4, shape=(3, 48, 48)):
    return draw_clips(bank, batch, shape, torch.Generator().manual_seed(seed))


def inputs(shape, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *shape, generator=generator)
    label = torch.arange(batch) % len(LABELS)
    return x, torch.full((batch,), 500.0), label, torch.zeros(batch, len(CAMERA_FIELDS))


def untrained_model_with_output(seed=0):
    """A tiny model whose zero-initialised layers are filled, so that every input matters."""
    torch.manual_seed(seed)
    model = VideoDiT(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def test_clips_follow_the_seed(bank):
    first, again, other = (clips_from_seed(bank, seed) for seed in (1, 1, 2))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.label, again.label)
    assert torch.equal(first.camera, again.camera)
    assert not torch.equal(first.video, other.video)


def test_clips_are_in_range_and_move(bank):
    clips = clips_from_seed(bank, 0, batch=16, shape=(5, 48, 48))
    assert clips.video.shape == (16, 3, 5, 48, 48)
    assert clips.video.dtype == torch.float32
    assert clips.video.isfinite().all()
    assert clips.video.abs().max() <= 1
    assert clips.camera.shape == (16, len(CAMERA_FIELDS))
    assert clips.camera.abs().max() <= 1
    change = (clips.video[:, :, 1:] - clips.video[:, :, :-1]).abs().mean(dim=(1, 2, 3, 4))
    moves = clips.camera.ne(0).any(dim=1)
    assert (change[moves] > 1e-3).all()
    # Consecutive frames must stay close: motion is smooth.
    assert change.max() < 0.3


def test_camera_at_rest_shows_a_still(bank):
    clips = clips_from_seed(bank, 5, batch=64)
    rests = ~clips.camera.ne(0).any(dim=1)
    assert rests.any()
    assert torch.equal(clips.video[rests, :, 0], clips.video[rests, :, -1])


def test_full_size_stays_within_its_limits():
    count = sum(parameter.numel() for parameter in VideoDiT(FULL).parameters())
    assert count <= 7_000_000


@pytest.mark.parametrize(("shape", "tokens"), [(DEMO_SHAPE, 2304), (TRAIN_SHAPE, 6912)])
def test_velocity_has_the_shape_of_the_clip(shape, tokens):
    frames, height, width = shape
    assert frames * (height // FULL.patch) * (width // FULL.patch) == tokens
    seen = []
    model = VideoDiT(TINY)
    model.blocks[0].register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape))
    x, timestep, label, camera = inputs(shape)
    with torch.no_grad():
        velocity = model(x, timestep, label, camera)
    assert velocity.shape == x.shape
    assert velocity.dtype == x.dtype
    assert seen == [(1, tokens, TINY.width)]


def test_patches_return_to_their_places():
    """At the start the estimate is grey, so the velocity is the noisy clip over its noise level."""
    x, timestep, label, camera = inputs((2, 24, 36))
    with torch.no_grad():
        velocity = VideoDiT(TINY)(x, timestep, label, camera)
    torch.testing.assert_close(velocity, x / 0.5)


def test_velocity_target_is_noise_minus_clip():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 2, 6, 6, generator=generator)
    timestep = torch.tensor([300.0])
    noisy = clean + 0.3 * (noise - clean)
    torch.testing.assert_close(
        velocity_target(noisy, clean, timestep), noise - clean, rtol=1e-4, atol=1e-5
    )


def test_null_label_ignores_the_camera():
    model = untrained_model_with_output()
    x, timestep, label, camera = inputs((2, 24, 24))
    null = torch.full_like(label, TINY.null_label)
    moved = camera + 1
    assert torch.equal(model(x, timestep, null, camera), model(x, timestep, null, moved))
    assert not torch.equal(model(x, timestep, label, camera), model(x, timestep, label, moved))


def test_weights_return_from_the_file(tmp_path):
    model = untrained_model_with_output()
    model.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {stored_weights.FILE, "config.json"}
    loaded = VideoDiT.from_pretrained(tmp_path)
    assert loaded.config == TINY
    assert not loaded.training
    eight_bits = 0
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        wanted = model.state_dict()[name]
        if torch.equal(tensor, wanted.bfloat16().float()):
            continue
        eight_bits += 1
        half_a_step = wanted.abs().amax(dim=1, keepdim=True) / 254
        assert ((tensor - wanted).abs() <= 1.001 * half_a_step).all(), name
    assert eight_bits == TINY.layers * 7  # of the blocks alone
    loaded.save(tmp_path / "again")
    again = VideoDiT.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0)
    half = VideoDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    x, timestep, label, camera = inputs((2, 24, 24))
    assert half(x, timestep, label, camera).dtype == x.dtype


def test_generation_follows_the_seed():
    model = untrained_model_with_output()
    steps_heard = []

    def run(seed, **options):
        return generate(
            model,
            label=1,
            camera=[0.5, 0, 0, 0, 1],
            seed=seed,
            steps=3,
            guidance=2.0,
            shape=(2, 24, 24),
            device="cpu",
            dtype=torch.float32,
            **options,
        )

    first = run(0, on_step=lambda step, seconds: steps_heard.append((step, seconds >= 0)))
    assert first.shape == (2, 24, 24, 3)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert steps_heard == [(0, True), (1, True), (2, True)]
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_guidance_calls_with_then_without_conditions():
    model = untrained_model_with_output()
    calls = []
    model.register_forward_pre_hook(
        lambda _module, args: calls.append((args[1].item(), args[2].item()))
    )
    options = {"label": 3, "camera": [0] * 5, "seed": 0, "steps": 2, "shape": (1, 12, 12)}
    generate(model, guidance=3.0, device="cpu", dtype=torch.float32, **options)
    labels = [label for _, label in calls]
    assert labels == [3, TINY.null_label] * 2
    assert calls[0][0] == calls[1][0] == 1000
    calls.clear()
    generate(model, guidance=1.0, device="cpu", dtype=torch.float32, **options)
    assert [label for _, label in calls] == [3, 3]


def test_noise_levels_fall_from_one_to_zero():
    sigmas = shifted_sigmas(10, 3.0)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert sorted(sigmas, reverse=True) == sigmas
    assert sigmas[5] == pytest.approx(0.75)


def test_learning_rate_rises_holds_and_ends_at_zero():
    assert 0 < learning_rate_factor(0) < 0.1
    assert learning_rate_factor(0.3) == 1
    assert learning_rate_factor(1.0) == 0
    assert learning_rate_factor(1.1) == 0


def test_training_lowers_the_loss_of_one_batch(bank):
    torch.manual_seed(0)
    model = VideoDiT(TINY)
    optimizer = make_optimizer(model, 3e-3)
    clips = clips_from_seed(bank, 0)

    def measured():
        with torch.no_grad():
            return flow_matching_loss(model, clips, torch.Generator().manual_seed(0)).item()

    before = measured()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        training_step(model, optimizer, clips, generator)
    assert measured() < 0.9 * before


def test_whole_model_compiles_without_a_graph_break():
    model = untrained_model_with_output()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shape in ((2, 24, 24), (3, 24, 24)):
        arguments = inputs(shape)
        torch.testing.assert_close(compiled(*arguments), model(*arguments))
