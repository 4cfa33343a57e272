"""The command `svg-ear`."""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from svg_ear_compile import __version__, bench, cost_commands
from svg_ear_compile.compare import command as compare_command
from svg_ear_compile.explain import explain
from svg_ear_compile.kernels.checked import InvalidValueError, printable, shown
from svg_ear_compile.made_models import model_and_inputs
from svg_ear_compile.settings import Settings

_ABOUT = (
    "Sparse attention for video diffusion transformers: what goes sparse, how fast and how close."
)

# What an interrupted command has kept.
_AGAIN = {
    "tune": "; run the same command again to continue",
    "compare": "; run the same command again to continue",
    "calibrate": "; nothing was saved: run it again",
}


class _Parser(argparse.ArgumentParser):
    """Answers a mistake by one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise InvalidValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 2 after an error, 130 after Ctrl-C."""
    # Read before parsing, which may fail.
    given = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in given
    try:
        parsed = _parser().parse_args([text for text in given if text != "--traceback"])
        parsed.run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        again = next((_AGAIN[word] for word in given[:2] if word in _AGAIN), "")
        print(f"svg-ear: interrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        print(f"svg-ear: {_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str:
    """One printable line for an error."""
    try:
        said = str(error)
    except Exception as fault:  # of a foreign class: whatever its message raises is said
        said = f"its message cannot be written: {type(fault).__name__}"
    text = next((line for line in said.splitlines() if line.strip()), "")
    if text and isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return printable(text)
    # An error of the user's model or a fault of this package: its place matters.
    return printable(f"{type(error).__name__}: {text} (--traceback shows where)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="svg-ear", description=_ABOUT)
    about = f"svg-ear {__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=about)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "list what goes sparse in a model, with its plan, and why the rest stays dense"
    command = commands.add_parser("explain", help=about, description=about)
    command.add_argument(
        "--model",
        required=True,
        metavar="MODULE:CALLABLE",
        help="a callable without arguments that returns (model, args) or (model, args, kwargs)",
    )
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the backend, e.g. density=0.1; may be given several times",
    )
    command.add_argument("--budget", metavar="FILE", help="a tuned budget")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--draw",
        metavar="FOLDER",
        help="also draw each kind of attention call before and after, into this folder",
    )
    command.set_defaults(run=_explain)
    cost_commands.add(commands)
    compare_command.add(commands)
    bench.add(commands)
    return parser


def _explain(given: argparse.Namespace) -> None:
    options: dict[str, Any] = {}
    budget = [] if given.budget is None else [("budget", given.budget)]
    for key, value in [*map(_option, given.option), *budget]:
        if key in options:
            raise InvalidValueError(f"the option {shown(key)} is given twice")
        options[key] = value
    Settings.parse(options)  # a mistake is answered before a model is loaded
    model, args, kwargs = model_and_inputs(given.model)
    found = explain(model, *args, options=options, draw_to=given.draw, **kwargs)
    if given.json:
        print(found.to_json())
    else:
        # Long lines are hard to read, however wide the terminal is.
        print(found.text(min(shutil.get_terminal_size().columns, 100)))


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidValueError(f"--option must be KEY=VALUE, got {shown(text)}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return key, value  # a string without quotes


if __name__ == "__main__":
    raise SystemExit(main())
