"""`compare`: what sparse attention does to the pictures and the seconds of one's own pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_ear_compile.compare.comparison import Comparison

_LIBRARIES = {"numpy": "numpy", "skimage": "scikit-image", "PIL": "pillow"}


def compare(
    make: Callable[[], Any],
    prompts: Sequence[str],
    out: str | Path,
    *,
    densities: Sequence[float] = (),
    settings: Sequence[Mapping[str, Any]] = (),
    seeds: int | Sequence[int] = 3,
    dense_steps: int = 0,
    floor_db: float = 30.0,
    fps: float = 16.0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Generate clips dense and under each setting, compare raw frames and write a page.

    The same prompts and seeds go through the same pipeline under Inductor (dense) and then under
    ``backend="svg_ear"`` with each setting. A setting starts with one generation that is not
    counted: it compiles, and its picture shows whether generations repeat. Every finished clip is
    kept in `out`, so a call that was interrupted goes on where it stopped.

    Args:
        make: returns the pipeline, or (pipeline, keyword arguments of every call). A pipeline is
            called with ``prompt=`` and with those of ``generator=``, ``seed=``,
            ``output_type="np"`` and ``callback_on_step_end=`` that its signature names, returns one
            clip as ``.frames`` (or as it is), and holds its denoising models, not compiled, as
            attributes: those that are called with a timestep. diffusers' video pipelines are such
            objects.
        prompts: one clip of each for every seed and setting.
        out: folder of the clips, of ``figures.json`` and of the page, ``index.html``.
        densities: one setting for each, ``{"density": d}``.
        settings: more settings: options of the backend, and ``"name"`` and ``"dense_steps"`` of
            this setting where wanted.
        seeds: that many seeds from 0, or the seeds themselves.
        dense_steps: leading denoising steps that stay dense, for settings that do not say.
        floor_db: the recommended setting is the fastest whose every clip has at least this PSNR.
        fps: frames per second of the page's players.
        on_progress: hears what is under way, clips generated so far, and clips in all.

    Returns:
        Every figure; ``page`` is the path of the page, ``recommended`` the recommended setting.

    Raises:
        ValueError: an option, a prompt list or a folder that cannot be used: `out` holds another
            comparison, say; or frames that are not finite.
        TypeError: `make` returns something else than a pipeline, or its call no clip.
        ImportError: a library of the extra ``compare`` is missing.
    """
    missing = [package for module, package in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"compare needs {' and '.join(missing)}: pip install 'svg-ear-compile[compare]'"
        )
    from svg_ear_compile.compare.running import run
    from svg_ear_compile.compare.setting import settings_of

    return run(
        make,
        prompts,
        Path(out),
        settings_of(densities, settings, dense_steps),
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
        floor_db=floor_db,
        fps=fps,
        on_progress=on_progress or (lambda what, done, total: None),
    )
