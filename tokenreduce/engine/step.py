"""A step of decoding in which the engine has nothing to do but to let a reduced cache go on."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

from torch import nn

from tokenreduce.engine.cache import Joined, TokenLayer


class Step:
    """State of a forward with one new token in each row, on a reduced cache without padding: it needs no mask at all.

    It has what cache and tap ask of a Forward, and leaves attention to transformers. Not for layers reduced at `kv` sites.
    """

    sequences: tuple[()] = ()

    def __init__(self) -> None:
        self.joined: Joined = {}

    @staticmethod
    def serves(width: int, implementation: str, config: Any, held: Many[TokenLayer]) -> bool:
        """Whether a call with `width` new tokens on these layers is such a step. SDPA alone ever goes without a mask."""
        if width != 1 or implementation != "sdpa" or getattr(config, "sliding_window", None):
            return False
        return all(layer.real is None and layer.position is None for layer in held)

    def attention_layer(self, module: nn.Module) -> None:
        """None: no layer needs anything."""

    def defers(self, layer: TokenLayer) -> bool:
        """No."""
        return False
