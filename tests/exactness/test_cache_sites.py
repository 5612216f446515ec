"""Stages at `cache` sites against the dense model in which, from the prompt's end on, each head does not see what it dropped.

The oracle is the model's own forward over everything at once, without a cache and with the family's eager attention; only its
mask gets a head axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.decoders import account
from support.double import Double, plugin  # noqa: F401
from support.hiding import CLOSE, GROUPS, double, oracle
from support.tiny import AFTER, BEFORE, FRAMES, PER_FRAME, TOKENS, layout, prompt, tiny_model
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import BudgetError, PipelineError, PluginError, UnsupportedError
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.schedule import forecast
from tokenreduce.strategy import Capabilities, StageContext


@pytest.fixture(autouse=True)
def _cache_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    may = Capabilities(sites=("cache",), attention=True, merges=True, chooses_count=True)
    monkeypatch.setattr(Double, "capabilities", may)
    monkeypatch.setattr(Double, "forecast", lambda self, view: super(Double, self).forecast(view))


def acting(act: Callable[[StageContext], Any], at: Any = (1, 2, 3), **more: Any) -> dict[str, Any]:
    Double.act = staticmethod(act)  # type: ignore[assignment]
    return {"name": "holding", "stages": [{"strategy": "double", "at": list(at), "keep": 0.4, **more}]}


def snap(noted: list[tuple[int, Tensor]], keep: int = 9) -> Callable[[StageContext], Any]:
    """Each KV head keeps the vision tokens that its queries of the last three rows look at most."""

    def act(ctx: StageContext) -> Any:
        each = ctx.attention(3, "each")
        scores = each.view(GROUPS, -1, ctx.n).sum(1)
        assert ctx.keys.shape[:2] == ctx.values.shape[:2] == (GROUPS, ctx.n)
        reduction = ctx.keep_top(scores, keep)
        noted.append((ctx.site.layer, reduction.kept.clone()))
        return reduction

    return act


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_prefill_decode_and_a_second_turn(kind: str) -> None:
    """The prefill keeps its bits; six steps, a turn of seven words and a step after it see what each head held."""
    model, noted = double(kind), list[tuple[int, Tensor]]()
    more = torch.randint(2, 64, (1, 14), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([prompt(), more], 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        dense = model(input_ids=ids[:, :TOKENS]).logits
        with tr.reduce(model, acting(snap(noted)), layout=layout()) as run:
            first = model(input_ids=ids[:, :TOKENS], past_key_values=cache).logits
            ours = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(TOKENS, TOKENS + 6)]
            ours.append(model(input_ids=ids[:, TOKENS + 6 : TOKENS + 13], past_key_values=cache).logits)
            ours.append(model(input_ids=ids[:, TOKENS + 13 :], past_key_values=cache).logits)
            trace = run.trace
        kept = {layer: heads[None] for layer, heads in noted}
        with oracle(model, (kept, TOKENS)):
            whole = model(input_ids=ids, use_cache=False).logits
        plain = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(first, dense)
    assert float((torch.cat(ours, 1) - whole[:, TOKENS:]).abs().max()) < CLOSE
    assert float((plain - whole)[:, TOKENS:].abs().max()) > 0.01
    assert any(not torch.equal(heads[0], heads[1]) for _, heads in noted)  # Heads chose for themselves.
    assert [layer.tokens.tolist() for layer in trace.layers] == [[TOKENS], [17], [17], [17]]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [TOKENS + 14] * 4
    assert [layer.keys.shape[2] for layer in cache.layers] == [TOKENS + 14, *[17 + 14] * 3]


def test_rows_of_a_ragged_batch_are_alone() -> None:
    """Two rows, the second padded by five and holding fewer: steps and a second turn equal each row by itself."""
    model = double()
    short = prompt(1)[:, 5:]
    ids = torch.cat([prompt(), torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [5]])).long()
    own = layout()
    slot = torch.cat([own.slot, torch.cat([own.slot.new_full((1, 5), -1), own.slot[:, 5:]], 1)])
    frame = torch.cat([own.frame, torch.cat([own.frame.new_full((1, 5), -1), own.frame[:, 5:]], 1)])
    both = tr.TokenLayout(slot=slot, frame=frame)
    more = torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(3))

    def act(ctx: StageContext) -> Any:
        scores = ctx.attention(3, "each").view(GROUPS, -1, ctx.n).sum(1)
        return ctx.keep_top(scores, 9 if ctx.n == TOKENS else 6)

    def talk(rows: Tensor, where: tr.TokenLayout, seen: Tensor, words: Tensor) -> Tensor:
        cache, out = DynamicCache(config=model.config), []
        with torch.no_grad(), tr.reduce(model, acting(act), layout=where):
            position = (seen.cumsum(1) - 1).clamp(min=0)
            model(input_ids=rows, attention_mask=seen, position_ids=position, past_key_values=cache)
            for part in (words[:, :1], words[:, 1:2], words[:, 2:7], words[:, 7:]):
                seen = torch.cat([seen, torch.ones_like(part)], 1)
                position = seen.cumsum(1)[:, -part.shape[1] :] - 1
                out.append(
                    model(input_ids=part, attention_mask=seen, position_ids=position, past_key_values=cache).logits
                )
        return torch.cat(out, 1)

    together = talk(ids, both, mask, more)
    for number, (row, where) in enumerate(
        ((ids[:1], own), (short, tr.TokenLayout(slot=slot[1:, 5:], frame=frame[1:, 5:])))
    ):
        alone = talk(row, where, torch.ones_like(row), more[number : number + 1])
        assert float((together[number] - alone[0]).abs().max()) < 1e-9


def test_beams_choose_alike_and_go_on_alike() -> None:
    """Each beam's score is that of its own words on the oracle."""
    model, noted = double(), list[tuple[int, Tensor]]()
    with tr.reduce(model, acting(snap(noted)), layout=layout()), torch.no_grad():
        out = model.generate(
            input_ids=prompt(), attention_mask=torch.ones(1, TOKENS, dtype=torch.long), max_new_tokens=5, num_beams=3,
            num_return_sequences=2, do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    kept = {layer: heads[None] for layer, heads in noted}
    for words, score in zip(out.sequences, out.sequences_scores, strict=True):
        with oracle(model, (kept, TOKENS)), torch.no_grad():
            logits = model(input_ids=words[None], use_cache=False).logits[0].log_softmax(-1)
        own = logits[TOKENS - 1 : -1].gather(1, words[TOKENS:, None]).sum()
        assert float((own - score).abs()) < CLOSE


def test_after_a_stage_that_drops_and_before_one_that_reads() -> None:
    """fastv at layer 1, the cache at layers 1 and 2, and a look at layer 2's attention before its FFN: as without `cache`."""
    model, noted = double(), list[tuple[int, Tensor]]()
    drop = {"strategy": "fastv", "at": 1, "keep": 0.5}
    look = {"strategy": "importance_prune", "at": 2, "keep": 0.25}
    hold = acting(snap(noted, 5), (1, 2))["stages"]
    kept = []
    for stages in ([drop, look], [drop, *hold, look]):
        with torch.no_grad(), tr.reduce(model, {"stages": stages}, layout=layout()) as run:
            logits = model(input_ids=prompt()).logits
            kept.append((run.trace.kept[0], logits))
    assert torch.equal(kept[0][0], kept[1][0])
    assert torch.equal(kept[0][1], kept[1][1])
    assert [heads.shape for _, heads in noted] == [(GROUPS, 8 + 12)] * 2


def test_merged_keys_and_values_against_loops() -> None:
    """Each head merges what it drops into a token of its choice; K and V are the means of the groups, by hand."""
    model, cache = double(), DynamicCache()
    target = torch.arange(TOKENS).repeat(GROUPS, 1)
    target[0, BEFORE + 1 : BEFORE + 7] = BEFORE
    target[1, BEFORE + 9 : BEFORE + 15] = BEFORE + 20
    seen: list[tuple[Tensor, Tensor]] = []

    def act(ctx: StageContext) -> Any:
        seen.append((ctx.keys.clone(), ctx.values.clone()))
        return ctx.merge(target)

    with torch.no_grad(), tr.reduce(model, acting(act, (1,)), layout=layout()) as run:
        model(input_ids=prompt(), past_key_values=cache)
    for side, held in zip(seen[0], (cache.layers[1].keys, cache.layers[1].values), strict=True):
        for head in range(GROUPS):
            left = [side[head, target[head] == i].mean(0) for i in range(TOKENS) if target[head, i] == i]
            assert torch.allclose(held[0, head], torch.stack(left), rtol=0, atol=1e-12)
    assert run.trace.layers[1].tokens.tolist() == [TOKENS - 6]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("budget", [{"kv_cache": 0.6}, 0.6])
def test_a_budget_is_met_and_forecast(text: bool, budget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the KV cache as they are, what the trace says and what `plan` says: the same numbers."""
    may = Capabilities(sites=("cache",), attention=True, chooses_count=True, text=text)
    monkeypatch.setattr(Double, "capabilities", may)

    def act(ctx: StageContext) -> Any:
        assert bool(ctx.reducible.all()) == text
        return ctx.keep_top(ctx.attention(2))

    pipeline = acting(act, (0, 1, 2, 3)) | {"budget": budget}
    del pipeline["stages"][0]["keep"]
    model, cache = double(), DynamicCache()
    with torch.no_grad(), tr.reduce(model, pipeline, layout=layout()) as run:
        model(input_ids=prompt(), past_key_values=cache)
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert [int(layer.tokens.sum()) for layer in run.trace.layers] == held
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sum(layer.kv_bytes for layer in run.trace.layers) == real
    assert 0.55 < sum(held) / (4 * TOKENS) <= 0.6
    planned = account(budget, TOKENS, FRAMES * PER_FRAME)
    forecast(build(load_pipeline(pipeline)), planned)
    assert planned.kv == held
    assert planned.pairs == [None] * 4
    with pytest.raises(BudgetError, match="cannot be met"):
        tr.reduce(model, pipeline | {"budget": 0.01}, layout=layout())


def test_what_a_cache_stage_may_not_do() -> None:
    model = tiny_model()

    def refused(act: Callable[[StageContext], Any], match: str, error: type[Exception] = PluginError) -> None:
        with torch.no_grad(), pytest.raises(error, match=match), tr.reduce(model, acting(act, (1,)), layout=layout()):
            model(input_ids=prompt())

    def heads(ctx: StageContext, *counts: int) -> Tensor:
        target = torch.arange(ctx.n).repeat(GROUPS, 1)
        for row, count in zip(target, counts, strict=True):
            row[BEFORE : BEFORE + count] = -1
        return target

    mix = tr.Reduction
    refused(lambda ctx: mix(heads(ctx, 1, 2)), r"keeps \[31, 30\] tokens in its heads; they must be equally many")
    refused(lambda ctx: mix(heads(ctx, 1, 1).roll(AFTER, 1) - AFTER), "strategy double at layer")
    refused(lambda ctx: ctx.merge(torch.where(ctx.position == 0, -1, ctx.position)), "removes a token that must stay")
    refused(lambda ctx: ctx.merge(torch.arange(ctx.n), weights=torch.ones(ctx.n)), "goes with hidden states alone")
    both = {
        "stages": [{"strategy": "streaming_window", "sinks": 2, "window": 9}, *acting(lambda ctx: None, (1,))["stages"]]
    }
    with pytest.raises(PipelineError, match="both act"):
        tr.reduce(model, both, layout=layout())


def test_a_failed_forward_leaves_the_cache_as_it_was() -> None:
    """The second prompt on a cache fails behind its `cache` stages: the first one's tokens are all there still."""
    model, noted = double(), list[tuple[int, Tensor]]()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), tr.reduce(model, acting(snap(noted)), layout=layout()) as run:
        model(input_ids=prompt(), past_key_values=cache)
        before = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in cache.layers]
        run.layout = layout()
        handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=prompt(1), past_key_values=cache)
        handle.remove()
        for layer, (keys, values, length) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
            assert layer.get_seq_length() == length


def test_a_second_video_holds_its_own() -> None:
    """What the first video's heads held stays, and the second's choose among its tokens, seen on the oracle."""
    model, noted = double(), list[tuple[int, Tensor]]()
    cache = DynamicCache(config=model.config)
    ids = torch.cat([prompt(), prompt(1), prompt(2)[:, :3]], 1)
    with torch.no_grad(), tr.reduce(model, acting(snap(noted)), layout=layout()) as run:
        model(input_ids=ids[:, :TOKENS], past_key_values=cache)
        run.layout = layout()
        second = model(input_ids=ids[:, TOKENS : 2 * TOKENS], past_key_values=cache).logits
        last = model(input_ids=ids[:, 2 * TOKENS :], past_key_values=cache).logits
    first = {layer: heads[None] for layer, heads in noted[:3]}
    with oracle(model, (first, TOKENS)), torch.no_grad():
        whole = model(input_ids=ids[:, : 2 * TOKENS], use_cache=False).logits[:, TOKENS:]
    assert float((second - whole).abs().max()) < CLOSE
    later = {layer: heads[None] for layer, heads in noted[3:]}
    everything = {layer: torch.cat([first[layer], later[layer]], 2) for layer in first}
    with oracle(model, (first, TOKENS), (everything, 2 * TOKENS)), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, 2 * TOKENS :]
    assert float((last - whole).abs().max()) < CLOSE


def test_keys_are_not_there_where_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Double, "capabilities", Capabilities(sites=("pre_ffn",), content_dependent=True))
    model, pipeline = tiny_model(), acting(lambda ctx: ctx.keys, (1,))
    with tr.reduce(model, pipeline, layout=layout()), pytest.raises(PipelineError, match="reads keys or values"):
        model(input_ids=prompt())


def test_stages_are_refused_in_a_compiled_model() -> None:
    model, pipeline = tiny_model(), acting(lambda ctx: None, (1,))
    model.model.compile(backend="eager")
    refusal = pytest.raises(UnsupportedError, match="`cache` sites are not supported in a compiled model")
    with torch.no_grad(), tr.reduce(model, pipeline, layout=layout()), refusal:
        model(input_ids=prompt())
