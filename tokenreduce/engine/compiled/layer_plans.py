"""What a compiled graph has to know of a forward before it runs: where stages will act, and how many tokens they leave."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.planning.schedule import Conductor, forecast
from tokenreduce.strategy import Site, SiteKind, Strategy

PHASES: tuple[SiteKind | None, ...] = ("pre_attention", "kv", "pre_ffn", None)
"""What a layer passes, in order: its sites, and its end."""


@dataclass
class SitePlan:
    """What the graph knows of a site where stages act."""

    layer: int
    """Counted from 0."""
    phase: int
    """Index into PHASES."""
    counts: list[int]
    """Tokens of each row afterwards."""
    padded: bool
    """Rows then differ in length."""
    changes: bool
    """A token goes."""
    reads: bool
    """A stage reads attention there."""


@dataclass
class LayerPlan:
    """One layer. Layers are a chain and not a numbered list, so that layers in which the same happens share one graph."""

    number: int
    """Counted from 0; −1 of what leads to the first."""
    before: SitePlan | None
    """Before its attention; None where no stage acts."""
    ffn: SitePlan | None
    """Before its FFN; None where no stage acts."""
    deep: bool
    """Deepstack rows are added after it."""
    following: LayerPlan | None
    """The next layer; None after the last."""

    @property
    def read(self) -> bool:
        """Whether the next stage reads the attention of this layer."""
        after = None if self.following is None else self.following.before
        return (self.ffn is not None and self.ffn.reads) or (after is not None and after.reads)


def chain(sequences: Many[TokenSequence], strategies: Many[Strategy], deepstack: int) -> LayerPlan:
    """The plan that leads to layer 0, from a forecast of all counts. deepstack: how many layers have rows added after them."""
    conductors = [_forecast(sequence, strategies if sequence.conductor.runs else ()) for sequence in sequences]
    reads_at: dict[Site, bool] = {}
    for conductor in conductors:
        for site, run in conductor.visited:
            reads_at[site] = reads_at.get(site, False) or run.strategy.reads(site)
    accounts = [conductor.account for conductor in conductors]
    depth = accounts[0].shape.layers
    before, visits = [len(sequence) for sequence in sequences], {}
    for layer in range(depth):
        for phase in (0, 2):
            counts = [(account.ffn if phase else account.attn)[layer] for account in accounts]
            site = Site(layer, PHASES[phase])  # type: ignore[arg-type]
            if site in reads_at:
                visits[layer, phase] = SitePlan(
                    layer, phase, counts, len(set(counts)) > 1, counts != before, reads_at[site]
                )
            before = counts
    plan: LayerPlan | None = None
    for layer in reversed(range(depth)):
        plan = LayerPlan(layer, visits.get((layer, 0)), visits.get((layer, 2)), layer < deepstack, plan)
    return LayerPlan(-1, None, None, False, plan)


def _forecast(sequence: TokenSequence, strategies: Many[Strategy]) -> Conductor:
    """The counts of `sequence` in every layer, as `tokenreduce plan` knows them."""
    return forecast(strategies, sequence.conductor.account.afresh())
