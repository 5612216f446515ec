"""Reduction against a loop over tokens, and the arithmetic that a mean over hundreds of frames needs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenreduce.errors import LayoutError
from tokenreduce.reduction import Reduction

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def targets(draw: st.DrawFn) -> list[list[int]]:
    """A legal target for every token of one to three rows: kept, dropped, or merged into a kept token, before or after."""
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    out = []
    for _ in range(rows):
        kept = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        heads = [i for i in range(n) if kept[i]]
        choice = st.sampled_from([-1, *heads])
        out.append([i if kept[i] else draw(choice) for i in range(n)])
    return out


def slow(hidden: Tensor, size: Tensor, target: list[list[int]], weighting: str) -> list[list[tuple[int, int, Tensor]]]:
    """Per row: (column, size, state) of each token that stays, by loops in float64."""
    rows = []
    for row, wanted in enumerate(target):
        left = []
        for head in (i for i, t in enumerate(wanted) if t == i):
            members = [i for i, t in enumerate(wanted) if t == head]
            sizes = [int(size[row, i]) for i in members]
            weights = sizes if weighting == "size" else [1] * len(members)
            mean = sum(w * hidden[row, i].double() for w, i in zip(weights, members, strict=True)) / sum(weights)
            left.append((head, sum(sizes), mean))
        rows.append(left)
    return rows


@given(targets(), st.sampled_from(["size", "plain"]), st.integers(0, 99))
@SETTINGS
def test_apply_is_the_loop(target: list[list[int]], weighting: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.tensor(target)
    hidden = torch.randn(*wanted.shape, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, wanted.shape, generator=generator)
    before = hidden.clone(), size.clone(), wanted.clone()
    reduction = Reduction.merge(wanted, weighting)
    reduction.validate()
    left = reduction.apply(hidden, size)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, size, wanted), strict=True))
    expected = slow(hidden, size, target, weighting)
    assert left.counts == tuple(len(row) for row in expected)
    width = max(left.counts)
    assert left.hidden is not None
    assert left.hidden.shape == (len(target), width, 5)
    assert (left.valid is None) == (len(set(left.counts)) == 1)
    for row, tokens in enumerate(expected):
        pad = width - len(tokens)
        if left.valid is not None:
            assert left.valid[row].tolist() == [False] * pad + [True] * len(tokens)
        assert left.index[row, pad:].tolist() == [column for column, _, _ in tokens]
        assert left.size[row, pad:].tolist() == [count for _, count, _ in tokens]
        for place, (_, _, state) in enumerate(tokens, pad):
            torch.testing.assert_close(left.hidden[row, place], state, atol=1e-13, rtol=0)


@given(targets(), st.integers(0, 99))
@SETTINGS
def test_tokens_outside_every_group_keep_their_bits(target: list[list[int]], seed: int) -> None:
    wanted = torch.tensor(target)
    hidden = torch.randn(*wanted.shape, 3, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    left = Reduction.merge(wanted).apply(hidden, torch.ones_like(wanted))
    assert left.hidden is not None
    for row, row_target in enumerate(target):
        for place in range(left.hidden.shape[1] - left.counts[row], left.hidden.shape[1]):
            column = int(left.index[row, place])
            if row_target.count(column) == 1:
                assert torch.equal(left.hidden[row, place], hidden[row, column])


@given(targets(), st.integers(0, 99))
@SETTINGS
def test_two_reductions_compose(target: list[list[int]], seed: int) -> None:
    """Merging by size in two steps is the mean of the originals: one step with the composed target."""
    row = target[0]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, len(row), 4, generator=generator, dtype=torch.float64)
    size = torch.ones(1, len(row), dtype=torch.long)
    first = Reduction.merge(torch.tensor([row])).apply(hidden, size)
    n = first.size.shape[1]
    if n == 0:
        return
    again = [0 if i % 2 else i for i in range(n)]
    second = Reduction.merge(torch.tensor([again])).apply(first.hidden, first.size)
    columns = first.index[0].tolist()
    composed = [-1 if t < 0 else columns[again[columns.index(t)]] for t in row]
    whole = Reduction.merge(torch.tensor([composed])).apply(hidden, size)
    assert torch.equal(second.size, whole.size)
    torch.testing.assert_close(second.hidden, whole.hidden, atol=1e-13, rtol=0)
    assert int(whole.size.sum()) == sum(t >= 0 for t in row)


def test_size_and_plain_weighting_differ_on_the_second_merge() -> None:
    hidden = torch.tensor([[[1.0], [0.0], [3.0]]])
    size = torch.tensor([[2, 1, 1]])
    target = torch.tensor([[0, 0, 0]])
    assert Reduction.merge(target, "size").apply(hidden, size).hidden.item() == pytest.approx(5 / 4)
    assert Reduction.merge(target, "plain").apply(hidden, size).hidden.item() == pytest.approx(4 / 3)
    assert Reduction.merge(target, "plain").apply(hidden, size).size.item() == 4


@pytest.mark.parametrize("frames", [100, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_run_averages_to_the_nearest_representable_mean(frames: int, dtype: torch.dtype) -> None:
    """A bf16 counter stops at 256 and a bf16 sum errs by percents; the mean is exact to one unit in the last place."""
    torch.manual_seed(frames)
    hidden = (10 + torch.randn(1, frames, 64)).to(dtype)
    left = Reduction.merge(torch.zeros(1, frames, dtype=torch.long)).apply(
        hidden, torch.ones(1, frames, dtype=torch.long)
    )
    exact = hidden.double().mean(1)
    assert left.hidden is not None
    ulp = 2.0 ** exact.abs().log2().floor() * torch.finfo(dtype).eps
    assert bool(((left.hidden[:, 0].double() - exact).abs() <= ulp).all())
    assert left.hidden.dtype == dtype
    assert left.size.item() == frames


def test_identical_frames_average_to_themselves() -> None:
    frame = torch.randn(1, 1, 32).to(torch.bfloat16)
    for frames in (2, 3, 64, 257):
        hidden = frame.expand(1, frames, 32)
        ones = torch.ones(1, frames, dtype=torch.long)
        left = Reduction.merge(torch.zeros(1, frames, dtype=torch.long)).apply(hidden, ones)
        assert torch.equal(left.hidden, frame)


def test_the_mean_of_rows_with_a_large_norm_is_exact() -> None:
    """fp16 rows of norm 790: their squares add to more than fp16 can hold."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 9, 64)
    hidden = (hidden / hidden.norm(dim=-1, keepdim=True) * 790).half()
    left = Reduction.merge(torch.zeros(1, 9, dtype=torch.long)).apply(hidden, torch.ones(1, 9, dtype=torch.long))
    torch.testing.assert_close(left.hidden[:, 0].double(), hidden.double().mean(1), atol=0.07, rtol=1e-3)
    assert bool(left.hidden.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mean_of_huge_rows_does_not_overflow(dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    hidden = torch.full((1, 300, 4), huge, dtype=dtype)
    left = Reduction.merge(torch.zeros(1, 300, dtype=torch.long)).apply(hidden, torch.ones(1, 300, dtype=torch.long))
    torch.testing.assert_close(left.hidden, hidden[:, :1], rtol=1e-6, atol=0)


def test_nan_stays_in_its_own_group() -> None:
    hidden = torch.arange(6.0).view(1, 6, 1).clone()
    hidden[0, 4] = math.nan
    left = Reduction.merge(torch.tensor([[0, 0, 2, 2, 4, -1]])).apply(hidden, torch.ones(1, 6, dtype=torch.long))
    assert left.hidden is not None
    assert left.hidden[0, :2, 0].tolist() == [0.5, 2.5]
    assert math.isnan(left.hidden[0, 2, 0])


def test_keep_drops_and_copies_bits() -> None:
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    reduction = Reduction.keep(mask)
    reduction.validate()
    left = reduction.apply(hidden, torch.ones(2, 5, dtype=torch.long))
    assert left.hidden is not None
    assert left.valid is not None
    assert torch.equal(left.hidden[0], hidden[0, [0, 2, 3]])
    assert torch.equal(left.hidden[1, 2], hidden[1, 2])
    assert left.valid[1].tolist() == [False, False, True]
    assert torch.equal(reduction.kept, mask)
    assert Reduction.keep(mask, counts=(3, 1)).apply(None, torch.ones(2, 5, dtype=torch.long)).hidden is None


def test_gradients_reach_what_was_kept() -> None:
    hidden = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 0, 2, -1]])
    size = torch.tensor([[3, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: Reduction.merge(target).apply(x, size).hidden, hidden)
    Reduction.merge(target).apply(hidden, size).hidden.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :, 0].tolist() == [0.75, 0.25, 1.0, 0.0]


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (Reduction(torch.tensor([[0, 5]])), "must lie in −1 … 1"),
        (Reduction(torch.tensor([[-2, 1]])), "must lie in −1 … 1"),
        (Reduction(torch.tensor([[1, 2, 2]])), "merges token 0 of row 0 into 1, which does not stay"),
        (Reduction(torch.tensor([[1, -1]])), "merges token 0 of row 0 into 1, which does not stay"),
        (Reduction(torch.tensor([0, 1])), "must be a (B, N) long tensor"),
        (Reduction(torch.tensor([[0.0, 1.0]])), "must be a (B, N) long tensor"),
        (Reduction(torch.tensor([[0, 0]]), merges=False), "says merges=False, but merges"),
        (Reduction(torch.tensor([[0, -1]]), counts=(2,)), "says counts=(2,), but keeps [1]"),
    ],
)
def test_validate_names_what_is_wrong(reduction: Reduction, message: str) -> None:
    with pytest.raises(LayoutError) as error:
        reduction.validate()
    assert message in str(error.value)
