"""Whether a pipeline can act on a decoder and meet its budget, found before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, PipelineError, TokenReduceError
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.account import Account
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.planning.schedule import least_cost, looks_ahead, too_late
from tokenreduce.plugin_checks import flag, sites_of
from tokenreduce.strategy import HOLDING, Contents, Strategy


def check_pipeline(strategies: Sequence[Strategy], budget: Budget | None, shape: DecoderShape) -> None:
    """Refuse stages that get in each other's way, a pipeline that needs a budget and has none, and one that can meet none."""
    check_sites(strategies, shape.layers)
    if budget is not None and budget.per == "medium":
        _refuse_at_cache(strategies, budget, shape.layers)
    ahead = [strategy.name for strategy in strategies if strategy.capabilities.own_attention]
    if ahead and budget is not None and budget.unit == "flops" and budget.amount != 1:
        raise PipelineError(
            f"budget {budget}: {ahead[0]} looks at attention ahead of its layer, whose cost cannot be planned; give a budget in "
            "tokens"
        )
    late = [strategy.name for strategy in strategies if strategy.decodes and flag(strategy, "needs_budget")]
    if late:
        raise PipelineError(f"{late[0]} acts in decoding, which no budget pays for; give the stage's `keep`")
    needy = [strategy.name for strategy in strategies if flag(strategy, "needs_budget")]
    if budget is None and needy:
        raise PipelineError(f"{needy[0]} solves its count from a budget: give `budget`, or the stage's `keep`")
    if not needy:
        check(strategies, Account(budget, shape, 1, 1))


def check_rows(
    strategies: Sequence[Strategy],
    length: int,
    rows: Sequence[tuple[int, int, Contents]],
    account: Callable[[int, int], Account],
) -> None:
    """Refuse a budget that a row of a batch cannot meet, however much of it is padding.

    length: of the batch, in tokens. rows: of each row that has any, how many tokens a stage may touch, and the column of the
    first of them, which is the most padding that there can be, and how they lie in frames. account: of a total and a reducible
    count.
    """
    for count, padding, contents in rows:
        try:
            check(strategies, replace(account(length, count), contents=contents))
        except BudgetError as refused:
            try:  # Each call is checked again, with its mask.
                check(strategies, replace(account(length - padding, count), contents=contents))
            except BudgetError:
                raise refused from None


def check_sites(strategies: Sequence[Strategy], depth: int) -> None:
    """Refuse stages that would get in each other's way at the KV cache of a layer: PipelineError."""
    holders: dict[int, str] = {}
    before: dict[int, str] = {}
    steps: dict[int, str] = {}
    for strategy in strategies:
        for name in ("once", "fixed_count", "needs_budget"):  # So that a fault is found before any forward.
            flag(strategy, name)
        sites = sites_of(strategy, depth)
        _check_shares(strategy, len(sites))
        for site in sites:
            if site.kind in HOLDING and site.layer in holders:
                raise PipelineError(
                    f"{holders[site.layer]} and {strategy.name} both act at {site}; keep them apart by `at`, `from` or `until`"
                )
            if site.kind == "decode" and (site.layer in steps or site.layer in before):
                other = steps.get(site.layer) or before[site.layer]
                raise PipelineError(
                    f"{other} and {strategy.name} at {site} cannot both act on the KV cache of one layer; keep them apart by "
                    "`at`, `from` or `until`"
                )
            if site.kind == "decode":
                steps[site.layer] = strategy.name
            if site.kind in HOLDING:
                holders[site.layer] = strategy.name
                if site.kind == "kv":
                    before[site.layer] = strategy.name
    for strategy in strategies:
        for site in filter(strategy.reads, sites_of(strategy, depth)):
            layer = site.layer - 1 if site.kind == "pre_attention" else site.layer
            if looks_ahead(strategy, site) or site.kind == "decode":
                continue
            if site.kind != "kv" and layer in before:
                raise PipelineError(
                    f"{strategy.name} at {site} would read attention of layer {layer}, where {before[layer]} acts on keys and "
                    "values, so that it is not attention to tokens; keep them apart by `at`, `from` or `until`"
                )


def _refuse_at_cache(strategies: Sequence[Strategy], budget: Budget, depth: int) -> None:
    for strategy in strategies:
        if any(site.kind in HOLDING for site in sites_of(strategy, depth)):
            raise PipelineError(
                f"budget {budget}: {strategy.name} acts on the KV cache of the whole sequence; `per: medium` does not go with it"
            )


def _check_shares(strategy: Strategy, sites: int) -> None:
    keep, at = (getattr(strategy.config, name, None) for name in ("keep", "at"))
    sites = len(at) if isinstance(at, (list, tuple)) else sites  # A stage may look at more layers than it acts at.
    if isinstance(keep, (list, tuple)) and len(keep) != sites:
        raise PipelineError(f"{strategy.name}: `keep` has {len(keep)} shares for {sites} layers in `at`")


def check(strategies: Sequence[Strategy], account: Account) -> bool:
    """Refuse a pipeline whose budget no video of these counts could meet, before anything runs.

    Whether every video meets it. Where only some do, what merging by a threshold finds decides: the forward refuses the others.
    Raises PipelineError where no stage can choose its count, BudgetError with a budget that every video meets otherwise.
    """
    budget = account.budget
    if budget is None:
        return True
    if not any(flag(strategy, "needs_budget") for strategy in strategies):
        solves_nothing(budget)
    sure, conductor = least_cost(strategies, account)
    if sure <= account.limit:
        return True
    if all(flag(strategy, "fixed_count") for strategy in strategies):
        best = sure
    else:
        best, _ = least_cost(strategies, account, similar=1.0)
    if best > account.limit and not account.lenient:
        raise account.refusal(sure, too_late(conductor, account))
    return False


DEPTH = 1024
"""Layers taken for granted where no model is known, if no stage names a later one."""


def problems_without_model(source: str) -> list[str]:
    """What is wrong, whatever the model, with a pipeline that can be read; one line each, naming pipeline and stage."""
    try:
        pipeline = load_pipeline(source)
    except PipelineError:
        return []  # What `pipeline_problems` is for.
    found = []
    strategies = build(pipeline)
    for strategy in strategies:
        try:
            _check_shares(strategy, len(sites_of(strategy, DEPTH)))
        except TokenReduceError as error:
            found.append(f"pipeline {pipeline.name}, stage {strategy.place + 1}: {error}")
    if found:
        return found
    try:
        check_sites(strategies, DEPTH)
        if pipeline.budget is not None and not any(flag(strategy, "needs_budget") for strategy in strategies):
            solves_nothing(pipeline.budget)
    except TokenReduceError as error:
        found.append(f"pipeline {pipeline.name}: {error}")
    return found


def solves_nothing(budget: Budget) -> NoReturn:
    """Refuse a budget that no stage would look at."""
    raise PipelineError(
        f"budget {budget}: no stage of this pipeline chooses its count by a budget; add importance_prune, or drop the budget"
    )


def read_later(strategies: Sequence[Strategy], depth: int) -> frozenset[int]:
    """Layers whose queries outlive their attention, because a stage reads it before the attention of the next layer."""
    return frozenset(
        site.layer - 1
        for strategy in strategies
        for site in sites_of(strategy, depth)
        if site.kind == "pre_attention" and strategy.reads(site) and not looks_ahead(strategy, site)
    )


def spans(strategies: Sequence[Strategy], depth: int) -> frozenset[int]:
    """Layers where a stage lets queries see a moving span of the keys."""
    return frozenset(
        site.layer
        for strategy in strategies
        for site in sites_of(strategy, depth)
        if site.kind == "kv" and strategy.capabilities.spans
    )
