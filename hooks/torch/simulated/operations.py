"""What the simulation must know of each operation of PyTorch, worked out once from its schema."""

from __future__ import annotations

from typing import Any

import torch

# Kinds of operation.
PASS, COMPUTE, COMPOSITE, HIGHER_ORDER = range(4)
"""PASS: touches no memory (views, questions about shapes). COMPOSITE: made of others, which are to be seen instead."""

_METADATA = frozenset(
    (
        "detach_", "t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_", "set_",
        "requires_grad_", "_coalesced_", "rename_", "is_same_size", "is_contiguous", "sym_size", "sym_numel",
        "sym_stride", "sym_storage_offset", "size", "stride", "numel", "dim", "is_set_to",
        "_has_compatible_shallow_copy_type", "_sparse_coo_tensor_unsafe", "_fused_sdp_choice", "is_coalesced",
        "sparse_dim", "dense_dim", "_nnz", "_dimI", "_dimV", "result_type", "_unpack_dual", "_is_zerotensor",
        "is_floating_point", "is_complex", "is_inference", "_version", "_validate_sparse_coo_tensor_args",
    )
)  # fmt: skip
"""Operations that change or ask only what is known of a tensor, not its memory."""

_MIXING = frozenset(
    (
        "index", "index_put", "index_put_", "_index_put_impl", "_index_put_impl_", "_unsafe_index",
        "_unsafe_index_put", "copy_", "copy", "_pack_padded_sequence", "_pack_padded_sequence_backward", "set_",
        "set_data", "_ctc_loss", "_ctc_loss_backward", "_fused_adam_", "_fused_adamw_", "_fused_sgd_",
    )
)  # fmt: skip
"""Operations that accept arguments on the host beside those on a GPU."""

_RESIZING = frozenset(
    (
        "resize", "resize_", "resize_as_", "resize_output_", "sparse_resize_", "set_", "_resize_output_",
        "resize_as_sparse_",
    )
)  # fmt: skip

_MADE_LIKE = frozenset(
    (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
        "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
    )
)  # fmt: skip
"""Operations that take only the shape and kind of their first argument."""


class Operation:
    """One operation: its name for people, its kind, and what its arguments may be."""

    __slots__ = (
        "base",
        "factory",
        "indexes",
        "kind",
        "like",
        "mixes",
        "name",
        "random",
        "resizes",
        "takes_device",
        "written",
    )

    def __init__(self, func: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            self.name = self.base = str(func)
            self.kind = HIGHER_ORDER
            return
        schema = func._schema
        self.name = schema.name.replace("::", ".")
        self.base = base = schema.name.rpartition("::")[2]
        arguments = schema.arguments
        self.written = [
            i
            for i, argument in enumerate(arguments)
            if not argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write
        ]
        out = any(argument.is_out for argument in arguments if argument.kwarg_only)
        self.takes_device = any(argument.name == "device" for argument in arguments)
        self.factory = self.takes_device and not any("Tensor" in str(argument.type) for argument in arguments)
        self.random = any(argument.name == "generator" for argument in arguments)
        self.indexes = base in ("index", "index_put", "index_put_", "_index_put_impl_")
        self.mixes = base in _MIXING
        self.resizes = out or base in _RESIZING
        self.like = base in _MADE_LIKE
        self.kind = COMPUTE
        if base in _METADATA:
            self.kind = PASS
        elif _has_kernel(func, "CompositeImplicitAutograd") and not _has_kernel(func, "CPU"):
            self.kind = COMPOSITE
        elif _is_view(schema):
            self.kind = PASS


def _has_kernel(func: Any, key: str) -> bool:
    """Whether PyTorch has an implementation of `func` for this dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _is_view(schema: Any) -> bool:
    """Whether everything returned is a view of an argument and nothing is written."""
    if not schema.returns or schema.is_mutable:
        return False
    return all(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)


_known: dict[Any, Operation] = {}


def known() -> list[Operation]:
    """Every operation that this process has used."""
    return list(_known.values())


def describe(func: Any) -> Operation:
    """What is known of `func`."""
    operation = _known.get(func)
    if operation is None:
        operation = _known[func] = Operation(func)
    return operation
