"""All that the author of a strategy for the vision tower needs to read.

The LLM is not the only cost: once it is four times faster, the tower dominates. A vision strategy looks at *all frames of one
call of the tower* and returns a `Reduction`: which frames or patch tokens stay, and which are merged into which. Nothing is
dropped, and every frame keeps equally many tokens, so that no mask is needed. At the tower's end the engine puts back what was
merged: every patch gets the state of the token it went into, so that projector, pooling and layout see the full grid.

    class MergePairs(VisionStrategy):
        '''Average each patch with its right neighbour.'''
        name = "merge_pairs"
        capabilities = Capabilities(sites=("vision.block",), merges=True)

        class Config(VisionStageConfig):
            strategy: Literal["merge_pairs"] = "merge_pairs"

        def decide(self, ctx):
            column = torch.arange(ctx.n, device=ctx.hidden.device)
            patch = column - (ctx.n - ctx.patches)  # below 0: class tokens
            target = torch.where(patch > 0, column - patch % 2, column)
            return Reduction.merge(target.repeat(ctx.frames, 1))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import AnyStageConfig, Capabilities, Share, VisionKind

Block = Annotated[int, Field(ge=0, strict=True)]


class VisionSite(NamedTuple):
    """A place in the tower: before it (`vision.input`, whole frames), or before its block `block`."""

    kind: VisionKind
    block: int = -1

    def __str__(self) -> str:
        return self.kind if self.kind == "vision.input" else f"vision.block[{self.block}]"


class VisionStageConfig(AnyStageConfig):
    """Fields of every stage in the vision tower. A strategy's own config subclasses it and pins `strategy`."""

    site: VisionKind | None = Field(None, description="Where in the tower the stage acts: the strategy's own site.")


class BlockStageConfig(VisionStageConfig):
    """Fields of stages inside the tower."""

    at: Block | list[Block] = Field(description="Block or blocks of the tower before which the stage acts.")

    @model_validator(mode="after")
    def _growing(self) -> BlockStageConfig:
        if isinstance(self.at, list) and (not self.at or self.at != sorted(set(self.at))):
            raise ValueError("`at` must be a list of blocks in growing order without repeats")
        return self


@dataclass(frozen=True)
class VisionContext:
    """F frames of one call of the tower, n tokens each, D values per token.

    site, depth: where, in a tower of how many blocks. hidden: (F, n, D): before block `site.block` its input; at `vision.input`
    the pixels of each patch as the tower is given them (normalised). size: (F, n) long, original tokens that each stands for.
    movable: (n,) bool, the patches, in raster order; class tokens before them stay. patches: how many a frame had at the start.

    hidden is the tower's own memory, perhaps the caller's pixels: to write to it, clone it; see StageContext.
    """

    site: VisionSite
    depth: int
    hidden: Tensor
    size: Tensor
    movable: Tensor
    patches: int

    @property
    def frames(self) -> int:
        """F."""
        return self.hidden.shape[0]

    @property
    def n(self) -> int:
        """Tokens of a frame."""
        return self.hidden.shape[1]


class VisionStrategy(ABC):
    """One way of sparing the vision tower work. Subclasses set `name`, `capabilities`, `Config` and write `decide`.

    `capabilities.sites` is one site: `vision.input` or `vision.block`.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Config: ClassVar[type[VisionStageConfig]]
    place: int = 0
    """Its place in the pipeline; set by `build_vision`."""
    proportional: bool = False
    """Whether attention in the blocks that follow counts a token as often as the patches that it stands for."""

    lossless: bool = False
    """Whether frames stand only for frames that are the same bit for bit."""

    def __init__(self, config: VisionStageConfig) -> None:
        self.config = config

    @abstractmethod
    def decide(self, ctx: VisionContext) -> Reduction | None:
        """At `vision.input` a reduction (1, F) of frames, at `vision.block` one (F, n) of tokens; None leaves all as it is."""

    def schedule(self, depth: int) -> list[VisionSite]:
        """The sites at which the stage is asked, for a tower of `depth` blocks whose output reaches the decoder."""
        kind: VisionKind = self.capabilities.sites[0]  # type: ignore[assignment]
        if kind == "vision.input":
            return [VisionSite(kind)]
        at = getattr(self.config, "at", 0)
        blocks = [at] if isinstance(at, int) else list(at)
        if blocks[-1] >= depth:
            raise PipelineError(
                f"{self.name} acts at block {blocks[-1]} of the vision tower, but its features come from blocks 0 … {depth - 1}"
            )
        return [VisionSite(kind, block) for block in blocks]

    def keep_count(self, ctx: VisionContext) -> int:
        """Patches of a frame that stay by the stage's `keep`, a share of those at the start; at least 1."""
        keep: Share | list[Share] = self.config.keep  # type: ignore[attr-defined]
        if isinstance(keep, list):
            keep = keep[self.schedule(ctx.depth).index(ctx.site)]
        return min(max(int(Fraction(repr(keep)) * ctx.patches), 1), int(ctx.movable.sum()))
