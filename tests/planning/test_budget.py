"""Budgets as they are written, and as they are spent: Table 2, Eq. 4, every unit, and refusals that name what would do."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.decoders import account

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.account import SPAN_BLOCK, Account, kv_pairs, released_removal
from tokenreduce.planning.cost import DecoderShape, kv_bytes, prefill_flops
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.schedule import forecast
from tokenreduce.strategy import Site

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("written", "unit", "amount", "relative"),
    [
        (0.3, "tokens", Fraction(3, 10), True),
        (1, "tokens", Fraction(1), True),
        ("0.3", "tokens", Fraction(3, 10), True),
        (1e-7, "tokens", Fraction(1, 10**7), True),
        ({"tokens": 0.1}, "tokens", Fraction(1, 10), True),
        ({"tokens": 1}, "tokens", Fraction(1), True),
        ({"tokens": 100}, "tokens", Fraction(100), False),
        ({"tokens": 100.0}, "tokens", Fraction(100), False),
        ({"flops": 0.25}, "flops", Fraction(1, 4), True),
        ({"flops": "12.5T"}, "flops", Fraction(125 * 10**11), False),
        ({"flops": "2 GFLOPs"}, "flops", Fraction(2 * 10**9), False),
        ({"flops": "1e12"}, "flops", Fraction(10**12), False),
        ({"kv_cache": "512MiB"}, "kv_cache", Fraction(2**29), False),
        ({"kv_cache": "1.5 GB"}, "kv_cache", Fraction(15 * 10**8), False),
        ({"kv_cache": "100kb"}, "kv_cache", Fraction(10**5), False),
        ({"kv_cache": 4096}, "kv_cache", Fraction(4096), False),
        ({"kv_cache": "0.5"}, "kv_cache", Fraction(1, 2), True),
        ({"tokens": 0.3, "of": "vision", "arithmetic": "released"}, "tokens", Fraction(3, 10), True),
        ({"tokens": 192, "of": "vision"}, "tokens", Fraction(192), False),
        (192 / 576, "tokens", Fraction(1, 3), True),
        ("192/576", "tokens", Fraction(1, 3), True),
        ({"tokens": 64 / 576}, "tokens", Fraction(1, 9), True),
        ("512MiB", "kv_cache", Fraction(2**29), False),
        ("12.5TFLOPs", "flops", Fraction(125 * 10**11), False),
        ("flops=0.25", "flops", Fraction(1, 4), True),
        ("kv_cache: 1.5 GB", "kv_cache", Fraction(15 * 10**8), False),
        ("{tokens: 192, of: vision}", "tokens", Fraction(192), False),
    ],
)
def test_what_a_budget_says(written: Any, unit: str, amount: Fraction, relative: bool) -> None:
    budget = Budget.parse(written)
    assert (budget.unit, budget.amount, budget.relative) == (unit, amount, relative)
    assert Budget.parse(budget) is budget
    assert Budget.parse(budget.model_dump()) == budget


def test_a_numpy_float_is_a_float() -> None:
    numpy = pytest.importorskip("numpy")
    assert Budget.parse(numpy.float64(0.3)).amount == Fraction(3, 10)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "budget tokens: expected a number above 0, got 0"),
        (-0.3, "budget tokens: expected a number above 0, got -0.3"),
        (-(10**400), "budget tokens: expected a number above 0, got -1000"),
        (math.nan, "budget tokens: expected a finite number above 0, got nan"),
        (math.inf, "budget tokens: expected a finite number above 0, got inf"),
        (1.01, "budget 1.01 is above 1: a bare budget is the share that remains, in (0, 1]; write {tokens: N}"),
        (True, "budget tokens: expected a number, got True"),
        (None, "budget: expected a share in (0, 1] such as 0.3, or a mapping such as {tokens: 0.3}, got None"),
        ([0.3], "budget tokens: expected a number, got [0.3]"),
        ("lots", "budget tokens: cannot read 'lots'; write a share such as 0.3"),
        ("30%", "budget tokens: cannot read '30%'"),
        ({}, "budget: a budget has exactly one of tokens, flops, kv_cache; got none"),
        ({"tokens": 0.3, "flops": 0.3}, "exactly one of tokens, flops, kv_cache; got tokens, flops"),
        ({"tokns": 0.3}, "budget: unknown field 'tokns'; did you mean 'tokens'?"),
        ({"latency": 0.3}, "budget: unknown field 'latency' (known: "),
        ({1: 0.3}, "budget: unknown field 1"),
        ({"tokens": 0}, "budget tokens: expected a number above 0, got 0"),
        ({"tokens": True}, "budget tokens: expected a number, got True"),
        ({"kv_cache": False}, "budget kv_cache: expected a number, got False"),
        ({"tokens": math.nan}, "budget tokens: expected a finite number"),
        ({"tokens": 100.5}, "share in (0, 1] or a whole number of tokens, got 100.5"),
        ({"tokens": "many"}, "budget tokens: "),
        ({"kv_cache": "12 parsec"}, "budget kv_cache: cannot read '12 parsec'; write a share such as 0.3 or an amount"),
        ({"kv_cache": "-5MB"}, "budget kv_cache: cannot read '-5MB'"),
        ({"kv_cache": "10 TFLOPs"}, "budget kv_cache: cannot read '10 TFLOPs'"),
        (
            {"flops": "512MiB"},
            "budget flops: cannot read '512MiB'; write a share such as 0.3 or an amount such as 12.5T",
        ),
        ({"kv_cache": "0.5B"}, "budget kv_cache: '0.5B' is next to nothing; a share is written without a unit"),
        ({"kv_cache": "0MB"}, "budget kv_cache: expected a number above 0, got 0MB"),
        ({"kv_cache": "1e999999999"}, "budget kv_cache: cannot read '1e999999999'"),
        ({"kv_cache": "9" * 5000}, "budget kv_cache: cannot read '999"),
        ({"flops": [1]}, "budget flops: "),
        ({"tokens": 0.3, "of": "text"}, "budget of: Input should be 'all' or 'vision'"),
        (
            {"tokens": 100, "of": "vision", "arithmetic": "released"},
            "`arithmetic: released` needs a budget that is a share",
        ),
        ({"tokens": 192, "per": "medium"}, "`per: medium` counts the vision tokens of each image or video: add"),
        (
            {"tokens": 0.3, "of": "vision", "per": "medium", "arithmetic": "released"},
            "`per: medium` goes with `arithmetic: exact`",
        ),
        ("12T", "budget: '12T' of what? Write kv_cache=12T or flops=12T"),
        ("tokens=0.3, tokens=0.2", "says one field twice"),
        ("tokns=0.3", "budget: unknown field 'tokns'; did you mean 'tokens'?"),
        ({"flops": 0.3, "of": "vision"}, "go with tokens or kv_cache, not with flops"),
        ({"tokens": 0.3, "arithmetic": "released"}, "`arithmetic: released` counts vision tokens: add `of: vision`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_budget(written: Any, message: str) -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse(written)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@given(st.one_of(st.floats(), st.integers(), st.text(max_size=8), st.dictionaries(st.text(max_size=8), st.floats())))
@SETTINGS
def test_anything_is_a_budget_or_a_budget_error(value: Any) -> None:
    try:
        budget = Budget.parse(value)
    except BudgetError:
        return
    assert budget.amount > 0


@given(st.integers(1, 9999))
@SETTINGS
def test_a_share_is_the_decimal_that_was_written(thousandths: int) -> None:
    assert Budget.parse(thousandths / 10**4).amount == Fraction(thousandths, 10**4)


@pytest.mark.parametrize(("layer", "percent"), [(0, 50.0), (1, 51.9), (2, 53.8), (12, 87.5), (13, 93.3), (14, 100.0)])
def test_table_2(layer: int, percent: float) -> None:
    """Merging at one layer of 28 for C = 0.5: the rate is 14/(28 − l) of the tokens. Vision only, so that 100 % is a case."""
    n = 28 * 27 * 26 * 10
    spent = account({"tokens": 0.5, "of": "vision"}, n, n, layers=28)
    spent.attn, spent.ffn, spent.kv, spent.pairs = [n] * layer, [n] * layer, [n] * layer, [None] * layer
    kept = spent.allowance(Site(layer, "pre_attention"), n)
    assert round(100 * (1 - kept / n), 1) == percent
    assert 1 - Fraction(kept, n) == Fraction(14, 28 - layer)


@pytest.mark.parametrize("depth", [12, 28, 64, 80])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_equation_4(depth: int, share: float) -> None:
    """N_l = (L·C·N − ΣN_done) / (layers left), rounded down, with text in the count; the released 28 is nowhere."""
    total, text = 6404, 4
    done = [total, total // 2]
    spent = account(share, total, total - text, layers=depth)
    spent.attn, spent.ffn, spent.kv, spent.pairs = list(done), [total, total // 2], list(done), [None, None]
    room = Fraction(str(share)) * depth * total - sum(done)
    expected = min(math.floor(room / (depth - 2)), done[-1]) - text
    got = spent.allowance(Site(2, "pre_attention"), done[-1] - text)
    assert got == (expected if expected >= 0 else -1)


def test_equation_4_by_hand() -> None:
    """64 frames of 210 tokens, C = 0.3, 28 layers, two layers dense: 13474·8.4 − 26948 over 26 layers is 3316.7."""
    total = 64 * 210 + 34
    spent = account(0.3, total, 64 * 210, layers=28)
    spent.attn, spent.ffn, spent.kv, spent.pairs = [total] * 2, [total] * 2, [total] * 2, [None] * 2
    assert spent.allowance(Site(2, "pre_attention"), 64 * 210) == 3316 - 34
    assert spent.affordable(total, [(Site(2, "pre_attention"), 3316)])
    assert not spent.affordable(total, [(Site(2, "pre_attention"), 3317)])


def test_fastv_share_by_hand() -> None:
    """keep = (L·C − K)/(L − K) = (8.4 − 2)/26 = 0.246 of the vision tokens."""
    spent = account({"tokens": 0.3, "of": "vision"}, 10**6, 10**6, layers=28)
    n = 10**6
    spent.attn, spent.ffn, spent.kv, spent.pairs = [n] * 2, [n] * 2, [n] * 2, [None] * 2
    assert spent.allowance(Site(2, "pre_attention"), n) == int(n * (8.4 - 2) / 26)


def test_a_pre_ffn_site_saves_from_the_next_layer_on() -> None:
    spent = account(0.5, 100, 100, layers=4)
    spent.attn, spent.kv, spent.pairs = [100], [100], [None]
    assert spent.allowance(Site(0, "pre_ffn"), 100) == 33  # 200 − 100 over three layers
    assert spent.project(100, [(Site(0, "pre_ffn"), 33)]) == 199


@given(
    st.sampled_from(["tokens", "flops", "kv_cache"]),
    st.integers(1, 40),
    st.integers(0, 10),
    st.integers(1, 30),
    st.integers(1, 100),
    st.booleans(),
)
@SETTINGS
def test_the_allowance_is_the_largest_that_fits(
    unit: str, vision: int, text: int, depth: int, percent: int, relative: bool
) -> None:
    """Against counting up from nothing, for relative and absolute budgets of every unit."""
    shape = account(None, 1, 1, layers=depth).shape
    total = vision + text
    dense = {
        "tokens": total,
        "flops": prefill_flops(shape, [total] * depth, [total] * depth),
        "kv_cache": kv_bytes(shape, [total] * depth, 8),
    }[unit]
    amount: Any = percent / 100 if relative else max(dense * percent // 100, 2)
    assume(relative or unit != "tokens" or amount >= 2)
    spent = account({unit: amount}, total, vision, layers=depth)
    first = depth // 2
    spent.attn, spent.ffn, spent.kv, spent.pairs = ([total] * first, [total] * first, [total] * first, [None] * first)
    limit = Fraction(percent, 100) * dense if relative else amount

    def price(keep: int) -> Fraction:
        counts = [total] * first + [text + keep] * (depth - first)
        if unit == "tokens":
            return Fraction(sum(counts), depth)
        return Fraction(prefill_flops(shape, counts, counts) if unit == "flops" else kv_bytes(shape, counts, 8))

    fitting = [keep for keep in range(vision + 1) if price(keep) <= limit]
    assert spent.allowance(Site(first, "pre_attention"), vision) == (fitting[-1] if fitting else -1)


@given(st.integers(1, 700), st.integers(1, 700))
@SETTINGS
def test_span_pairs_are_the_union_of_each_blocks_windows(tokens: int, held: int) -> None:
    expected = 0
    for first in range(0, tokens, SPAN_BLOCK):
        queries = range(first, min(first + SPAN_BLOCK, tokens))
        seen = {key for query in (queries[0], queries[-1]) for key in range(max(0, query - held + 1), query + 1)}
        seen |= set(range(max(0, queries[0] - held + 1), queries[-1] + 1))
        expected += len(queries) * len(seen)
    assert kv_pairs(tokens, held, span=True) == expected
    assert kv_pairs(tokens, held, span=False) == tokens * held


def test_released_arithmetic_by_hand() -> None:
    """Nothing removed at the first call of 28 layers at 0.3: 8.4 − 1 over 27 stays."""
    assert released_removal([0.0], 0.3, 28) == pytest.approx(1 - 7.4 / 27)
    assert released_removal([0.0, 0.5], 0.3, 28) == pytest.approx(1 - 6.9 / (26 * 0.5))
    assert released_removal([0.9], 0.9, 28) == 0
    with pytest.raises(BudgetError, match="hold more than it allows"):
        released_removal([0.0] * 9, 0.3, 28)


PRUNERS = ["random", "fastv", "prune_only", "framefusion", "streaming_llm"]


@given(
    st.sampled_from(PRUNERS),
    st.sampled_from(["tokens", "flops", "kv_cache"]),
    st.booleans(),
    st.integers(3, 30),
    st.integers(0, 40),
    st.integers(20, 400),
)
@example("fastv", "flops", True, 28, 40, 400)
@SETTINGS
def test_a_refusal_names_the_smallest_budget_that_can_be_met(
    name: str, unit: str, relative: bool, depth: int, text: int, vision: int
) -> None:
    """That budget is met by every video, as it is printed; one step less is not."""
    total = text + vision
    strategies = build(load_pipeline(name))
    tiny = account({unit: 1e-9 if relative else 2}, total, vision, layers=depth)
    assume(relative or unit != "tokens" or text > 1)
    with pytest.raises(BudgetError) as error:
        check(strategies, tiny)
    named = re.search(r"smallest feasible budget here is ([0-9.e-]+)( ?[kKMGT]?i?[A-Za-z]+)?$", str(error.value))
    assert named, str(error.value)
    assert bool(named[2]) is not relative
    least: Any = float(named[1]) if relative else int(named[1]) if unit == "tokens" else named[1] + named[2]
    met = account({unit: least}, total, vision, layers=depth)
    assert check(strategies, met)
    forecast(strategies, met, similar=0.0)
    assert met.spent <= met.limit
    if relative or unit == "tokens":
        step = 1e-4 if relative else 1
        less = round(least - step, 4) if relative else least - step
        if less > (0 if relative else 1):
            assert not promised(strategies, account({unit: less}, total, vision, layers=depth))


def promised(strategies: Any, spent: Account) -> bool:
    try:
        return check(strategies, spent)
    except BudgetError:
        return False


def test_a_budget_that_nobody_solves_is_refused() -> None:
    strategies = build(load_pipeline({"stages": [{"strategy": "random", "keep": 0.5}]}))
    with pytest.raises(PipelineError, match="no stage of this pipeline chooses its count by a budget"):
        check(strategies, account(0.3, 100, 90))
    check(strategies, account(None, 100, 90))


@given(st.sampled_from(PRUNERS), st.integers(1, 100), st.sampled_from([12, 28, 64, 80]), st.integers(1, 500))
@SETTINGS
def test_forecasts_use_the_budget_up(name: str, percent: int, depth: int, vision: int) -> None:
    """Never above it, and less than one token per layer below."""
    spent = account(percent / 100, vision + 9, vision, layers=depth)
    try:
        check(build(load_pipeline(name)), spent)
    except BudgetError:
        return
    forecast(build(load_pipeline(name)), spent)
    held = Fraction(sum(spent.kv))
    assert spent.limit - depth < held <= spent.limit


def test_an_account_without_reducible_tokens_is_all_fixed() -> None:
    shape = DecoderShape(layers=2, hidden=8, ffn=8, heads=1, kv_heads=1, head_dim=8, vocab=8)
    assert Account(Budget.parse(1), shape, 5, 0).fixed == 5
    assert Account(Budget.parse(1), shape, 5, 0).allowance(Site(0, "pre_attention"), 0) == 0
