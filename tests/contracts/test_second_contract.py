"""What a strategy sees and says beyond the first contract: roles, grids, groups, counts, shares of the depth, mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.decoders import context
from support.double import Double, plugin  # noqa: F401
from support.tiny import prompt, tiny_model
from torch import Tensor

import tokenreduce as tr
from tokenreduce.errors import LayoutError, PipelineError, PluginError, UnsupportedError
from tokenreduce.layout import (
    AROUND,
    BEFORE,
    PLAIN,
    QUESTION,
    SYSTEM,
    TAIL,
    TIMESTAMP,
    VISION,
    WRAPPER,
    TokenLayout,
    roles,
)  # fmt: skip
from tokenreduce.planning.plan import plan
from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategy import Capabilities, Site, StageContext

LAYOUT = TokenLayout.video(before=3, frames=4, per_frame=6, after=5, grid=(2, 3))


@pytest.fixture(autouse=True)
def _without_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Double, "capabilities", Capabilities(sites=("pre_attention", "pre_ffn"), merges=True, content_dependent=True)
    )


def look(act: Callable[[StageContext], Any], layout: TokenLayout = LAYOUT, at: Any = 1, **more: Any) -> list[Any]:
    """What `act` returned at each look of a forward of a tiny model; its reductions are carried out."""
    seen: list[Any] = []
    Double.act = staticmethod(
        lambda ctx: (seen.append(act(ctx)), seen[-1] if isinstance(seen[-1], Reduction) else None)[1]
    )  # type: ignore[assignment]
    model = tiny_model()
    with (
        torch.no_grad(),
        tr.reduce(model, {"stages": [{"strategy": "double", "at": at, **more}]}, layout=layout) as run,
    ):
        model(input_ids=prompt()[:, : layout.shape[1]].expand(layout.shape[0], -1))
        seen.append(run.trace)
    return seen


# What a token is ------------------------------------------------------------------------------------------------------


def test_roles_of_a_bare_layout() -> None:
    slot = torch.tensor([-1, -1, 0, 1, -1, 0, -1, -1])
    assert roles(slot).tolist() == [BEFORE, BEFORE, VISION, VISION, AROUND, VISION, QUESTION, QUESTION]
    assert roles(torch.tensor([-1, -1])).tolist() == [BEFORE, BEFORE]


def test_roles_by_markers_and_turn_ends() -> None:
    slot = torch.tensor([-1, -1, -1, -1, 0, -1, 0, -1, -1, -1, -1, -1])
    marker = torch.tensor([PLAIN] * 3 + [WRAPPER, PLAIN, TIMESTAMP, PLAIN, WRAPPER] + [PLAIN] * 4)
    ids = torch.tensor([5, 2, 6, 7, 9, 8, 9, 7, 5, 6, 2, 5])
    expected = [SYSTEM, SYSTEM, BEFORE, AROUND, VISION, AROUND, VISION, AROUND, QUESTION, QUESTION, TAIL, TAIL]
    assert roles(slot, marker, ids, [2]).tolist() == expected
    assert roles(slot, marker, ids, [63]).tolist()[-4:] == [QUESTION] * 4


def test_facts_of_the_tokens_that_are_alive() -> None:
    Double.act = staticmethod(
        lambda ctx: (
            found.append((ctx.role, ctx.row, ctx.column, ctx.ids, ctx.marker, ctx.position)),
            ctx.keep((ctx.row == 1) & (ctx.column != 0)),
        )[1]
    )  # type: ignore[assignment]
    found: list[tuple[Tensor, ...]] = []
    model, ids = tiny_model(eos_token_id=63), prompt()
    ids[ids == 63] = 5
    ids[0, -2] = 63
    with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "double", "at": [1, 2]}]}, layout=LAYOUT):
        model(input_ids=ids)
    (role, row, column, its, marker, _), (later, *rest, place) = found
    assert role.tolist() == [BEFORE] * 3 + [VISION] * 24 + [QUESTION] * 3 + [TAIL] * 2
    assert row.tolist() == [-1] * 3 + [0, 0, 0, 1, 1, 1] * 4 + [-1] * 5
    assert column.tolist() == [-1] * 3 + [0, 1, 2] * 8 + [-1] * 5
    assert torch.equal(its, ids[0])
    assert not marker.any()
    assert len(place) == 3 + 8 + 5
    for first, second in zip((role, row, column, its, marker), (later, *rest), strict=True):
        assert torch.equal(first[place], second)


def test_a_grid_that_no_one_knows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer\[1\].pre_attention.*reads ctx.row.*TokenLayout\(..., row="):
        look(lambda ctx: ctx.row, TokenLayout.video(before=3, frames=4, per_frame=6, after=5))
    with pytest.raises(LayoutError, match="a grid of 2 × 2 is not 6 tokens per frame"):
        TokenLayout.video(before=3, frames=4, per_frame=6, after=5, grid=(2, 2))
    with pytest.raises(LayoutError, match=r"row and layout.column go together"):
        TokenLayout(slot=LAYOUT.slot, frame=LAYOUT.frame, row=LAYOUT.row)


@pytest.mark.parametrize("needs", ["grid", "ids"])
def test_needs_are_checked_before_anything_runs(needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Capabilities(sites=("pre_attention",), content_dependent=True, needs=(needs,))  # type: ignore[arg-type]
    monkeypatch.setattr(Double, "capabilities", declared)
    Double.act = staticmethod(lambda ctx: None)  # type: ignore[assignment]
    model, bare = tiny_model(), TokenLayout.video(before=3, frames=4, per_frame=6, after=5)
    given = {"input_ids": prompt()} if needs == "grid" else {"inputs_embeds": torch.randn(1, 32, 32)}
    ran: list[int] = []
    with tr.reduce(model, {"name": "needy", "stages": [{"strategy": "double", "at": 1}]}, layout=bare):
        model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        with torch.no_grad(), pytest.raises(UnsupportedError, match=f"needy: double needs .*{needs}"):
            model(**given)
    assert not ran


# Groups ---------------------------------------------------------------------------------------------------------------


def test_groups_shares_and_the_best_of_each() -> None:
    ctx = context(torch.zeros(32, 4), LAYOUT)
    frames = ctx.groups("frame")
    assert frames.counts == (6, 6, 6, 6)
    assert ctx.groups("medium").counts == (24,)
    assert ctx.groups(ctx.slot % 2).counts == (12, 12)
    counts = ctx.share(10, frames, [1, 2, 3, 4])
    assert counts == (1, 2, 3, 4)
    assert ctx.share(10, frames, [1, 0, 0, 0], least=1) == (6, 2, 1, 1)  # What is over is spread evenly.
    scores = torch.arange(32.0)
    kept = ctx.keep_top(scores, per=frames, counts=counts)
    assert kept.counts == (8 + 10,)
    per_frame = [int((kept.kept[0] & (ctx.frame == f)).sum()) for f in range(4)]
    assert per_frame == [1, 2, 3, 4]
    kept.validate()
    with pytest.raises(ValueError, match="a count from 0 for each of 4 groups"):
        ctx.keep_top(scores, per=frames, counts=[1])


# Merging --------------------------------------------------------------------------------------------------------------


def brute(x: Tensor, target: list[int], edges: list[tuple[int, int, float]]) -> Tensor:
    """States that are left: of a token with edges their sum, of any other its own."""
    rows = []
    for i, into in enumerate(target):
        if into == i:
            mine = [weight * x[source] for to, source, weight in edges if to == i]
            rows.append(sum(mine) if mine else x[i])
    return torch.stack(rows)  # type: ignore[arg-type]


def test_mixtures_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    target = [0, 1, 1, -1, 4, 0, 6, 4, -1]
    edges = [(0, 0, 2.0), (0, 5, -0.5), (0, 3, 0.25), (4, 3, 1.0), (6, 6, 0.5), (4, 7, 0.1)]
    into, source, weight = (list(part) for part in zip(*edges, strict=True))
    mixture = Mixture(torch.tensor(into), torch.tensor(source), torch.tensor(weight, dtype=torch.float64))
    reduction = Reduction.mix(torch.tensor([target]), mixture)
    reduction.validate()
    left = reduction.apply(x[None], torch.ones(1, 9, dtype=torch.long))
    assert left.hidden is not None
    assert torch.allclose(left.hidden[0], brute(x, target, edges), rtol=0, atol=1e-12)
    assert torch.equal(left.hidden[0, 1], x[1])  # No edge: its bits.
    assert left.size.tolist() == [[2, 2, 2, 1]]
    for odd, what in (
        (Mixture(torch.tensor([3]), torch.tensor([0]), torch.tensor([1.0])), "does not stay"),
        (Mixture(torch.tensor([0]), torch.tensor([9]), torch.tensor([1.0])), r"must lie in 0 … 8"),
        (Mixture(torch.tensor([0]), torch.tensor([1]), torch.tensor([1])), "float tensor"),
    ):
        with pytest.raises(LayoutError, match=what):
            Reduction.mix(torch.tensor([target]), odd).validate()


@pytest.mark.parametrize("way", ["weights", "keep_first", "mixture"])
def test_merged_states_in_a_forward(way: str) -> None:
    """Against the dense layers run by hand on the states that the rule in words leaves."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(32, generator=generator)
    target = torch.arange(32)
    target[9:15] = 3  # The second frame into the first token of the first.
    target[15:21] = -1
    edges = {
        "weights": [(int(target[i]), i, float(weights[i])) for i in range(3, 27) if target[i] >= 0],
        "keep_first": [],
        "mixture": [(21, 15, 0.5), (21, 16, 0.75), (3, 9, 1.0)],
    }[way]
    into, source, weight = (torch.tensor([edge[part] for edge in edges]) for part in range(3))
    states: list[Tensor] = []

    def act(ctx: StageContext) -> Reduction:
        states.append(ctx.hidden.clone())
        if way == "weights":
            return ctx.merge(target, weights=weights)
        if way == "keep_first":
            return ctx.merge(target, "keep_first")
        return ctx.merge(target, mixture=Mixture(into, source, weight))

    Double.act = staticmethod(act)  # type: ignore[assignment]
    model, after = tiny_model(), []
    with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "double", "at": 1}]}, layout=LAYOUT) as run:
        handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: after.append(args[0]))
        model(input_ids=prompt())
        handle.remove()
    expected = brute(states[0], target.tolist(), edges)
    assert torch.allclose(after[0][0], expected, rtol=0, atol=1e-6)
    assert run.trace.source[0, 9:15].tolist() == [3] * 6
    assert run.trace.source[0, 15:21].tolist() == [-1] * 6


def test_states_may_be_mixed_without_a_token_less() -> None:
    seen = look(lambda ctx: ctx.merge(torch.arange(32), weights=torch.full((32,), 0.5)), at=[1, 2])
    assert seen[-1].kept[0].tolist() == list(range(32))
    states: list[Tensor] = []
    look(lambda ctx: (states.append(ctx.hidden.clone()), ctx.merge(torch.arange(32), weights=torch.zeros(32)))[1])
    model, after = tiny_model(), []
    with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "double", "at": 1}]}, layout=LAYOUT):
        handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: after.append(args[0]))
        model(input_ids=prompt())
        handle.remove()
    assert not after[0][0, 3:27].any()
    assert torch.equal(after[0][0, 27:], states[0][27:])


def test_across_media_only_where_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    medium = torch.where(LAYOUT.vision, (LAYOUT.frame >= 2).long(), -1)
    two = TokenLayout(slot=LAYOUT.slot, frame=LAYOUT.frame, medium=medium)
    target = torch.arange(32)
    target[26] = 3
    with pytest.raises(PluginError, match=r"another medium; the latter is for .*across_media=True"):
        look(lambda ctx: ctx.merge(target), two)
    mixture = Mixture(torch.tensor([3]), torch.tensor([26]), torch.tensor([1.0]))
    with pytest.raises(PluginError, match="mixes with text, a protected token or another medium"):
        look(lambda ctx: ctx.merge(torch.arange(32), mixture=mixture), two)
    allowed = Capabilities(sites=("pre_attention",), merges=True, content_dependent=True, across_media=True)
    monkeypatch.setattr(Double, "capabilities", allowed)
    assert look(lambda ctx: ctx.merge(target), two)[-1].source[0, 26] == 3
    text = Mixture(torch.tensor([3]), torch.tensor([30]), torch.tensor([1.0]))
    with pytest.raises(PluginError, match="mixes with text"):
        look(lambda ctx: ctx.merge(torch.arange(32), mixture=text), two)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [[2], [1, 2]])
def test_attention_of_chosen_rows_in_a_forward(at: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against eager attention's own weights, also after a stage at an earlier layer."""
    declared = Capabilities(sites=("pre_attention",), attention=True, content_dependent=True)
    monkeypatch.setattr(Double, "capabilities", declared)
    found: dict[str, Tensor] = {}

    def act(ctx: StageContext) -> Reduction | None:
        if ctx.site.layer == 1:
            return ctx.keep(ctx.slot < 3)
        rows = (ctx.role == QUESTION).nonzero()[:, 0]
        found["rows"] = rows
        found["each"] = ctx.attention(rows, "each", "each")
        found["sum"], found["max"] = ctx.attention(rows), ctx.attention(rows, "max", "max")
        found["last"] = ctx.attention("last", "each")
        return None

    Double.act = staticmethod(act)  # type: ignore[assignment]
    model, weights = tiny_model("eager"), []
    with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "double", "at": at}]}, layout=LAYOUT):
        handle = model.model.layers[1].self_attn.register_forward_hook(lambda _, args, out: weights.append(out[1][0]))
        model(input_ids=prompt())
        handle.remove()
    whole = weights[0][:, found["rows"]]
    assert torch.allclose(found["each"], whole, atol=1e-6)
    assert torch.allclose(found["sum"], whole.sum(1).mean(0), atol=1e-6)
    assert torch.allclose(found["max"], whole.amax((0, 1)), atol=1e-6)
    assert torch.allclose(found["last"], weights[0][:, -1], atol=1e-6)


def test_odd_questions_about_attention() -> None:
    ctx = context(torch.zeros(32, 4), LAYOUT, Site(1, "pre_attention"), scores=torch.zeros(32))
    for queries, heads, rows, match in (
        (torch.tensor([32]), "mean", "sum", r"places in 0 … 31"),
        (torch.tensor([1.0]), "mean", "sum", r"an \(r,\) long tensor"),
        ("last", "median", "sum", "heads must be mean, max or each"),
        ("last", "mean", "min", "rows must be sum, max or each"),
    ):
        with pytest.raises(ValueError, match=match):
            ctx.attention(queries, heads, rows)  # type: ignore[arg-type]


# Counts and layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"),
    [(7, 7), (0, 0), (1, 24), (1.0, 24), (0.5, 12), ("7/24", 7), ({"tokens": 1}, 1), (7 / 24, 7), (192, 24)],
)
def test_what_keep_says(keep: Any, left: int) -> None:
    model = tiny_model()
    pipeline = {"stages": [{"strategy": "random", "at": 1, "keep": keep}]}
    with torch.no_grad(), tr.reduce(model, pipeline, layout=LAYOUT) as run:
        model(input_ids=prompt())
    assert run.trace.layers[1].tokens.tolist() == [8 + left]
    assert plan(pipeline, "llava-video-7b", frames=4).layers[1].tokens > 0


@pytest.mark.parametrize("keep", [-1, 1.5, 0.0, "3/2", "0/4", "a", True, {"tokens": -1}, {"token": 3}, float("inf")])
def test_what_keep_may_not_say(keep: Any) -> None:
    with pytest.raises(PipelineError, match="keep"):
        tr.load_pipeline({"stages": [{"strategy": "random", "at": 1, "keep": keep}]})


def test_so_many_of_each_medium() -> None:
    medium = torch.where(LAYOUT.vision, (LAYOUT.frame >= 1).long(), -1)
    two = TokenLayout(slot=LAYOUT.slot, frame=LAYOUT.frame, medium=medium)
    model = tiny_model()
    pipeline = {"stages": [{"strategy": "random", "at": 1, "keep": {"tokens": 8, "per": "medium"}}]}
    with torch.no_grad(), tr.reduce(model, pipeline, layout=two) as run:
        model(input_ids=prompt())
    kept = run.trace.kept[0]
    assert [int((medium[0, kept] == number).sum()) for number in (0, 1)] == [6, 8]


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"at": 0.5}, [2]),
        ({"at": [0.25, 0.5, 3]}, [1, 2, 3]),
        ({"from": 0.5}, [2, 3]),
        ({"from": 0.3, "until": 0.6}, [1, 2]),
        ({"until": 0.25}, [0, 1]),
    ],
)
def test_shares_of_the_depth(fields: dict[str, Any], layers: list[int]) -> None:
    seen = look(lambda ctx: ctx.site.layer, **{"at": None, **fields})
    assert seen[:-1] == layers


def test_shares_of_the_depth_that_meet() -> None:
    with pytest.raises(PipelineError, match=r"`at: \[0.5, 0.6\]` is layers \[2, 2\] of 4"):
        look(lambda ctx: None, at=[0.5, 0.6])
    for at in (1.0, 0.0, -0.5, 1.5):
        with pytest.raises(PipelineError, match="at"):
            tr.load_pipeline({"stages": [{"strategy": "random", "at": at, "keep": 0.5}]})
