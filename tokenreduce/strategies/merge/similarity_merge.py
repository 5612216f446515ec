"""FrameFusion's merging stage: tokens that look like the same spot of the frame before are averaged into it.

Paper: Fu et al., FrameFusion (2025), §4.1 for the stage, §7 for N_max.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenreduce.amounts import layer_of
from tokenreduce.ops.carry import Carry
from tokenreduce.ops.similarity import cosine_to, merge_runs, previous_in_slot, within_span
from tokenreduce.ops.topk import top_mask
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.merge.similarity_config import SimilarityConfig
from tokenreduce.strategy import (
    Capabilities,
    CountView,
    Decision,
    Outcome,
    Site,
    StageContext,
    Strategy,
)


class SimilarityMerge(Strategy):
    """Merge each token whose cosine with its slot's previous surviving token reaches `threshold` into the first of its run.

    Without a schedule it acts before layer 0's attention and then before the FFN of successive layers, until the share of
    similar tokens falls below `stop_below`. Where merging all of them would leave less than the budget, only the most
    similar are merged and the rest of the pipeline is skipped (N_max). Without a threshold it merges the most similar
    tokens, as many as `keep` or the budget says, wherever the pipeline puts it. At site `kv` only keys and values merge.
    """

    name = "similarity_merge"
    capabilities = Capabilities(
        sites=("pre_attention", "pre_ffn", "kv"), chooses_count=True, merges=True, content_dependent=True
    )

    Config = SimilarityConfig
    config: SimilarityConfig

    def schedule(self, depth: int) -> list[Site]:
        """Before the first layer's attention, then before successive FFNs, unless the stage says otherwise."""
        config = self.config
        if config.at is not None or config.site is not None or config.threshold is None:
            if config.at is None and config.site is None:
                return [Site(layer_of(config.from_ or 0, depth), "pre_attention")]
            return super().schedule(depth)
        layers = [site.layer for site in super().schedule(depth)]
        return [Site(layers[0], "pre_attention"), *(Site(layer, "pre_ffn") for layer in layers)]

    @property
    def fixed_count(self) -> bool:
        """Without a threshold the count is given."""
        return self.config.threshold is None

    def needs_budget(self) -> bool:
        """Only where neither a threshold nor a share tells how much to merge."""
        return self.config.threshold is None and self.config.keep is None

    def carry(self, depth: int) -> Carry:
        """Only a merge by threshold before layer 0, and no share of the whole video in its rule, needs no token to come."""
        config, sites = self.config, self.schedule(depth)
        if config.threshold is None:
            raise self.cannot_stream("without `threshold` it merges the most similar tokens of the whole video")
        if sites != [Site(0, "pre_attention")]:
            raise self.cannot_stream(f"it acts at {sites[-1]}, on states that depend on merges to come; write `at: 0`")
        if config.stop_below and not config.merge_below:
            raise self.cannot_stream("`stop_below` is a share of the whole video; write `stop_below: 0`")
        return Carry(config.threshold, config.max_run)

    def measure(self, ctx: StageContext) -> torch.Tensor:
        """(1,) long: how many tokens are similar; without a threshold, how many could merge at all."""
        config, known = self.config, ctx.kept_for_decide
        previous = known["previous"] = previous_in_slot(ctx.slot, ctx.medium, ctx.reducible)
        similarity = known["similarity"] = cosine_to(ctx.hidden, previous)
        similar = similarity > -torch.inf if config.threshold is None else similarity >= config.threshold
        if config.max_run is not None:
            similar = within_span(ctx.frame, previous, similar, config.max_run)
        known["similar"] = similar
        return similar.sum()[None]

    def decide(self, ctx: StageContext) -> Decision:
        """See the class."""
        config, (count,) = self.config, self.measured(ctx)
        similar = ctx.kept_for_decide["similar"]
        if config.threshold is None:
            merges = ctx.reducible_count - _mergeable(ctx, self.keep_count(ctx, "merge"), count)
            return Decision(self._merge(ctx, self._most(ctx, merges), merges), note=f"{merges} merged")
        share = count / max(ctx.reducible_count, 1)
        note = f"{share:.1%} similar"
        if ctx.has_budget and ctx.reducible_count - count <= ctx.allowance("bound"):
            merges = ctx.reducible_count - min(ctx.allowance("merge"), ctx.reducible_count)
            chosen, note = self._most(ctx, merges), f"{note}, {merges} allowed"
            return Decision(self._merge(ctx, chosen, merges), finished=True, budget_met=True, note=note)
        below = share < config.stop_below
        if below and not config.merge_below:
            return Decision(finished=True, consumed=False, note=note)
        return Decision(self._merge(ctx, similar, count), finished=below, note=note)

    def _most(self, ctx: StageContext, merges: int) -> torch.Tensor:
        """(n,) bool: the `merges` most similar of the similar ones."""
        return top_mask(ctx.kept_for_decide["similarity"], merges, ctx.kept_for_decide["similar"])

    def _merge(self, ctx: StageContext, similar: torch.Tensor, merges: int) -> Reduction:
        """Each of the `merges` tokens in `similar` (n,) bool goes into the first of its run: so many go, and no other."""
        target = merge_runs(ctx.kept_for_decide["previous"], similar)
        return replace(ctx.merge(target, self.config.weighting), counts=(ctx.n - merges,), proven=True)

    def forecast(self, view: CountView) -> Outcome:
        """As `decide`, taking `view.similar` of the tokens for similar at the first look and none at later ones."""
        config = self.config
        if config.threshold is None:
            kept = _mergeable(view, self.keep_count(view, "merge"), view.reducible_count - view.unmatched)
            return Outcome(kept if view.site.kind != "kv" else view.n - view.reducible_count + kept)
        count = 0 if view.state.setdefault("looked", False) else int(view.similar * view.reducible_count)
        if config.max_run is not None and view.frames > 1:
            spans = -(-view.frames // config.max_run)
            count = min(count, view.reducible_count * (view.frames - spans) // view.frames)
        count = min(count, view.reducible_count - view.unmatched)
        view.state["looked"] = True
        if view.allowance_source is not None and view.reducible_count - count <= view.allowance("bound"):
            return Outcome(min(view.allowance("merge"), view.reducible_count), finished=True, budget_met=True)
        below = count < config.stop_below * view.reducible_count
        if below and not config.merge_below:
            return Outcome(view.reducible_count, finished=True, consumed=False)
        return Outcome(view.reducible_count - count, finished=below)


def _mergeable(ctx: StageContext | CountView, keep: int, possible: int) -> int:
    """How many reducible tokens stay where `keep` of them should, and `possible` of them have a counterpart."""
    merges = ctx.reducible_count - keep
    if merges <= possible:
        return keep
    fixed = ctx.n - ctx.reducible_count if ctx.site.kind == "kv" else 0
    least = ctx.at_least(
        ctx.reducible_count - possible + fixed,
        f"similarity_merge at {ctx.site} would have to merge {merges} of {ctx.reducible_count} vision tokens, but only "
        f"{possible} have a counterpart in an earlier frame",
    )
    return least - fixed
