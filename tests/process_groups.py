"""Processes for tests, forked from one that has imported what all of them need and ran nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

IMPORTED = (
    "torch.distributed.device_mesh", "torch._inductor.compile_fx", "svg_ear_compile.backend",
    "svg_ear_compile.cli", "diffusers.pipelines.wan.pipeline_wan",
)  # fmt: skip


def spawn(worker: Callable[..., None], args: tuple[Any, ...] = (), nprocs: int = 1) -> None:
    """As `torch.multiprocessing.spawn`, whose processes import torch for seconds each."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    mp.start_processes(worker, args, nprocs, start_method="forkserver")


def in_process(worker: Callable[..., None], folder: Path, *args: Any, **variables: str) -> str:
    """What `worker` prints in a process of its own that has these environment variables."""
    spawn(_printing, (worker, args, variables, str(folder)))
    return (folder / "0.txt").read_text()


def torchrun(ranks: int, script: Path | str, arguments: list[str], folder: Path) -> str:
    """Run a script, or a module where it is no path, as torchrun does; all that is printed.

    Graphs run as the pass leaves them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_rank_of_torchrun, (ranks, port, script, arguments, str(folder)), ranks)
    return "".join((folder / f"{rank}.txt").read_text() for rank in range(ranks))


def _printing(
    rank: int, worker: Callable[..., None], args: tuple[Any, ...], variables: dict[str, str],
    folder: str,
) -> None:  # fmt: skip
    os.environ.update(variables)
    with open(f"{folder}/{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        worker(*args)


def _rank_of_torchrun(
    rank: int, ranks: int, port: int, script: Path | str, arguments: list[str], folder: str
) -> None:
    from svg_ear_compile import backend

    # Fewer arguments than Inductor has, of which this process gives none.
    backend.compile_fx = lambda gm, inputs, **given: gm.forward  # type: ignore[assignment]
    variables = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    _printing(rank, _run, (script, arguments), variables, folder)


def _run(script: Path | str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    if isinstance(script, Path):
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")
