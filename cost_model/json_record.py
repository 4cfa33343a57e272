"""Reader and writer of all JSON files, whose content is described by dataclasses.

Users may edit these files, and other processes may damage them. The reader accepts regular files of
bounded size in UTF-8, with bounded nesting, unique keys and finite numbers. The annotations of a
dataclass then say which fields, types and ranges are allowed. Any other file is refused by one
printable sentence that names the file and the field. Nothing in a file is executed.

(pydantic and msgspec were considered. They accept repeated keys and do not check the file itself;
they would replace `_decode`, half of this file.)
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import stat
import types
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from svg_ear_compile.kernels.checked import (
    InvalidTypeError,
    InvalidValueError,
    checked,
    field_kinds,
    printable,
    shown,
)

Record = TypeVar("Record")

MOST_BYTES = 4 << 20
"""Largest file that is read; a budget of a thousand layers in ten phases has half of it."""
MOST_LEVELS = 32
MOST_DIGITS = 20

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
# Brackets become +1 and -1, all other bytes are dropped.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Content of a regular file; never waits for another process.

    Args:
        path: path of the file.
        most: largest size in bytes.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: the file is not regular, or is too large.
    """
    # A pipe without a writer would keep an ordinary open waiting.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    handle = os.open(path, flags)
    try:
        check_regular(handle)
        with open(handle, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(handle)
    if len(data) > most:
        raise InvalidValueError(f"it is larger than {most >> 20} MiB")
    return data


def check_regular(handle: int) -> None:
    """Raise a ValueError unless an open file is a regular one."""
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        raise InvalidValueError(f"it is {_KINDS.get(kind, 'a device')}, not a file")


def parse(data: bytes) -> Any:
    """Plain data from JSON.

    Raises:
        ValueError: `data` is not JSON in UTF-8, is nested too deep, or has a repeated key in an
            object, a number that is not finite, or a whole number of more than 20 digits.
    """
    if _levels(data) > MOST_LEVELS:
        raise InvalidValueError(f"it is nested deeper than {MOST_LEVELS} levels")
    try:
        return _DECODER.decode(data.decode())
    except InvalidValueError:
        raise
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"byte {error.start} is not UTF-8") from error
    except ValueError as error:
        raise InvalidValueError(f"it is not JSON: {error}") from error


def _levels(data: bytes) -> int:
    """Depth of nesting, computed without recursion."""
    # Without escapes, every second part between quotation marks is a string.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    steps = array("b", outside.translate(_STEPS, _NO_BRACKETS))
    return max(itertools.accumulate(steps), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise InvalidValueError(f"the key {shown(twice)} stands twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise InvalidValueError(f"a whole number has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidValueError(f"a number is too large: {shown(digits)}")
    return value


def _no_constant(name: str) -> float:
    raise InvalidValueError(f"{name} is not a finite number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=_no_constant
)


def decode(kind: type[Record], data: object, where: str = "") -> Record:
    """An instance of the dataclass `kind` from parsed JSON, or from such an instance.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type or out of its range; the message
            says which.
    """
    try:
        found: Record = _decode(kind, data, where)
    except InvalidTypeError as error:
        raise InvalidValueError(str(error)) from error
    return found


def check(record: Record) -> Record:
    """Return the record if `decode` would accept it; raises what `decode` raises."""
    decode(type(record), record)
    return record


def _decode(kind: Any, data: object, where: str) -> Any:
    if is_dataclass(kind):
        return _decode_record(kind, data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise InvalidValueError(f"{where} must be a list, got {shown(data)}")
        return tuple(_decode(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise InvalidValueError(f"{where} must be an object, got {shown(data)}")
        return {
            checked(f"a key of {where}", key, str): _decode(
                arguments[1], x, f"{where}[{shown(key)}]"
            )
            for key, x in data.items()
        }
    return checked(where, data, kind)


def _decode_record(kind: Any, data: object, where: str) -> Any:
    if isinstance(data, kind):
        data = {field.name: getattr(data, field.name) for field in fields(data)}
    if not isinstance(data, dict):
        raise InvalidValueError(f"{where or 'the file'} must be an object, got {shown(data)}")
    hints, dot = field_kinds(kind), f"{where}." if where else ""
    known = {f.name: f for f in fields(kind)}
    for name in data:
        if name not in known:
            raise InvalidValueError(
                f"{dot}{shown(name)} is not known; {kind.__name__} has {', '.join(known)}"
            )
    given = {}
    for name, field in known.items():
        if name in data:
            given[name] = _decode(hints[name], data[name], dot + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InvalidValueError(f"{dot}{name} is missing")
    return kind(**given)


def schema(kind: Any) -> dict[str, Any]:
    """JSON Schema of the data that `decode` accepts for `kind`."""
    if is_dataclass(kind):
        record: Any = kind
        hints = field_kinds(record)
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
    if origin is Annotated:
        inner, limit = arguments
        return schema(inner) | {"minimum": limit.least, "maximum": limit.most}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(arguments[1])}
    return {"type": {str: "string", int: "integer", float: "number", bool: "boolean"}[kind]}


def write(path: Path, record: Any) -> None:
    """Write a dataclass, or plain data, as JSON.

    The write is atomic: a reader sees the old file or the new one. A symbolic link is replaced, not
    followed. The umask decides who may read the file.
    """
    data = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    part = _new_beside(path)
    try:
        with part.open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raise an OSError unless `write` could write this file; for use before long computations."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    _new_beside(path).unlink()


def _new_beside(path: Path) -> Path:
    """A new, empty file in the folder of another one."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return part


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix the message of a ValueError with the name of the file, and make it printable."""
    try:
        yield
    except ValueError as error:
        raise InvalidValueError(printable(f"{path}: {error}")) from error


def read(kind: type[Record], path: Path) -> Record:
    """Read a dataclass from a file of `write`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, or does not describe a `kind`; the message names the file
            and the field.
    """
    with naming(path):
        return decode(kind, parse(read_bytes(path)))
