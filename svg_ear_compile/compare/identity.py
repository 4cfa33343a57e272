"""What the clips of a comparison depend on, as digests: weights, configurations, call, budgets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svg_ear_compile.compare.pipeline import Pipeline
from svg_ear_compile.compare.setting import Setting
from svg_ear_compile.fingerprint import config_of, fingerprint_of
from svg_ear_compile.kernels.checked import InvalidTypeError, shown
from svg_ear_compile.pipeline_calls import held_by

_RUNS = 64
"""Runs of so many adjacent elements are read of a large weight, and as many runs."""

_PRINTED = (bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device)
_OnDisk = dict[int, tuple[str, str]]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity_of(pipeline: Pipeline, settings: Sequence[Setting]) -> dict[str, Any]:
    """Digests of everything whose change makes other clips, in plain JSON values.

    Not seen: plain attributes of the pipeline and of its modules (the scale of a LoRA, say), hooks,
    the content of a file that an argument names as text, and what `weights_digest` misses.

    Raises:
        TypeError: an argument of the call has no digest; the message names it.
        OSError: a budget file cannot be read.
    """
    held = {"the pipeline": pipeline.made, **held_by(pipeline.made)}
    models = {name: each for name, each in held.items() if isinstance(each, nn.Module)}
    configs = {name: config_of(each) for name, each in held.items() if name not in models}
    budgets = {setting.name: (setting.options or {}).get("budget") for setting in settings}
    return {
        "weights": {name: weights_digest(model) for name, model in models.items()},
        "configurations": {
            name: _hashed(
                json.dumps(config, sort_keys=True, default=lambda odd: type(odd).__name__)
            )
            for name, config in configs.items()
            if config is not None
        },
        "call": {name: _argument(name, value) for name, value in pipeline.given.items()},
        "budgets": {
            name: _hashed(Path(budget).read_bytes())
            for name, budget in budgets.items()
            if isinstance(budget, (str, Path))
        },
    }


def weights_digest(model: nn.Module) -> str:
    """Digest of a model's fingerprint, and of a sample of each parameter and persistent buffer.

    At most 4,096 elements of each are read, bit by bit, where they lie: on any device, in the parts
    of a quantised tensor, in the map to which accelerate offloads, or in diffusers' files. So it
    takes about a second for 14 B parameters in memory. It misses a change of other elements of a
    large weight, and every change of weights that are on ``meta`` and nowhere else.
    """
    parts = [json.dumps(asdict(fingerprint_of(model)))]
    on_disk = _on_disk(model)
    for path, module in sorted(model.named_modules()):
        own = {**module._parameters, **module._buffers}
        for name, held in sorted(own.items()):
            if held is None or name in module._non_persistent_buffers_set:
                continue
            for tensor in _parts(_found(module, name, held, on_disk)):
                parts.append(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}")
                if not tensor.is_meta:
                    parts.append(_hashed(_bits(tensor, _RUNS * _RUNS)))
    return _hashed("\n".join(parts))


def _found(module: nn.Module, name: str, held: Tensor, on_disk: _OnDisk) -> Tensor:
    """The weight itself, where a module holds another tensor in place of one that is offloaded."""
    path, key = on_disk.get(id(held), ("", ""))
    if path and Path(path).is_file():
        from safetensors import safe_open  # diffusers wrote the file with it

        with safe_open(path, "pt") as file:
            written: Tensor = file.get_tensor(key)
            return written
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        if held.is_meta and kept is not None and name in kept:
            return torch.as_tensor(kept[name])
    return held


def _on_disk(model: nn.Module) -> _OnDisk:
    """File and key by identity of each weight that diffusers offloads to disk.

    The memory of such a weight was written by nobody.
    """
    found: _OnDisk = {}
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        group: Any = getattr(hooks.get("group_offloading"), "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            keys = group.tensor_to_key.items()
            found |= {id(each): (group.safetensors_file_path, key) for each, key in keys}
    return found


def _argument(name: str, value: Any) -> str:
    try:
        return _digest(value)
    except TypeError as error:
        raise InvalidTypeError(
            f"make gives the call {name}, which holds {error}: clips are kept by the values of the "
            "arguments, so give numbers, text, lists, dicts, arrays, tensors or pictures"
        ) from None


def _digest(value: Any) -> str:
    """Digest of a value and its type; a TypeError that shows the part that has none."""
    said = type(value).__name__
    if isinstance(value, Enum):
        return _hashed(f"{said} {value.name}")
    if value is None or isinstance(value, _PRINTED):
        return _hashed(f"{said} {value!r}")
    if isinstance(value, Path):
        return _hashed(f"{said} {value}", value.read_bytes() if value.is_file() else b"")
    if isinstance(value, Mapping):
        return _hashed(said, *sorted(_digest(key) + _digest(each) for key, each in value.items()))
    if isinstance(value, (set, frozenset)):
        return _hashed(said, *sorted(map(_digest, value)))
    if isinstance(value, (list, tuple)):
        return _hashed(said, *map(_digest, value))
    if isinstance(value, nn.Module):
        return _hashed(said, weights_digest(value))
    if isinstance(value, Tensor) and not value.is_meta:
        tensors = [(f"{each.dtype} {tuple(each.shape)}", _bits(each)) for each in _parts(value)]
        return _hashed(said, *(part for tensor in tensors for part in tensor))
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return _hashed(f"{said} {value.dtype} {value.shape}", value.tobytes())
    if isinstance(value, Image.Image):
        palette = bytes(value.getpalette() or ())
        return _hashed(f"{value.mode} {value.size}", palette, value.tobytes())
    if is_dataclass(value) and not isinstance(value, type):
        return _hashed(said, *(_digest(getattr(value, each.name)) for each in fields(value)))
    raise TypeError(shown(value))


def _hashed(*parts: str | bytes) -> str:
    """Digest of the parts, of which each is told from the next."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return found.hexdigest()[:32]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: several of a quantised one, say."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


@torch.no_grad()
def _bits(tensor: Tensor, most: int | None = None) -> bytes:
    """The bytes of a plain tensor, or of `most` elements in runs that are spread over it evenly."""
    with torch._C.DisableTorchFunctionSubclass():
        found = tensor.detach()
        found = found.int_repr() if found.is_quantized else found
        found = found if found.layout is torch.strided else found.to_dense()
        if found.is_complex():
            found = torch.view_as_real(found.resolve_conj())
        found = found.resolve_neg().view(_BITS[found.element_size()])
        if most is not None and found.numel() > most:
            each = torch.arange(_RUNS, device=found.device)
            starts = each * (found.numel() - _RUNS) // (_RUNS - 1)
            places = (starts[:, None] + each).flatten()
            found = found[torch.unravel_index(places, found.shape)]
        return found.cpu().numpy().tobytes()
