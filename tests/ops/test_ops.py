"""Every op against the plainest code that says what it means."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenreduce.ops.attention as attention_ops
from tokenreduce.ops import blocks
from tokenreduce.ops.attention import importance
from tokenreduce.ops.similarity import cosine_to, merge_runs, previous_in_slot
from tokenreduce.ops.topk import top_mask
from tokenreduce.planning.cost import importance_flops

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38]), st.floats(width=32)
)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """slot, medium and candidates of up to 30 tokens."""
    n = draw(st.integers(0, 30))
    slot = draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n))
    medium = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    some = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    slots = torch.tensor(slot, dtype=torch.long)
    return slots, torch.tensor(medium, dtype=torch.long), torch.tensor(some, dtype=torch.bool) & (slots >= 0)


@given(tokens())
@SETTINGS
def test_previous_in_slot_looks_back_one_by_one(facts: tuple[Tensor, Tensor, Tensor]) -> None:
    slot, medium, candidates = facts
    expected = []
    for i in range(len(slot)):
        before = [j for j in range(i) if candidates[j] and slot[j] == slot[i] and medium[j] == medium[i]]
        expected.append(before[-1] if candidates[i] and before else -1)
    assert previous_in_slot(slot, medium, candidates).tolist() == expected


@given(tokens(), st.integers(0, 999))
@SETTINGS
def test_merge_runs_walks_back_to_the_first(facts: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    previous = previous_in_slot(*facts)
    similar = torch.rand(len(previous), generator=torch.Generator().manual_seed(seed)) < 0.6
    expected = []
    for i in range(len(previous)):
        at = i
        while similar[at] and previous[at] >= 0:
            at = int(previous[at])
        expected.append(at)
    assert merge_runs(previous, similar).tolist() == expected


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000])
def test_one_long_run_ends_in_its_first_token(length: int) -> None:
    previous = torch.arange(-1, length - 1)
    assert merge_runs(previous, torch.ones(length, dtype=torch.bool)).tolist() == [0] * length
    assert merge_runs(previous, torch.zeros(length, dtype=torch.bool)).tolist() == list(range(length))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cosine_is_the_definition(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenreduce.ops.blocks.ELEMENTS", 7 * 16)
    torch.manual_seed(0)
    hidden = torch.randn(40, 16).to(dtype)
    other = torch.randint(-1, 40, (40,))
    before = hidden.clone()
    cosine = cosine_to(hidden, other)
    assert torch.equal(hidden, before)
    assert cosine.dtype == torch.promote_types(dtype, torch.float32)
    for i, j in enumerate(other.tolist()):
        if j < 0:
            assert cosine[i] == -math.inf
        else:
            a, b = hidden[i].double().tolist(), hidden[j].double().tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
            assert float(cosine[i]) == pytest.approx(dot / norms, abs=3e-7)


def test_zero_nan_and_infinite_rows_resemble_nothing() -> None:
    hidden = torch.tensor([[1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, math.inf], [2.0, 4.0]])
    for row in range(1, 5):
        for partner in range(6):
            pair = torch.full((6,), -1)
            pair[row] = partner
            assert cosine_to(hidden, pair)[row] == -math.inf
            pair = torch.full((6,), -1)
            pair[5] = row
            assert cosine_to(hidden, pair)[5] == -math.inf
    assert cosine_to(hidden, torch.tensor([-1, -1, -1, -1, -1, 0]))[5].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_cosine_does_not_depend_on_the_scale(scale: float) -> None:
    row = torch.tensor([1.0, -2.0, 3.0])
    hidden = torch.stack([row, row * scale, torch.tensor([2.0, 1.0, 0.0]) * scale])
    cosine = cosine_to(hidden, torch.tensor([-1, 0, 0]))
    assert float(cosine[1]) == pytest.approx(1, abs=0.01 if scale < 1e-40 else 1e-6)
    assert float(cosine[2]) == pytest.approx(0, abs=0.01 if scale < 1e-40 else 1e-6)


def test_half_precision_rows_of_norm_790_keep_their_cosine() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 64)
    rows = (rows / rows.norm(dim=-1, keepdim=True) * 790).half()
    assert rows[0].square().sum().isinf()
    exact = torch.nn.functional.cosine_similarity(rows[:1].double(), rows[1:].double())
    assert float(cosine_to(rows, torch.tensor([-1, 0]))[1]) == pytest.approx(float(exact), abs=1e-6)


@given(st.data())
@SETTINGS
def test_top_mask_is_a_sort_by_score_then_position(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 15))
    scores = torch.tensor(data.draw(st.lists(NUMBERS, min_size=n, max_size=n)), dtype=torch.float32)
    candidates = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    places = [i for i in range(n) if candidates[i]]
    k = data.draw(st.integers(0, len(places)))
    ranked = sorted(
        places, key=lambda i: (bool(scores[i].isnan()), -float(scores[i].nan_to_num(0, math.inf, -math.inf)), i)
    )
    assert top_mask(scores, k, candidates).nonzero().squeeze(1).tolist() == sorted(ranked[:k])


def test_ties_go_to_the_earlier_token_and_nan_ranks_last() -> None:
    scores = torch.tensor([math.nan, 1.0, 1.0, -math.inf, 1.0])
    everyone = torch.ones(5, dtype=torch.bool)
    order = [top_mask(scores, k, everyone).nonzero().squeeze(1).tolist() for k in range(6)]
    assert order == [[], [1], [1, 2], [1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert top_mask(torch.full((4,), math.nan), 2, torch.ones(4, dtype=torch.bool)).tolist() == [
        True,
        True,
        False,
        False,
    ]


def matrix(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(H, n, m): the whole causal softmax matrix, heads one by one."""
    heads, n, _ = q.shape
    m = k.shape[1]
    rows = []
    for head in range(heads):
        scores = q[head].double() @ k[head * k.shape[0] // heads].double().T * scale
        hidden = torch.arange(m)[None] > torch.arange(m - n, m)[:, None]
        rows.append(scores.masked_fill(hidden, -math.inf).softmax(-1))
    return torch.stack(rows)


def log_sum_exp(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(H, n) float64: of each row's scores, as attention kernels compute it."""
    n, m = q.shape[1], k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * scale
    return scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -math.inf).logsumexp(-1)


def small_blocks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(blocks, "SCORES", elements)
    monkeypatch.setattr(blocks, "LEAST_QUERIES", 1)
    monkeypatch.setattr(attention_ops, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(attention_ops, "TILE_QUERIES", 1 + elements // 100)


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (17, 17), (5, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_importance_is_a_column_sum_of_the_softmax(
    block: int, heads: str, n: int, m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, block)
    torch.manual_seed(n)
    q, k = torch.randn(4, n, 8, dtype=dtype), torch.randn(2, m, 8, dtype=dtype)
    weights, lse = matrix(q, k, 0.4), log_sum_exp(q, k, 0.4).to(dtype)
    for queries in {1, (n + 1) // 2, n}:
        summed = weights[:, n - queries :].sum(1)
        expected = summed.amax(0) if heads == "max" else summed.mean(0)
        for known in (None, lse):
            got = importance(q, k, 0.4, queries, heads, known)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), expected, atol=1e-12 if dtype == torch.float64 else 1e-5, rtol=0)
            assert float(importance(q, k, 0.4, queries, lse=known).sum()) == pytest.approx(queries, rel=1e-5)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores of some thousands, and one key that takes everything."""
    q, k = torch.randn(2, 40, 8) * 60, torch.randn(2, 40, 8) * 60
    expected = matrix(q, k, 1.0).sum(1).mean(0)
    for known in (None, log_sum_exp(q, k, 1.0).float()):
        # A float32 score of 4096 is known to 2.4e-4 of its unit.
        torch.testing.assert_close(importance(q, k, 1.0, 40, lse=known).double(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_not_rounded(dtype: torch.dtype) -> None:
    q, k = torch.randn(4, 50, 16).to(dtype), torch.randn(2, 50, 16).to(dtype)
    expected = matrix(q, k, 1.0).sum(1).mean(0)
    for known in (None, log_sum_exp(q, k, 1.0).float()):
        torch.testing.assert_close(importance(q, k, 1.0, 50, lse=known).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [1, 500, 1 << 22])
def test_importance_flops_are_what_torch_counts(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    small_blocks(monkeypatch, block)
    q, k = torch.randn(4, 23, 8), torch.randn(2, 40, 8)
    for queries in (1, 10, 23):
        with FlopCounterMode(display=False) as counter:
            importance(q, k, 1.0, queries)
        assert counter.get_total_flops() == importance_flops(4, 8, 23, 40, queries)


@given(
    heads=st.integers(1, 40),
    n=st.integers(1, 5000),
    past=st.integers(0, 5000),
    share=st.floats(0, 1),
    width=st.integers(1, 9),
)
@SETTINGS
def test_importance_flops_are_a_sum_over_blocks(heads: int, n: int, past: int, share: float, width: int) -> None:
    m, queries = n + past, max(1, int(share * n))
    block, pairs = blocks.query_block(heads, m, queries), 0
    for first in range(n - queries, n, block):
        last = min(first + block, n)
        pairs += (last - first) * (past + last)
    assert importance_flops(heads, width, n, m, queries) == 2 * heads * width * pairs


def test_importance_flops_of_a_long_video_take_no_time() -> None:
    n, block = 32 * 10**9, blocks.LEAST_QUERIES
    assert importance_flops(28, 128, n, n, n) == 28 * 128 * n * (n + block)


def test_bf16_importance_of_many_queries_is_summed_in_float32() -> None:
    """A bf16 sum of 2048 shares would stop growing at 256 times its step."""
    q, k = torch.zeros(1, 2048, 4, dtype=torch.bfloat16), torch.zeros(1, 2048, 4, dtype=torch.bfloat16)
    received = importance(q, k, 1.0, 2048)
    harmonic = sum(1 / i for i in range(1, 2049))
    assert float(received[0]) == pytest.approx(harmonic, rel=1e-5)
    assert float(received.sum()) == pytest.approx(2048, rel=1e-5)
