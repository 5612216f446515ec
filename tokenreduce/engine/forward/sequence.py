"""One sequence of a batch in one forward: its tokens, and what a stage sees and changes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tokenreduce.errors import PluginError
from tokenreduce.layout import roles
from tokenreduce.planning.account import Account
from tokenreduce.planning.schedule import Conductor, StageRun, takes_text
from tokenreduce.plugin_checks import check_heads, check_reduction, check_shape, lent, per_medium
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import HOLDING, Site, StageContext, Strategy

AttentionSource = Callable[..., Tensor]
"""Of a TokenSequence and the arguments of `StageContext.attention`."""
HeldSource = Callable[[], tuple[Tensor, Tensor]]
"""Keys and values (G, n, d) of the tokens that are alive."""


@dataclass
class Facts:
    """What is known of the N tokens of a sequence beside slot, frame and medium; each (N,) long, or None."""

    marker: Tensor | None = None
    """See TokenLayout."""
    row: Tensor | None = None
    """See TokenLayout."""
    column: Tensor | None = None
    """See TokenLayout."""
    ids: Tensor | None = None
    """Of the tokens, as the outer model was given them."""
    ends: Sequence[int] = ()
    """Ids that end a turn of the chat."""
    tower: Callable[[str, int], Tensor] | None = None
    """(N, …) of a signal of a block of the vision tower."""

    def role_of(self, slot: Tensor) -> Tensor:
        """(N,) long, see `roles`."""
        return roles(slot, self.marker, self.ids, self.ends)


@dataclass(eq=False)
class Part:
    """The reducible tokens that share a budget: all of a sequence, or those of one image or video (`per: medium`)."""

    conductor: Conductor
    """Which stage is asked about them when, and what they have spent."""
    reducible_count: int
    """How many are alive."""
    original: int
    """How many there were."""
    medium: int | None = None
    """Whose they are; None for all."""

    def tokens(self) -> int:
        """Tokens that are alive, those that always stay included where they count."""
        return self.conductor.account.fixed + self.reducible_count


class TokenSequence:
    """The tokens of a row that are not padding, N of them; n are alive.

    Args: see the attributes. facts: what else is known of the N.
    """

    row: int
    """Of the batch."""
    columns: Tensor
    """(N,) long, their input columns."""
    slot: Tensor
    """(N,) long, see TokenLayout."""
    frame: Tensor
    """(N,) long, see TokenLayout."""
    medium: Tensor
    """(N,) long, see TokenLayout."""
    reducible: Tensor
    """(N,) bool, tokens that may go."""
    original_reducible: int
    """How many of the N may go."""
    reducible_count: int
    """How many of the n may go."""
    conductor: Conductor
    """Which stage is due, and what was spent."""
    total: int
    """N."""
    alive: Tensor
    """(n,) long, places among the N, growing."""
    size: Tensor
    """(n,) long, how many of the N each stands for."""
    place: Tensor
    """(N,) long, where each token is among the alive; −1 if it was dropped."""
    attended: Tensor
    """`alive` as it was at the last attention."""
    whole: bool
    """No token has gone yet."""

    def __init__(
        self,
        row: int,
        columns: Tensor,
        slot: Tensor,
        frame: Tensor,
        medium: Tensor,
        reducible: Tensor,
        reducible_count: int,
        conductor: Conductor,
        facts: Facts | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        self.row, self.columns, self.facts = row, columns, facts or Facts()
        self.slot, self.frame, self.medium, self.reducible = slot, frame, medium, reducible
        self.original_reducible = self.reducible_count = reducible_count
        self.conductor = conductor
        self.parts = [*parts] or [Part(conductor, reducible_count, reducible_count)]
        self.total = len(columns)
        self.alive = torch.arange(self.total, device=columns.device)
        self.size = torch.ones_like(self.alive)
        self.place = self.alive.clone()
        self.attended = self.alive
        self.whole = True

    def __len__(self) -> int:
        return len(self.alive)

    def move(self, device: torch.device) -> None:
        """Take what is known of the tokens to `device`."""
        for name in ("columns", "slot", "frame", "medium", "reducible", "alive", "size", "place", "attended"):
            setattr(self, name, getattr(self, name).to(device))

    @property
    def runs(self) -> list[StageRun]:
        """All stages, of all parts."""
        return [run for part in self.parts for run in part.conductor.runs]

    def unfinished(self) -> list[StageRun]:
        """Stages that neither acted nor were skipped for a reason."""
        return [run for part in self.parts for run in part.conductor.unfinished()]

    @property
    def accounts(self) -> list[Account]:
        """What the parts have spent."""
        return [part.conductor.account for part in self.parts]

    def context(
        self,
        run: StageRun,
        site: Site,
        hidden: Tensor,
        attention: AttentionSource | None,
        part: Part | None = None,
        held: HeldSource | None = None,
    ) -> StageContext:
        """What `run` sees; hidden: (n, D). The facts are copies: what becomes of them is the strategy's affair."""
        alive = self.alive
        chosen = torch.clone if self.whole else (lambda facts: facts[alive])
        conductor, medium_only = self.conductor, None
        count, original, tokens = self.reducible_count, self.original_reducible, len(self)
        if part is not None and part.medium is not None:
            conductor, medium_only = part.conductor, part.medium
            count, original, tokens = part.reducible_count, part.original, part.tokens()
        reducible, medium = chosen(self.reducible), chosen(self.medium)
        if takes_text(run.strategy, site):
            reducible, count, original = torch.ones_like(alive, dtype=torch.bool), len(self), self.total
        return StageContext(
            site=site,
            depth=conductor.depth,
            hidden=lent(hidden),
            slot=chosen(self.slot),
            frame=chosen(self.frame),
            medium=medium,
            position=alive.clone(),
            size=self.size.clone(),
            reducible=reducible if medium_only is None else reducible & (medium == medium_only),
            reducible_count=count,
            original_reducible=original,
            state=run.state,
            attention_source=None if attention is None else partial(attention, self),
            allowance_source=None
            if conductor.account.budget is None
            else partial(conductor.allowance, run, site, count, tokens),
            refusal_source=partial(conductor.refusal, run, site, tokens),
            fact_source=self._fact,
            tower_source=None if self.facts.tower is None else self._told,
            held_source=held,
            total=self.total,
            per_medium=per_medium(run.strategy, site, conductor.depth),
            settle_source=partial(conductor.settle, run, site, tokens),
        )

    def _fact(self, name: str) -> Tensor | None:
        """(n,) long: a fact of the tokens that are alive, a copy; None where it is not known."""
        fact = self.facts.role_of(self.slot) if name == "role" else getattr(self.facts, name)
        return None if fact is None else fact.to(self.alive.device)[self.alive]

    def facts_of(self, strategy: Strategy, site: Site, reduction: Reduction, heads: int | None = None) -> Tensor | None:
        """(3,) long: 1 where the reduction keeps the contract, tokens that stay, tokens dropped. None where that is known.

        PluginError where it is no reduction of these tokens at all, or is a mixture that breaks the contract.
        """
        across, text = strategy.capabilities.across_media, takes_text(strategy, site)
        if heads is not None:
            self.check(strategy.name, site, reduction, across, heads, text)
            return None
        check_shape(f"strategy {strategy.name} at {site}", reduction, (1, len(self)), self.alive.device)
        if reduction.proven:
            return None
        if reduction.mixture is not None or not len(self):
            self.check(strategy.name, site, reduction, across, text=text)
        target, n = reduction.target[0], len(self)
        into, goes = target.clamp(0, max(n - 1, 0)), target >= 0
        kept = target == torch.arange(n, device=target.device)
        reducible, medium = self.reducible[self.alive] | text, self.medium[self.alive]
        across = across or text
        fair = (target < n) & kept[into] & reducible[into] & ((medium[into] == medium) | across)
        good = kept | (reducible & ((target == -1) | (goes & fair & reduction.merges)))
        return torch.stack([good.all().long(), kept.sum(), (target < 0).sum()])

    def hold(
        self, strategy: Strategy, site: Site, reduction: Reduction, good: int, stay: int, dropped: int
    ) -> Reduction:
        """The reduction with what is known of it (see `facts_of`). PluginError where it breaks the contract."""
        if not good or reduction.counts not in (None, (stay,)):
            self.check(
                strategy.name, site, reduction, strategy.capabilities.across_media, text=takes_text(strategy, site)
            )
        return replace(reduction, counts=(stay,), dropped=dropped)

    def _told(self, name: str, block: int) -> Tensor:
        """(n, …) of a signal of the tower."""
        assert self.facts.tower is not None
        told = self.facts.tower(name, block)
        return told[self.alive.to(told.device)].to(self.alive.device)

    def check(
        self,
        name: str,
        site: Site,
        reduction: Reduction,
        across_media: bool = False,
        heads: int | None = None,
        text: bool = False,
    ) -> None:
        """Hold a strategy to its contract: PluginError where it misses tokens, touches text or merges across media.

        across_media, text: whether it may do these. heads: KV heads of a `cache` site, each of which may have its own row."""
        who = f"strategy {name} at {site}"
        own = heads is not None and isinstance(reduction.target, Tensor) and reduction.target.shape[:1] == (heads,)
        check_reduction(who, reduction, (heads if own and heads else 1, len(self)), self.alive.device)
        target, kept = reduction.target, reduction.kept
        if heads is not None:
            check_heads(who, kept)
        if text:
            return
        reducible, medium = self.reducible[self.alive], self.medium[self.alive]
        if not bool((kept | reducible).all()):
            raise PluginError(f"{who} removes a token that must stay (text or protected)")
        into = target.clamp(min=0)
        fair = kept | (target < 0) | (reducible[into] & ((medium[into] == medium) | across_media))
        if not bool(fair.all()):
            raise PluginError(
                f"{who} merges a token into text or into another medium; the latter is for strategies that declare "
                "Capabilities(across_media=True)"
            )
        mixture = reduction.mixture
        if mixture is not None:
            if site.kind in HOLDING:
                raise PluginError(f"{who} merges by a mixture, which goes with hidden states alone")
            into, source = mixture.into, mixture.source
            fair = reducible[into] & reducible[source] & ((medium[into] == medium[source]) | across_media)
            if not bool(fair.all()):
                raise PluginError(f"{who} mixes with text, a protected token or another medium")

    def apply(
        self, reduction: Reduction, hidden: Tensor | None, passengers: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor], int]:
        """Reduce the tokens, `hidden` (n, D) and whatever else has one row per token; also says how many were merged."""
        left = reduction.apply(None if hidden is None else hidden[None], self.size[None])
        moved = [reduction.apply(rows[None], self.size[None]).hidden for rows in passengers]
        target, index = reduction.target[0], left.index[0]
        new_place = torch.full_like(target, -1)
        new_place[index] = torch.arange(len(index), device=index.device)
        there = torch.where(target >= 0, new_place[target.clamp(min=0)], -1)
        self.place = torch.where(self.place >= 0, there[self.place.clamp(min=0)], -1)
        gone = len(self) - len(index)
        dropped = reduction.dropped
        if dropped is None:
            dropped = 0 if reduction.proven else int((target < 0).sum())
        merged = gone - dropped if reduction.merges else 0
        self.alive, self.size, self.whole = self.alive[index], left.size[0], False
        self.reducible_count -= gone
        return (
            (None if left.hidden is None else left.hidden[0]),
            [rows[0] for rows in moved if rows is not None],
            merged,
        )

    def source(self, width: int) -> Tensor:
        """(width,) long: the input column each input column ended in, −1 if dropped or padding."""
        out = torch.full((width,), -1, dtype=torch.long, device=self.columns.device)
        ended = self.columns[self.alive[self.place.clamp(min=0)]] if len(self) else self.place
        out[self.columns] = torch.where(self.place >= 0, ended, -1)
        return out
