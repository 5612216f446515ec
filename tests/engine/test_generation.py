"""Every way of generating on a reduced prefill, against the oracle: greedy, beams, sampling, drafts that are taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.matrix import (
    BY_NAME,
    PROMPTS,
    TOLERANCE,
    Expected,
    Prompt,
    each,
    generate,
    greedy,
    known,
    model,
    near,
    prompt,
)
from support.matrix import expect as run_oracle
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr

NAMES = list(BY_NAME)
SOME = ["framefusion", "prune_last", "merge_then_kv_merge", "prune_then_window"]
EXACT = TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name: str) -> None:
    """16 tokens of a ragged batch with a row of text alone."""
    given = PROMPTS["ragged"]()
    subject = model()
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        tokens, states = generate(subject, given)
    ours, expected = greedy(known(name, "ragged"))
    assert torch.equal(tokens, ours)
    near(states, expected, EXACT)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("embeds", [False, True])
def test_greedy_of_one_row_in_float32(name: str, embeds: bool) -> None:
    given = PROMPTS["single"]()
    subject = model(dtype=torch.float32)
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        for _ in range(2):  # A second call of generate() on the same attachment starts afresh.
            tokens, states = generate(subject, given, embeds=embeds)
            ours, expected = greedy(known(name, "single"))
            assert torch.equal(tokens, ours)
            near(states, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["window_given", pytest.param("prune_then_window", marks=pytest.mark.slow)])
def test_generating_more_than_the_prompt_was_long(name: str) -> None:
    """A row of text alone is not bounded by the others' span; theirs moves on and on."""
    given, count = PROMPTS["ragged"](), 61
    subject = model()
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        tokens, states = generate(subject, given, max_new_tokens=count)
    ours, expected = greedy(known(name, "ragged"), count)
    assert torch.equal(tokens, ours)
    near(states, expected, EXACT)


# Beams ----------------------------------------------------------------------------------------------------------------


def beams(expected: Expected, row: int, width: int, count: int) -> list[tuple[float, list[int]]]:
    """The `width` best continuations of a row, by a plain beam search over the oracle's log-probabilities."""
    alive = [(0.0, [], expected.rows[row].fork(), expected.logits[row][-1])]
    for step in range(count):
        options = [
            (score + float(value), number, token)
            for number, (score, _, _, logits) in enumerate(alive)
            for token, value in enumerate(logits.log_softmax(-1).tolist())
        ]
        best = sorted(options, reverse=True)[:width]
        grown = []
        for score, number, token in best:
            _, words, before, logits = alive[number]
            branch = before.fork()
            grown.append((score, [*words, token], branch, branch.next(token) if step + 1 < count else logits))
        alive = grown
    return [(score, words) for score, words, _, _ in alive]


@pytest.mark.parametrize("name", SOME)
def test_beams(name: str) -> None:
    given, count = PROMPTS["ragged"](), 6
    subject = model()
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        out = subject.generate(
            **given.inputs, max_new_tokens=count, do_sample=False, num_beams=3, num_return_sequences=3,
            length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    ours = [beams(known(name, "ragged"), row, 3, count) for row in range(len(given.ids))]
    assert out.sequences[:, given.ids.shape[1] :].tolist() == [words for row in ours for _, words in row]
    near(out.sequences_scores, torch.tensor([score for row in ours for score, _ in row]), 1e-5)


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_sampling_with_a_seed(name: str) -> None:
    """Two samples of each row; the same numbers are drawn from the oracle's probabilities."""
    given, count = PROMPTS["ragged"](), 8
    subject = model()
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.8, "num_return_sequences": 2}
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        torch.manual_seed(11)
        tokens, states = generate(subject, given, max_new_tokens=count, **settings)
    expected = known(name, "ragged")
    rows = [expected.rows[i // 2].fork() for i in range(6)]
    logits = torch.stack([expected.logits[i // 2][-1] for i in range(6)])
    torch.manual_seed(11)
    for step in range(count):
        near(states[:, step], logits, EXACT)
        drawn = torch.multinomial((logits.float() / 0.8).softmax(-1), 1)[:, 0]
        assert torch.equal(tokens[:, step], drawn)
        logits = torch.stack([row.next(int(token)) for row, token in zip(rows, drawn, strict=True)])


# Drafts ---------------------------------------------------------------------------------------------------------------


def repeating() -> Prompt:
    """Its last two words were there before, so that prompt lookup has a first guess (of video ids, meant as words)."""
    made = prompt([4, range(9), 6])
    made.ids[0, -2:] = made.ids[0, 2:4]
    return made


def widths(subject: Any, seen: list[int]) -> Any:
    """Note how many ids each forward of the decoder has."""

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is not None:
            seen.append(kwargs["input_ids"].shape[1])

    return subject.model.register_forward_pre_hook(note, with_kwargs=True)


def check_draft(name: str, given: Prompt, **settings: Any) -> None:
    subject, seen = model(), list[int]()
    expected = run_oracle(BY_NAME[name], given)
    handle = widths(subject, seen)
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout) as run:
        tokens, states = generate(subject, given, **settings)
        trace = run.trace
    handle.remove()
    assert seen[0] > given.ids.shape[1], "the prefill carries no draft, so this proves nothing"
    ours, own = greedy(expected)
    assert torch.equal(tokens, ours)
    near(states, own, EXACT)
    assert trace.kept[0].tolist() == expected.rows[0].receipt.kept
    assert [int(layer.tokens) for layer in trace.layers] == expected.rows[0].receipt.held


@pytest.mark.parametrize("name", each(SOME))
def test_assisted_decoding(name: str) -> None:
    """The assistant prefills with a draft behind the prompt: the stages must not know of it, and what is wrong is cropped."""
    check_draft(name, PROMPTS["single"](), assistant_model=_assistant(seed=5))


@pytest.mark.parametrize("name", SOME)
def test_assistant_that_is_often_right(name: str) -> None:
    check_draft(name, PROMPTS["open_end"](), assistant_model=_assistant(seed=0))


@pytest.mark.parametrize("name", SOME)
def test_prompt_lookup(name: str) -> None:
    check_draft(name, repeating(), prompt_lookup_num_tokens=3)


def _assistant(seed: int) -> Any:
    assistant = model(seed=seed)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


@pytest.mark.parametrize("cached", [False, True])
def test_logits_to_keep_is_no_draft(cached: bool) -> None:
    """A forward that asks for several logits is a prefill like any other."""
    given = PROMPTS["single"]()
    subject = model()
    cache = DynamicCache(config=subject.config) if cached else None
    with torch.no_grad(), tr.reduce(subject, BY_NAME["framefusion"].load(), layout=given.layout) as run:
        logits: Tensor = subject(**given.inputs, past_key_values=cache, use_cache=cached, logits_to_keep=4).logits
        assert run.trace.kept[0].tolist() == known("framefusion", "single").rows[0].receipt.kept
    near(logits[0], known("framefusion", "single").logits[0][-4:], EXACT)


@pytest.mark.parametrize("name", ["framefusion", "fastv", "streaming_llm"])
def test_generation_without_a_cache(name: str) -> None:
    """Every step is a prefill of the prompt and what was written so far: the same as calling the model so by hand."""
    given, subject = PROMPTS["single"](), model()
    ids = given.inputs["input_ids"]
    pipeline = BY_NAME[name].load()
    with torch.no_grad(), tr.reduce(subject, pipeline, layout=given.layout):
        tokens = subject.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, min_new_tokens=5)
    by_hand = ids
    for step in range(5):
        with torch.no_grad(), tr.reduce(subject, pipeline, layout=given.layout.followed_by_text(step)):
            logits = subject(by_hand, use_cache=False).logits[:, -1]
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, by_hand)
