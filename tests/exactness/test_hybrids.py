"""Decoders whose layers are not all attention: from the site on, the sequence is the shorter one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tests.support.hybrids import DECODERS, decoder, dense
from tokenreduce.errors import UnsupportedError

BEFORE, FRAMES, SLOTS, AFTER = 4, 5, 6, 5
TOKENS = BEFORE + FRAMES * SLOTS + AFTER
PAD = 7
WHERE = tr.TokenLayout.video(before=BEFORE, frames=FRAMES, per_frame=SLOTS, after=AFTER)
CLOSE = 1e-4
"""Chunked and stepped forms of one state round differently."""


def words(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def pipeline(site: int, **stage: Any) -> dict[str, Any]:
    return {"stages": [{"strategy": "random", "keep": 0.5, "at": site, **stage}]}


@torch.no_grad()
@pytest.mark.parametrize("site", [0, 1, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_one_row_and_its_later_turns(kind: str, site: int) -> None:
    """A prefill of one row is the oracle's to the bit; steps, a second turn of seven words and its steps within CLOSE."""
    model, ids = decoder(kind), words(1, TOKENS + 3 + 7 + 2)
    cache = DynamicCache(config=model.config)
    found, at = [], 0
    with tr.reduce(model, pipeline(site), layout=WHERE) as run:
        for count in (TOKENS, 1, 1, 1, 7, 1, 1):
            place = torch.arange(at, at + count)[None]  # Bamba's own positions begin anew in a later turn.
            found.append(model(input_ids=ids[:, at : at + count], position_ids=place, past_key_values=cache).logits[0])
            at += count
        kept = run.trace.kept[0]
    assert BEFORE + AFTER < len(kept) < TOKENS
    alive = torch.cat([kept, torch.arange(TOKENS, at)])
    expected = dense(model, ids[0], site, alive)
    first = dense(model, ids[0, :TOKENS], site, kept)
    assert torch.equal(found[0], first)
    assert float((torch.cat(found) - expected).abs().max()) < CLOSE
    whole = dense(model, ids[0], site, torch.arange(at))
    assert float((whole[alive] - expected)[len(kept) :].abs().max()) > 100 * CLOSE  # The reduction mattered.


@torch.no_grad()
@pytest.mark.parametrize("site", [0, 2])
@pytest.mark.parametrize("kind", DECODERS)
def test_rows_of_other_lengths(kind: str, site: int) -> None:
    """Padding, the input's and what rows that keep different numbers leave, never enters a state."""
    model = decoder(kind)
    rows = [words(TOKENS), words(TOKENS - PAD, seed=2)]
    ids = torch.stack([rows[0], torch.cat([torch.zeros(PAD, dtype=torch.long), rows[1]])])
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    slot, frame = WHERE.slot.repeat(2, 1), WHERE.frame.repeat(2, 1)
    slot[1, : BEFORE + PAD] = frame[1, : BEFORE + PAD] = -1
    where = tr.TokenLayout(slot=slot, frame=frame)
    more, cache = words(2, 2 + 5, seed=3), DynamicCache(config=model.config)
    with tr.reduce(model, pipeline(site), layout=where) as run:
        place = (mask.cumsum(1) - 1).clamp(min=0)
        found = [model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache).logits]
        kept = [columns - pad for columns, pad in zip(run.trace.kept, (0, PAD), strict=True)]
        at = 0
        for count in (1, 1, 5):
            mask = torch.cat([mask, mask.new_ones(2, count)], 1)
            place = (mask.cumsum(1) - 1)[:, -count:]
            piece = more[:, at : at + count]
            found.append(model(input_ids=piece, attention_mask=mask, position_ids=place, past_key_values=cache).logits)
            at += count
    assert len(kept[0]) != len(kept[1])
    for row in range(2):
        everything = torch.cat([rows[row], more[row]])
        alive = torch.cat([kept[row], torch.arange(len(rows[row]), len(everything))])
        expected = dense(model, everything, site, alive)
        got = torch.cat([found[0][row, -len(kept[row]) :], *(later[row] for later in found[1:])])
        assert float((got - expected).abs().max()) < CLOSE


@torch.no_grad()
def test_attention_is_read_at_the_last_layer_that_has_it() -> None:
    """Layers 0, 1 and 3 have none: what is read before layer 4 is of layer 2, and nothing can be read before layer 3."""
    model, ids = decoder("qwen3_5_text"), words(1, TOKENS)
    seen: dict[int, Tensor] = {}

    def note(module: Any, args: Any, output: Any) -> None:
        seen[module.layer_idx] = output[1]

    with tr.reduce(model, {"stages": [{"strategy": "fastv", "at": 4, "keep": 0.5}]}, layout=WHERE) as run:
        model(input_ids=ids)
        kept = run.trace.kept[0]
        assert "read the attention of layer 2" in run.trace.stages[0].note
    model.set_attn_implementation("eager")
    handle = model.model.layers[2].self_attn.register_forward_hook(note)
    try:
        model(input_ids=ids)
    finally:
        handle.remove()
        model.set_attn_implementation("sdpa")
    scores = seen[2][0, :, -1].mean(0)  # FastV reads the last query.
    video = torch.arange(BEFORE, TOKENS - AFTER)
    best = video[scores[video].topk(FRAMES * SLOTS // 2).indices].sort().values
    assert torch.equal(kept[(kept >= BEFORE) & (kept < TOKENS - AFTER)], best)
    with pytest.raises(UnsupportedError, match=r"reads attention at .*, before any layer of attention .* are 2, 4"):
        tr.reduce(model, {"stages": [{"strategy": "fastv", "at": 2, "keep": 0.5}]}, layout=WHERE)


@torch.no_grad()
def test_stages_at_the_cache_act_on_layers_of_attention_alone() -> None:
    model, ids = decoder("qwen3_5_text"), words(1, TOKENS + 1)
    stage = {"strategy": "streaming_window", "sinks": 2, "window": 8}
    with pytest.raises(UnsupportedError, match=r"layer 3, which has no attention .* attention layers are 2, 4"):
        tr.reduce(model, {"stages": [{**stage, "at": 3}]}, layout=WHERE)
    cache = DynamicCache(config=model.config)
    with tr.reduce(model, {"stages": [{**stage, "at": 4}]}, layout=WHERE):
        model(input_ids=ids[:, :TOKENS], past_key_values=cache)
        model(input_ids=ids[:, TOKENS:], past_key_values=cache)
    assert cache.layers[4].keys.shape[2] < cache.layers[2].keys.shape[2] == TOKENS + 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "nemotron_h"])
def test_a_forward_that_fails_leaves_the_states_as_they_were(kind: str) -> None:
    model, ids = decoder(kind), words(1, TOKENS + 9)

    def fail(*args: Any) -> None:
        raise RuntimeError("broken off")

    def turn(broken: bool) -> Tensor:
        cache = DynamicCache(config=model.config)
        with tr.reduce(model, pipeline(1), layout=WHERE):
            model(input_ids=ids[:, :TOKENS], past_key_values=cache)
            if broken:
                handle = model.model.layers[-1].register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="broken off"):
                    model(input_ids=ids[:, TOKENS + 4 :], past_key_values=cache)
                handle.remove()
            place = torch.arange(TOKENS, TOKENS + 9)[None]
            logits: Tensor = model(input_ids=ids[:, TOKENS:], position_ids=place, past_key_values=cache).logits
            return logits

    assert torch.equal(turn(broken=True), turn(broken=False))


@torch.no_grad()
def test_what_a_state_cannot_do_is_refused() -> None:
    model, ids = decoder("qwen3_5_text"), words(2, TOKENS)
    cache = DynamicCache(config=model.config)
    slot, frame = WHERE.slot.repeat(2, 1), WHERE.frame.repeat(2, 1)
    slot[1, : BEFORE + SLOTS] = frame[
        1, : BEFORE + SLOTS
    ] = -1  # A frame less, so that the rows keep different numbers.
    where = tr.TokenLayout(slot=slot, frame=frame)
    with tr.reduce(model, pipeline(1), layout=where) as run:
        model(input_ids=ids, past_key_values=cache)
        assert len(run.trace.kept[0]) != len(run.trace.kept[1])
        with pytest.raises(UnsupportedError, match="recurrent states cannot be cropped"):
            cache.crop(-2)
        before = {name: state.clone() for name, state in cache.layers[0].recurrent_states.items()}
        mask = torch.ones(2, 2 * TOKENS, dtype=torch.long)
        mask[1, TOKENS : TOKENS + 3] = 0
        with pytest.raises(UnsupportedError, match="padding in a later turn"):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        run.layout = where
        with pytest.raises(UnsupportedError, match="rows that keep different numbers"):
            model(input_ids=ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="no pipeline is attached"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert all(torch.equal(cache.layers[0].recurrent_states[name], state) for name, state in before.items())


@torch.no_grad()
def test_beams() -> None:
    """The score of the best of three beams is the oracle's of its tokens."""
    model, ids = decoder("qwen3_5_text"), words(1, TOKENS)
    with tr.reduce(model, pipeline(1), layout=WHERE.expand(3)) as run:
        out = model.generate(
            input_ids=ids, max_new_tokens=4, num_beams=3, do_sample=False, output_scores=True,
            return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
        kept = run.trace.kept[0]
    assert all(torch.equal(other, kept) for other in run.trace.kept)
    row = out.sequences[0]
    logits = dense(model, row[:-1], 1, torch.cat([kept, torch.arange(TOKENS, len(row) - 1)]))
    chosen = logits.log_softmax(-1)[-4:].gather(1, row[-4:, None]).sum()
    assert abs(float(chosen - out.sequences_scores[0])) < CLOSE
