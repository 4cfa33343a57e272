"""`python -m benchmarks.attention.sorted_copies --out DIR`: K and V copied once in cluster order.

An experiment beside the operator: what the attend stage gains when clusters lie contiguous, in
bf16 and in e4m3, with the copies, their scales, the lists and the empty places of pages counted.
A variant is compared with the present kernel, which gets the same rounded inputs, before it is
timed. Variants run in a process of their own; one that hangs or fails is ended, and the rest go on.
`--compile` compiles every variant for sm_90 on a machine without a GPU, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.sorted_copies.bench import Bench
from benchmarks.attention.sorted_copies.compiled import compile_for_sm90, compile_variant
from benchmarks.attention.sorted_copies.rows import ClockLog, measure, median_ms, said
from benchmarks.attention.sorted_copies.variants import DIM, VARIANTS
from benchmarks.provenance import provenance


def causes(error: BaseException) -> str:
    """The last lines of an error and of what caused it, the cause first."""
    lines = [f"{type(error).__name__}: " + " / ".join(str(error).splitlines()[-3:])]
    inner = error.__cause__ or error.__context__
    return " <- ".join([causes(inner), *lines] if inner else lines)


def work(given: argparse.Namespace) -> None:
    """Measure the named variants in this process; prints lines for `supervise`."""
    print("START setup", flush=True)
    benches = [
        Bench(given.heads, given.tokens, density)
        for density in map(float, given.densities.split(","))
    ]
    q, k, v = benches[0].q, benches[0].k, benches[0].v

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    clocks = ClockLog()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        began = time.monotonic()
        dense_ms = median_ms(dense, 3)
        dense_out = dense()
    rate = 4e-9 * given.heads * given.tokens**2 * DIM / dense_ms
    found = {"name": "cudnn", "dense_ms": dense_ms, "dense_tflops": rate}
    print("ROW " + json.dumps(found | {"sm_mhz": clocks.since(began)}), flush=True)
    for name in given.names.split(","):
        for bench in benches:
            print(f"START {name}", flush=True)
            try:
                row = measure(bench, name, given.repeats, dense_ms, dense_out, clocks)
            except Exception as error:
                row = {"name": name, "density": bench.plan.density, "failed": causes(error)}
                print("ROW " + json.dumps(row), flush=True)
                if not isinstance(error, triton.CompilationError):
                    sys.exit(1)  # nothing is known of the state of the device
                continue
            print("ROW " + json.dumps(row), flush=True)
            torch.cuda.empty_cache()
    clocks.close()


def compile_first(base: list[str], given: argparse.Namespace) -> None:
    """Compile the named variants and what the operator runs side by side, for 70 s at most."""
    began = time.monotonic()
    compiled = [n for n in given.names.split(",") if n in VARIANTS]
    asked = [["--warm", "--names", ",".join(compiled[i::8])] for i in range(8) if compiled[i::8]]
    # One head of the same length compiles what the present operator runs.
    asked.append(["--work", "--names", "present", "--heads", "1", "--tokens", str(given.tokens)])
    compilers = [
        subprocess.Popen([*base, *more], stdout=subprocess.PIPE, text=True) for more in asked
    ]
    for compiler in compilers:
        try:
            text, _ = compiler.communicate(timeout=max(0.1, began + 70.0 - time.monotonic()))
        except subprocess.TimeoutExpired:
            compiler.kill()
            continue
        for line in text.splitlines():
            if line.startswith("DOES NOT COMPILE"):
                print(line, flush=True)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def supervise(given: argparse.Namespace) -> None:
    """Compile side by side, then run workers until every variant has its rows or failed."""
    began = time.monotonic()
    ends = began + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    base = [sys.executable, "-u", "-m", "benchmarks.attention.sorted_copies"]
    compile_first(base, given)
    rows: list[dict[str, Any]] = []
    left = given.names.split(",")
    options = ["--heads", str(given.heads), "--tokens", str(given.tokens)]
    options += ["--densities", given.densities, "--repeats", str(given.repeats)]
    while left and time.monotonic() < ends:
        worker = subprocess.Popen(
            [*base, "--work", "--names", ",".join(left), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        current, patience = "setup", 90.0
        said_last: list[str] = []
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(patience, ends - time.monotonic())))
            except queue.Empty:
                print(f"{current}: no word, ended", flush=True)
                break
            if line is None:
                break
            if line.startswith("START "):
                current = line.split()[1]
                patience = 90.0 if current == "setup" else given.patience
                # What was done before is not done again.
                left = left[left.index(current) :] if current in left else left
            elif line.startswith("ROW "):
                row = json.loads(line[4:])
                rows.append(row)
                print(f"[{time.monotonic() - began:3.0f} s] {said(row)}", flush=True)
                record = {**provenance(), "heads": given.heads, "tokens": given.tokens}
                text = json.dumps(record | {"rows": rows}, indent=1)
                (given.out / "sorted_copies.json").write_text(text)
            else:
                said_last = [*said_last[-8:], line.rstrip()]
        worker.kill()
        if worker.wait() == 0:
            left = []
        else:
            print(f"{current} did not end well; its last words:", *said_last, sep="\n", flush=True)
            if current == "setup":
                break
            left = left[1:]
    if left:
        print("not measured: " + ", ".join(left), flush=True)


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    worker.wait()
    lines.put(None)


def main() -> None:
    """Parse the command line and run, or compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default="present," + ",".join(VARIANTS))
    parser.add_argument("--densities", default="0.2,0.1")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=140.0, help="everything ends by then")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds for one row")
    parser.add_argument("--out", type=Path, default=Path("sorted_copies"))
    parser.add_argument("--compile", action="store_true", help="for sm_90, without a GPU")
    parser.add_argument("--dump", type=Path, help="with --compile: folder for PTX and cubins")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    variants = [n for n in given.names.split(",") if n in VARIANTS]
    if given.compile:
        compile_for_sm90(variants, given.dump)
    elif given.warm:
        for name in variants:
            try:
                compile_variant(VARIANTS[name], "cuda")
            except triton.CompilationError as error:
                print(f"DOES NOT COMPILE {name}: {causes(error)}", flush=True)
    elif given.work:
        work(given)
    else:
        supervise(given)


if __name__ == "__main__":
    main()
