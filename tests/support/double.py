"""A strategy that does what the test says, and the fixture that registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest

from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageConfig, StageContext, Strategy


class Double(Strategy):
    """Does what the test says."""

    name = "double"
    capabilities = Capabilities(
        sites=("pre_attention", "pre_ffn", "kv"), merges=True, content_dependent=True, chooses_count=True
    )
    act: ClassVar[Callable[[StageContext], Any]]

    class Config(StageConfig):
        strategy: Literal["double"] = "double"
        keep: float | None = None

    def decide(self, ctx: StageContext) -> Any:
        return type(self).act(ctx)

    def forecast(self, view: CountView) -> Outcome:
        return Outcome(min(view.allowance(), view.reducible_count) if view.allowance_source else view.reducible_count)


class Plugin:
    @hookimpl
    def tokenreduce_strategies(self) -> list[type[Strategy]]:
        return [Double]


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    plugin = Plugin()
    manager().register(plugin, "test-plugin:double")
    yield
    manager().unregister(plugin)
