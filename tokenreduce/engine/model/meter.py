"""What a few tokens really cost in each layer of a decoder, against what its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokenreduce.planning import cost

TOLERANCE = 0.01


@dataclass
class Measured:
    """What a few tokens cost."""

    tokens: int
    """How many."""
    flops: list[int]
    """Of each layer for those tokens, without the two products of attention."""
    pair: list[int]
    """FLOPs of those products in each layer, per (query, key) pair."""
    cached: list[int]
    """Elements that the cache of each layer holds per token."""
    beside: list[str]
    """What the attention of any layer has beside a softmax of products."""

    def mismatch(self, shape: cost.DecoderShape) -> str:
        """What a layer costs other than in `shape`, empty if nothing."""
        said = (cost.layer_flops(shape, self.tokens, self.tokens, pairs=0), 4 * shape.heads * shape.head_dim)
        for layer, found in enumerate(zip(self.flops, self.pair, strict=True)):
            if any(abs(here - there) > TOLERANCE * there for here, there in zip(found, said, strict=True)):
                return (
                    f"its config says {said[0]:,} FLOPs for {self.tokens} tokens in a layer and {said[1]:,} for a query and a "
                    f"key, layer {layer} takes {found[0]:,} and {found[1]:,}"
                )
        return ""


@dataclass
class Meter(TorchDispatchMode):
    """Counts the FLOPs of this thread as torch's FlopCounterMode does, whose hooks are everybody's; grouped products too."""

    flops: int = 0
    layers: list[int] = field(default_factory=list)
    pair: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        if (
            torch.is_inference_mode_enabled()
            and packet not in flop_registry
            and isinstance(func, torch._ops.OpOverload)
        ):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif "grouped_mm" in str(packet):
            self.flops += 2 * args[0].shape[-1] * out.numel()
        return out

    def watch(self, layers: Sequence[nn.Module]) -> list[Any]:
        """Note what each of `layers` takes; the handles of the hooks."""
        self.layers, self.pair = [0] * len(layers), [0] * len(layers)
        handles = []
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(lambda m, a, number=number: self._note(number, -1)))
            handles.append(layer.register_forward_hook(lambda m, a, o, number=number: self._note(number, 1)))
        return handles

    def _note(self, layer: int, sign: int) -> None:
        self.layers[layer] += sign * self.flops

    def attention(self, layer: int, query: Tensor, value: Tensor, before: int) -> None:
        """After an attention of `layer`: kernels that the registry does not know would be missed, so count by its shapes."""
        self.flops = before
        self.pair[layer] += 2 * query.shape[1] * (query.shape[-1] + value.shape[-1])

    def measured(self, tokens: int, cache: Any, beside: list[str]) -> Measured:
        """What was found. cache: that `tokens` tokens were put into."""
        cached = [0] * len(self.layers)
        for number, layer in enumerate(cache.layers[: len(cached)]):
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                cached[number] += part.shape[1] * part.shape[-1] if isinstance(part, Tensor) and part.dim() == 4 else 0
        return Measured(tokens, self.layers, self.pair, cached, beside)
