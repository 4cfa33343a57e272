"""`python -m benchmarks.tuning --out FOLDER`: everything about the cost model on this machine.

Calibrates, tests predicted times on shapes that were not fitted, and on a GPU makes the proof on
the video DiT: tuned budgets against one density on unseen seeds, one speed-up, one error. Each part
runs by itself too (`validate`, `sensitivity`, `video_dit`, `local_error`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from svg_ear_compile import calibrate
from svg_ear_compile.cost_model import calibration as calibrations


def main() -> None:
    """Run the parts, each in a process of its own; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--speedup", default="1.2", help="target_speedup that is checked")
    parser.add_argument("--max-error", default="0.03", help="max_error that is checked")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    found = calibrate("cuda" if on_gpu else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    cached = calibrations.cache_folder() / f"{found.device.key}.json"
    shutil.copy(cached, given.out / "calibration.json")
    print(f"calibrated in {found.seconds:.0f} s", flush=True)
    parts = [
        ["validate", "--out", str(given.out)],
        ["sensitivity", "--out", str(given.out / "sensitivity.json")],
    ]
    if on_gpu:
        objectives = ["--speedup", given.speedup, "--max-error", given.max_error]
        parts.append(["video_dit", "--out", str(given.out), *objectives])
    for part in parts:
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.tuning.{part[0]}", *part[1:]], check=True
        )


if __name__ == "__main__":
    main()
