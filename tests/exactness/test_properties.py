"""The invariants of the design, over random layouts, batches, pipelines and budgets on tiny decoders in float64.

Each property is tried about a hundred times, always on the same examples; `-m slow` tries thousands of new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.decoders import KINDS, account, decoder, embeddings
from support.rows import rows
from torch import Tensor

import tokenreduce as tr
from tokenreduce.errors import BudgetError
from tokenreduce.layout import PLAIN

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
DEFAULT = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=CHECKS)
OFTEN = settings(max_examples=2000, deadline=None, suppress_health_check=CHECKS)
HIDDEN = 32


# Random cases --------------------------------------------------------------------------------------------------------


@st.composite
def pipelines(draw: st.DrawFn, depth: int) -> dict[str, Any]:
    """One of many compositions, each legal in a decoder of `depth` layers."""
    layer, late = draw(st.integers(0, depth - 1)), draw(st.integers(1, depth - 1))
    share = draw(st.sampled_from([0.2, 0.5, 0.8, 1.0]))
    merge = {
        "strategy": "similarity_merge",
        "threshold": draw(st.sampled_from([-1.0, 0.3, 0.6, 0.95])),
        "stop_below": draw(st.sampled_from([0.0, 0.1, 0.6])),
        "merge_below": draw(st.booleans()),
        "weighting": draw(st.sampled_from(["size", "plain"])),
    }
    prune = {
        "strategy": "importance_prune",
        "importance": draw(st.sampled_from(["last", "cumulative", "window"])),
        "window": 3,
        "heads": draw(st.sampled_from(["mean", "max"])),
    }
    site = draw(st.sampled_from(["pre_attention", "pre_ffn"]))
    stages: list[dict[str, Any]] = draw(
        st.sampled_from(
            [
                [merge, prune],
                [merge | {"from": late}, prune],
                [{"strategy": "fastv", "at": late}],
                [{"strategy": "fastv", "at": list(range(late, depth))}],
                [{"strategy": "random", "at": layer, "site": site, "seed": 3}],
                [{"strategy": "random", "at": 0, "keep": 0.9}, prune | {"at": late}],
                [prune | {"at": late, "keep": share}, {"strategy": "random", "at": late, "site": "pre_ffn"}],
                [merge | {"at": layer, "site": site}, {"strategy": "fastv", "at": late}],
                [{"strategy": "similarity_merge", "at": layer, "site": site}],
                [{"strategy": "similarity_merge", "site": "kv", "from": layer}],
                [{"strategy": "streaming_window", "sinks": 2}],
                [{"strategy": "streaming_window", "sinks": 1, "from": layer}],
                [{"strategy": "uniform_frames", "at": layer}],
            ]
        )
    )
    policy = st.sampled_from(["merge", "protect"])
    return {"stages": stages, "newlines": draw(policy), "wrappers": draw(policy)}


@dataclass(repr=False)
class Case:
    """A batch, padded on the left, and what is done to it."""

    depth: int
    layout: tr.TokenLayout
    mask: Tensor
    x: Tensor
    pipeline: dict[str, Any]
    budget: dict[str, Any]
    look: tuple[str, int]

    def __repr__(self) -> str:
        facts = {name: value.tolist() for name, value in vars(self.layout).items()}
        return (
            f"depth {self.depth}, {self.look}, budget {self.budget}, {self.pipeline}, lengths {self.lengths}, {facts}"
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return self.mask.sum(1).tolist()

    @property
    def reducible(self) -> Tensor:
        """(B, N) bool under the pipeline's policies."""
        return self.layout.reducible(self.pipeline["newlines"], self.pipeline["wrappers"]) & self.mask.bool()

    def alone(self, row: int) -> Case:
        """That row without the others and without padding."""
        inside = slice(self.layout.shape[1] - self.lengths[row], None)
        facts = {name: x[row : row + 1, inside] for name, x in vars(self.layout).items() if x is not None}
        return Case(
            self.depth, tr.TokenLayout(**facts), self.mask[row : row + 1, inside], self.x[row : row + 1, inside],
            self.pipeline, self.budget, self.look,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, most_rows: int = 3) -> Case:
    """A batch in which every row but perhaps the last has vision tokens that may be reduced."""
    depth = draw(st.integers(3, 5))
    pipeline = draw(pipelines(depth))
    batch = [draw(rows()) for _ in range(draw(st.integers(1, most_rows)))]
    if len(batch) > 1 and draw(st.booleans()):
        batch[-1] = draw(rows(text_only=True))
    width = max(len(row) for row in batch)
    padded = [[(-1, -1, -1, PLAIN, False)] * (width - len(row)) + row for row in batch]
    slot, frame, medium, marker, protected = torch.tensor(padded).unbind(-1)
    # A first patch that may go, so that no pipeline protects all of a row.
    protected = protected.bool() & ~((slot == 0) & (frame == 0))
    layout = tr.TokenLayout(slot=slot, frame=frame, medium=medium, marker=marker, protected=protected)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    look = draw(st.sampled_from(KINDS)), draw(st.integers(0, 9))
    unit = draw(st.sampled_from(["tokens", "tokens", "flops", "kv_cache"]))
    return Case(
        depth, layout, mask, embeddings(layout, HIDDEN, *look), pipeline, {unit: draw(st.integers(30, 100)) / 100}, look
    )


def model_of(case: Case) -> Any:
    """With sdpa: transformers' eager attention softmaxes in float32, where float64's mask value overflows to NaN on padding."""
    return decoder(case.depth, HIDDEN, implementation="sdpa")


def forward(case: Case, **changes: Any) -> tuple[Tensor, tr.Trace]:
    """Logits (B, M, V) and trace of one prefill at positions that do not count padding."""
    model = model_of(case)
    position = (case.mask.cumsum(1) - 1).clamp(min=0)
    budget = changes.get("budget", case.budget)
    with torch.no_grad(), tr.reduce(model, case.pipeline, layout=case.layout, budget=budget) as run:
        out = model(inputs_embeds=case.x, attention_mask=case.mask, position_ids=position)
    return out.logits, run.trace


def tried(case: Case) -> tuple[Tensor, tr.Trace]:
    """`forward`; where no choice of tokens meets the budget, with the smallest that the refusal says can be met."""
    unit, share = next(iter(case.budget.items()))
    for _ in range(12):
        try:
            result = forward(case)
        except BudgetError as error:
            named = float(str(error).rpartition("smallest feasible budget here is ")[2])
            if not share < named <= 1:
                raise AssertionError(f"no progress: {error}") from None
            case.budget, share = {unit: named}, named
        else:
            event("reduced" if any(stage.before != stage.after for stage in result[1].stages) else "kept all")
            return result
    raise AssertionError(f"no budget named can be met; the last was {case.budget}")


# Properties ------------------------------------------------------------------------------------------------------------


def tokens_are_accounted_for(case: Case) -> None:
    """Invariants 1–3: text stays, order is kept, each token has one end, counts add up, no budget is exceeded."""
    logits, trace = tried(case)
    reducible, media = case.reducible, case.layout.media()
    assert trace.tokens.tolist() == case.lengths
    assert logits.shape[1] == max(len(kept) for kept in trace.kept)
    assert bool(logits.isfinite().all())
    for row, kept in enumerate(trace.kept):
        source, inside = trace.source[row], case.mask[row].bool()
        assert torch.equal(kept, kept.unique())
        assert bool((source[~inside] == -1).all())
        stays = inside & ~reducible[row]
        columns = torch.arange(len(source))
        assert torch.equal(source[stays], columns[stays])
        ends = source >= 0
        assert torch.equal(source[ends].unique(), kept)
        assert torch.equal(source[kept], kept)
        assert bool(inside[kept].all())
        moved = ends & (source != columns)
        assert torch.equal(media[row][moved], media[row][source[moved]])
        assert torch.equal(case.layout.slot[row][moved], case.layout.slot[row][source[moved]])
        looks = [stage for stage in trace.stages if stage.row == row and not stage.site.endswith("kv")]
        # A token that is dropped takes along what was merged into it, so the originals gone are at least those dropped.
        merged, dropped, gone = sum(s.merged for s in looks), sum(s.dropped for s in looks), int((inside & ~ends).sum())
        assert merged + dropped == case.lengths[row] - len(kept)
        assert merged - int(moved.sum()) == gone - dropped >= 0
        assert (gone == 0) == (dropped == 0)
        assert [s.after for s in looks[:-1]] == [s.before for s in looks[1:]]
        held = [int(layer.tokens[row]) for layer in trace.layers]
        ffn = [int(layer.ffn_tokens[row]) for layer in trace.layers]
        assert held == sorted(held, reverse=True) or any("kv" in stage.site for stage in trace.stages)
        assert ffn[-1] == len(kept)
        if reducible[row].any() and not any("kv" in stage.site for stage in trace.stages):
            spent = account(case.budget, case.lengths[row], int(reducible[row].sum()), case.depth, HIDDEN)
            assert spent.cost(held, ffn, held, [None] * case.depth) <= spent.limit
        elif "flops" not in case.budget and reducible[row].any():
            assert sum(held) <= next(iter(case.budget.values())) * case.depth * case.lengths[row] + 1e-9


def a_row_does_not_know_its_batch(case: Case) -> None:
    """Invariants 5 and 7: the same tokens and logits alone and without padding; the same bits a second time."""
    logits, trace = tried(case)
    again, second = forward(case)
    assert torch.equal(logits, again)
    assert torch.equal(trace.source, second.source)
    for row, length in enumerate(case.lengths):
        if not bool(case.layout.vision[row].any()):
            continue
        single, own = forward(case.alone(row))
        pad = case.layout.shape[1] - length
        assert [int(layer.tokens[0]) for layer in own.layers] == [int(layer.tokens[row]) for layer in trace.layers]
        if case.look[0] == "zeros":
            continue  # Tokens that are all alike tie in attention but for its rounding, and that goes by the batch's shape.
        assert torch.equal(own.kept[0] + pad, trace.kept[row])
        assert torch.equal(torch.where(own.source[0] >= 0, own.source[0] + pad, -1), trace.source[row, pad:])
        torch.testing.assert_close(logits[row, logits.shape[1] - single.shape[1] :], single[0], atol=1e-9, rtol=0)


def keeping_all_changes_no_bit_and_detach_restores(case: Case) -> None:
    """Invariants 4 and 6."""
    model = model_of(case)
    position = (case.mask.cumsum(1) - 1).clamp(min=0)

    def dense() -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=case.x, attention_mask=case.mask, position_ids=position).logits

    def hooks() -> list[int]:
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

    before, config = dense(), model.config.to_dict() | {"attention": model.config._attn_implementation}
    own = [stage for stage in case.pipeline["stages"] if "keep" not in stage]
    if len(own) == len(case.pipeline["stages"]):
        logits, trace = forward(case, budget={**dict.fromkeys(case.budget, 1.0)})
        assert trace.source[case.mask.bool()].tolist() == case.mask.nonzero()[:, 1].tolist()
        assert torch.equal(logits[case.mask.bool()], before[case.mask.bool()])
    tried(case)
    assert not any(hooks())
    assert model.config.to_dict() | {"attention": model.config._attn_implementation} == config
    assert torch.equal(dense(), before)


def bad_vectors_stay_where_they_are(case: Case, values: list[float], seed: int) -> None:
    """Invariant 8: what enters layer 0 after a merge is bad only where it was; other rows of the batch never notice."""
    case.pipeline = case.pipeline | {
        "stages": [{"strategy": "similarity_merge", "threshold": 0.5, "at": 0}, {"strategy": "random", "at": 1}]
    }
    clean = tried(case)
    x, generator = case.x.clone(), torch.Generator().manual_seed(seed)
    for value in values:
        x[0, int(torch.randint(0, x.shape[1], (1,), generator=generator))] = value
    entered: list[Tensor] = []
    model = model_of(case)
    norm = model.model.layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    try:
        logits, trace = forward(replace(case, x=x))
    finally:
        handle.remove()
    bad = (~x.isfinite() | (x == 0)).any(-1)[0] & case.mask[0].bool()
    state = entered[-1][0, -int(trace.layers[0].tokens[0]) :]
    assert int((~state.isfinite() | (state == 0)).any(-1).sum()) == int(bad.sum())
    columns, source = torch.arange(len(bad)), trace.source[0]
    assert bool(((source == columns) | (source < 0))[bad].all())
    assert not bool(torch.isin(source[~bad], columns[bad]).any())
    for row in range(1, len(x)):
        assert torch.equal(trace.source[row], clean[1].source[row])
        own = len(trace.kept[row])
        torch.testing.assert_close(logits[row, -own:], clean[0][row, -own:], atol=1e-9, rtol=0)


# Their two suites ------------------------------------------------------------------------------------------------------

PROPERTIES: list[Callable[[Case], None]] = [
    tokens_are_accounted_for,
    a_row_does_not_know_its_batch,
    keeping_all_changes_no_bit_and_detach_restores,
]
BAD = st.lists(st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e300]), min_size=1, max_size=4)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=cases())
@DEFAULT
def test_property(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@given(cases(), BAD, st.integers(0, 99))
@DEFAULT
def test_bad_vectors_never_spread(case: Case, values: list[float], seed: int) -> None:
    bad_vectors_stay_where_they_are(case, values, seed)


@pytest.mark.slow
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=cases())
@OFTEN
def test_property_often(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@pytest.mark.slow
@given(cases(), BAD, st.integers(0, 99))
@OFTEN
def test_bad_vectors_never_spread_often(case: Case, values: list[float], seed: int) -> None:
    bad_vectors_stay_where_they_are(case, values, seed)
