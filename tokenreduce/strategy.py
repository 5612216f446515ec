"""All that the author of a strategy needs to read.

A strategy is a pydantic config and one method. It looks at *one* sequence through a `StageContext` (no batch, no padding)
and returns a `Decision`: which tokens stay, which are merged into which, which go. The engine does everything else:
batches, masks, rotary positions, KV caches, budgets, provenance.

    class KeepBright(Strategy):
        '''Keep the vision tokens of largest norm.'''
        name = "keep_bright"
        capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

        class Config(StageConfig):
            strategy: Literal["keep_bright"] = "keep_bright"

        def decide(self, ctx):
            return ctx.keep_top(ctx.hidden.norm(dim=-1))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tokenreduce.errors import BudgetError, PipelineError, UnsupportedError
from tokenreduce.ops.carry import Carry
from tokenreduce.ops.topk import top_mask
from tokenreduce.reduction import Reduction, Weighting

SiteKind = Literal["pre_attention", "kv", "pre_ffn"]
SITE_ORDER: tuple[SiteKind, ...] = ("pre_attention", "kv", "pre_ffn")
"""The order in which a layer passes its sites."""
VisionKind = Literal["vision.input", "vision.block"]
VISION_ORDER: tuple[VisionKind, ...] = ("vision.input", "vision.block")
"""Sites of the vision tower, all before those of the decoder; see tokenreduce.vision."""

Layer = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(gt=0, le=1)]


class Site(NamedTuple):
    """A place in the decoder where tokens can go: `pre_attention`, `kv` or `pre_ffn` of layer `layer`."""

    layer: int
    kind: SiteKind

    @property
    def order(self) -> int:
        """Sorts sites in the order a forward passes them."""
        return 3 * self.layer + SITE_ORDER.index(self.kind)

    def __str__(self) -> str:
        return f"layer[{self.layer}].{self.kind}"


@dataclass(frozen=True)
class Capabilities:
    """What a strategy needs and does; checked against model, schedule and budget before the first forward.

    sites: where it may act, its default first. attention: reads attention rows through `ctx.attention`.
    chooses_count: it can keep exactly as many tokens as a budget leaves. merges: it averages tokens, not only drops them.
    content_dependent: how many tokens it leaves depends on the video. waits: it acts once, after the stages before it.
    spans: at `kv` sites it decides on attention spans instead of which tokens stay.
    """

    sites: tuple[SiteKind, ...] | tuple[VisionKind, ...]
    attention: bool = False
    chooses_count: bool = False
    merges: bool = False
    content_dependent: bool = False
    waits: bool = False
    spans: bool = False


class AnyStageConfig(BaseModel):
    """What stages of the decoder and of the vision tower have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    strategy: str = Field(description="Name of the strategy; `tokenreduce strategies` lists them.")
    site: Any = None


class StageConfig(AnyStageConfig):
    """Fields that every stage in the decoder has. A strategy's own config subclasses it and pins `strategy`."""

    site: SiteKind | None = Field(None, description="Where in a layer the stage acts; default: the strategy's own.")
    at: Layer | list[Layer] | Literal["next"] | None = Field(
        None,
        description="Layer or layers at which the stage acts; `next`: once, where the stage before it has finished.",
    )
    from_: Layer | None = Field(None, alias="from", description="First layer of a range.")
    until: Layer | None = Field(None, description="Last layer of a range, included.")

    @model_validator(mode="after")
    def _one_schedule(self) -> StageConfig:
        if self.at is not None and (self.from_ is not None or self.until is not None):
            if "at" in self.model_fields_set:
                raise ValueError("a stage says either `at` or `from`/`until`, not both")
            raise ValueError(
                f"{self.strategy} acts at the layers in `at` ({self.at}); list them there instead of `from`/`until`"
            )
        if self.from_ is not None and self.until is not None and self.until < self.from_:
            raise ValueError(f"`until: {self.until}` comes before `from: {self.from_}`")
        if isinstance(self.at, list) and (not self.at or self.at != sorted(set(self.at))):
            raise ValueError("`at` must be a list of layers in growing order without repeats")
        return self


@dataclass(frozen=True)
class Span:
    """What a query at position p may see at a `kv` site: the first `sinks` tokens and the last `window`, itself included.

    Whole numbers: sinks from 0, window from 1.
    """

    sinks: int
    window: int


@dataclass(frozen=True)
class Decision:
    """What a strategy decided for one sequence at one site.

    reduction: of shape (1, n), on the tokens' device; None leaves the tokens as they are. span: at `kv` sites, an attention
    span instead.
    finished: this stage will not act again in this forward. budget_met: nor need any later stage that waits for it.
    consumed: a stage that waits for this one starts at the next site; False lets it start at this very site.
    note: shown in the trace, e.g. why merging ended.

    The engine takes none of it on trust: a value of another type is refused (PluginError), as is what touches other tokens than
    it may. The flags are bools: a tensor has to be made one by the strategy, which costs a device synchronisation.
    """

    reduction: Reduction | None = None
    span: Span | None = None
    finished: bool = False
    budget_met: bool = False
    consumed: bool = True
    note: str = ""


Queries = Literal["last", "all"] | int
Action = Literal["prune", "merge", "bound"]
Heads = Literal["mean", "max"]


@dataclass
class StageContext:
    """One sequence at one site, as a strategy sees it. n tokens are alive, D is the hidden width.

    site, depth: where, in a decoder of how many layers. hidden: (n, D), the residual stream; at `kv` sites the layer's input.
    slot, frame, medium: (n,) long, −1 for text, see TokenLayout. position: (n,) long, place in the original sequence, padding not
    counted, growing.
    size: (n,) long, originals each token stands for. reducible: (n,) bool, tokens the stage may touch; all others stay.
    reducible_count: how many those are. original_reducible: how many they were at the start.
    state: a dict that the stage keeps for this sequence and this forward.

    hidden is the model's own memory, at layer 0 perhaps the caller's: to write to it, clone it. A write is noticed by the
    tensor's version counter and refused (PluginError), in inference mode too; only what goes round the counter (`.data`,
    `.numpy()`) is not. The facts (slot … reducible) are copies.
    """

    site: Site
    depth: int
    hidden: Tensor
    slot: Tensor
    frame: Tensor
    medium: Tensor
    position: Tensor
    size: Tensor
    reducible: Tensor
    reducible_count: int
    original_reducible: int
    state: dict[str, Any] = field(default_factory=dict)
    attention_source: Callable[[Queries, Heads], Tensor] | None = None
    allowance_source: Callable[[Action], int] | None = None
    refusal_source: Callable[[int, str], BudgetError] | None = None

    @property
    def n(self) -> int:
        """Tokens alive."""
        return self.hidden.shape[0]

    @property
    def has_budget(self) -> bool:
        """Whether `allowance` has an answer."""
        return self.allowance_source is not None

    def allowance(self, action: Action = "prune") -> int:
        """How many reducible tokens may stay from here on so that the whole forward meets its budget; at least 1.

        At `kv` sites: how many tokens in all the layer's KV cache may hold. `action` matters only to a budget with
        `arithmetic: released`: a `prune` keeps the nearest number, a `merge` rounds up, `bound` rounds down.
        """
        if self.allowance_source is None:
            raise BudgetError(
                "this stage solves its count from a budget and there is none; give `budget` or the stage's `keep`"
            )
        return self.allowance_source(action)

    def refusal(self, least: int, reason: str) -> BudgetError:
        """The error to raise where the strategy cannot go down to its allowance: names the smallest budget that it can meet.

        least: what it could leave here (reducible tokens; at `kv` sites, tokens in all). reason: why not less, in a clause.
        """
        return BudgetError(reason) if self.refusal_source is None else self.refusal_source(least, reason)

    def attention(self, queries: Queries = "last", heads: Heads = "mean") -> Tensor:
        """(n,) float32: attention that each token receives, summed over `queries`, then mean or max over heads.

        queries: `last` row, `all` rows (cumulative importance), or the last so many rows. At `pre_ffn` sites the layer's own
        attention, at `pre_attention` sites that of the layer before. No N×N matrix is made.
        """
        count = isinstance(queries, int) and not isinstance(queries, bool) and queries >= 1
        if not count and queries not in ("last", "all"):
            raise ValueError(f"queries must be last, all or a whole number from 1, got {queries!r}")
        if heads not in get_args(Heads):
            raise ValueError(f"heads must be mean or max, got {heads!r}")
        if self.attention_source is None:
            raise PipelineError(f"{self.site}: no attention has been computed before this site")
        return self.attention_source(queries, heads)

    def keep_top(self, scores: Tensor, count: int | None = None) -> Reduction:
        """Keep every token that may not be touched and the `count` (default: what the budget leaves) others of highest score.

        scores: (n,). Ties go to the earlier token; NaN ranks last.
        """
        count = reducible_allowance(self) if count is None else count
        if scores.shape != (self.n,):
            raise ValueError(f"keep_top needs one score per token, ({self.n},), got {tuple(scores.shape)}")
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"keep_top needs a whole number of tokens from 0, got {count!r}")
        count = min(count, self.reducible_count)
        mask = top_mask(scores, count, self.reducible) | ~self.reducible
        return Reduction.keep(mask[None], counts=(self.n - self.reducible_count + count,))

    def merge(self, target: Tensor, weighting: Weighting = "size") -> Reduction:
        """Merge tokens into `target` (n,) long."""
        return Reduction.merge(target[None], weighting)

    def random(self, seed: int) -> Tensor:
        """(n,) uniform scores that depend on `seed` and the original positions only, not on batch, device or threads."""
        generator = torch.Generator().manual_seed(seed)
        last = int(self.position.max()) + 1 if self.n else 0
        return torch.rand(last, generator=generator).to(self.position.device)[self.position]


@dataclass
class CountView:
    """What is known of a sequence before there are tensors: counts only. See `Strategy.forecast`.

    similar: assumed share of reducible tokens that resemble the frame before them at the first merge (S_threshold is the
    median similarity by FrameFusion §7, hence 0.5 by default); later merges are taken to find none. frames: how many.
    """

    site: Site
    depth: int
    n: int
    reducible_count: int
    original_reducible: int
    state: dict[str, Any]
    allowance_source: Callable[[Action], int] | None
    similar: float = 0.5
    frames: int = 1
    reading: Callable[[Queries], None] | None = None

    def attention(self, queries: Queries = "last") -> None:
        """To be called where `decide` reads attention: a budget of FLOPs has to pay for it."""
        if self.reading is not None:
            self.reading(queries)

    def allowance(self, action: Action = "prune") -> int:
        """As StageContext.allowance."""
        if self.allowance_source is None:
            raise BudgetError(
                "this stage solves its count from a budget and there is none; give `budget` or the stage's `keep`"
            )
        return self.allowance_source(action)


def reducible_allowance(ctx: StageContext | CountView, action: Action = "prune") -> int:
    """How many reducible tokens the allowance leaves: at `kv` sites it counts those that always stay, too."""
    fixed = ctx.n - ctx.reducible_count if ctx.site.kind == "kv" else 0
    return max(ctx.allowance(action) - fixed, 1)


@dataclass(frozen=True)
class Outcome:
    """Forecast of a Decision: reducible tokens that remain (at `kv` sites: tokens the cache holds), and its flags."""

    count: int
    finished: bool = False
    budget_met: bool = False
    consumed: bool = True


class Strategy(ABC):
    """One way of choosing tokens. Subclasses set `name`, `capabilities`, `Config` and write `decide`."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    Config: ClassVar[type[StageConfig]]
    place: int = 0
    """Its place in the pipeline; set by `build`."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        site = config.site
        if site is not None and site not in self.capabilities.sites:
            raise PipelineError(
                f"{self.name} cannot act at site '{site}' (it can at: {', '.join(self.capabilities.sites)})"
            )

    @abstractmethod
    def decide(self, ctx: StageContext) -> Decision | Reduction | None:
        """Look at one sequence and decide. A bare Reduction means: done with this site, go on with the next.

        None leaves the tokens as they are."""

    def forecast(self, view: CountView) -> Outcome:
        """What `decide` will do to the counts, without any token: what `tokenreduce plan` and the budget check know.

        The default is for strategies that keep as many as they may: the stage's `keep`, else the budget's allowance."""
        count = self.keep_count(view) if self.capabilities.chooses_count else view.reducible_count
        return Outcome(count + (view.n - view.reducible_count if view.site.kind == "kv" else 0))

    def carry(self, depth: int) -> Carry | None:
        """What the stage remembers between the chunks of a stream (`tokenreduce.stream`).

        A Carry: it merges before layer 0, as the Carry does. None: at `kv` sites, each chunk can be decided by itself, as a later
        turn is. UnsupportedError, the default, says why the stage must see the whole sequence.
        """
        if self.capabilities.attention:
            raise self.cannot_stream("it ranks tokens by the attention of queries that have not come yet")
        raise self.cannot_stream("it chooses among the tokens of the whole video")

    def cannot_stream(self, reason: str) -> UnsupportedError:
        """The error for `carry` to raise."""
        return UnsupportedError(f"{self.name} cannot run in a stream: {reason}")

    def share_at(self, site: Site, depth: int) -> Fraction | None:
        """The stage's `keep` for `site`: the share of the original reducible tokens that stays, None where it is solved."""
        keep = getattr(self.config, "keep", None)
        if isinstance(keep, (list, tuple)):
            sites = self.schedule(depth)
            if len(keep) != len(sites):
                raise PipelineError(f"{self.name}: `keep` has {len(keep)} shares for {len(sites)} layers in `at`")
            keep = keep[sites.index(site)]
        return None if keep is None else Fraction(repr(keep))

    def keep_count(self, ctx: StageContext | CountView, action: Action = "prune") -> int:
        """How many reducible tokens stay: by the stage's `keep`, else by the budget."""
        keep = self.share_at(ctx.site, ctx.depth)
        count = reducible_allowance(ctx, action) if keep is None else max(int(keep * ctx.original_reducible), 1)
        return min(count, ctx.reducible_count)

    def schedule(self, depth: int) -> list[Site]:
        """The sites at which the stage is asked, in order, for a decoder of `depth` layers."""
        config = self.config
        kind: SiteKind = config.site or self.capabilities.sites[0]  # type: ignore[assignment]
        if isinstance(config.at, int):
            layers = [config.at]
        elif isinstance(config.at, list):
            layers = list(config.at)
        else:
            # Attention before a layer's own is that of the layer before: layer 0 has none.
            first = 1 if self.capabilities.attention and kind == "pre_attention" else 0
            layers = list(
                range(max(config.from_ or 0, first), (depth - 1 if config.until is None else config.until) + 1)
            )
        if self.capabilities.attention and kind == "pre_attention" and 0 in layers:
            raise PipelineError(
                f"{self.name} reads attention, and before layer 0 there is none; let it act at layer 1 or later"
            )
        if not layers:
            raise PipelineError(f"{self.name} acts at no layer of a model of {depth} layers; mend `from` and `until`")
        for layer in layers:
            if layer >= depth:
                raise PipelineError(f"{self.name} acts at layer {layer}, but the model has layers 0 … {depth - 1}")
        return [Site(layer, kind) for layer in layers]

    @property
    def once(self) -> bool:
        """Whether the stage acts at one site only: the first it is free to act at."""
        return self.capabilities.waits and self.config.at in (None, "next")

    @property
    def fixed_count(self) -> bool:
        """Whether `forecast` knows how many tokens `decide` leaves, whatever the video shows: what a compiled model needs."""
        return not self.capabilities.content_dependent

    def needs_budget(self) -> bool:
        """Whether the stage cannot act without a budget."""
        return self.capabilities.chooses_count and getattr(self.config, "keep", None) is None
