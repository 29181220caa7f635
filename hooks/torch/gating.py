"""Gating of PyTorch's Python side: modules, the autograd engine, optimizers. Each patch is one small function."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from typing import Any

import torch

from acb.hooks.torch import devices, layers, memory, reach, regions
from acb.hooks.torch.devices import touches
from acb.hooks.torch.memory import OutOfMemoryError
from acb.hooks.torch.patching import Patches
from acb.hooks.torch.regions import gated, here, run, run_watched

Module: Any = torch.nn.Module


# --- modules --------------------------------------------------------------------------------------------------------

_places: dict[int, tuple[weakref.ref[Any], int, bool]] = {}
_moves = 0  # how often modules have been moved: what is remembered of them is older then


def module_gated(module: Any) -> bool:
    """Whether a module's first parameter or buffer lies on a gated device; the answer is remembered.

    Should it have become wrong behind PyTorch's back, the sentinel still sees every operation.
    """
    place = _places.get(id(module))
    if place is not None and place[1] == _moves and place[0]() is module:
        return place[2]
    tensor = _first_tensor(module)
    if tensor is None:
        return False
    gated, key = devices.on_gated(tensor), id(module)
    _places[key] = (weakref.ref(module, lambda _: _places.pop(key, None)), _moves, gated)
    return gated


def _first_tensor(module: Any) -> Any:
    """The first parameter or buffer of a module or of what it contains; None: there is none."""
    for part in module.modules():
        for kind in ("_parameters", "_buffers"):
            held = part.__dict__.get(kind)
            if isinstance(held, dict):
                for tensor in held.values():
                    if tensor is not None:
                        return tensor
    return next(module.parameters(), None)  # a scripted module's are not in such dictionaries


def module_touches(args: Any, kwargs: Any) -> bool:
    """Whether a call of the module ``args[0]`` surely uses a gated device: its first tensor or an argument does."""
    return module_gated(args[0]) or touches(args[1:], kwargs)


def _outermost_call(module: Any, args: Any, kwargs: Any) -> Any:
    """A module's call outside every region: a region of its own if it uses a gated device.

    Else it runs under the sentinel, which takes the first operation on a gated device through the gate: a module on the
    CPU does not wait for the GPU. A compiled module is opaque: under a mode it would compile again.
    """
    compiled = module._compiled_call_impl
    implementation = compiled if compiled is not None else module._call_impl
    place = _places.get(id(module))
    if place is not None and place[2] and place[1] == _moves and place[0]() is module:
        return run(implementation, args, kwargs)
    return run(
        implementation,
        args,
        kwargs,
        lambda args, kwargs: module_touches((module, *args), kwargs),
        opaque=compiled is not None or type(module).__name__ == "OptimizedModule",
    )


def patch_module_call(patches: Patches) -> None:
    """Module.__call__: inside a region one look at the thread's depth, and no further frame on the stack.

    Inside or not, a layer that runs out of memory is called again once there is room.
    """
    original = Module._wrapped_call_impl
    if Module.__call__ is not original or original.__code__.co_names != ("_compiled_call_impl", "_call_impl"):
        _wrap_module_call(patches)
        return

    @functools.wraps(original)
    def _wrapped_call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if here.state.depth:
                if self._compiled_call_impl is not None:
                    return self._compiled_call_impl(*args, **kwargs)
                return self._call_impl(*args, **kwargs)
            return _outermost_call(self, args, kwargs)
        except OutOfMemoryError:
            if not layers.repeatable(self):
                raise
        return _again(self._call_impl, args, kwargs)

    _set_module_call(patches, _wrapped_call_impl)


def _again(implementation: Any, args: Any, kwargs: Any) -> Any:
    """A layer's call once more, in the region in which it failed, or in one of its own."""
    if here.state.depth:
        return memory.with_room(implementation, args, kwargs, amid=True)
    return run(implementation, args, kwargs, retried=True)


def _wrap_module_call(patches: Patches) -> None:
    """The same for a version of PyTorch whose Module.__call__ does something else."""
    original = Module.__call__

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if here.state.depth or not module_touches((self, *args), kwargs):
                return original(self, *args, **kwargs)
            return run(original, (self, *args), kwargs)
        except OutOfMemoryError:
            if not layers.repeatable(self):
                raise
        return _again(original, (self, *args), kwargs)

    _set_module_call(patches, __call__)


def _set_module_call(patches: Patches, replacement: Any) -> None:
    """Install Module.__call__, also where the compiler compares it with what it was."""
    import sys

    original = Module.__call__
    if vars(Module).get("_wrapped_call_impl") is original:
        patches.set(Module, "_wrapped_call_impl", replacement)
    patches.set(Module, "__call__", replacement)
    for name in ("torch._dynamo.utils", "torch._dynamo.variables.nn_module"):
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(loaded, "unpatched_nn_module_call", None) is original:
            patches.set(loaded, "unpatched_nn_module_call", replacement)


def patch_module_moves(patches: Patches) -> None:
    """Module.to(), .cuda() and their kin; they can be repeated: what has moved stays moved."""

    def moves(args: Any, kwargs: Any) -> bool:
        return module_touches(args, kwargs) or (len(args) > 1 and devices.names_gated(args[1]))

    def to_cuda(args: Any, kwargs: Any) -> bool:
        return "cuda" in devices.GATED or module_touches(args, kwargs)

    patches.replace(Module, "cuda", lambda original: gated(original, to_cuda, retried=True))
    patches.replace_all(Module, ("to", "to_empty"), lambda original: gated(original, moves, retried=True))

    def moving(original: Any) -> Any:
        through_gate = gated(original, module_touches, retried=True)

        @functools.wraps(original)
        def _apply(*args: Any, **kwargs: Any) -> Any:
            global _moves
            try:
                return through_gate(*args, **kwargs)
            finally:
                _moves += 1

        return _apply

    patches.replace(Module, "_apply", moving)


def patch_module_state(patches: Patches) -> None:
    """Methods that touch every parameter: one region rather than one an operation."""
    names = ("zero_grad", "state_dict", "load_state_dict")
    patches.replace_all(Module, names, lambda original: gated(original, module_touches))


# --- autograd -------------------------------------------------------------------------------------------------------


_BUILT_IN = re.compile(r"Backward\d+$")


def _graph_touches(roots: Any) -> bool:
    """Whether an autograd graph has anything on a gated device: its gradients cross between devices in copies only."""
    seen: set[Any] = set()
    todo = [root.grad_fn for root in roots if isinstance(root, torch.Tensor)]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if devices.on_gated(variable):
                return True
        elif "Copy" in node.name() or not _BUILT_IN.search(node.name()):  # a custom function may do anything
            return True
        todo.extend(following for following, _ in node.next_functions)
    return False


def _engine_needs_gate(args: Any, kwargs: Any) -> bool:
    """Whether a run of the autograd engine must be a region. Walking the graph only pays when the thread would wait."""
    if touches(args, kwargs):
        return True
    if not regions.used():
        return False
    return not regions.closed() or _graph_touches(args[0] if args else ())


def patch_engine(patches: Patches) -> None:
    """Where every backward and grad of Python enters the engine."""
    import torch.autograd.graph as graph

    original = graph._engine_run_backward

    @functools.wraps(original)
    def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        if here.state.depth:
            return original(*args, **kwargs)
        # Hooks and custom functions of the program run on this thread, so that a run on the host needs the sentinel.
        return run(watched, args, kwargs, _engine_needs_gate, opaque=not regions.used())

    def watched(*args: Any, **kwargs: Any) -> Any:
        if here.state.depth or here.bare:
            return original(*args, **kwargs)
        return run_watched(original, args, kwargs)

    patches.set(graph, "_engine_run_backward", _engine_run_backward)
    patches.set(torch.autograd, "_engine_run_backward", _engine_run_backward)


def patch_backward(patches: Patches) -> None:
    """Tensor.backward(), which makes the first gradient on the device before the engine runs.

    torch.autograd.backward() and grad() need nothing more: the sentinel sees the operations that they begin with.
    """
    patches.replace(torch.Tensor, "backward", gated)


def patch_saved_tensor_hooks(patches: Patches) -> None:
    """Note that the program uses hooks on saved tensors: evacuation must not run them."""
    kind: Any = torch.autograd.graph.saved_tensors_hooks
    original = kind.__enter__

    @functools.wraps(original)
    def __enter__(self: Any) -> Any:
        reach.saw_saved_tensor_hooks()
        return original(self)

    patches.set(kind, "__enter__", __enter__)


def patch_gc_freeze(patches: Patches) -> None:
    """gc.freeze() hides what exists from a search through the collector's lists."""
    original = gc.freeze

    @functools.wraps(original)
    def freeze() -> None:
        reach.remember()
        original()

    patches.set(gc, "freeze", freeze)


# --- optimizers -----------------------------------------------------------------------------------------------------


def optimizer_touches(args: Any, kwargs: Any) -> bool:
    """Whether the first parameter of the optimizer ``args[0]`` lies on a gated device."""
    for group in getattr(args[0], "param_groups", ()):
        for parameter in group["params"]:
            return devices.on_gated(parameter)
    return False


def patch_optimizer_step(patches: Patches) -> None:
    """Optimizer.step of every class, present and future: PyTorch passes each through profile_hook_step once."""
    Optimizer: Any = torch.optim.Optimizer
    original = Optimizer.profile_hook_step

    @functools.wraps(original)
    def profile_hook_step(func: Any) -> Any:
        return gated(original(func), optimizer_touches)

    patches.set(Optimizer, "profile_hook_step", staticmethod(profile_hook_step))
    todo = list(Optimizer.__subclasses__())
    while todo:
        kind = todo.pop()
        todo.extend(kind.__subclasses__())
        step = vars(kind).get("step")
        if getattr(step, "hooked", False):
            patches.set(kind, "step", gated(step, optimizer_touches))


def patch_optimizer_state(patches: Patches) -> None:
    """Optimizer methods that touch every parameter."""
    patches.replace_all(
        torch.optim.Optimizer, ("zero_grad", "load_state_dict"), lambda original: gated(original, optimizer_touches)
    )


def patch_gradient_tools(patches: Patches) -> None:
    """Gradient clipping and loss scaling: one region each."""
    import torch.nn.utils.clip_grad as clip_grad

    def clips(args: Any, kwargs: Any) -> bool:
        # The parameters may come as a generator, which cannot be looked into; with the gate open a region is cheap.
        return touches(args, kwargs) or (regions.used() and not regions.closed())

    names = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_")
    patches.replace_all(clip_grad, names, lambda original: gated(original, clips), torch.nn.utils)
    scaler: Any = torch.amp.GradScaler

    def on_device(args: Any, kwargs: Any) -> bool:
        return getattr(args[0], "_device", "cuda") in devices.GATED and args[0].is_enabled()

    patches.replace_all(scaler, ("scale", "unscale_", "step", "update"), lambda original: gated(original, on_device))


def patch_losses(patches: Patches) -> None:
    """Loss functions of torch.nn.functional: PyTorch's way of showing a Python function to a mode costs more."""
    functional: Any = torch.nn.functional
    names = (
        "binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss "
        "gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss "
        "multi_margin_loss nll_loss poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss"
    )
    patches.replace_all(functional, names.split(), gated)


STEPS = (
    patch_losses,
    patch_module_call,
    patch_module_moves,
    patch_module_state,
    patch_engine,
    patch_backward,
    patch_saved_tensor_hooks,
    patch_gc_freeze,
    patch_optimizer_step,
    patch_optimizer_state,
    patch_gradient_tools,
)
"""In the order in which they are applied."""
