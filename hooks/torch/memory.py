"""Out of memory: calls that are safe to repeat (see also `layers`) ask the broker for room and are tried again."""

from __future__ import annotations

import re
from typing import Any

import torch

TRIES = 3
"""How often a call is repeated before the program sees its own error."""

OutOfMemoryError: Any = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNKNOWN = 256 << 20  # asked for when the error does not say

_MAKING = (
    "to cuda clone contiguous float half double bfloat16 int long short bool new_empty new_zeros new_ones new_full "
    "new_tensor empty_like zeros_like ones_like full_like rand_like randn_like cat stack empty empty_strided zeros "
    "ones full arange eye linspace logspace rand randn randint randperm tensor as_tensor asarray scalar_tensor"
)
_COMPUTING = (
    "sum mean prod std var norm amax amin max min argmax argmin median logsumexp cumsum cumprod sort argsort topk "
    "unique nonzero masked_select masked_fill where gather scatter scatter_add index_select index_add take "
    "take_along_dim repeat repeat_interleave tile roll flip tril triu pad one_hot reshape flatten concat hstack vstack "
    "add sub subtract mul multiply div divide true_divide floor_divide remainder pow square sqrt rsqrt reciprocal neg "
    "abs exp expm1 log log1p log2 log10 sin cos tan tanh sigmoid relu gelu silu leaky_relu elu softplus softmax "
    "log_softmax maximum minimum clamp clip lerp round floor ceil sign eq ne lt le gt ge logical_and logical_or "
    "logical_not isnan isinf isfinite "
    "matmul mm bmm mv dot outer addmm baddbmm einsum tensordot cdist cross kron linear bilinear conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d layer_norm group_norm "
    "rms_norm embedding interpolate unfold fold normalize cosine_similarity pairwise_distance mse_loss l1_loss "
    "cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits"
)
_OPERATORS = (
    "getitem add radd sub rsub mul rmul div rdiv truediv rtruediv floordiv rfloordiv mod pow rpow matmul rmatmul neg "
    "abs eq ne lt le gt ge and or xor invert"
)
_REPEATABLE = frozenset([*_MAKING.split(), *_COMPUTING.split(), *(f"__{name}__" for name in _OPERATORS.split())])


def repeatable(func: Any, kwargs: Any) -> bool:
    """Whether an operation allocates first, changes nothing, and draws no random numbers before it has its memory."""
    return getattr(func, "__name__", "") in _REPEATABLE and not (
        kwargs and (kwargs.get("out") is not None or kwargs.get("inplace"))
    )


def wanted_bytes(error: BaseException) -> int:
    """How many bytes PyTorch failed to allocate, from its message; a guess when it does not say."""
    match = _WANTED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) + 1 if match else _UNKNOWN


def more_room(nbytes: int) -> bool:
    """Ask the broker for room; a seam for tests."""
    from acb.client.runtime import client

    return client().more_room(nbytes)


def beside() -> int:
    """Bytes of others' memory that could make way; a seam for tests."""
    from acb.client.runtime import client

    return client().beside


def with_room(func: Any, args: Any, kwargs: Any, *, amid: bool = False) -> Any:
    """Call `func`, inside a region; on out-of-memory make room and call it again, at most TRIES times.

    `amid` a computation whose next steps may want more, and cannot be repeated: everybody else is to make way.
    """
    for _ in range(TRIES):
        try:
            return func(*args, **kwargs)
        except OutOfMemoryError as error:
            nbytes = wanted_bytes(error)
        # The error is gone here, and with it the failed call's frames and the memory that they held.
        if not _make_room(nbytes, amid):
            break
    return func(*args, **kwargs)  # its error, if any, is the program's own


def _make_room(nbytes: int, amid: bool) -> bool:
    """Give back what the allocator caches and ask for `nbytes` more; a failure to ask is a no."""
    try:
        torch.cuda.empty_cache()
        return (amid and beside() > nbytes and more_room(beside())) or more_room(nbytes)
    except Exception:
        return False
