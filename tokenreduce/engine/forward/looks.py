"""The stages' looks at one forward: each is asked what to do, its answer is held to the contract, and a record is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenreduce import plugins
from tokenreduce.engine.forward.sequence import AttentionSource, HeldSource, Part, TokenSequence
from tokenreduce.planning.schedule import StageRun
from tokenreduce.plugin_checks import as_decision, decide_with
from tokenreduce.strategy import Decision, Site
from tokenreduce.trace import StageTrace


class Ask(NamedTuple):
    """One stage to be asked about one sequence."""

    sequence: TokenSequence
    part: Part
    run: StageRun
    hidden: Tensor
    """(n, D), the states that it sees."""
    attention: AttentionSource | None = None
    """Where it may read attention."""
    held: HeldSource | None = None
    """Keys and values, where it may read them."""


def rounds(sequences: Sequence[TokenSequence], site: Site) -> Iterator[list[tuple[TokenSequence, Part, StageRun]]]:
    """The stages due at `site`: the first one of every sequence, then the second …, so that a batch is asked at once."""

    def due(sequence: TokenSequence) -> Iterator[tuple[TokenSequence, Part, StageRun]]:
        for part in sequence.parts:
            for run in part.conductor.due(site, part.tokens):
                yield sequence, part, run

    waiting = [due(sequence) for sequence in sequences]
    while True:
        now = [found for found in (next(each, None) for each in waiting) if found is not None]
        if not now:
            return
        yield now


class Looks:
    """What the stages were asked in one forward, and what they did."""

    traces: list[StageTrace]
    """Every look so far, in order."""
    unobserved: list[StageTrace]
    """Those of which the observers have not been told yet."""

    def __init__(self) -> None:
        self.traces, self.unobserved = [], []

    def ask(self, asked: Sequence[Ask], site: Site) -> list[Decision]:
        """What each of `asked` decides; a reduction comes with its counts. PluginError where it breaks the contract.

        What strategies measure, and what of their answers has to be checked, comes to the host in one copy each for all of them.
        """
        contexts, measured = [], []
        for ask in asked:
            ctx = ask.sequence.context(ask.run, site, ask.hidden, ask.attention, ask.part, ask.held)
            contexts.append(ctx)
            measured.append(decide_with(_who(ask, site), ask.run.strategy.measure, ctx))
        for ctx, numbers in zip(contexts, to_host(measured), strict=True):
            ctx.measured = numbers
        decisions = [
            as_decision(_who(ask, site), site, decide_with(_who(ask, site), ask.run.strategy.decide, ctx))
            for ask, ctx in zip(asked, contexts, strict=True)
        ]
        facts = [
            None
            if decision.reduction is None
            else ask.sequence.facts_of(ask.run.strategy, site, decision.reduction, _heads(ask, site))
            for ask, decision in zip(asked, decisions, strict=True)
        ]
        for number, (ask, found) in enumerate(zip(asked, to_host(facts), strict=True)):
            reduction = decisions[number].reduction
            if found is not None and reduction is not None:
                held = ask.sequence.hold(ask.run.strategy, site, reduction, *found)
                decisions[number] = replace(decisions[number], reduction=held)
        return decisions

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


def _heads(ask: Ask, site: Site) -> int | None:
    return None if ask.held is None or site.kind != "cache" else ask.held()[0].shape[0]


def _who(ask: Ask, site: Site) -> str:
    return f"strategy {ask.run.strategy.name} at {site}"


def to_host(parts: Sequence[Tensor | None]) -> list[list[Any] | None]:
    """The numbers of each of `parts` (k,), all in one copy; None for None."""
    there = [part for part in parts if part is not None]
    numbers = iter(torch.cat(there).tolist() if there else [])
    return [None if part is None else [next(numbers) for _ in range(len(part))] for part in parts]


def notify_observers(events: Sequence[StageTrace]) -> None:
    """Tell the observers. One that fails is warned of by name and told no more; the forward goes on."""
    for event in events:
        plugins.observe(event)
