"""The hooks inside the layers: where stages act on the residual stream while a forward reduces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapter import FfnPair
from tokenreduce.engine.forward.peek import due
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.hooks import Hook, remove_handles
from tokenreduce.errors import UnsupportedError
from tokenreduce.strategy import Site

FOLLOWING = ("hidden_states", "attention_mask", "mamba_attention_mask", "position_ids", "position_embeddings")
"""Arguments of a layer that the engine makes follow the tokens."""


class LayerHooks:
    """Hooks on the layers, there only while a forward reduces: permanent ones cost 0.5 ms per decode step.

    Args:
        layers: of the decoder. pairs: where the FFN is, for the layers with a stage there. family: for messages.
        current: the forward that reduces in this thread, None if there is none. Another thread's forward may have put the
            hooks on, or be taking them off: then a hook can be called for nothing, even without its keyword arguments.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        pairs: Mapping[int, FfnPair],
        current: Callable[[], Forward | None],
        family: str,
    ) -> None:
        self.layers, self.pairs, self.current, self.family = layers, pairs, current, family
        self.handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on, unless they are."""
        if self.handles:
            return
        for number, layer in enumerate(self.layers):
            self._before(layer, self.enter_layer, number, with_kwargs=True)
            pair = self.pairs.get(number)
            if pair is not None:
                self._before(pair.entry, self.enter_ffn, number)
                self.handles.append(pair.exit.register_forward_hook(Hook(self.leave_ffn, pair.exit)))
            # Before other people's hooks, so that they see the layer's real output.
            leave = Hook(self.leave_layer, layer, number)
            self.handles.append(layer.register_forward_hook(leave, prepend=True))

    def _before(self, module: nn.Module, method: Callable[..., Any], number: int, with_kwargs: bool = False) -> None:
        hook = Hook(method, module, number)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def remove(self) -> None:
        """Take the hooks off."""
        remove_handles(self.handles)

    def enter_layer(self, number: int, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Before a layer: its `pre_attention` and `kv` stages, and what else must follow the tokens."""
        forward = self.current()
        if forward is None:
            return None
        if due(forward.sequences, number):
            x = args[0] if args else kwargs["hidden_states"]
            forward.move(x.device)
            forward.look_ahead(number, module, args, kwargs)
        return enter_layer(forward, number, self.family, args, kwargs)

    def enter_ffn(self, number: int, module: nn.Module, args: Any) -> Any:
        """Before the FFN: its `pre_ffn` stages."""
        forward = self.current()
        return None if forward is None else enter_ffn(forward, number, args)

    def leave_ffn(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the FFN of a layer whose tokens were reduced before it."""
        forward = self.current()
        return None if forward is None else leave_ffn(forward, output)

    def leave_layer(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        """After a layer: the residual stream of the tokens that are left."""
        forward = self.current()
        return None if forward is None else leave_layer(forward, number, output)


def enter_layer(forward: Forward, number: int, family: str, args: Any, kwargs: Any) -> Any:
    """Arguments of a layer, reduced by its `pre_attention` stages, with all that must follow the tokens; None as they are."""
    x = args[0] if args else kwargs["hidden_states"]
    changed = forward.visit(Site(number, "pre_attention"), x)
    forward.looks.notify_observers()
    x = x if changed is None else changed
    forward.enter_attention(number, x)
    forward.looks.notify_observers()
    if forward.batch.index is None:
        return None
    for name, value in kwargs.items():
        per_token = isinstance(value, Tensor) and value.dim() > 1 and forward.batch.width in value.shape[:3]
        if per_token and name not in FOLLOWING:
            raise UnsupportedError(
                f"{family}: its layers take {name}, one per token, which cannot follow reduced tokens"
            )
    kwargs = dict(kwargs)
    if number in forward.mixers:
        kwargs["attention_mask"] = forward.mixer_mask(number)
    tables, places = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    if tables is not None:  # None in layers without positions (NoPE).
        kwargs["position_embeddings"] = forward.rotate(tables)
    if places is not None:
        kwargs["position_ids"] = forward.batch.positions(places, forward.implementation)
    if args:
        return (x, *args[1:]), kwargs
    kwargs["hidden_states"] = x
    return args, kwargs


def enter_ffn(forward: Forward, number: int, args: Any) -> Any:
    """Arguments of the FFN's entry, reduced by its `pre_ffn` stages; None as they are."""
    forward.ffn = forward.visit(Site(number, "pre_ffn"), args[0])
    forward.looks.notify_observers()
    return None if forward.ffn is None else (forward.ffn, *args[1:])


def leave_ffn(forward: Forward, output: Any) -> Any:
    """Keep the output of an FFN before which tokens were reduced for `leave_layer`.

    The layer adds what is returned here to the tokens it still has; `leave_layer` puts the real sum in its place.
    """
    if forward.ffn is None:
        return None
    forward.ffn_output = output[0] if isinstance(output, tuple) else output
    nothing = forward.ffn_output.new_zeros(1, 1, forward.ffn_output.shape[-1])
    return (nothing, *output[1:]) if isinstance(output, tuple) else nothing


def leave_layer(forward: Forward, number: int, output: Any) -> Any:
    """Output of a layer for the tokens that are left."""
    state = output[0] if isinstance(output, tuple) else output
    if forward.ffn is not None and forward.ffn_output is not None:
        state = forward.ffn + forward.ffn_output
        forward.ffn = forward.ffn_output = None
    state = forward.finish_layer(number, state)
    return (state, *output[1:]) if isinstance(output, tuple) else state
