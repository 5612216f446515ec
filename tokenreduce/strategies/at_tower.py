"""What methods that act on the decoder's input by the vision tower's attention have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, Signal, StageContext, Strategy

Rows = Literal["cls", "mean"]


class TowerConfig(InputConfig):
    """Fields of a stage that ranks vision tokens by the attention that their patches receive in the tower."""

    rows: Rows = Field(
        "mean",
        description="Whose attention: the class token's (CLIP, InternVL), or the mean over all patches, for towers without one.",
    )
    block: int = Field(-1, description="Block of the tower; below 0 from the last whose output reaches the decoder.")


class TowerStrategy(Strategy):
    """A stage that needs the tower's attention from the rows that its config names, and what `more` adds."""

    more: ClassVar[tuple[Signal, ...]] = ()
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    def __init_subclass__(cls) -> None:
        cls.capabilities = replace(cls.capabilities, needs=("tower.mean", *cls.more))

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rows: Signal = "tower.cls" if config.rows == "cls" else "tower.mean"
        self.capabilities = replace(type(self).capabilities, needs=(rows, *self.more))  # type: ignore[misc]

    def tower_blocks(self, depth: int) -> tuple[int, ...]:
        """The block of the config."""
        return (self.config.block,)  # type: ignore[attr-defined]

    def received(self, ctx: StageContext) -> Tensor:
        """(n,) float: attention that each token receives, mean over heads; 0 for tokens that stand for no patch."""
        return ctx.tower.attention(self.config.block, self.config.rows).nan_to_num(0.0)  # type: ignore[attr-defined]
