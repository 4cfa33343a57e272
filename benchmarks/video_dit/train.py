"""Train a video model for a given number of minutes: ``python -m benchmarks.video_dit.train``.

The learning rate, and the moment when long clips join, follow the WALL CLOCK: the run ends
annealed and on time on a fast device and on a slow one. Short clips come first, because attention
makes a long clip about six times as expensive; later every other batch is of long clips.

With `--state` a run that was cut goes on where it was when it is started again. One that ended can
be trained on, from any moment of the schedule: `--progress 0.6` is before the learning rate falls.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import imageio.v3 as imageio
import torch
import torch._dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.video_dit.data import Clips
from benchmarks.video_dit.pixel_dit import PixelDiT, velocity_target
from benchmarks.video_dit.sample import generate
from benchmarks.video_dit.training_state import TrainingState
from benchmarks.video_dit.zoo import MODELS, PHOTO_NOISE, Draw, TrainedModel

_LABEL_DROP = 0.1
_EMA_DECAY = 0.998
_LOG_SECONDS = 15.0
_CHECKPOINT_SECONDS = 60.0
_SAMPLE_SECONDS = 35.0
_WARM_UP, _LONG_FROM, _DECAY_FROM = 0.03, 0.5, 0.6  # fractions of the training time


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained and for how long.

    ``minutes`` is the wall time of everything but the imports, final samples included. ``films`` is
    the file of real motion, for a model that learns it. ``state`` is a file to go on from and to
    keep up to date, ``progress`` where in the schedule to go on, by default where the state was.
    """

    model: TrainedModel
    minutes: float
    learning_rate: float = 1e-3
    sample_steps: int = 40
    sample_labels: int = 10
    seed: int = 0
    films: Path | None = None
    state: Path | None = None
    progress: float | None = None

    @property
    def batches(self) -> dict[tuple[int, int, int], int]:
        """Batch size by clip shape, the short one first."""
        return {
            self.model.short: self.model.short_batch,
            self.model.long: self.model.long_batch,
        }


def learning_rate_factor(progress: float) -> float:
    """Warm-up, plateau, then a square-root decay to zero, over ``progress`` in [0, 1]."""
    if progress < _WARM_UP:
        return (progress + 0.001) / (_WARM_UP + 0.001)
    if progress < _DECAY_FROM:
        return 1.0
    return 1.0 - math.sqrt(min(1.0, (progress - _DECAY_FROM) / (1 - _DECAY_FROM)))


def flow_matching_loss(
    model: PixelDiT,
    clips: Clips,
    generator: torch.Generator | None = None,
    noise: tuple[float, float] = PHOTO_NOISE,
) -> torch.Tensor:
    """Mean squared error of the velocity at one random noise level per clip, a scalar.

    ``noise`` is mean and deviation of the logit of the noise level.
    """
    video, label = clips.video, clips.label
    batch, device = len(label), video.device

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, generator=generator)

    # Logit-normal, moved towards high noise: neighbouring pixels and frames agree so much that a
    # clip stays readable under noise that would drown a single independent value.
    sigma = torch.sigmoid(noise[0] + noise[1] * normal(batch))
    weight = sigma.view(-1, 1, 1, 1, 1)
    noisy = video + weight * (normal(*video.shape) - video)
    dropped = torch.rand(batch, device=device, generator=generator) < _LABEL_DROP
    label = torch.where(dropped, model.config.null_label, label)
    timestep = 1000 * sigma
    velocity = model(noisy, timestep, *model.conditions(label, clips.camera))
    return (velocity - velocity_target(noisy, video, timestep)).square().mean()


def loss_with_gradients(
    model: PixelDiT, clips: Clips, generator: torch.Generator, noise: tuple[float, float]
) -> torch.Tensor:
    """The loss, a scalar still on the device; its gradients are added to the parameters'."""
    with torch.autocast(clips.video.device.type, torch.bfloat16):
        loss = flow_matching_loss(model, clips, generator, noise)
    loss.backward()
    return loss.detach()


def training_step(
    model: PixelDiT,
    optimizer: torch.optim.Optimizer,
    clips: Clips,
    generator: torch.Generator,
    noise: tuple[float, float] = PHOTO_NOISE,
) -> torch.Tensor:
    """One optimiser step; returns the loss, a scalar still on the device."""
    loss = loss_with_gradients(model, clips, generator, noise)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def make_optimizer(model: PixelDiT, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with a little weight decay on matrices and none on vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def train(plan: TrainingPlan, out: Path, device: torch.device) -> PixelDiT:
    """Carry out ``plan``; leaves weights, configuration, losses and samples in ``out``."""
    started = time.perf_counter()
    finish = started + 60 * plan.minutes
    # What is left of the time is for the final samples.
    stop_training = finish - min(_SAMPLE_SECONDS, 0.25 * 60 * plan.minutes)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator(device).manual_seed(plan.seed)

    short, long = plan.batches
    draw = plan.model.clips(short[2], device, plan.films)
    model = plan.model.build().to(device)
    smoothed = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model, plan.learning_rate)
    state = TrainingState(model, smoothed, optimizer, generator)
    if plan.state is not None and plan.state.exists():
        state.load(plan.state)
        print(f"goes on from step {state.step}, at {state.progress:.3f}", flush=True)
    if plan.progress is not None:
        state.progress = plan.progress
    first_progress = state.progress
    if first_progress >= 1:
        raise SystemExit(f"the training of {plan.state} has ended; --progress 0.6 trains it on")
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters on {device}, torch {torch.__version__}", flush=True)
    _write_data_sheet(draw, plan, out, device)
    if device.type == "cuda":
        _compile_blocks(model, draw, plan, generator)
    print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)

    first_step = time.perf_counter()
    weights, smoothed_weights = list(model.parameters()), list(smoothed.parameters())
    loss_sum = {shape: torch.zeros((), device=device) for shape in plan.batches}
    loss_count = dict.fromkeys(loss_sum, 0)
    last_log = last_checkpoint = first_step

    def keep() -> None:
        smoothed.save(out)
        if plan.state is not None:
            state.save(plan.state)

    logged_step = state.step
    while (now := time.perf_counter()) < stop_training:
        of_this_run = (now - first_step) / (stop_training - first_step)
        state.progress = first_progress + (1 - first_progress) * of_this_run
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_factor(state.progress)
        is_long = state.progress >= _LONG_FROM and state.step % 2 == 1
        shape = long if is_long else short
        clips = draw(plan.batches[shape], shape, generator)
        loss_sum[shape] += training_step(model, optimizer, clips, generator, plan.model.noise)
        loss_count[shape] += 1
        state.step += 1
        decay = min(_EMA_DECAY, (1 + state.step) / (10 + state.step))
        torch._foreach_lerp_(smoothed_weights, weights, 1 - decay)

        if now - last_log >= _LOG_SECONDS:
            means = {
                f"loss_{name}": loss_sum[shape].item() / loss_count[shape]
                for name, shape in (("short", short), ("long", long))
                if loss_count[shape]
            }
            now = time.perf_counter()
            rate = (state.step - logged_step) / (now - last_log)
            state.losses.append({"step": state.step, "seconds": now - started, **means})
            text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"{now - started:6.1f} s  step {state.step}  {text}  {rate:.2f} it/s", flush=True)
            for shape in loss_sum:
                loss_sum[shape].zero_()
                loss_count[shape] = 0
            last_log, logged_step = now, state.step
        if now - last_checkpoint >= _CHECKPOINT_SECONDS:
            keep()
            last_checkpoint = now

    state.progress = 1.0
    keep()
    print(f"trained {state.step} steps, {time.perf_counter() - started:.1f} s", flush=True)
    record = {
        "steps": state.step,
        "minutes": plan.minutes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "short": {"shape": short, "batch": plan.batches[short]},
        "long": {"shape": long, "batch": plan.batches[long]},
        "losses": state.losses,
    }
    (out / "loss.json").write_text(json.dumps(record, indent=1) + "\n")
    _write_samples(plan.model.kind.from_pretrained(out), plan, out, device, finish)
    print(f"done after {time.perf_counter() - started:.1f} s", flush=True)
    return smoothed


def write_contact_sheet(path: Path, clips: Iterable[torch.Tensor]) -> None:
    """Write clips ``(T, H, W, 3)`` in [0, 1] as a PNG: a row per clip, up to 7 frames."""
    rows = []
    for clip in clips:
        chosen = torch.linspace(0, len(clip) - 1, min(7, len(clip))).round().long()
        rows.append(torch.cat(list(clip[chosen]), dim=1))
    sheet = torch.cat(rows, dim=0)
    imageio.imwrite(path, (sheet * 255).round().byte().cpu().numpy())


def _compile_blocks(
    model: PixelDiT, draw: Draw, plan: TrainingPlan, generator: torch.Generator
) -> None:
    """Compile the blocks, which share graphs at each clip shape, before the clock of training."""
    # Were graphs not shared, all blocks at two shapes would pass the default limit of 8 and the
    # rest would silently run eager.
    torch._dynamo.config.recompile_limit = 64
    # A block that does not compile trains eagerly: slower, but the run is not lost.
    torch._dynamo.config.suppress_errors = True
    for block in model.blocks:
        block.compile(dynamic=False)
    for shape, batch in plan.batches.items():
        clips = draw(batch, shape, generator)
        for run in ("first, with its compilation", "second"):
            started = time.perf_counter()
            loss_with_gradients(model, clips, generator, plan.model.noise)
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            milliseconds = 1000 * (time.perf_counter() - started)
            print(f"{shape} x {batch}: {milliseconds:.1f} ms a pass ({run})", flush=True)
    print(f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated", flush=True)


def _write_data_sheet(draw: Draw, plan: TrainingPlan, out: Path, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(plan.seed)
    video = draw(plan.sample_labels, plan.model.short, generator).video
    write_contact_sheet(out / "data.png", (video.permute(0, 2, 3, 4, 1) + 1) / 2)


def _write_samples(
    model: PixelDiT, plan: TrainingPlan, out: Path, device: torch.device, finish: float
) -> None:
    """Sample every label short, then long, as far as the time until ``finish`` goes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, shape in zip(("short", "long"), plan.batches, strict=True):
        clips = []
        for seed in range(plan.sample_labels):
            if clips and time.perf_counter() > finish:
                break
            label, camera = plan.model.prompt(seed)
            clips.append(
                generate(
                    model,
                    label=label,
                    camera=camera,
                    seed=seed,
                    steps=plan.sample_steps,
                    guidance=2.0,
                    shape=shape,
                    device=device,
                    dtype=dtype,
                )
            )
        write_contact_sheet(out / f"samples_{name}.png", clips)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="wall time, samples included")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and samples")
    parser.add_argument("--short-batch", type=int, help="clips of a batch, by default the model's")
    parser.add_argument("--long-batch", type=int, help="the same for long clips")
    parser.add_argument("--learning-rate", type=float, default=TrainingPlan.learning_rate)
    parser.add_argument("--films", type=Path, help="the file of prepare_footage")
    parser.add_argument("--state", type=Path, help="a file to go on from, and to keep up to date")
    parser.add_argument("--progress", type=float, help="where in the schedule to go on, 0 to 1")
    parser.add_argument("--tiny", action="store_true", help="a smoke run for a CPU")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    if arguments.tiny:
        model = model.shrunk()
    given = {name: getattr(arguments, name) for name in ("short_batch", "long_batch")}
    model = replace(model, **{name: size for name, size in given.items() if size is not None})
    plan = TrainingPlan(
        model, arguments.minutes, arguments.learning_rate,
        films=arguments.films, state=arguments.state, progress=arguments.progress,
    )  # fmt: skip
    if arguments.tiny:
        plan = replace(plan, sample_steps=8, sample_labels=2)
    # With cuDNN's attention the first backward pass of the joint model read outside its memory
    # (4,048 tokens, head dim 128; torch 2.11, H200).
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        train(plan, arguments.out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
