"""The command `svg-ear`."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from svg_ear_compile import bench, cost_commands
from svg_ear_compile.compare import command as compare_command
from svg_ear_compile.explain import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (2 for wrong arguments)."""
    parser = argparse.ArgumentParser(prog="svg-ear", description=__doc__)
    commands = parser.add_subparsers(required=True)
    about = "list every attention of a model: layer, role, shape, plan and why"
    command = commands.add_parser("explain", help=about, description=about)
    command.add_argument(
        "--model",
        required=True,
        metavar="MODULE:CALLABLE",
        help="a callable without arguments that returns (model, args) or (model, args, kwargs)",
    )
    command.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="as in options={...}"
    )
    command.add_argument(
        "--budget", metavar="FILE", help="a tuned budget, as options={'budget': …}"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--draw", metavar="FOLDER", help="also draw each kind of site before and after"
    )
    command.set_defaults(run=_explain)
    cost_commands.add(commands, _load)
    compare_command.add(commands, _load)
    bench.add(commands)
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        print(f"svg-ear: {error}", file=sys.stderr)
        return 2
    return 0


def _explain(given: argparse.Namespace) -> None:
    options = dict(_option(text) for text in given.option)
    if given.budget is not None:
        options["budget"] = given.budget
    model, args, *rest = _load(given.model)()
    inputs = rest[0] if rest else {}
    found = explain(model, *args, options=options, draw_to=given.draw, **inputs)
    if given.json:
        print(found.to_json())
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(found.table())


def _load(path: str) -> Any:
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"--model must be MODULE:CALLABLE, got {path!r}")
    sys.path.insert(0, "")
    return getattr(importlib.import_module(module), name)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option must be KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


if __name__ == "__main__":
    raise SystemExit(main())
