"""Weights that ComfyUI casts when they are used, cast once a layer and not once a chunk.

Where the weights do not fit the device, lie there in another dtype or carry LoRA, ComfyUI's layers
copy and cast them at every call. A layer of Inf-DiT is called for every chunk of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_prefetch
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...infdit_core.blocks.grid import Chunk, Frontier, Strip
from ...infdit_core.blocks.schedules import Full, Schedule
from ...infdit_core.network.condition import Condition
from ...infdit_core.network.model import InfDiT
from ...infdit_core.network.rope import Rotary
from ...infdit_core.network.run import Run


class CastingInfDiT(InfDiT):
    """`InfDiT` that keeps the cast weights of the layer at work, where layers come one by one."""

    placed: tuple[torch.device, torch.dtype] | None = None
    """Device and dtype of the computation; the weights', which may come to it when they are used,
    if None."""
    _weights: _LayerWeights | None = None

    @property
    def device(self) -> torch.device:
        return self.placed[0] if self.placed else super().device

    @property
    def dtype(self) -> torch.dtype:
        return self.placed[1] if self.placed else super().dtype

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        schedule: Schedule | None = None,
        *,
        run: Run | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Tensor:
        schedule = schedule or Full()
        strip: Strip | None = options.get("strip")
        grid = self.grid(x) if strip is None else strip.own_grid
        layers = [layer for layer, _ in schedule.cells(grid, len(self.layers))[:2]]
        if len(set(layers)) == len(layers):  # each layer is at work once, or again and again
            return super().forward(x, sigma, cond, schedule, run=run, dtype=dtype, **options)
        with ExitStack() as stack:
            self._weights = _LayerWeights(self, sigma.device, dtype or x.dtype)
            stack.callback(self.__dict__.pop, "_weights")
            stack.callback(self._weights.release)
            return super().forward(x, sigma, cond, schedule, run=run, dtype=dtype, **options)

    def lr_keys_values(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._weights is not None:
            self._weights.hold(0)  # the cross-attention's are among them
        return super().lr_keys_values(*args, **kwargs)

    def layer(
        self,
        n: int,
        tokens: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        frontier: Frontier,
        chunk: Chunk,
        lr_kv: Callable[[Chunk], Tensor],
    ) -> Tensor:
        if self._weights is not None:
            self._weights.hold(n)
        return super().layer(n, tokens, modulation, rotary, frontier, chunk, lr_kv)


class _LayerWeights:
    """The weights that one layer uses in every chunk, on the device and in the dtype of its work.

    Args:
        net: of ComfyUI's operations.
        device, dtype: of the computation.
    """

    def __init__(self, net: InfDiT, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        with_every_layer = [net.final.linear]  # of the last one; and that may be any
        with_first = [net.patch_embed, net.lr_embed, net.cross_attention]
        self._parts = [
            nn.ModuleList([layer, *with_every_layer, *(with_first if n == 0 else [])])
            for n, layer in enumerate(net.layers)
        ]
        self._held = ExitStack()
        self._n: int | None = None

    def hold(self, n: int) -> None:
        """Cast the weights of layer n, and let go of those of the layer before."""
        if n != self._n:
            self.release()
            self._held.enter_context(_streamed(self._parts[n], self._device))
            for module in self._parts[n].modules():
                if _is_cast(module):
                    self._held.enter_context(_cast(module, self._device, self._dtype))
            self._n = n

    def release(self) -> None:
        self._n = None
        self._held.close()


def _is_cast(module: Any) -> bool:
    """Whether ComfyUI's layer casts its weight at every call, and is not streamed."""
    return (
        isinstance(module, comfy.ops.CastWeightBiasOp)
        and not hasattr(module, "_v")
        and bool(module.comfy_cast_weights or module.weight_function or module.bias_function)
    )


@contextmanager
def _cast(module: Any, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give a layer the weight and bias that it would cast at every call."""
    weight, bias = module.weight, module.bias
    functions = module.weight_function, module.bias_function
    forced = getattr(module, "comfy_force_cast_weights", False)
    # layers that multiply 8-bit numbers keep theirs, unless LoRA is added
    in_8_bits = isinstance(weight, QuantizedTensor) or isinstance(module, comfy.ops.fp8_ops.Linear)
    own = in_8_bits and not any(functions)
    cast = comfy.ops.cast_bias_weight(
        module, dtype=weight.dtype if own else dtype, device=device, bias_dtype=dtype
    )
    try:
        module.weight, module.bias = (
            None if t is None else nn.Parameter(t, requires_grad=False) for t in cast
        )
        module.weight_function, module.bias_function = [], []
        module.comfy_force_cast_weights = forced or any(functions)  # so they round no input
        yield
    finally:
        module.weight, module.bias = weight, bias
        module.weight_function, module.bias_function = functions
        module.comfy_force_cast_weights = forced


@contextmanager
def _streamed(parts: nn.Module, device: torch.device) -> Iterator[None]:
    """Weights under dynamic VRAM come by the prefetching of ComfyUI's own models."""
    queue = None
    if any(hasattr(module, "_v") for module in parts.modules()):
        wanted = {"prefetch_dynamic_vbars": True}
        queue = comfy.model_prefetch.make_prefetch_queue([parts], device, wanted)
    comfy.model_prefetch.prefetch_queue_pop(queue, device, parts)
    try:
        yield
    finally:
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
