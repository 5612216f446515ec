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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tokenreduce.amounts import Keep as Keep
from tokenreduce.amounts import Layer as Layer
from tokenreduce.amounts import Share as Share
from tokenreduce.amounts import Tokens, count_in, layer_of, of_total, share_in
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedError
from tokenreduce.layout import roles
from tokenreduce.ops.carry import Carry
from tokenreduce.ops.groups import Groups, grouped, shared, top_in_groups
from tokenreduce.ops.topk import top_mask
from tokenreduce.reduction import Mixture, Reduction, Weighting

SiteKind = Literal["pre_attention", "kv", "cache", "pre_ffn", "decode"]
SITE_ORDER: tuple[SiteKind, ...] = ("pre_attention", "kv", "cache", "pre_ffn", "decode")
"""The order in which a layer passes its sites: `decode` not in the prefill, but in steps of decoding, after their attention."""
HOLDING: tuple[SiteKind, ...] = ("kv", "cache")
"""Sites at which a stage says what a layer's KV cache holds, while all hidden states go on; a layer has one of the two."""
VisionKind = Literal["vision.input", "vision.block"]
VISION_ORDER: tuple[VisionKind, ...] = ("vision.input", "vision.block")
"""Sites of the vision tower, all before those of the decoder; see tokenreduce.vision."""

Signal = Literal["grid", "ids", "tower.cls", "tower.mean", "tower.pooled", "tower.keys"]
"""What not every model or layout can give: `ctx.row` and `ctx.column`, `ctx.ids`, and each of what `ctx.tower` has."""
CountKind = Literal["known", "solved", "video"]
"""Where a stage's count comes from: known from shapes, solved from the budget, or left to the video."""


class Site(NamedTuple):
    """A place in the decoder where tokens can go: `pre_attention`, `kv`, `cache`, `pre_ffn` or `decode` of layer `layer`.

    At `kv` keys and values go before the layer's attention, which then does not see them; at `cache` after it, so that the
    layer's output is as it was. At `decode` they go after the attention of a step of decoding, every `every` steps (a field of
    the stage's config, 1 without it): `ctx.attention` is that of the steps since, hidden states are not there (n, 0), and
    `ctx.state` is new each time.
    """

    layer: int
    kind: SiteKind

    @property
    def order(self) -> int:
        """Sorts sites in the order a forward passes them."""
        return 3 * self.layer + {"pre_attention": 0, "pre_ffn": 2}.get(self.kind, 1)

    def __str__(self) -> str:
        return f"layer[{self.layer}].{self.kind}"


@dataclass(frozen=True)
class Capabilities:
    """What a strategy needs and does; checked against model, schedule and budget before the first forward.

    sites: where it may act, its default first. attention: reads attention rows through `ctx.attention`: at all its sites, or
    only at those named.
    chooses_count: it can keep exactly as many tokens as a budget leaves. merges: it averages tokens, not only drops them.
    content_dependent: how many tokens it leaves depends on the video. waits: it acts once, after the stages before it.
    spans: at `kv` sites it decides on attention spans instead of which tokens stay.
    across_media: it may merge tokens of one image or video into another's. needs: what not every model can give; a pipeline
    that needs what the model or the layout lacks is refused by name before anything runs.
    text: at `cache` sites it may drop text, too; `ctx.reducible` is then all tokens.
    own_attention: at `pre_attention` sites `ctx.attention` is that which the layer itself is about to compute, not that of the
    layer before: layer 0 has it, too. Its norm and projections run twice then (5 to 7 % of the layer).
    """

    sites: tuple[SiteKind, ...] | tuple[VisionKind, ...]
    attention: bool | tuple[SiteKind, ...] = False
    chooses_count: bool = False
    merges: bool = False
    content_dependent: bool = False
    waits: bool = False
    spans: bool = False
    across_media: bool = False
    needs: tuple[Signal, ...] = ()
    text: bool = False
    own_attention: bool = False


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
        description="Layer or layers at which the stage acts, each a number or a share of the depth with a decimal point; "
        "`next`: once, where the stage before it has finished.",
    )
    from_: Layer | None = Field(None, alias="from", description="First layer of a range, or a share of the depth.")
    until: Layer | None = Field(None, description="Last layer of a range, included, or a share of the depth.")

    @model_validator(mode="after")
    def _one_schedule(self) -> StageConfig:
        if self.at is not None and (self.from_ is not None or self.until is not None):
            if "at" in self.model_fields_set:
                raise ValueError("a stage says either `at` or `from`/`until`, not both")
            raise ValueError(
                f"{self.strategy} acts at the layers in `at` ({self.at}); list them there instead of `from`/`until`"
            )
        comparable = type(self.from_) is type(self.until)
        if comparable and self.from_ is not None and self.until is not None and self.until < self.from_:
            raise ValueError(f"`until: {self.until}` comes before `from: {self.from_}`")
        if isinstance(self.at, list):
            # A number and a share are compared when the depth is known.
            each = [[layer for layer in self.at if isinstance(layer, kind)] for kind in (int, float)]
            if not self.at or any(layers != sorted(set(layers)) for layers in each):
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
Rows = Literal["sum", "max", "each"]
"""How the attention of several queries becomes one number per token: or does not."""


@dataclass(frozen=True)
class TowerView:
    """What the vision tower told of the tokens alive; declare `needs`, and the blocks in `Strategy.tower_blocks`.

    A token that stands for several patches has their mean, as the family pools them; one that stands for none (newlines, text)
    has NaN. Tokens that were merged have the value of the one that stayed. block: of the tower, from 0; below 0 from the last
    whose output reaches the decoder.
    """

    source: Callable[[str, int], Tensor]
    """(n, C) of a signal of a block."""

    def attention(
        self,
        block: int = -1,
        queries: Literal["cls", "mean"] = "mean",
        heads: Heads | Literal["each"] = "mean",
    ) -> Tensor:
        """(n,) float32, with `each` (H, n): attention that the patches receive from the class token, or as the mean over all
        patches of their frame (of their window, in blocks that attend in windows)."""
        if queries not in ("cls", "mean"):
            raise ValueError(f"queries must be cls or mean, got {queries!r}")
        found = self.source(f"tower.{queries}", block).T
        return found if heads == "each" else found.amax(0) if heads == "max" else found.mean(0)

    def keys(self, block: int = -1) -> Tensor:
        """(n, H·d): keys of the patches, head by head."""
        return self.source("tower.keys", block)

    @property
    def pooled(self) -> Tensor:
        """(n, D): the tower's pooled output of the frame that each token is in."""
        return self.source("tower.pooled", -1)


@dataclass
class StageContext:
    """One sequence at one site, as a strategy sees it. n tokens are alive, D is the hidden width.

    site, depth: where, in a decoder of how many layers. hidden: (n, D), the residual stream; at `kv` sites the layer's input.
    slot, frame, medium: (n,) long, −1 for text, see TokenLayout. position: (n,) long, place in the original sequence, padding not
    counted, growing.
    size: (n,) long, originals each token stands for. reducible: (n,) bool, tokens the stage may touch; all others stay.
    reducible_count: how many those are. original_reducible: how many they were at the start.
    state: a dict that the stage keeps for this sequence and this forward.
    role, marker, ids, row, column: further facts, (n,) long each, looked up when they are asked for; see there.

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
    attention_source: Callable[..., Tensor] | None = None
    allowance_source: Callable[[Action], int] | None = None
    refusal_source: Callable[[int, str], BudgetError] | None = None
    fact_source: Callable[[str], Tensor | None] | None = None
    tower_source: Callable[[str, int], Tensor] | None = None
    per_medium: int | None = None
    """Where the stage says `keep: {tokens: …, per: medium}`: how many tokens of each image or video stay."""
    settle_source: Callable[[int, str], int] | None = None
    held_source: Callable[[], tuple[Tensor, Tensor]] | None = None
    total: int | None = None
    """Tokens of the sequence before any went, above every `position`."""
    measured: list[Any] | None = None
    """What the strategy's `measure` asked for, as numbers."""
    kept_for_decide: dict[str, Any] = field(default_factory=dict)
    """What `measure` has computed, and `decide` need not compute again."""

    @property
    def n(self) -> int:
        """Tokens alive."""
        return self.hidden.shape[0]

    # Further facts ----------------------------------------------------------------------------------------------------

    def _fact(self, name: str) -> Tensor | None:
        return None if self.fact_source is None else self.fact_source(name)

    @cached_property
    def role(self) -> Tensor:
        """(n,) long: what each token is for: VISION, or text that is SYSTEM, BEFORE the first vision token, AROUND or between
        vision tokens, the QUESTION after the last, or the TAIL of the template after that. See `tokenreduce.layout.roles`."""
        found = self._fact("role")
        return roles(self.slot) if found is None else found

    @cached_property
    def marker(self) -> Tensor:
        """(n,) long: PLAIN, NEWLINE, WRAPPER or TIMESTAMP, see TokenLayout."""
        found = self._fact("marker")
        return torch.zeros_like(self.slot) if found is None else found

    @cached_property
    def ids(self) -> Tensor:
        """(n,) long: token ids as given to the model; at vision tokens the placeholder's. Declare `needs=("ids",)`."""
        return self._needed("ids", "it was called with embeddings; call it with input_ids")

    @cached_property
    def row(self) -> Tensor:
        """(n,) long: row of each token in the grid of its frame, −1 in none (text, newlines). Declare `needs=("grid",)`."""
        return self._needed("row", "its layout has no rows and columns; give TokenLayout(..., row=..., column=...)")

    @cached_property
    def column(self) -> Tensor:
        """(n,) long: column of each token in the grid of its frame, −1 in none. Declare `needs=("grid",)`."""
        return self._needed("column", "its layout has no rows and columns; give TokenLayout(..., row=..., column=...)")

    @property
    def tower(self) -> TowerView:
        """What the vision tower told. Declare `needs`, e.g. ("tower.mean",)."""
        if self.tower_source is None:
            raise UnsupportedError(
                f"{self.site}: a strategy reads ctx.tower, of which nothing is known; declare Capabilities(needs=('tower.mean',))"
            )
        return TowerView(self.tower_source)

    def _needed(self, name: str, why: str) -> Tensor:
        found = self._fact(name)
        if found is None:
            raise UnsupportedError(f"{self.site}: a strategy reads ctx.{name}, which this call does not give: {why}")
        return found

    # Budget -----------------------------------------------------------------------------------------------------------

    @property
    def has_budget(self) -> bool:
        """Whether `allowance` has an answer."""
        return self.allowance_source is not None

    def allowance(self, action: Action = "prune") -> int:
        """How many reducible tokens may stay from here on so that the whole forward meets its budget; at least 1.

        At `kv` and `cache` sites: how many tokens in all the layer's KV cache may hold. `action` matters only to a budget with
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

    def at_least(self, least: int, reason: str) -> int:
        """`least`, where the strategy cannot go down to its allowance and the stages after it can make up for that.

        least, reason: as in `refusal`, which is raised where they cannot. A pipeline with `on_infeasible: least` never refuses.
        """
        if self.settle_source is None:
            raise self.refusal(least, reason)
        return self.settle_source(least, reason)

    def attention(
        self,
        queries: Queries | Tensor = "last",
        heads: Heads | Literal["each"] = "mean",
        rows: Rows = "sum",
    ) -> Tensor:
        """(n,) float32: attention that each token receives, summed over `queries`, then mean or max over heads.

        queries: `last` row, `all` rows (cumulative importance), the last so many rows, or (r,) long, places among the n tokens:
        one pass, whatever their number. rows: `max` over them instead of the sum, or `each`. heads: `each` keeps them apart. The
        axes come first: (H, n), (r, n), (H, r, n). At `cache` and `pre_ffn` sites the layer's own attention, at `pre_attention`
        sites that of the layer before (the layer's own with Capabilities(own_attention=True)).
        No N×N matrix is made, unless all rows are asked for each.
        """
        if isinstance(queries, Tensor):
            if queries.dtype != torch.long or queries.dim() != 1:
                raise ValueError(f"queries must be an (r,) long tensor of places, got {queries.dtype} {queries.shape}")
            if len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < self.n:
                raise ValueError(f"queries must be places in 0 … {self.n - 1}")
        else:
            count = isinstance(queries, int) and not isinstance(queries, bool) and queries >= 1
            if not count and queries not in ("last", "all"):
                raise ValueError(
                    f"queries must be last, all, a whole number from 1, or a tensor of places, got {queries!r}"
                )
        if heads not in (*get_args(Heads), "each"):
            raise ValueError(f"heads must be mean, max or each, got {heads!r}")
        if rows not in get_args(Rows):
            raise ValueError(f"rows must be sum, max or each, got {rows!r}")
        if self.attention_source is None:
            raise PipelineError(f"{self.site}: no attention has been computed before this site")
        return self.attention_source(queries, heads) if rows == "sum" else self.attention_source(queries, heads, rows)

    @property
    def keys(self) -> Tensor:
        """(G, n, d): keys of the tokens in the attention that `attention` is of, after rotation, by KV head."""
        return self._held()[0]

    @property
    def values(self) -> Tensor:
        """(G, n, d): values of the tokens, see `keys`."""
        return self._held()[1]

    def _held(self) -> tuple[Tensor, Tensor]:
        if self.held_source is None:
            raise PipelineError(
                f"{self.site}: a strategy reads keys or values, which are there at `cache` sites, and where it reads attention"
            )
        return self.held_source()

    # Groups -----------------------------------------------------------------------------------------------------------

    def groups(self, by: Literal["frame", "medium"] | Tensor = "frame") -> Groups:
        """The reducible tokens by frame (of each medium), by medium, or by numbers of your own (n,) long, below 0 for none.

        Groups are numbered by their first token, and none is empty.
        """
        inside = self.reducible
        if isinstance(by, Tensor):
            if by.shape != (self.n,) or by.dtype != torch.long:
                raise ValueError(
                    f"groups needs one whole number per token, ({self.n},) long, got {by.dtype} {by.shape}"
                )
            return grouped(by, inside & (by >= 0))
        if by == "medium":
            return grouped(self.medium, inside)
        if by == "frame":
            return grouped(self.medium * (self.frame.max() + 1) + self.frame, inside)
        raise ValueError(f"groups are by frame, medium or a tensor, got {by!r}")

    def share(
        self, total: int, groups: Groups, weights: Sequence[float] | Tensor | None = None, least: int = 0
    ) -> tuple[int, ...]:
        """`total` tokens over the groups by `weights` (g,): largest remainder, exact sum, no group above its size.

        least: what each group gets first, where `total` and its size allow. Equal remainders go to the earlier group.
        """
        sizes = groups.counts
        base = [0] * len(sizes)
        if least and total >= (floor := sum(min(least, size) for size in sizes)):
            base, total = [min(least, size) for size in sizes], total - floor
        more = shared(total, [size - first for size, first in zip(sizes, base, strict=True)], weights)
        return tuple(first + extra for first, extra in zip(base, more, strict=True))

    # Decisions --------------------------------------------------------------------------------------------------------

    def keep(self, mask: Tensor) -> Reduction:
        """Keep the tokens where `mask` (n,) bool is True, and every token that may not be touched."""
        return Reduction.keep((mask | ~self.reducible)[None])

    def keep_top(
        self,
        scores: Tensor,
        count: int | None = None,
        *,
        per: Groups | None = None,
        counts: Sequence[int] | None = None,
    ) -> Reduction:
        """Keep every token that may not be touched and the `count` (default: what the budget leaves) others of highest score.

        scores: (n,). Ties go to the earlier token; NaN ranks last. per, counts: instead of one count, so many of each group;
        reducible tokens in no group go. At `cache` sites scores may be (G, n), a choice for each KV head.
        """
        if scores.dim() == 2 and self.site.kind == "cache" and per is None:
            each = [self.keep_top(row, count) for row in scores]
            kept = tuple(number for one in each for number in one.counts or ())
            return Reduction(torch.cat([one.target for one in each]), counts=kept, merges=False)
        if scores.shape != (self.n,):
            raise ValueError(f"keep_top needs one score per token, ({self.n},), got {tuple(scores.shape)}")
        if per is None and self.per_medium is not None and count is not None:
            per = self.groups("medium")
            counts, wanted = [min(self.per_medium, size) for size in per.counts], count
            if sum(counts) != wanted:
                raise PipelineError(f"{self.site}: a strategy that keeps {wanted} tokens cannot keep them per medium")
        if per is not None:
            if counts is None or len(counts) != per.count or any(one < 0 for one in counts):
                raise ValueError(f"keep_top needs a count from 0 for each of {per.count} groups, got {counts!r}")
            stays = sum(min(one, size) for one, size in zip(counts, per.counts, strict=True))
            mask = top_in_groups(scores, per, counts) & self.reducible | ~self.reducible
            return Reduction.keep(mask[None], counts=(self.n - self.reducible_count + stays,))
        count = reducible_allowance(self) if count is None else count
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"keep_top needs a whole number of tokens from 0, got {count!r}")
        count = min(count, self.reducible_count)
        mask = top_mask(scores, count, self.reducible) | ~self.reducible
        reduction = Reduction.keep(mask[None], counts=(self.n - self.reducible_count + count,))
        return replace(reduction, proven=True)

    def merge(
        self,
        target: Tensor,
        weighting: Weighting = "size",
        *,
        weights: Tensor | None = None,
        mixture: Mixture | None = None,
    ) -> Reduction:
        """Merge tokens into `target` (n,) long: its own place for a token that stays, −1 for one that is dropped.

        At `cache` sites keys and values merge, by `weighting`; there `target` may be (G, n), a choice for each KV head.

        weighting: `size`: the mean of the originals. `plain`: the mean of what is there. `keep_first`: the token that stays
        keeps its state, and what merges into it only counts. weights: (n,) float, instead: a reducible token that stays becomes
        Σ w·x over the tokens whose target it is, itself included, whether or not the weights sum to one. mixture: instead, edges
        from any tokens into any that stay, see Mixture. Merging across media needs Capabilities(across_media=True).
        """
        if weights is None and mixture is None:
            return Reduction.merge(target if target.dim() == 2 else target[None], weighting)
        if weights is not None:
            if weights.shape != (self.n,) or not weights.is_floating_point():
                raise ValueError(f"merge needs one weight per token, ({self.n},) float, got {tuple(weights.shape)}")
            source = (self.reducible & (target >= 0)).nonzero().squeeze(1)
            mixture = Mixture(target[source], source, weights[source])
        assert mixture is not None
        return Reduction.mix(target[None], mixture)

    def random(self, seed: int) -> Tensor:
        """(n,) uniform scores that depend on `seed` and the original positions only, not on batch, device or threads."""
        generator = torch.Generator().manual_seed(seed)
        last = self.total if self.total is not None else int(self.position.max()) + 1 if self.n else 0
        return torch.rand(last, generator=generator).to(self.position.device)[self.position]


@dataclass(frozen=True)
class Contents:
    """How the reducible tokens of a sequence lie in its frames: what bounds merging and the choice of whole frames."""

    frames: int
    """Frames with a reducible token, of all images and videos."""
    slots: int
    """Tokens without a counterpart in an earlier frame: no merge between frames leaves fewer."""
    first_frame: int
    """Tokens of the first frame."""
    largest_frame: int
    """Tokens of the largest frame."""

    @classmethod
    def even(cls, reducible: int, frames: int) -> Contents:
        """Frames of one size."""
        size = -(-reducible // max(frames, 1))
        return cls(frames, size, size, size)


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
    contents: Contents | None = None
    settle_source: Callable[[int, str], int] | None = None

    @property
    def unmatched(self) -> int:
        """Reducible tokens that have no counterpart in an earlier frame: the least that merging between frames leaves.

        After a stage that chose by content it may be fewer: as few as can be if all are taken to be `similar`, else as many.
        """
        known = self.contents
        if known is None:
            return min(self.reducible_count, 1)
        if self.similar == 1 and self.reducible_count < self.original_reducible:
            return -(-self.reducible_count // known.frames)
        return min(self.reducible_count, known.slots)

    @property
    def whole_frame(self) -> int:
        """Reducible tokens of the first frame that is left; of the largest, where an earlier stage chose by content."""
        known = self.contents
        if known is None:
            return min(self.reducible_count, 1)
        untouched = self.reducible_count == self.original_reducible
        if self.similar == 1 and not untouched:
            return -(-self.reducible_count // known.frames)
        return min(self.reducible_count, known.first_frame if untouched else known.largest_frame)

    def at_least(self, least: int, reason: str) -> int:
        """As StageContext.at_least."""
        if self.settle_source is None:
            return least
        return self.settle_source(least, reason)

    def attention(self, queries: Queries = "last") -> None:
        """To be called where `decide` reads attention: a budget of FLOPs has to pay for it. queries: of chosen rows, how many."""
        if self.reading is not None:
            self.reading(queries)

    def allowance(self, action: Action = "prune") -> int:
        """As StageContext.allowance."""
        if self.allowance_source is None:
            raise BudgetError(
                "this stage solves its count from a budget and there is none; give `budget` or the stage's `keep`"
            )
        return self.allowance_source(action)

    @property
    def per_medium(self) -> None:
        """Counts do not know of media: see `Strategy.keep_count`."""
        return None


def reducible_allowance(ctx: StageContext | CountView, action: Action = "prune") -> int:
    """How many reducible tokens the allowance leaves: at `kv` and `cache` sites it counts those that always stay, too."""
    fixed = ctx.n - ctx.reducible_count if ctx.site.kind in HOLDING else 0
    return max(ctx.allowance(action) - fixed, 1)


@dataclass(frozen=True)
class Outcome:
    """Forecast of a Decision: reducible tokens that remain (at `kv` sites: tokens the cache holds), and its flags.

    assumed: where the count depends on the video, what was taken for granted, in a clause; `plan` shows it.
    """

    count: int
    finished: bool = False
    budget_met: bool = False
    consumed: bool = True
    assumed: str = ""


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

    def measure(self, ctx: StageContext) -> Tensor | None:
        """(k,) numbers that `decide` has to know on the host, if any; there they are `measured(ctx)`.

        The engine brings those of all sequences of a batch over at once, in one synchronisation: a `.item()` in `decide` is one
        per sequence. What else is computed here, and `decide` needs too, goes into `ctx.kept_for_decide`.
        """
        return None

    def measured(self, ctx: StageContext) -> list[Any]:
        """The numbers of `measure`."""
        if ctx.measured is None:
            numbers = self.measure(ctx)
            ctx.measured = [] if numbers is None else numbers.tolist()
        return ctx.measured

    @abstractmethod
    def decide(self, ctx: StageContext) -> Decision | Reduction | None:
        """Look at one sequence and decide. A bare Reduction means: done with this site, go on with the next.

        None leaves the tokens as they are."""

    def forecast(self, view: CountView) -> Outcome:
        """What `decide` will do to the counts, without any token: what `tokenreduce plan` and the budget check know.

        The default is for strategies that keep as many as they may: the stage's `keep`, else the budget's allowance."""
        count = self.keep_count(view) if self.capabilities.chooses_count else view.reducible_count
        return Outcome(count + (view.n - view.reducible_count if view.site.kind in HOLDING else 0))

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

    def keep_at(self, site: Site, depth: int) -> Keep | None:
        """The stage's `keep` for `site`; None where the count is solved."""
        keep = getattr(self.config, "keep", None)
        if isinstance(keep, (list, tuple)):
            sites = self.schedule(depth)
            if len(keep) != len(sites):
                raise PipelineError(f"{self.name}: `keep` has {len(keep)} shares for {len(sites)} layers in `at`")
            keep = keep[sites.index(site)]
        return keep  # type: ignore[no-any-return]

    def share_at(self, site: Site, depth: int) -> Fraction | None:
        """The stage's `keep` for `site` as a share of the original reducible tokens; None where it is solved, or a count."""
        keep = self.keep_at(site, depth)
        return None if keep is None else share_in(keep)

    def count_at(self, site: Site, depth: int, original: int) -> int | None:
        """How many of `original` reducible tokens stay by the stage's `keep`, by a share at least 1; None: solved."""
        keep = self.keep_at(site, depth)
        count = None if keep is None else count_in(keep)
        if count is not None:
            return min(count, original)
        share = self.share_at(site, depth)
        return None if share is None else max(of_total(share, original), 1)

    def keep_count(self, ctx: StageContext | CountView, action: Action = "prune") -> int:
        """How many reducible tokens stay: by the stage's `keep`, else by the budget."""
        if ctx.per_medium is not None and isinstance(ctx, StageContext):
            return sum(min(ctx.per_medium, size) for size in ctx.groups("medium").counts)
        count = self.count_at(ctx.site, ctx.depth, ctx.original_reducible)
        return min(reducible_allowance(ctx, action) if count is None else count, ctx.reducible_count)

    def tower_blocks(self, depth: int) -> Sequence[int]:
        """Blocks of the vision tower, of `depth` whose output reaches the decoder, that `ctx.tower` is asked about; below 0 from
        the last. By default the last."""
        return (-1,)

    def reads(self, site: Site) -> bool:
        """Whether the stage reads attention at `site`."""
        attention = self.capabilities.attention
        return attention if isinstance(attention, bool) else site.kind in attention

    def schedule(self, depth: int) -> list[Site]:
        """The sites at which the stage is asked, in order, for a decoder of `depth` layers."""
        config = self.config
        kind: SiteKind = config.site or self.capabilities.sites[0]  # type: ignore[assignment]
        own = self.capabilities.own_attention
        if config.at is not None and config.at != "next":
            layers = [layer_of(layer, depth) for layer in (config.at if isinstance(config.at, list) else [config.at])]
            if layers != sorted(set(layers)):
                raise PipelineError(
                    f"{self.name}: `at: {config.at}` is layers {layers} of {depth}; they must grow without repeats"
                )
        else:
            # Attention before a layer's own is that of the layer before: layer 0 has none.
            first = 1 if kind == "pre_attention" and self.reads(Site(0, kind)) and not own else 0
            last = depth - 1 if config.until is None else layer_of(config.until, depth)
            layers = list(range(max(layer_of(config.from_ or 0, depth), first), last + 1))
        if kind == "pre_attention" and 0 in layers and self.reads(Site(0, kind)) and not own:
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
    def decodes(self) -> bool:
        """Whether the stage acts in steps of decoding, and not in the prefill."""
        return (self.config.site or self.capabilities.sites[0]) == "decode"

    @property
    def once(self) -> bool:
        """Whether the stage acts at one site only: the first it is free to act at."""
        return self.capabilities.waits and self.config.at in (None, "next")

    @property
    def fixed_count(self) -> bool:
        """Whether `forecast` knows how many tokens `decide` leaves, whatever the video shows: what a compiled model needs."""
        keep = getattr(self.config, "keep", None)
        each = keep if isinstance(keep, (list, tuple)) else [keep]
        if any(isinstance(one, Tokens) and one.per for one in each):
            return False  # How many media there are, shapes do not say.
        return not self.capabilities.content_dependent

    @property
    def count_kind(self) -> CountKind:
        """Where the count comes from: what `tokenreduce plan` says of its figures."""
        if not self.fixed_count:
            return "video"
        needs = self.needs_budget
        return "solved" if (needs() if callable(needs) else needs) else "known"

    def needs_budget(self) -> bool:
        """Whether the stage cannot act without a budget."""
        return self.capabilities.chooses_count and getattr(self.config, "keep", None) is None
