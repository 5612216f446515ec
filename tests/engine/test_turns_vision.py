"""Conversations with real multimodal models: every turn against the oracle, which is given the decoder's own inputs.

The vision tower and the arithmetic of 3-D positions are not under test, so the oracle takes embeddings and rotary tables
from a dense forward over the whole conversation; what is vision it takes from the hand-written layouts of `families`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from support.families import Family, Part, Text, Video
from support.matrix import TOLERANCE, Case, Expected, check_prefill, greedy, near
from support.oracle import Decoder, Row
from support.oracle_stages import Token
from support.subjects import SUBJECTS
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.layout import PLAIN

EXACT = TOLERANCE[torch.float64]
FIRST: list[Part] = [Text(4), Video(5), Text(5)]
TURNS: list[list[Part]] = [FIRST, [Text(6)], [Text(2), Video(4), Text(3)], [Text(4)]]
CASES = [
    Case("framefusion", "framefusion", 0.7),
    Case("prune", {"stages": [{"strategy": "importance_prune", "at": 1, "keep": 0.4}]}),
    Case("merge", {"stages": [{"strategy": "similarity_merge", "keep": 0.5, "at": 1, "site": "pre_ffn"}]}),
    Case("kv merge", {"stages": [{"strategy": "similarity_merge", "site": "kv", "at": [1, 3], "keep": 0.5}]}),
    Case("window", {"stages": [{"strategy": "streaming_window", "sinks": 2, "window": 25, "from": 1}]}),
]
PARAMETERS = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in ("prune", "merge") else ())
    for case in CASES
]


@dataclass(frozen=True)
class Conversation:
    """A model, its oracle, the inputs of each turn, and what a dense forward over all of them gave the decoder."""

    model: Any
    oracle: Decoder
    ids: Tensor
    mask: Tensor
    turns: list[dict[str, Tensor]]
    layout: tr.TokenLayout
    seen: dict[str, Any]
    bounds: list[int]

    def row(self, number: int, case: Case) -> Row:
        return Row(self.oracle, case.plain())

    def expect(self, row: Row, number: int, turn: int, case: Case) -> Tensor:
        """The oracle's logits of a turn of a row."""
        pipeline = case.load()
        first, last = self.bounds[turn], self.bounds[turn + 1]
        columns = [c for c in range(first, last) if self.mask[number, c]]
        reducible = self.layout.reducible(pipeline.newlines, pipeline.wrappers)[number]
        facts = [
            Token(
                column - first,
                *(int(getattr(self.layout, name)[number, column]) for name in ("slot", "frame", "medium")),
                reducible=bool(reducible[column]),
                deepstack=tuple(rows[number, column] for rows in self.seen["deepstack"]),
            )
            for column in columns
        ]
        cos, sin = (table[number if len(table) > 1 else 0, columns] for table in self.seen["rotary"])
        logits = row.turn(self.seen["embeds"][number, columns], facts, (cos, sin))
        row.shift = int(self.seen["positions"].amax(0)[number, columns].max()) + 1 - row.seen
        return logits

    def play(self, turn: int, cache: DynamicCache | None) -> Tensor:
        """The model's logits of a turn."""
        first, last = self.bounds[turn], self.bounds[turn + 1]
        positions = self.seen["given"][..., first:last]
        with torch.no_grad():
            out = self.model(
                **self.turns[turn], attention_mask=self.mask[:, :last], position_ids=positions, past_key_values=cache
            )
        return out.logits  # type: ignore[no-any-return]


def converse(family: Family, rows: list[list[list[Part]]]) -> Conversation:
    """rows: per row of the batch, its turns. Later turns must be as long in every row."""
    model = family.model(torch.float64)
    samples = [family.sample([row[t] for row in rows], seed=10 + t, dtype=torch.float64) for t in range(len(rows[0]))]
    ids, mask = (torch.cat([s.inputs[name] for s in samples], 1) for name in ("input_ids", "attention_mask"))
    facts = [torch.cat([getattr(s.layout, name) for s in samples], 1) for name in ("slot", "frame", "medium", "marker")]
    whole = {"input_ids": ids, "attention_mask": mask}
    # Pixels go in the order of the placeholders, row after row.
    for name in dict.fromkeys(name for s in samples for name in s.inputs):
        parts = [s.inputs[name] for s in samples if name in s.inputs]
        if name == "mm_token_type_ids":
            whole[name] = torch.cat(parts, 1)
        elif name not in whole:
            assert len(rows) == 1 or len(parts) == 1, "one row, or videos in the first turn only"
            whole[name] = torch.cat(parts)
    seen: dict[str, Any] = {"deepstack": []}
    decoder = model.model.language_model

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["embeds"] = kwargs["inputs_embeds"].clone()
        seen["given"] = kwargs["position_ids"]
        if kwargs.get("deepstack_visual_embeds") is not None:
            for rows in kwargs["deepstack_visual_embeds"]:
                spread = rows.new_zeros(*ids.shape, rows.shape[-1])
                spread[kwargs["visual_pos_masks"]] = rows
                seen["deepstack"].append(spread)

    def note_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["rotary"] = kwargs["position_embeddings"]

    given = {} if "mm_token_type_ids" in whole else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    handles = [
        decoder.register_forward_pre_hook(note, with_kwargs=True),
        decoder.layers[0].register_forward_pre_hook(note_layer, with_kwargs=True),
    ]
    with torch.no_grad():
        model(**whole, **given)
    for handle in handles:
        handle.remove()
    positions = seen["given"]
    seen["positions"] = positions if positions.dim() == 3 else positions[None]
    inputs = [{k: v for k, v in s.inputs.items() if k != "attention_mask"} for s in samples]
    bounds = [0]
    for sample in samples:
        bounds.append(bounds[-1] + sample.inputs["input_ids"].shape[1])
    layout = tr.TokenLayout(*facts[:3], marker=facts[3] if bool((facts[3] != PLAIN).any()) else None)
    return Conversation(model, Decoder(model, "model.language_model"), ids, mask, inputs, layout, seen, bounds)


@cache
def one_row(family: str) -> Conversation:
    return converse(SUBJECTS[family], [TURNS])


@cache
def three_rows(family: str) -> Conversation:
    """A long video, text alone, a short video; then words."""
    rows: list[list[Part]] = [[Text(4), Video(5), Text(5)], [Text(6)], [Text(3), Video(3), Text(4)]]
    return converse(SUBJECTS[family], [[row, [Text(5)]] for row in rows])


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("family", SUBJECTS)
def test_four_turns(family: str, case: Case) -> None:
    """Video, words, another video, words, on one cache; the layouts are the adapter's."""
    talk = one_row(family)
    cache, row = DynamicCache(config=talk.model.config.get_text_config()), talk.row(0, case)
    with tr.reduce(talk.model, case.load()) as run:
        for number, parts in enumerate(TURNS):
            own = talk.expect(row, 0, number, case)
            logits = talk.play(number, cache)
            if any(isinstance(part, Video) for part in parts):
                check_prefill(Expected([row], [own]), logits, run.trace, EXACT)
            else:
                near(logits[0], own, EXACT)
    assert cache.get_seq_length() == talk.ids.shape[1]


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("family", SUBJECTS)
def test_ragged_batch(family: str, case: Case) -> None:
    """Left padding and a row of text alone: prefill, generation from the pixels, and a turn of words."""
    talk = three_rows(family)
    cache, rows = DynamicCache(config=talk.model.config.get_text_config()), [talk.row(i, case) for i in range(3)]
    with tr.reduce(talk.model, case.load()) as run:
        expected = Expected(rows, [talk.expect(row, i, 0, case) for i, row in enumerate(rows)])
        check_prefill(expected, talk.play(0, cache), run.trace, EXACT)
        out = talk.model.generate(
            **talk.turns[0], attention_mask=talk.mask[:, : talk.bounds[1]], max_new_tokens=6, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens, states = greedy(expected, 6)
        assert torch.equal(out.sequences[:, talk.bounds[1] :], tokens)
        near(torch.stack(out.logits, 1), states, EXACT)
        logits = talk.play(1, cache)
        for number, row in enumerate(rows):
            near(logits[number], talk.expect(row, number, 1, case), EXACT)


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
@pytest.mark.parametrize("family", SUBJECTS)
def test_conversation_with_generate(family: str, case: Case) -> None:
    """An answer, then a question on the same cache with the whole conversation as ids; the first answer also by drafts."""
    talk = one_row(family)
    cache, row = DynamicCache(config=talk.model.config.get_text_config()), talk.row(0, case)
    mask = talk.mask[:, : talk.bounds[1]]
    with tr.reduce(talk.model, case.load()) as run:
        answer = talk.model.generate(
            **talk.turns[0], attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False
        )
        kept = run.trace.kept[0]
        drafted = talk.model.generate(
            **talk.turns[0], attention_mask=mask, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(drafted, answer)
        assert torch.equal(run.trace.kept[0], kept)
        ids = torch.cat([answer, talk.turns[1]["input_ids"]], 1)
        more = {}
        if "mm_token_type_ids" in talk.turns[0]:
            types = talk.turns[0]["mm_token_type_ids"]
            more["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        out = talk.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **more,
        )  # fmt: skip
    talk.expect(row, 0, 0, case)
    own = row.turn(talk.oracle.embed(ids[0, talk.bounds[1] :]))
    tokens, states = greedy(Expected([row], [own]), 5)
    assert torch.equal(out.sequences[:, ids.shape[1] :], tokens)
    near(torch.stack(out.logits, 1), states, EXACT)
