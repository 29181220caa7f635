"""Which modules' calls can be repeated when they run out of memory in the midst of another's forward.

A layer of torch.nn that is one operation changes nothing until it has its output: with room made for that it is called
again, and the forward around it goes on as if there had been room. Others might have changed something: a forward of
the program's own, a batch norm in training, what draws random numbers or works in place, and whatever has hooks.
"""

from __future__ import annotations

from typing import Any

import torch

nn: Any = torch.nn

_NAMES = (
    "Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d "
    "LayerNorm RMSNorm GroupNorm Embedding Flatten Unflatten Identity PixelShuffle PixelUnshuffle Upsample "
    "ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad1d ZeroPad2d ZeroPad3d "
    "ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d "
    "ReLU ReLU6 LeakyReLU PReLU ELU CELU SELU GELU GLU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign "
    "Hardtanh Hardswish Hardsigmoid Softmax LogSoftmax "
    "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d "
    "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"
)
_PURE = frozenset([getattr(nn, name) for name in _NAMES.split() if hasattr(nn, name)])

_EVALUATED = frozenset(
    [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
)
"""Pure but in training."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def repeatable(module: Any) -> bool:
    """Whether a call of this module that ran out of memory can be made again."""
    kind = type(module)
    if kind not in _PURE and not (kind in _EVALUATED and not module.training):
        return False
    held = vars(module)
    return not (
        "forward" in held  # replaced for this one
        or held.get("inplace")
        or held.get("max_norm") is not None  # an embedding, which scales its weights then
        or held.get("padding_mode", "zeros") != "zeros"  # a convolution that is two operations
        or held.get("_compiled_call_impl") is not None
        or any(held.get(name) for name in _HOOKS)
        or nn.modules.module._has_any_global_hook()
    )
