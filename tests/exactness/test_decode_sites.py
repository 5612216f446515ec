"""Stages at `decode` sites against the dense model in which, from each asking on, what was dropped is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.double import Double, plugin  # noqa: F401
from support.hiding import CLOSE, GROUPS, HEADS, double, oracle
from support.tiny import TOKENS, layout, prompt
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import PipelineError, PluginError, UnsupportedError
from tokenreduce.strategy import Capabilities, StageContext

STEPS = 12


@pytest.fixture(autouse=True)
def _decode_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    may = Capabilities(sites=("decode",), attention=True, content_dependent=True)
    monkeypatch.setattr(Double, "capabilities", may)


class Held:
    """Which tokens of the conversation each head of each layer holds, kept beside the engine: (G, held) long by layer."""

    def __init__(self, layers: list[int], tokens: int) -> None:
        self.places = {layer: torch.arange(tokens).repeat(GROUPS, 1) for layer in layers}
        self.asked: list[tuple[dict[int, Tensor], int]] = []
        self.rows: list[tuple[int, int, Tensor]] = []

    def ask(self, layer: int, now: int, kept: Tensor) -> None:
        """At the step that is token `now`, `kept` (G, n) bool of what is held stays."""
        held = self.places[layer]
        fresh = torch.arange(int(held.max()) + 1, now + 1)
        held = torch.cat([held, fresh.repeat(GROUPS, 1)], 1)
        assert held.shape == kept.shape
        self.places[layer] = torch.stack([row[stays] for row, stays in zip(held, kept, strict=True)])
        seen = torch.zeros(1, GROUPS, now + 1, dtype=torch.bool)
        for head, places in enumerate(self.places[layer]):
            seen[0, head, places] = True
        self.asked.append(({layer: seen}, now + 1))


def pipeline(act: Callable[[StageContext], Any], every: int, at: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    Double.act = staticmethod(act)  # type: ignore[assignment]
    return {"name": "late", "stages": [{"strategy": "double", "at": list(at), "site": "decode", "keep": float(every)}]}


@pytest.fixture(autouse=True)
def _every(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double has no field `every`: its `keep` says it here."""
    monkeypatch.setattr(Double.Config, "every", property(lambda self: int(self.keep or 1)), raising=False)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_steps_see_what_is_left(every: int, text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads drop two tokens at each asking by the attention of the steps since; rows of attention are the oracle's own."""
    may = Capabilities(sites=("decode",), attention=True, content_dependent=True, text=text)
    monkeypatch.setattr(Double, "capabilities", may)
    model, record, now = double(), Held([1, 2, 3], TOKENS), [0]
    ids = torch.cat([prompt(), torch.randint(2, 64, (1, STEPS), generator=torch.Generator().manual_seed(5))], 1)
    rows: list[tuple[int, int, Tensor, Tensor]] = []

    def act(ctx: StageContext) -> Any:
        assert ctx.site.kind == "decode"
        assert ctx.keys.shape[:2] == (GROUPS, ctx.n)
        assert bool(ctx.reducible.all()) == text
        each = ctx.attention("all", "each")
        rows.append((ctx.site.layer, now[0], record.places[ctx.site.layer].clone(), each))
        scores = each.view(GROUPS, -1, ctx.n).sum(1).masked_fill(~ctx.reducible, torch.inf)
        scores[:, -1] = torch.inf
        target = torch.arange(ctx.n).repeat(GROUPS, 1)
        gone = (scores if text else scores.mean(0, keepdim=True).expand_as(scores)).argsort(1)[:, :2]
        target.scatter_(1, gone, -1)
        record.ask(ctx.site.layer, now[0], target >= 0)
        return tr.Reduction(target)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        dense = model(input_ids=ids[:, :TOKENS]).logits
        with tr.reduce(model, pipeline(act, every), layout=layout()):
            assert torch.equal(model(input_ids=ids[:, :TOKENS], past_key_values=cache).logits, dense)
            ours = []
            for now[0] in range(TOKENS, TOKENS + STEPS):
                ours.append(model(input_ids=ids[:, now[0] : now[0] + 1], past_key_values=cache).logits)
        weights: dict[int, Tensor] = {}
        handles = [
            model.model.layers[n].self_attn.register_forward_hook(lambda m, a, out, n=n: weights.update({n: out[1][0]}))
            for n in (1, 2, 3)
        ]
        with oracle(model, *record.asked):
            whole = model(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        plain = model(input_ids=ids, use_cache=False).logits
    assert float((torch.cat(ours, 1) - whole[:, TOKENS:]).abs().max()) < CLOSE
    assert float((plain - whole)[:, -1].abs().max()) > 1e-3
    asked = STEPS // every
    assert len(record.asked) == 3 * asked
    assert [layer.keys.shape[2] for layer in cache.layers[1:]] == [TOKENS + STEPS - 2 * asked] * 3
    assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS + STEPS] * 4
    share = HEADS // GROUPS
    for layer, last, held, each in rows:
        summed = weights[layer][:, last - every + 1 : last + 1].sum(1)
        for head in range(HEADS):
            places = torch.cat([held[head // share], torch.arange(int(held.max()) + 1, last + 1)])
            assert torch.allclose(each[head], summed[head, places], atol=1e-5)


def test_rows_with_padding_and_a_second_turn_are_alone() -> None:
    """Rows drop what they look at least; the second has fewer vision tokens left, and holds fewer."""
    model = double()
    short = prompt(1)[:, 5:]
    ids = torch.cat([prompt(), torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [5]])).long()
    own = layout()
    slot, frame = (torch.cat([x, torch.cat([x.new_full((1, 5), -1), x[:, 5:]], 1)]) for x in (own.slot, own.frame))
    words = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(3))

    def act(ctx: StageContext) -> Any:
        return ctx.keep_top(ctx.attention("all"), max(ctx.reducible_count - (3 if ctx.reducible_count % 2 else 2), 4))

    def talk(rows: Tensor, where: tr.TokenLayout, seen: Tensor, said: Tensor) -> Tensor:
        cache, out = DynamicCache(config=model.config), []
        with torch.no_grad(), tr.reduce(model, pipeline(act, 2), layout=where):
            position = (seen.cumsum(1) - 1).clamp(min=0)
            model(input_ids=rows, attention_mask=seen, position_ids=position, past_key_values=cache)
            for part in (*said[:, :5].split(1, 1), said[:, 5:8], *said[:, 8:].split(1, 1)):
                seen = torch.cat([seen, torch.ones_like(part)], 1)
                position = seen.cumsum(1)[:, -part.shape[1] :] - 1
                out.append(
                    model(input_ids=part, attention_mask=seen, position_ids=position, past_key_values=cache).logits
                )
        assert cache.layers[1].keys.shape[2] < TOKENS + 12
        return torch.cat(out, 1)

    together = talk(ids, tr.TokenLayout(slot=slot, frame=frame), mask, words)
    for number, (row, where) in enumerate(
        ((ids[:1], own), (short, tr.TokenLayout(slot=slot[1:, 5:], frame=frame[1:, 5:])))
    ):
        alone = talk(row, where, torch.ones_like(row), words[number : number + 1])
        assert float((together[number] - alone[0]).abs().max()) < CLOSE


def test_beams_take_their_queries_along() -> None:
    """A beam's words, given one by one to the same pipeline, have the beam's score."""
    model = double()

    def act(ctx: StageContext) -> Any:
        return ctx.keep_top(ctx.attention("all"), max(ctx.reducible_count - 3, 4))

    where = layout()
    with torch.no_grad():
        with tr.reduce(model, pipeline(act, 2), layout=where):
            out = model.generate(
                input_ids=prompt(), attention_mask=torch.ones(1, TOKENS, dtype=torch.long), max_new_tokens=8, num_beams=3,
                num_return_sequences=3, do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
            )  # fmt: skip
        for words, score in zip(out.sequences, out.sequences_scores, strict=True):
            cache, total = DynamicCache(config=model.config), 0.0
            with tr.reduce(model, pipeline(act, 2), layout=where):
                logits = model(input_ids=words[None, :TOKENS], past_key_values=cache).logits
                for place in range(TOKENS, len(words)):
                    total += float(logits[0, -1].log_softmax(-1)[words[place]])
                    logits = model(input_ids=words[None, place : place + 1], past_key_values=cache).logits
            assert abs(total - float(score)) < CLOSE


def test_facts_live_on_behind_earlier_stages() -> None:
    """After fastv at layer 1 a stage knows of each token that it holds which frame it is of."""
    model, seen = double(), list[tuple[int, Tensor, Tensor]]()
    Double.act = staticmethod(lambda ctx: seen.append((ctx.site.layer, ctx.frame, ctx.slot)))  # type: ignore[assignment]
    stages = [{"strategy": "fastv", "at": 1, "keep": 0.5}, *pipeline(Double.act, 1, (0, 3))["stages"]]
    with torch.no_grad(), tr.reduce(model, {"stages": stages}, layout=layout()) as run:
        cache = DynamicCache(config=model.config)
        model(input_ids=prompt(), past_key_values=cache)
        model(input_ids=prompt()[:, :1], past_key_values=cache)
        kept = run.trace.kept[0]
    assert [layer for layer, _, _ in seen] == [0, 3]
    for (_, frame, slot), alive in zip(seen, (torch.arange(TOKENS), kept), strict=True):
        assert frame.tolist() == [*layout().frame[0, alive].tolist(), -1]
        assert slot.tolist() == [*layout().slot[0, alive].tolist(), -1]


def test_what_a_decode_stage_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()

    def refused(act: Callable[[StageContext], Any], match: str, error: type[Exception] = PluginError) -> None:
        with torch.no_grad(), tr.reduce(model, pipeline(act, 1, (1,)), layout=layout()):
            cache = DynamicCache(config=model.config)
            model(input_ids=prompt(), past_key_values=cache)
            with pytest.raises(error, match=match):
                model(input_ids=prompt()[:, :1], past_key_values=cache)

    refused(lambda ctx: ctx.merge(torch.where(ctx.position == 0, -1, ctx.position)), "removes a token that must stay")
    refused(lambda ctx: ctx.attention(torch.tensor([0])), "queries are last, all")
    heads = torch.arange(TOKENS + 1).repeat(GROUPS, 1)
    heads[0, 3] = heads[1, 4] = -1
    refused(lambda ctx: tr.Reduction(heads), r"lets heads differ, .*Capabilities\(text=True\)")
    two = {"stages": [*pipeline(lambda ctx: None, 1)["stages"]] * 2}
    with pytest.raises(PipelineError, match="cannot both act on the KV cache of one layer"):
        tr.reduce(model, two, layout=layout())
    window = {
        "stages": [{"strategy": "streaming_window", "sinks": 2, "window": 9}, *pipeline(lambda ctx: None, 1)["stages"]]
    }
    with pytest.raises(PipelineError, match="cannot both act on the KV cache of one layer"):
        tr.reduce(model, window, layout=layout())
    monkeypatch.setattr(Double, "capabilities", Capabilities(sites=("decode",), attention=True))
    model.model.compile(backend="eager")
    refusal = pytest.raises(UnsupportedError, match="`decode` sites are not supported in a compiled model")
    with torch.no_grad(), tr.reduce(model, pipeline(lambda ctx: None, 1), layout=layout()), refusal:
        model(input_ids=prompt())
