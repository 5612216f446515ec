"""Whether a pipeline can act on a decoder and meet its budget, found before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.planning.account import Account
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.planning.schedule import forecast
from tokenreduce.plugin_checks import flag, sites_of
from tokenreduce.strategy import Strategy


def check_pipeline(strategies: Sequence[Strategy], budget: Budget | None, shape: DecoderShape) -> None:
    """Refuse stages that get in each other's way, a pipeline that needs a budget and has none, and one that can meet none."""
    check_sites(strategies, shape.layers)
    needy = [strategy.name for strategy in strategies if flag(strategy, "needs_budget")]
    if budget is None and needy:
        raise PipelineError(f"{needy[0]} solves its count from a budget: give `budget`, or the stage's `keep`")
    if not needy:
        check(strategies, Account(budget, shape, 1, 1))


def check_rows(
    strategies: Sequence[Strategy], length: int, rows: Sequence[tuple[int, int]], account: Callable[[int, int], Account]
) -> None:
    """Refuse a budget that a row of a batch cannot meet, however much of it is padding.

    length: of the batch, in tokens. rows: of each row that has any, how many tokens a stage may touch, and the column of the
    first of them, which is the most padding that there can be. account: of a total and a reducible count.
    """
    for count, padding in rows:
        try:
            check(strategies, account(length, count))
        except BudgetError as refused:
            try:  # Each call is checked again, with its mask.
                check(strategies, account(length - padding, count))
            except BudgetError:
                raise refused from None


def check_sites(strategies: Sequence[Strategy], depth: int) -> None:
    """Refuse stages that would get in each other's way at the KV cache of a layer: PipelineError."""
    holders: dict[int, str] = {}
    for strategy in strategies:
        for name in ("once", "fixed_count", "needs_budget"):  # So that a fault is found before any forward.
            flag(strategy, name)
        for site in sites_of(strategy, depth):
            if site.kind == "kv" and site.layer in holders:
                raise PipelineError(
                    f"{holders[site.layer]} and {strategy.name} both act at {site}; keep them apart by `at`, `from` or `until`"
                )
            if site.kind == "kv":
                holders[site.layer] = strategy.name
    for strategy in strategies:
        for site in filter(strategy.reads, sites_of(strategy, depth)):
            layer = site.layer if site.kind == "pre_ffn" else site.layer - 1
            if site.kind != "kv" and layer in holders:
                raise PipelineError(
                    f"{strategy.name} at {site} would read attention of layer {layer}, where {holders[layer]} acts on keys and "
                    "values, so that it is not attention to tokens; keep them apart by `at`, `from` or `until`"
                )


def check(strategies: Sequence[Strategy], account: Account) -> None:
    """Refuse a pipeline whose budget cannot be met, before anything runs.

    Raises PipelineError where no stage can choose its count, BudgetError with the smallest feasible budget otherwise."""
    budget = account.budget
    if budget is None:
        return
    if not any(flag(strategy, "needs_budget") for strategy in strategies):
        raise PipelineError(
            f"budget {budget}: no stage of this pipeline chooses its count by a budget; add importance_prune, or drop the budget"
        )
    probe = Account(budget, account.shape, account.total, account.reducible, account.cache_bytes)
    forecast(strategies, probe, least=True)
    least = probe.cost(probe.attn, probe.ffn, probe.kv, probe.pairs)
    if least > probe.limit:
        sure = all(flag(strategy, "fixed_count") for strategy in strategies)
        raise probe.refusal(least, met="met" if sure else "promised")


def read_later(strategies: Sequence[Strategy], depth: int) -> frozenset[int]:
    """Layers whose queries outlive their attention, because a stage reads it before the attention of the next layer."""
    return frozenset(
        site.layer - 1
        for strategy in strategies
        for site in sites_of(strategy, depth)
        if site.kind == "pre_attention" and strategy.reads(site)
    )


def spans(strategies: Sequence[Strategy], depth: int) -> frozenset[int]:
    """Layers where a stage lets queries see a moving span of the keys."""
    return frozenset(
        site.layer
        for strategy in strategies
        for site in sites_of(strategy, depth)
        if site.kind == "kv" and strategy.capabilities.spans
    )
