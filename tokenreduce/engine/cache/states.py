"""KV cache layers of hybrid decoders: a state in place of tokens, or nothing at all.

A state has no length: from a reduction on it is what the tokens that are left have made of it. So these layers need no
plan; they keep others from going on with a reduced cache, and can be put back as they were when a forward fails.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from tokenreduce.engine.cache.layers import TokenLayer, running
from tokenreduce.errors import UnsupportedError

STATE, NOTHING, TOKENS = "state", "nothing", "tokens"
"""What a decoder layer has in the cache: a state, nothing, or keys and values of tokens."""


def contents(config: Any, depth: int) -> list[str]:
    """Of each of `depth` decoder layers of this config what a DynamicCache holds: STATE, NOTHING or TOKENS."""
    layers = DynamicCache(config=config).layers[:depth]
    kinds = [
        STATE if type(layer) is LinearAttentionLayer else NOTHING if isinstance(layer, DummyLayer) else TOKENS
        for layer in layers
    ]
    return kinds + [TOKENS] * (depth - len(kinds))


class _NoTokens:
    """What a layer of tokens has, in layers that hold none."""

    held = gone = logical = 0
    not_padding = position = end = span = columns = None
    shed = False
    plan: Any = None
    reduced = broken = False
    number = 0

    def snapshot(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    def restore(self, snapshot: dict[str, Any]) -> None:
        """As it was when `snapshot` was taken."""
        self.__dict__.update(snapshot)


class EmptyLayer(_NoTokens, DummyLayer):  # type: ignore[misc]
    """A decoder layer that keeps nothing, as one of experts alone."""

    changed = False

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class StateLayer(_NoTokens, LinearAttentionLayer):  # type: ignore[misc]
    """The states of one linear-attention, state-space or convolution layer.

    conv_states: (B, C, kernel) each, the last inputs of a convolution. recurrent_states: (B, …) each, none in a layer that only
    convolves.
    """

    changed: bool
    """A forward has written to it since it began."""

    def __init__(self, number: int, old: LinearAttentionLayer) -> None:
        self._has: dict[int, bool] = {}
        self.number, self.reduced, self.broken, self.changed = number, False, False, False
        super().__init__(number_of_states=old.number_of_states)
        self.__dict__.update({name: value for name, value in vars(old).items() if name != "has_previous_state"})
        self._has = dict(old.has_previous_state)

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """Whether each of the states is of an earlier forward. A layer asks before it goes on with them."""
        if self.reduced:
            TokenLayer.refuse(self, running.forward)
        return self._has

    @has_previous_state.setter
    def has_previous_state(self, value: dict[int, bool]) -> None:
        self._has = value

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers', and it is noted."""
        self.changed = True
        return super().update_conv_state(*args, **kwargs)  # type: ignore[no-any-return]

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers', and it is noted."""
        self.changed = True
        return super().update_recurrent_state(*args, **kwargs)  # type: ignore[no-any-return]

    def snapshot(self) -> dict[str, Any]:
        """All of it, with copies of the states, which forwards write in place."""
        self.changed = False
        return {
            name: {key: _copy(one) for key, one in value.items()} if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }

    def reset(self) -> None:
        """Forget everything."""
        self.reduced = self.broken = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """UnsupportedError for a recurrent state: what the last tokens have put into it cannot be taken out again."""
        self.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """See `crop`."""
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):
            raise UnsupportedError(CROP)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        self._each(lambda t: t[indices])

    def _each(self, change: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({key: None if state is None else change(state) for key, state in states.items()})


CROP = (
    "the cache of a decoder with recurrent states cannot be cropped: what the tokens have put into a state cannot be taken out "
    "again; copy the cache before the tokens come"
)


def stand_in(number: int, old: Any) -> StateLayer | EmptyLayer | None:
    """Ours for a layer of transformers that holds no tokens; None for one that does."""
    if isinstance(old, (StateLayer, EmptyLayer)):
        return old
    if type(old) is LinearAttentionLayer:
        return StateLayer(number, old)
    if type(old) is DummyLayer:
        return EmptyLayer(number)
    if isinstance(old, LinearAttentionCacheLayerMixin):
        raise UnsupportedError(
            f"a cache with a {type(old).__name__} is not supported: a state and keys in one layer (Falcon-H1, Zamba2)"
        )
    return None


def link(layers: list[Any]) -> None:
    """Let layers of tokens know of states beside them: a crop of the ones alone would be wrong."""
    states = [layer for layer in layers if isinstance(layer, StateLayer)]
    for layer in layers:
        if states and isinstance(layer, TokenLayer):
            layer.beside = states


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
