"""Renew the records of this host's GPUs: ``python -m benchmarks.records --out DIR``.

Every record is one command. Those that need several GPUs run first and alone, the others one on
each GPU. Below DIR the files lie as in ``results/<device>/``, each command's output beside them.
Checks come before measurements, and nothing is started that the time left cannot hold.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Record:
    """One command.

    Attributes:
        name: what the command line calls it.
        minutes: time on an H200, compilation included; it is stopped after twice that.
        command: shell command, with ``{python}`` and the folder ``{out}``.
        gpus: number of GPUs that it uses at once.
    """

    name: str
    minutes: float
    command: str
    gpus: int = 1


_PARALLEL = "{python} -m benchmarks.context_parallel --gpus 2 --out {out}/context_parallel"
_SANITIZER = "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1"
_PYTEST = "{python} -m pytest -q -m gpu -p no:benchmark -p no:cacheprovider"

RECORDS = (
    Record("context-parallel", 6, f"{_PARALLEL} --model wan14b-720p --layers 4", 2),
    Record("context-parallel-hunyuan", 7, f"{_PARALLEL} --model hunyuan-720p --layers 4", 2),
    Record(
        "tune-two-gpus", 1.5,
        "mkdir -p {out}/tuning && {python} -m torch.distributed.run --nproc-per-node 2 "
        "-m svg_ear_compile tune --model benchmarks.tuning.wan:six_layers --target-speedup 1.4 "
        "--out {out}/tuning/budget-wan1.3b-480p-6-layers-two-gpus.json",
        2,
    ),
    Record("tests-two-gpus", 1, f"{_PYTEST} tests/kernels/test_operator.py", 2),
    Record("tests", 8.5, f"{_PYTEST} tests"),
    Record(
        "memcheck", 4.5,
        "{python} -m benchmarks.memcheck --seconds 60 && "
        f"{_SANITIZER} {{python}} -m benchmarks.memcheck --seconds 200",
    ),
    Record("attention", 5, "{python} -m benchmarks.attention --out {out}"),
    Record("launches", 0.5, "{python} -m benchmarks.attention.launches | tee {out}/launches.txt"),
    Record("heads", 1, "{python} -m benchmarks.attention.heads --out {out}"),
    Record("cache", 1.5, "{python} -m benchmarks.attention.cache --out {out}"),
    Record("chunks", 2, "{python} -m benchmarks.attention.chunks --out {out}"),
    Record(
        "calibration", 0.7,
        "XDG_CACHE_HOME={out}/calibration {python} -m svg_ear_compile calibrate --device cuda",
    ),
    Record(
        "forward-wan", 3,
        "{python} -m benchmarks.end_to_end forward --model wan14b-720p --layers 10 "
        "--out {out}/end_to_end",
    ),
    Record(
        "forward-hunyuan", 3,
        "{python} -m benchmarks.end_to_end forward --model hunyuan-720p --layers 5,10 "
        "--out {out}/end_to_end",
    ),
    Record(
        "generation-wan", 6,
        "{python} -m benchmarks.end_to_end generation --model wan14b-720p --steps 5 "
        "--densities 0.2 --dense-steps 1,0 --out {out}/end_to_end",
    ),
    Record(
        "schedules-third", 4,
        "for guidance in 2 5; do {python} -m benchmarks.fidelity.schedules --model third "
        "--guidance $guidance --out {out}/fidelity/schedules; done",
    ),
    Record(
        "peers-third", 4,
        "{python} -m benchmarks.fidelity clips --models third --minutes 3.8 --out "
        "{out}/fidelity/peers --rules kitchen_top_k,kitchen_top_k_cubes,kitchen_tau,"
        "kitchen_tau_cubes,kitchen_tokens,sol_top_k",
    ),
    Record(
        "fidelity-times", 4,
        "{python} -m benchmarks.fidelity times --minutes 3.8 --models self,joint --out "
        "{out}/fidelity --rules paper,gaussian,kitchen_top_k,kitchen_tau,kitchen_tokens "
        "--clusters 64/64,128/64,256/64",
    ),
    Record("stacking", 6, "{python} -m benchmarks.stacking --out {out}/stacking"),
    Record(
        "stacking-wan14b", 3,
        "{python} -m benchmarks.stacking --model wan14b-720p --layers 10 --steps 5 "
        "--rows alone,float8 --out {out}/stacking",
    ),
)  # fmt: skip


class Run:
    """Records that run on the GPUs of this host until the time is over.

    Args:
        out: folder of the records.
        gpus: number of GPUs.
        minutes: nothing runs on after that.
    """

    def __init__(self, out: Path, gpus: int, minutes: float) -> None:
        self.out = out
        self.gpus = gpus
        # Of a machine that is shared, this process may have been given some GPUs alone.
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._names = given.split(",") if given else [str(gpu) for gpu in range(gpus)]
        self.end = time.monotonic() + 60 * minutes
        self.outcomes: dict[str, str] = {}
        self._waiting: list[Record] = []
        self._lock = threading.Lock()

    def all_of(self, records: Sequence[Record]) -> None:
        """Run them; what became of each is in `outcomes`."""
        self.out.mkdir(parents=True, exist_ok=True)
        for record in records:
            if record.gpus > 1:
                self._one(record, range(record.gpus))
        self._waiting = [record for record in records if record.gpus == 1]
        workers = [threading.Thread(target=self._work, args=(gpu,)) for gpu in range(self.gpus)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, gpu: int) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                record = self._waiting.pop(0)
            self._one(record, [gpu])

    def _one(self, record: Record, gpus: Sequence[int]) -> None:
        left = self.end - time.monotonic()
        if len(gpus) > self.gpus:
            self._say(record, f"needs {record.gpus} GPUs")
        elif left < 60 * record.minutes:
            self._say(record, "no time left")
        else:
            started = time.monotonic()
            with (self.out / f"{record.name}.log").open("w") as log:
                how = self._shell(record, gpus, min(left, 120 * record.minutes), log.fileno())
            self._say(record, f"{how}, {time.monotonic() - started:.0f} s")

    def _shell(self, record: Record, gpus: Sequence[int], seconds: float, log: int) -> str:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self._names[gpu] for gpu in gpus)}
        command = record.command.format(python=sys.executable, out=shlex.quote(str(self.out)))
        # A session of its own: what a stopped command has started stops with it.
        running = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env={**os.environ, **visible},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = running.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
            running.wait()
            return "stopped"
        return "done" if status == 0 else f"failed ({status})"

    def _say(self, record: Record, outcome: str) -> None:
        with self._lock:
            self.outcomes[record.name] = outcome
            print(f"{record.name}: {outcome}", flush=True)


def main() -> None:
    """Parse the command line; exit code 1 if a record failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [record.name for record in RECORDS]
    parser.add_argument("names", nargs="*", help=f"all, or in this order: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"no record is called {', '.join(unknown)}")
    gpus = torch.cuda.device_count()
    if gpus == 0:
        parser.error("there is no GPU here")
    run = Run(given.out.resolve(), gpus, given.minutes)
    of = {record.name: record for record in RECORDS}
    run.all_of([of[name] for name in given.names or names])
    if any(how.startswith(("failed", "stopped")) for how in run.outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
