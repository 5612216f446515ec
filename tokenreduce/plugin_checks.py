"""What the engine asks of a strategy: nothing it is shown can be harmed unseen, and no answer is taken on trust.

A refusal is a PluginError of one line that names the strategy, where it was asked, and what is wrong. None costs a device
synchronisation unless tokens go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenreduce.amounts import Tokens
from tokenreduce.config.yaml_source import short
from tokenreduce.errors import LayoutError, PluginError, call_plugin
from tokenreduce.ops.carry import Carry
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import (
    HOLDING,
    SITE_ORDER,
    VISION_ORDER,
    CountView,
    Decision,
    Outcome,
    Site,
    Span,
    StageContext,
    Strategy,
)
from tokenreduce.vision import VisionContext, VisionSite, VisionStrategy

T = TypeVar("T")

LONGEST_SPAN = 1 << 40
"""Tokens; beyond it, sums of positions and spans could overflow."""


# Contexts -------------------------------------------------------------------------------------------------------------


def lent(hidden: Tensor) -> Tensor:
    """`hidden` as a strategy is shown it: the same memory, and a version counter that tells whether it was written to.

    Tensors made in inference mode have no counter. What is made outside it has one, also over their memory, and operations
    count up there in any mode. No copy: hidden states are as large as the residual stream.
    """
    if not hidden.is_inference():
        return hidden.view_as(hidden)
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=hidden.dtype, device=hidden.device)
        return alias.set_(hidden.untyped_storage(), hidden.storage_offset(), hidden.size(), hidden.stride())


def decide_with(who: str, decide: Callable[[Any], T], ctx: StageContext | VisionContext) -> T:
    """What `decide` says of `ctx`, whose hidden states are `lent`. PluginError if it raises, or writes to them."""
    hidden = ctx.hidden
    version = hidden._version
    answer = call_plugin(who, lambda: decide(ctx))
    if hidden._version != version:
        raise PluginError(
            f"{who} changed ctx.hidden in place, which is the model's own and may be the caller's; work on ctx.hidden.clone()"
        )
    return answer


# Answers --------------------------------------------------------------------------------------------------------------


def as_decision(who: str, site: Site, answer: Any) -> Decision:
    """The Decision that a strategy's answer stands for. Its reduction is held to the tokens by `check_reduction`."""
    decision = Decision(answer) if answer is None or isinstance(answer, Reduction) else answer
    if not isinstance(decision, Decision):
        raise PluginError(f"{who} returned a {type(decision).__name__}, not a Decision")
    for field, kind in (("reduction", Reduction), ("span", Span)):
        value = getattr(decision, field)
        if value is not None and not isinstance(value, kind):
            raise PluginError(
                f"{who} returned a Decision whose {field} is a {type(value).__name__}, not a {kind.__name__}"
            )
    if decision.span is not None:
        _check_span(who, site, decision.span, decision.reduction)
    _check_flags(who, decision)
    if not isinstance(decision.note, str):
        raise PluginError(f"{who} returned a Decision whose note is a {type(decision.note).__name__}, not text")
    return decision


def reduction_of(who: str, answer: Any) -> Reduction | None:
    """The answer of a strategy in the vision tower."""
    if answer is not None and not isinstance(answer, Reduction):
        raise PluginError(f"{who} returned a {type(answer).__name__}, not a Reduction")
    return answer


def check_reduction(who: str, reduction: Reduction, shape: tuple[int, int], device: torch.device) -> None:
    """Refuse a reduction that is not one, or not one of (rows, tokens) `shape` on `device`."""
    check_shape(who, reduction, shape, device)
    try:
        reduction.validate()
    except LayoutError as error:
        raise PluginError(f"{who}: {error}") from None


def check_shape(who: str, reduction: Reduction, shape: tuple[int, int], device: torch.device) -> None:
    """As `check_reduction`, as far as no number has to come from the device."""
    target = reduction.target
    if isinstance(target, Tensor):
        if tuple(target.shape) != shape:
            raise PluginError(f"{who} returned a reduction of {tuple(target.shape)}, expected {shape}")
        if target.device != device:
            raise PluginError(f"{who} returned a reduction on {target.device}, but its tokens are on {device}")
    try:
        reduction.check_types()
    except LayoutError as error:
        raise PluginError(f"{who}: {error}") from None


def check_heads(who: str, kept: Tensor) -> None:
    """Refuse heads that keep different numbers of tokens, or none. kept: (rows, n) bool."""
    counts = kept.sum(1)
    if bool((counts != counts[0]).any()):
        raise PluginError(f"{who} keeps {counts.tolist()} tokens in its heads; they must be equally many")
    if not int(counts[0]):
        raise PluginError(f"{who} keeps no token at all in the cache; keep one")


def _check_span(who: str, site: Site, span: Span, reduction: Reduction | None) -> None:
    if site.kind != "kv":
        raise PluginError(f"{who} returned a span, which only a stage at a `kv` site can have")
    if reduction is not None:
        raise PluginError(f"{who} returned a span and a reduction; a decision is one or the other")
    for name, value, least in (("sinks", span.sinks, 0), ("window", span.window, 1)):
        if type(value) is not int or not least <= value <= LONGEST_SPAN:
            raise PluginError(
                f"{who} returned a span with {name}={_short(value)}; it must be a whole number from {least} to 2**40"
            )


def _check_flags(who: str, answer: Decision | Outcome) -> None:
    for name in ("finished", "budget_met", "consumed"):
        value = getattr(answer, name)
        if not isinstance(value, bool):
            raise PluginError(
                f"{who} returned {type(answer).__name__}({name}={_short(value)}); it must be True or False"
            )


def _short(value: object) -> str:
    """`value` in one line, also where its text has several or cannot be had."""
    try:
        return " ".join(short(value).split())
    except Exception:
        return f"a {type(value).__name__}"


# Schedules and forecasts ----------------------------------------------------------------------------------------------


def sites_of(strategy: Strategy, depth: int) -> list[Site]:
    """Where `strategy` is asked in a decoder of `depth` layers."""
    return _growing(strategy, depth, Site, lambda site: (site.layer, SITE_ORDER.index(site.kind)))


def vision_sites_of(strategy: VisionStrategy, depth: int) -> list[VisionSite]:
    """Where `strategy` is asked in a tower of `depth` blocks."""
    return _growing(strategy, depth, VisionSite, lambda site: (site.block, VISION_ORDER.index(site.kind)))


S = TypeVar("S", Site, VisionSite)


def _growing(
    strategy: Strategy | VisionStrategy, depth: int, kind: type[S], order: Callable[[S], tuple[int, int]]
) -> list[S]:
    """The schedule of `strategy`, if it is one. order: the layer or block of a site, and its place there."""
    who = f"strategy {strategy.name}: its schedule"
    sites: Any = call_plugin(who, lambda: strategy.schedule(depth))
    whole = isinstance(sites, (list, tuple)) and len(sites) > 0 and all(isinstance(site, kind) for site in sites)
    if not whole:
        raise PluginError(f"{who} must be a list of at least one {kind.__name__}, got {_short(sites)}")
    for site in sites:
        where = getattr(site, "layer" if kind is Site else "block")
        inside = where == -1 if site.kind == "vision.input" else type(where) is int and 0 <= where < depth
        if site.kind not in strategy.capabilities.sites or not inside:
            raise PluginError(
                f"{who} has {_short(tuple(site))}, but it can act at {', '.join(strategy.capabilities.sites)} of 0 … {depth - 1}"
            )
    places = [order(site) for site in sites]
    if places != sorted(set(places)):
        raise PluginError(f"{who} must name its sites in growing order without repeats, got {_short(sites)}")
    return list(sites)


def flag(strategy: Strategy, name: str) -> bool:
    """`strategy.<name>`, an attribute or a method, which must say True or False."""
    who = f"strategy {strategy.name}: its {name}"

    def value() -> Any:
        found = getattr(strategy, name)
        return found() if callable(found) else found

    said = call_plugin(who, value)
    if not isinstance(said, bool):
        raise PluginError(f"{who} must be True or False, got {_short(said)}")
    return said


def per_medium(strategy: Strategy, site: Site, depth: int) -> int | None:
    """How many tokens of each medium stay, where the stage says so."""
    keep: Any = getattr(strategy.config, "keep", None)
    if keep is None or isinstance(keep, (int, float)):
        return None
    keep = call_plugin(f"strategy {strategy.name}: its keep", lambda: strategy.keep_at(site, depth))
    return keep.tokens if isinstance(keep, Tokens) and keep.per == "medium" else None


def carry_of(strategy: Strategy, depth: int) -> Carry | None:
    """What `strategy` remembers between the chunks of a stream."""
    who = f"strategy {strategy.name}: its carry"
    carry: Any = call_plugin(who, lambda: strategy.carry(depth))
    if carry is not None and not isinstance(carry, Carry):
        raise PluginError(f"{who} must be a Carry or None, got {_short(carry)}")
    return carry


def outcome_of(strategy: Strategy, view: CountView) -> Outcome:
    """The forecast of `strategy`. At `kv` sites it may name more tokens than there are: a span does."""
    who = f"strategy {strategy.name} at {view.site}: its forecast"
    outcome: Any = call_plugin(who, lambda: strategy.forecast(view))
    if not isinstance(outcome, Outcome):
        raise PluginError(f"{who} must be an Outcome, got {_short(outcome)}")
    most = LONGEST_SPAN if view.site.kind in HOLDING else view.reducible_count
    if type(outcome.count) is not int or not 0 <= outcome.count <= most:
        raise PluginError(f"{who} is {_short(outcome.count)} tokens; it must be a whole number from 0 to {most}")
    _check_flags(who, outcome)
    return outcome
