"""Merging over chunks, without a model: the same groups and the same means as over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import KINDS, embeddings
from support.rows import rows
from support.streams import SOME, layout_of, near
from torch import Tensor

import tokenreduce as tr
from tokenreduce.ops.carry import Carry


def brute_force(
    x: Tensor, layout: tr.TokenLayout, able: list[bool], threshold: float, max_run: int | None
) -> tuple[list[int], dict[int, Tensor]]:
    """The token that each token ends in, and the mean of each group."""
    slot, frame, medium = (facts[0].tolist() for facts in (layout.slot, layout.frame, layout.media()))
    into: list[int] = []
    for i in range(len(x)):
        before = [j for j in range(i) if able[j] and (slot[j], medium[j]) == (slot[i], medium[i])]
        j = before[-1] if able[i] and before else -1
        alike = j >= 0 and bool(x[i].any()) and bool(x[j].any())
        alike = alike and float(torch.cosine_similarity(x[i], x[j], dim=0)) >= threshold
        if alike and max_run is not None:
            alike = frame[i] // max_run == frame[j] // max_run
        into.append(into[j] if alike else i)
    groups = {head: [i for i in range(len(x)) if into[i] == head] for head in set(into)}
    return into, {head: x[members].mean(0) for head, members in groups.items()}


@given(
    rows(), st.sampled_from(KINDS), st.sampled_from([-1.0, 0.3, 0.6, 0.95]), st.sampled_from([None, 2, 3]), st.data()
)
@settings(SOME, max_examples=100)
def test_carry_against_loops(row: Any, kind: str, threshold: float, max_run: int | None, data: st.DataObject) -> None:
    layout = layout_of(row)
    n = layout.shape[1]
    x, able = embeddings(layout, 8, kind)[0], layout.reducible()[0]
    into, means = brute_force(x, layout, able.tolist(), threshold, max_run)
    carry, source, out = Carry(threshold, max_run), [], []
    borders = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    for start, stop in zip([0, *borders], [*borders, n], strict=True):
        facts = (layout.slot, layout.frame, layout.media())
        source += carry.feed(x[start:stop], *(f[0, start:stop] for f in facts), able[start:stop]).tolist()
        # What waits: no token before the first one whose group is not whole yet, and may be joined.
        assert carry.held - carry.closed <= sum(head < stop for head in means)
        out.append(carry.take(data.draw(st.integers(0, carry.closed))))
    with pytest.raises(ValueError, match="are closed"):
        carry.take(carry.held + 1)
    carry.close()
    out.append(carry.take(carry.held))
    state, position, size = (torch.cat(parts) for parts in zip(*out, strict=True))
    assert source == into
    assert position.tolist() == sorted(means)
    assert size.tolist() == [into.count(head) for head in sorted(means)]
    near(state, torch.stack([means[head] for head in sorted(means)]), 1e-12)
    assert (carry.seen, carry.similar) == (n, n - len(means))


def test_carried_means_are_those_of_the_whole_bit_for_bit() -> None:
    """Also of large rows in bfloat16 and float32, over more tokens than either can count exactly in halves."""
    for dtype, scale in ((torch.bfloat16, 1e38), (torch.float32, 3e38), (torch.float32, 1e-30)):
        x = (1 + 0.2 * torch.rand(700, 4, generator=torch.Generator().manual_seed(1))).mul(scale / 2).to(dtype)
        slot, frame = torch.zeros(700, dtype=torch.long), torch.arange(700)
        merged = tr.Reduction.merge(torch.zeros(1, 700, dtype=torch.long))
        one = merged.apply(x[None], torch.ones(1, 700, dtype=torch.long))
        carry = Carry(0.9)
        for start in range(0, 700, 33):
            some = slice(start, start + 33)
            carry.feed(x[some], slot[some], frame[some], slot[some], torch.ones(len(x[some]), dtype=torch.bool))
        carry.close()
        state, _, size = carry.take(1)
        assert size.tolist() == [700]
        assert one.hidden is not None
        assert torch.equal(state, one.hidden[0])
