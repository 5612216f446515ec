"""The hooks inside the layers of a compiled model: plain functions, so that a graph made with them holds no attachment.

Which forward runs they read from the thread, and that is guarded: a graph is never used for a forward of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tokenreduce.adapter import FfnPair
from tokenreduce.engine.cache.layers import running
from tokenreduce.engine.compiled.state import CompiledForward
from tokenreduce.engine.forward import layer_hooks as plain
from tokenreduce.engine.model.hooks import remove_handles


class TracedHooks:
    """As LayerHooks, for forwards of a compiled model. layers: of the decoder. pairs: where the FFN is, if a stage is there."""

    def __init__(self, layers: Sequence[nn.Module], pairs: Mapping[int, FfnPair]) -> None:
        self.layers, self.pairs = layers, pairs
        self.handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on, unless they are."""
        if self.handles:
            return
        for number, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_pre_hook(_enter_layer, with_kwargs=True))
            pair = self.pairs.get(number)
            if pair is not None:
                self.handles.append(pair.entry.register_forward_pre_hook(_enter_ffn))
                self.handles.append(pair.exit.register_forward_hook(_leave_ffn))
            self.handles.append(layer.register_forward_hook(_leave_layer, prepend=True))

    def remove(self) -> None:
        """Take the hooks off."""
        remove_handles(self.handles)


def _current() -> CompiledForward | None:
    forward = running.forward
    return forward if isinstance(forward, CompiledForward) and forward.layer_plan is not None else None


def _number(forward: CompiledForward) -> int:
    assert forward.layer_plan is not None
    return forward.layer_plan.number


def _enter_layer(module: nn.Module, args: Any, kwargs: Any) -> Any:
    forward = _current()
    return None if forward is None else plain.enter_layer(forward, _number(forward), forward.family, args, kwargs)


def _enter_ffn(module: nn.Module, args: Any) -> Any:
    forward = _current()
    return None if forward is None else plain.enter_ffn(forward, _number(forward), args)


def _leave_ffn(module: nn.Module, args: Any, output: Any) -> Any:
    forward = _current()
    return None if forward is None else plain.leave_ffn(forward, output)


def _leave_layer(module: nn.Module, args: Any, output: Any) -> Any:
    forward = _current()
    return None if forward is None else plain.leave_layer(forward, _number(forward), output)
