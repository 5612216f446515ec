"""Hooks that do no harm outside their attachment: not on a deep copy, not in a pickle, not after detach."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokenreduce.engine.model import tap
from tokenreduce.errors import UnsupportedError


class Hook:
    """Calls the bound `method(*extra, module, ...)` as long as its object lives and `module` is the module it was put on.

    A deep copy of a model carries its hooks along; there they find another module and do nothing. A pickle carries inert
    ones, and makes the tap known where it is loaded, because the model's configuration names it.
    """

    def __init__(self, method: Callable[..., Any], module: nn.Module, *extra: Any) -> None:
        self.method, self.extra = weakref.WeakMethod(method), extra
        self.module = weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        method = self.method()
        if method is None or self.module() is not module:
            if method is not None and getattr(module, "_is_replica", False):
                raise UnsupportedError(
                    "torch.nn.DataParallel runs copies of the model, which no pipeline is attached to; use one process per GPU "
                    "(torchrun), or device_map"
                )
            return None
        if torch.compiler.is_compiling():  # Asked because to be disabled costs as much again, at every token.
            return _outside_the_graph(method, *self.extra, module, *args)
        return method(*self.extra, module, *args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        host = getattr(getattr(self.method(), "__self__", None), "host", None)
        return inert, (getattr(host, "implementation", ""),)


@torch.compiler.disable(reason="a token reduction begins or ends here")  # type: ignore[untyped-decorator]
def _outside_the_graph(method: Callable[..., Any], *args: Any) -> Any:
    return method(*args)


def remove_handles(handles: list[Any]) -> None:
    """Remove hooks. One that Ctrl-C leaves is still in the list, for the next time."""
    while handles:
        handles[-1].remove()
        handles.pop()


class Inert:
    """What a hook becomes in a pickle."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __call__(self, *args: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return inert, (self.implementation,)


def inert(implementation: str) -> Inert:
    """A hook that does nothing, on a model whose attention is the tap around `implementation`."""
    if implementation:
        tap.tapped(implementation)
    return Inert(implementation)
