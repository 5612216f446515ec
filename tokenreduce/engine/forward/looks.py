"""The stages' looks at one forward: each is asked what to do, its answer is held to the contract, and a record is kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenreduce import plugins
from tokenreduce.engine.forward.sequence import AttentionSource, HeldSource, Part, TokenSequence
from tokenreduce.planning.schedule import StageRun, takes_text
from tokenreduce.plugin_checks import as_decision, decide_with
from tokenreduce.strategy import Decision, Site
from tokenreduce.trace import StageTrace


class Looks:
    """What the stages were asked in one forward, and what they did."""

    traces: list[StageTrace]
    """Every look so far, in order."""
    unobserved: list[StageTrace]
    """Those of which the observers have not been told yet."""

    def __init__(self) -> None:
        self.traces, self.unobserved = [], []

    def ask(
        self,
        sequence: TokenSequence,
        part: Part,
        run: StageRun,
        site: Site,
        hidden: Tensor,
        attention: AttentionSource | None,
        held: HeldSource | None = None,
    ) -> Decision:
        """What `run` decides about `part`, given the hidden (n, D) of `sequence`. PluginError where it breaks the contract.

        held: keys and values, where it may read them."""
        who = f"strategy {run.strategy.name} at {site}"
        ctx = sequence.context(run, site, hidden, attention, part, held)
        decision = as_decision(who, site, decide_with(who, run.strategy.decide, ctx))
        if decision.reduction is not None:
            allowed = run.strategy.capabilities
            heads = None if held is None or site.kind != "cache" else held()[0].shape[0]
            text = takes_text(run.strategy, site)
            sequence.check(run.strategy.name, site, decision.reduction, allowed.across_media, heads, text)
        return decision

    def record(
        self,
        sequence: TokenSequence,
        part: Part,
        run: StageRun,
        site: Site,
        decision: Decision,
        before: int,
        after: int,
        merged: int,
    ) -> None:
        """Take note that `decision` left `after` of `before` tokens, `merged` of the others averaged into those."""
        part.conductor.record(run, site, decision.finished, decision.budget_met, decision.consumed, decision.note)
        trace = StageTrace(
            stage=run.strategy.place,
            strategy=run.strategy.name,
            site=str(site),
            layer=site.layer,
            row=sequence.row,
            before=before,
            after=after,
            merged=merged,
            dropped=before - after - merged,
            finished=run.done,
            note=decision.note
            if part.medium is None
            else f"medium {part.medium}{': ' * bool(decision.note)}{decision.note}",
        )
        self.traces.append(trace)
        self.unobserved.append(trace)

    def notify_observers(self) -> None:
        """Tell the observers what was done since they were last told."""
        if self.unobserved:
            events, self.unobserved = self.unobserved, []
            notify_observers(events)


def notify_observers(events: Sequence[StageTrace]) -> None:
    """Tell the observers. One that fails is warned of by name and told no more; the forward goes on."""
    for event in events:
        plugins.observe(event)
