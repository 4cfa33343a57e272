"""Frozen dataclasses as JSON, read back strictly, and the JSON Schema that says how.

For files that a user may edit or hand us: every wrong field is named, nothing is executed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from svg_ear_compile.kernels.plan import REMOVED

Record = TypeVar("Record")

_NAMES = {str: "a string", int: "a whole number", float: "a finite number", bool: "true or false"}


def decode(kind: type[Record], data: object, where: str = "") -> Record:
    """An instance of the dataclass `kind` from parsed JSON.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the message says which.
    """
    found: Record = _decode(kind, data, where)
    return found


def _decode(kind: Any, data: object, where: str) -> Any:
    if is_dataclass(kind):
        return _decode_record(kind, data, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if data is None else _decode(inner, data, where)
    if origin is Literal:
        if isinstance(data, str) and data in REMOVED:
            raise ValueError(f"{where}: {REMOVED[data]}")
        if data not in arguments:
            raise ValueError(f"{where} must be one of {arguments}, got {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where} must be a list, got {data!r:.60}")
        return tuple(_decode(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise ValueError(f"{where} must be an object, got {data!r:.60}")
        return {key: _decode(arguments[1], x, f"{where}[{key!r}]") for key, x in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data)
    wrong_bool = isinstance(data, bool) and kind is not bool
    if wrong_bool or not isinstance(data, kind) or (kind is float and not math.isfinite(data)):
        raise ValueError(f"{where} must be {_NAMES[kind]}, got {data!r:.60}")
    return data


def _decode_record(kind: type[Any], data: object, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} must be an object, got {data!r:.60}")
    hints, dot = get_type_hints(kind), f"{where}." if where else ""
    known = {f.name: f for f in fields(kind)}
    for name in data:
        if name not in known:
            raise ValueError(f"{dot}{name} is not known; {kind.__name__} has {', '.join(known)}")
    given = {}
    for name, field in known.items():
        if name in data:
            given[name] = _decode(hints[name], data[name], dot + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{dot}{name} is missing")
    return kind(**given)


def schema(kind: Any) -> dict[str, Any]:
    """JSON Schema of what `decode` takes for `kind`."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        required = [
            f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
        ]
        return {
            "type": "object",
            "properties": {f.name: schema(hints[f.name]) for f in fields(kind)},
            "required": required,
            "additionalProperties": False,
        }
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return {"anyOf": [schema(inner), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(arguments[1])}
    return {"type": {str: "string", int: "integer", float: "number", bool: "boolean"}[kind]}


def write(path: Path, record: Any) -> None:
    """Write a dataclass as JSON; a reader sees the old file or the new one, never a part."""
    text = json.dumps(asdict(record), indent=1, allow_nan=False) + "\n"
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(part, 0o644)  # a temporary file is the owner's alone; these are made to be shared
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read(kind: type[Record], path: Path) -> Record:
    """Read what `write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not that of `kind`; the message names the file and the field.
    """
    try:
        return decode(kind, json.loads(path.read_text()))
    except ValueError as error:  # json and unicode errors are ValueErrors too
        raise ValueError(f"{path}: {error}") from error
