"""Whether offloading moves the layers of a model one by one, which compiled graphs do not survive.

Both libraries move a module in hooks around its forward. Dynamo ends a graph at such a hook.
"""

from __future__ import annotations

from torch import nn

_GROUP_OFFLOADING = "group_offloading"  # name of diffusers' hook


def moves_each_layer(model: nn.Module) -> bool:
    """Whether a module without children has a hook of accelerate or of diffusers' offloading."""
    return any(
        hasattr(module, "_hf_hook")
        or _GROUP_OFFLOADING in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
        for module in model.modules()
        if not module._modules
    )
