"""Hooks that do no harm outside their attachment: not on a deep copy, not in a pickle, not after detach."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class Hook:
    """Calls `owner.method(module, ...)` as long as the owner lives and `module` is the module it was put on.

    A deep copy of a model carries its hooks along; there they find another module and do nothing. A pickle carries inert
    ones.
    """

    def __init__(self, owner: Any, method: str, module: nn.Module, *extra: Any) -> None:
        self.owner, self.method, self.extra = weakref.ref(owner), method, extra
        self.module = weakref.ref(module)

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        owner = self.owner()
        if owner is None or self.module() is not module:
            return None
        return getattr(owner, self.method)(*self.extra, module, *args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _inert, ()


class _Inert:
    """What a hook becomes in a pickle."""

    def __call__(self, *args: Any) -> None:
        return None


def _inert() -> _Inert:
    return _Inert()
