"""A step of decoding in which the engine has nothing to do but to let a reduced cache go on."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Any

from torch import Tensor

from tokenreduce.engine.cache.adopt import token_layers
from tokenreduce.engine.cache.layers import Activity, Joined, TokenLayer
from tokenreduce.layout import TokenLayout


def cache_of_decode_step(kwargs: Mapping[str, Any], layout: TokenLayout | None) -> list[TokenLayer] | None:
    """The adopted cache layers that a call with one new token in each row goes on with; None if it is another kind of call."""
    x = kwargs.get("inputs_embeds")
    if x is None:
        x = kwargs.get("input_ids")
    if x is None or x.shape[1] != 1 or (layout is not None and layout.slot.shape[1] == 1):
        return None
    layers = token_layers(kwargs.get("past_key_values"))
    for layer in layers:
        if isinstance(layer, TokenLayer):  # The first that can tell.
            return layers if layer.held else None
    return None


def any_reduced(layers: Many[TokenLayer]) -> bool:
    """Whether one of the layers holds other tokens than transformers believes."""
    for layer in layers:  # noqa: SIM110 - any() takes twice as long
        if layer.reduced:
            return True
    return False


class DecodeStep(Activity):
    """State of a forward with one new token in each row, on a reduced cache without padding: it needs no mask at all.

    It says that these tokens are the engine's, and leaves all else to transformers. Not for layers reduced at `kv` sites.
    """

    sequences: tuple[()] = ()
    idle = True

    def __init__(self, layers: Many[TokenLayer]) -> None:
        self.layers = layers
        self.joined: Joined = {}

    @staticmethod
    def applies(mask: Any, implementation: str, config: Any, layers: Many[TokenLayer]) -> bool:
        """Whether a call with one new token on these layers is such a step. SDPA alone ever goes without a mask."""
        if implementation != "sdpa" or getattr(config, "sliding_window", None):
            return False
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return False  # It is to be refused.
        for layer in layers:  # noqa: SIM110
            if layer.not_padding is not None or layer.position is not None:
                return False
        return True
