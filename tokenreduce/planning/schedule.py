"""Which stage is asked at which site, for one sequence. Counts and flags only, so that `plan` runs the very same rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tokenreduce.errors import BudgetError
from tokenreduce.planning.account import Account, Change, ImportanceCost, kv_pairs, released_removal
from tokenreduce.planning.cost import DecoderShape, importance_flops
from tokenreduce.plugin_checks import flag, outcome_of, sites_of
from tokenreduce.strategy import HOLDING, SITE_ORDER, Action, Contents, CountView, Outcome, Queries, Site, Strategy


@dataclass
class StageRun:
    """One stage in one sequence: where it may act, and how far it is."""

    strategy: Strategy
    """Whose stage it is."""
    sites: list[Site]
    """Where it may act, in the order of the forward."""
    done: bool = False
    """It will not be asked again."""
    acted: bool = False
    """It was asked at least once."""
    assumed: str = ""
    """What its last forecast took for granted of the video."""
    note: str = ""
    """Why it ended, or what its last decision said of itself."""
    free_from: int = 0
    """`order` of the first site at which it may act if it waits for the stages before it."""
    last: int = -1
    """`order` of the site at which it was asked last."""
    state: dict[str, Any] = field(default_factory=dict)
    """What the strategy keeps between its sites."""

    @property
    def once(self) -> bool:
        """See Strategy."""
        return flag(self.strategy, "once")

    @property
    def fixed(self) -> bool:
        """See Strategy.fixed_count."""
        return flag(self.strategy, "fixed_count")

    @property
    def solved(self) -> bool:
        """See Strategy.needs_budget."""
        return flag(self.strategy, "needs_budget")

    def end(self, note: str = "") -> None:
        """The stage will not be asked again."""
        self.done = True
        self.note = self.note or note

    def after(self, site: Site) -> list[Site]:
        """Its sites that are still to come."""
        return [later for later in self.sites if later.order > site.order]


Look = tuple[Site, StageRun]


class Conductor:
    """Asks the stages of a pipeline in turn, for one sequence in one forward.

    A stage with its own layers is asked at each of them. A stage that waits (`at: next`) is asked once, when all stages
    before it are done: at the next of its sites, or at this one if the last of them ended without acting on it. If the
    budget gives it its count, it is not left to wait beyond the last site at which the budget can still be met, what the
    stages before it are sure to leave out included: then those are cut short.
    """

    def __init__(self, strategies: Sequence[Strategy], account: Account) -> None:
        self.account = account
        depth = account.shape.layers
        self.depth = depth
        self.visited: list[Look] = []
        """Where stages have acted so far, in order."""
        self.changed: list[tuple[Look, int]] = []
        """The same in a forecast, with how many tokens each look left out."""
        self.runs = [StageRun(strategy, sites_of(strategy, depth)) for strategy in strategies if not strategy.decodes]

    def due(self, site: Site, tokens: Callable[[], int]) -> Iterator[StageRun]:
        """Stages to ask at `site`, in order; `tokens` tells how many tokens are alive when it is asked."""
        for place, run in enumerate(self.runs):
            if run.done or run.last >= site.order or site not in run.sites:
                continue
            before = self.runs[:place]
            if run.once and (site.order < run.free_from or not all(other.done for other in before)):
                if not self._must_act(run, site, tokens()):
                    continue
                for other in before:
                    if not other.done:
                        other.end("cut short: the budget leaves the stage after it no later site")
            yield run

    def _must_act(self, run: StageRun, site: Site, tokens: int) -> bool:
        later = run.after(site)
        if not later:
            return True
        account = self.account
        if account.budget is None or not run.solved:
            return False
        # Stages with layers of their own will be asked there; of another that waits nobody knows when.
        sure = [other for other in self.runs[: self.runs.index(run)] if not (other.done or other.once)]
        looks = [(at, other) for other in sure for at in other.after(site) if at.order <= later[0].order]
        looks.append((later[0], run))
        return not account.affordable(tokens, list(self._leaving(looks)), self._reading(looks, tokens))

    def _leaving(self, looks: Sequence[Look]) -> Iterator[Change]:
        """How many tokens stay after each of `looks`, where it is not the video that tells: the least if a budget does."""
        for site, run in looks:
            if site.kind not in HOLDING and run.strategy.capabilities.chooses_count:
                try:
                    count = run.strategy.count_at(site, self.depth, self.account.reducible)
                except (TypeError, ValueError):
                    continue  # A plugin's `keep` may be something else than a share or a count.
                if count is not None or run.solved:
                    yield site, self.account.fixed + (1 if count is None else count)

    def _reading(self, looks: Sequence[Look], tokens: int) -> ImportanceCost | None:
        """What `looks` will spend on importance, if a budget pays for it. tokens: alive now."""
        account = self.account
        if not account.reads:
            return None
        read: list[tuple[int, Queries]] = []
        reducible = tokens - account.fixed
        for site, run in looks:
            if run.strategy.reads(site):
                layer = site.layer - 1 if site.kind == "pre_attention" else site.layer
                view = CountView(site, self.depth, tokens, reducible, account.reducible, dict(run.state), _one)
                view.reading = lambda queries, layer=layer: read.append((layer, queries))  # type: ignore[misc]
                outcome_of(run.strategy, view)
        return lambda attn: sum(reading_flops(account, attn[layer], queries) for layer, queries in read)

    def _to_come(self, run: StageRun, site: Site) -> list[Look]:
        """Looks at attention after that of `run` at `site`, which what it leaves there must still pay for."""
        if not (run.fixed or run.solved):
            return []  # A merge by threshold asks for its allowance to meet the budget; then the others are skipped.
        place = self.runs.index(run)
        looks: list[Look] = []
        for number, other in enumerate(self.runs):
            if other.done or not other.strategy.capabilities.attention or (other is run and other.once):
                continue
            sites = [at for at in other.sites if at.order > site.order or (at == site and number > place)]
            sites = [at for at in sites if other.strategy.reads(at)]
            if other.once:
                ends = [one.sites[-1].order for one in self.runs[:number] if not one.done and one.fixed]
                sites = [at for at in sites if at.order > max([site.order, *ends])][:1] or sites[-1:]
            looks += [(at, other) for at in sites]
        return looks

    def record(
        self, run: StageRun, site: Site, finished: bool, budget_met: bool, consumed: bool, note: str = ""
    ) -> None:
        """Take note of what the stage did at `site`."""
        run.acted, run.last = True, site.order
        self.visited.append((site, run))
        run.note = note or run.note
        place = self.runs.index(run)
        if finished or run.once or not run.after(site):
            run.end()
            for later in self.runs[place + 1 :]:
                later.free_from = site.order + 1 if consumed else site.order
        if budget_met:
            for later in self.runs[place + 1 :]:
                later.end(f"skipped: {run.strategy.name} met the budget")

    def allowance(self, run: StageRun, site: Site, reducible: int, tokens: int, action: Action) -> int:
        """How many reducible tokens may stay (`kv` sites: how many tokens the cache may hold). BudgetError if none."""
        account = self.account
        if account.budget is None:
            raise BudgetError(
                f"{run.strategy.name} solves its count from a budget: give `budget`, or the stage's `keep`"
            )
        reading = self._reading(self._to_come(run, site), tokens)
        if site.kind in HOLDING:
            span, free = run.strategy.capabilities.spans, takes_text(run.strategy, site)
            after = site.kind == "cache"
            held = account.kv_allowance(site.layer, [at.layer for at in run.sites], tokens, span, reading, after)
            least = 1 if span or free else account.fixed + 1
            return held if held >= least else self._settle_allowance(run, site, tokens, least)
        if account.budget.arithmetic == "released":
            return self._released(reducible, action)
        # A stage that solves every count is taken to keep the same share each time; merging by threshold to find no more.
        later = run.after(site) if run.solved and not run.once else []
        floor = self._outcome(run, site, reducible, tokens, _one).count if later else 1
        keep = account.allowance(site, reducible, later, reading, floor)
        return keep if keep >= 1 else self._settle_allowance(run, site, tokens, 1)

    def _settle_allowance(self, run: StageRun, site: Site, tokens: int, least: int) -> int:
        """`least`, where it is too much by itself, but the stages to come may make up for it."""
        account = self.account
        if not (account.lenient or self.rest(run, site, tokens, least, similar=1.0) <= account.limit):
            raise self.refusal(run, site, tokens, least)
        return least

    def settle(self, run: StageRun, site: Site, tokens: int, least: int, reason: str) -> int:
        """See StageContext.at_least."""
        account = self.account
        if account.lenient:
            return least
        if account.budget is None or not run.solved or self.rest(run, site, tokens, least, 1.0) > account.limit:
            raise self.refusal(run, site, tokens, least, reason)
        return least

    def rest(self, run: StageRun, site: Site, tokens: int, least: int, similar: float) -> int:
        """Cost of the whole forward if `run` leaves `least` at `site` and every stage after it as few as it can.

        least: reducible tokens; at `kv` sites, tokens in all. similar: share that later merges by threshold find, 0 or 1.
        """
        twin = Conductor([], self.account.copy())
        twin.runs = [replace(one, state=dict(one.state)) for one in self.runs]
        mine = twin.runs[self.runs.index(run)]
        reducible = tokens - self.account.fixed
        outcome = twin._outcome(mine, site, reducible, tokens, _one, similar)
        twin.record(mine, site, outcome.finished, outcome.budget_met, outcome.consumed)
        held = least if site.kind == "kv" else None
        _go_on(
            twin, site, reducible if site.kind in HOLDING else least, similar=similar, frames=1, least=True, held=held,
            span=run.strategy.capabilities.spans,
        )  # fmt: skip
        return twin.account.spent

    def _outcome(
        self,
        run: StageRun,
        site: Site,
        reducible: int,
        tokens: int,
        solve: Callable[[Action], int] | None,
        similar: float = 0.0,
    ) -> Outcome:
        """What `run` would do at `site`. Nothing of it is noted, and no reading of attention is paid for."""
        account, original = self.account, self.account.reducible
        if takes_text(run.strategy, site):
            reducible, original = tokens, account.total
        view = CountView(site, self.depth, tokens, reducible, original, dict(run.state), solve, similar)
        view.contents = account.contents
        view.frames = 1 if view.contents is None else view.contents.frames
        return outcome_of(run.strategy, view)

    def refusal(self, run: StageRun, site: Site, tokens: int, least: int, reason: str = "") -> BudgetError:
        """The error where `run` cannot leave less than `least` tokens at `site` (reducible ones; at `kv` sites, in all).

        It names a budget that every video of these counts meets.
        """
        account = self.account
        if account.budget is None:
            whose = f"pipeline {account.pipeline}: " if account.pipeline else ""
            return BudgetError(f"{whose}{reason}")
        sure = least_cost([one.strategy for one in self.runs], account)[0]
        here = self.rest(run, site, tokens, least, similar=0.0)
        return account.refusal(max(sure, here), reason or too_late(self, account))

    def _released(self, reducible: int, action: Action) -> int:
        """The released code's arithmetic: shares of vision tokens; pruning rounds to nearest, a capped merge rounds up."""
        account = self.account
        assert account.budget is not None
        # At pre_ffn the attention of this layer has run: the calls so far are as many as the layers in the account.
        held = [account.reducible] + [count - account.fixed for count in account.attn]
        shares = [(a - b) / a for a, b in itertools.pairwise(held)]
        removal = released_removal(shares, float(account.budget.amount), self.depth)
        if action != "prune":
            room = removal * reducible
            return max(reducible - (int(room) if action == "merge" else math.ceil(room)), 1)
        return max(round((1 - removal) * reducible), 1)

    def unfinished(self) -> list[StageRun]:
        """Stages that neither acted nor were skipped for a reason."""
        return [run for run in self.runs if not run.acted and not run.note]


def forecast(
    strategies: Sequence[Strategy], account: Account, *, similar: float = 0.5, frames: int = 1, least: bool = False
) -> Conductor:
    """Run the stages on counts alone and leave the counts of every layer in `account`.

    similar, frames: see CountView. least: let every solved count be the least, to learn what the pipeline costs then.
    """
    conductor = Conductor(strategies, account)
    _go_on(conductor, Site(0, "pre_attention"), account.reducible, similar=similar, frames=frames, least=least)
    return conductor


def least_cost(strategies: Sequence[Strategy], account: Account, similar: float = 0.0) -> tuple[int, Conductor]:
    """What the pipeline costs a sequence at the least, and how: with `similar` 0 whatever the video shows, with 1 at its best."""
    probe = account.afresh()
    conductor = forecast(strategies, probe, similar=similar, least=True)
    return probe.spent, conductor


def too_late(conductor: Conductor, account: Account) -> str:
    """Why stages cannot save more, in a clause that names those that the budget solves for."""
    solved = [run for run in conductor.runs if run.solved]
    acts = [f"{run.strategy.name} (stage {run.strategy.place + 1}) from {run.sites[0]} on" for run in solved]
    return (
        f"{account.fixed} of {account.total} tokens always stay and the stages act too late to save more "
        f"({', '.join(acts)})"
    )


def _go_on(
    conductor: Conductor,
    start: Site,
    reducible: int,
    *,
    similar: float,
    frames: int,
    least: bool,
    held: int | None = None,
    span: bool = False,
) -> None:
    """Forecast from `start` on. held, span: what the cache of its layer is to hold, where that is decided already."""
    account = conductor.account
    contents = account.contents
    if contents is not None:
        frames = contents.frames
    elif frames > 1:
        contents = Contents.even(account.reducible, frames)
    paid: set[int] = set()
    for layer in range(start.layer, conductor.depth):
        if layer > start.layer:
            held, span = None, False
        for kind in SITE_ORDER:
            site = Site(layer, kind)
            if site.order < start.order:
                continue
            if kind == "cache" and len(account.attn) <= layer:
                account_attention(account, account.fixed + reducible, held, span)
            for run in conductor.due(site, lambda: account.fixed + reducible):  # noqa: B023
                tokens = account.fixed + reducible
                free, ahead = takes_text(run.strategy, site), looks_ahead(run.strategy, site)
                if ahead and layer not in paid:
                    paid.add(layer)
                    account.selector_flops += look_ahead_flops(account.shape, tokens)
                solve: Callable[[Action], int] | None = None
                if account.budget is not None:
                    solve = _one if least else partial(conductor.allowance, run, site, reducible, tokens)
                view = CountView(
                    site,
                    conductor.depth,
                    tokens,
                    tokens if free else reducible,
                    account.total if free else account.reducible,
                    run.state,
                    solve,
                    similar,
                    frames,
                    partial(_read, account, tokens if ahead else None),
                    contents,
                    _settled if least and run.solved else partial(conductor.settle, run, site, tokens),
                )
                outcome = outcome_of(run.strategy, view)
                run.assumed = outcome.assumed or run.assumed
                left = outcome.count if kind in HOLDING else account.fixed + outcome.count
                if kind == "kv":
                    held, span = min(outcome.count, tokens), run.strategy.capabilities.spans
                elif kind == "cache":
                    account.kv[-1] = min(outcome.count, tokens)
                else:
                    reducible = outcome.count
                conductor.record(run, site, outcome.finished, outcome.budget_met, outcome.consumed)
                conductor.changed.append(((site, run), max(tokens - left, 0)))
        account.ffn.append(account.fixed + reducible)


def _settled(least: int, reason: str) -> int:
    return least


def takes_text(strategy: Strategy, site: Site) -> bool:
    """Whether the stage may drop text there, and not only vision tokens."""
    return site.kind == "cache" and strategy.capabilities.text


def looks_ahead(strategy: Strategy, site: Site) -> bool:
    """Whether the stage reads there what the layer itself is about to compute."""
    return site.kind == "pre_attention" and strategy.capabilities.own_attention and strategy.reads(site)


def look_ahead_flops(shape: DecoderShape, tokens: int) -> int:
    """FLOPs of the projections to queries, keys and values that run once more for a look ahead."""
    return 2 * tokens * shape.hidden * shape.head_dim * (shape.heads + 2 * shape.kv_heads)


def _one(action: Action) -> int:
    return 1


def _read(account: Account, ahead: int | None, queries: Queries) -> None:
    account.selector_flops += reading_flops(account, account.attn[-1] if ahead is None else ahead, queries)


def reading_flops(account: Account, tokens: int, queries: Queries) -> int:
    """FLOPs of the importance of `tokens` tokens to the last `queries` of them."""
    rows = tokens if queries == "all" else 1 if queries == "last" else min(int(queries), tokens)
    return importance_flops(account.shape.heads, account.shape.head_dim, tokens, tokens, rows)


def account_attention(account: Account, tokens: int, held: int | None, span: bool) -> None:
    """Enter the attention of one layer: `tokens` queries, `held` of them in the cache (None: all), see `kv_pairs`."""
    everything = held is None or held >= tokens
    account.attn.append(tokens)
    account.kv.append(tokens if held is None else min(held, tokens))
    account.pairs.append(None if everything or held is None else kv_pairs(tokens, held, span))


def attention_sources(reads: Iterable[int], without: Container[int]) -> dict[int, int]:
    """Of each order (Site.order) of a reading site, the last layer before it that has attention; none where there is none.

    without: layers that have none."""
    found = {}
    for order in reads:
        layer = next((layer for layer in range((order - 1) // 3, -1, -1) if layer not in without), None)
        if layer is not None:
            found[order] = layer
    return found
