"""Later turns on a reduced cache, and one reduced prefix for several questions, against the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.matrix import (
    BY_NAME,
    PROMPTS,
    TOLERANCE,
    Case,
    Expected,
    Prompt,
    check_prefill,
    each,
    expect,
    generate,
    greedy,
    known,
    model,
    near,
    prompt,
)
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import LayoutError, UnsupportedError

SOME = ["framefusion", "prune_last", "merge_then_kv_merge", "prune_then_window"]
CASCADED = ["framefusion", "prune_window", "merge_late", "random_twice"]
EXACT = TOLERANCE[torch.float64]
TEXT = prompt([9], [9], [9], seed=8)
VIDEO = prompt([30], [2, range(2, 6), 4], [range(9, 13), 6], seed=9)
"""Later turns, without padding: words; words in a first row and videos in the others."""


def turn(subject: Any, cache: Any, given: Prompt, before: Prompt | None = None) -> Tensor:
    """Logits (B, M, V) of a turn; before: all that was said earlier, as one prompt."""
    mask, positions = given.mask, given.positions
    if before is not None:
        mask = torch.cat([before.mask, mask], 1)
        positions = positions + before.mask.sum(1, keepdim=True)
    with torch.no_grad():
        out = subject(input_ids=given.ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits  # type: ignore[no-any-return]


def joined(*turns: Prompt) -> Prompt:
    """What was said in several turns, as far as a later one must know it."""
    parts = [[getattr(each, name) for each in turns] for name in ("ids", "mask", "positions")]
    ids, mask, positions = (torch.cat(part, 1) for part in parts)
    return Prompt(ids, mask, positions, turns[0].layout)


def compare(logits: Tensor, expected: Expected, tolerance: float = EXACT) -> None:
    for number, own in enumerate(expected.logits):
        near(logits[number, logits.shape[1] - len(own) :], own, tolerance)


@pytest.mark.parametrize("name", each())
def test_text_then_video(name: str) -> None:
    """Three more turns on a ragged batch with a cache of the user's: words, a new video, words."""
    first, case, subject = PROMPTS["ragged"](), BY_NAME[name], model()
    expected, cache = known(name, "ragged"), DynamicCache(config=subject.config)
    with tr.reduce(subject, case.load(), layout=first.layout) as run:
        turn(subject, cache, first)
        expected = expect(case, TEXT, before=expected)
        compare(turn(subject, cache, TEXT, first), expected)
        assert cache.get_seq_length() == first.ids.shape[1] + 9
        run.layout = VIDEO.layout
        expected = expect(case, VIDEO, before=expected)
        logits = turn(subject, cache, VIDEO, joined(first, TEXT))
        check_prefill(expected, logits, run.trace, EXACT)
        expected = expect(case, TEXT, before=expected)
        compare(turn(subject, cache, TEXT, joined(first, TEXT, VIDEO)), expected)


@pytest.mark.parametrize("name", CASCADED)
def test_padding_in_every_turn(name: str) -> None:
    """Questions of different length are padded on the left, in the middle of what the cache holds."""
    first, case, subject = PROMPTS["ragged"](), BY_NAME[name], model()
    words, video = prompt([9], [2], [5], seed=4), prompt([6], [2, range(2, 6), 4], [range(9, 12), 6], seed=5)
    cache, expected = DynamicCache(config=subject.config), known(name, "ragged")
    with tr.reduce(subject, case.load(), layout=first.layout) as run:
        turn(subject, cache, first)
        expected = expect(case, words, before=expected)
        compare(turn(subject, cache, words, first), expected)
        run.layout = video.layout
        expected = expect(case, video, before=expected)
        check_prefill(expected, turn(subject, cache, video, joined(first, words)), run.trace, EXACT)
        expected = expect(case, words, before=expected)
        compare(turn(subject, cache, words, joined(first, words, video)), expected)


def test_padding_in_a_later_turn_is_refused_at_kv_sites() -> None:
    first, subject = PROMPTS["ragged"](), model()
    cache = DynamicCache(config=subject.config)
    with tr.reduce(subject, BY_NAME["noncascaded_merge"].load(), layout=first.layout):
        turn(subject, cache, first)
        with pytest.raises(UnsupportedError, match="padding in a later turn"):
            turn(subject, cache, prompt([9], [2], [5]), first)


@pytest.mark.parametrize("name", SOME)
def test_video_after_a_dense_turn_with_padding(name: str) -> None:
    """The first turn has words alone, so its cache is adopted as it is, padding included."""
    first, case, subject = prompt([7], [3], [5], seed=2), BY_NAME[name], model()
    cache, expected = DynamicCache(config=subject.config), expect(case, first)
    with tr.reduce(subject, case.load(), layout=first.layout) as run:
        compare(turn(subject, cache, first), expected)
        for words in (None, TEXT):
            before = first if words is None else joined(first, VIDEO)
            run.layout = (words or VIDEO).layout
            expected = expect(case, words or VIDEO, before=expected)
            compare(turn(subject, cache, words or VIDEO, before), expected)


@pytest.mark.parametrize("name", SOME)
def test_conversation_with_generate(name: str) -> None:
    """generate() on the user's cache, with the whole conversation as ids, the way transformers wants it."""
    first, case, subject = PROMPTS["ragged"](), BY_NAME[name], model()
    cache, expected = DynamicCache(config=subject.config), known(name, "ragged")
    with tr.reduce(subject, case.load(), layout=first.layout):
        answer, _ = generate(subject, first, past_key_values=cache, max_new_tokens=5)
        # The last token of an answer has not been through the model yet: it comes with the question.
        question = Prompt(
            torch.cat([answer, TEXT.ids], 1), torch.ones(3, 14, dtype=torch.long), TEXT.positions, TEXT.layout
        )
        whole = joined(first, question)
        tokens, states = generate(subject, whole, past_key_values=cache, max_new_tokens=8)
    rows = expected.fork().rows
    logits = [row.turn(row.decoder.embed(ids)) for row, ids in zip(rows, question.ids, strict=True)]
    ours, own = greedy(Expected(rows, logits), 8)
    assert torch.equal(tokens, ours)
    near(states, own, EXACT)


@pytest.mark.parametrize("name", each())
def test_one_prefix_for_several_questions(name: str) -> None:
    """The cache of a reduced prefix is deep-copied for each question, and cropped back after one."""
    first, case, subject = PROMPTS["single"](), BY_NAME[name], model()
    cache, expected = DynamicCache(config=subject.config), known(name, "single")
    questions = [prompt([n], seed=n) for n in (5, 3, 8)]
    with tr.reduce(subject, case.load(), layout=first.layout):
        turn(subject, cache, first)
        for question in questions:
            compare(turn(subject, copy.deepcopy(cache), question, first), expect(case, question, before=expected))
        for question in questions:
            compare(turn(subject, cache, question, first), expect(case, question, before=expected))
            cache.crop(-question.ids.shape[1])
        assert cache.get_seq_length() == first.ids.shape[1]


@pytest.mark.parametrize("name", SOME)
def test_one_prefix_for_several_questions_at_once(name: str) -> None:
    """The rows of a cache are repeated and chosen, as a server does."""
    first, case, subject = PROMPTS["single"](), BY_NAME[name], model()
    cache, expected = DynamicCache(config=subject.config), known(name, "single")
    questions = prompt([6], [6], [6], seed=12)
    with tr.reduce(subject, case.load(), layout=first.layout):
        turn(subject, cache, first)
        cache.batch_repeat_interleave(3)
        before = Prompt(*(getattr(first, part).expand(3, -1) for part in ("ids", "mask", "positions")), first.layout)
        logits = turn(subject, cache, questions, before)
        rows = [expected.rows[0].fork() for _ in range(3)]
        own = Expected(rows, [row.turn(row.decoder.embed(questions.ids[i])) for i, row in enumerate(rows)])
        compare(logits, own)
        cache.batch_select_indices(torch.tensor([2, 0]))
        more = prompt([4], [4], seed=13)
        rest = joined(before, questions)
        rest = Prompt(rest.ids[:2], rest.mask[:2], rest.positions[:2], rest.layout)
        left = Expected([rows[2], rows[0]], [])
        compare(turn(subject, cache, more, rest), expect(case, more, before=left))


@pytest.mark.parametrize("name", SOME)
def test_another_pipeline_goes_on_with_the_cache(name: str) -> None:
    """The first pipeline is taken off after its turn; what the cache lost stays lost, and the new one acts on what comes."""
    first, subject = PROMPTS["ragged"](), model()
    cache, expected = DynamicCache(config=subject.config), known(name, "ragged")
    other = Case("other", {"stages": [{"strategy": "random", "keep": 0.5, "at": 1}]})
    with tr.reduce(subject, BY_NAME[name].load(), layout=first.layout):
        turn(subject, cache, first)
    with tr.reduce(subject, other.load(), layout=VIDEO.layout) as run:
        rows = expected.fork().rows
        for row in rows:
            row.pipeline = other.plain()
        logits = turn(subject, cache, VIDEO, first)
        check_prefill(expect(other, VIDEO, before=Expected(rows, [])), logits, run.trace, EXACT)


def test_a_reduced_cache_without_a_pipeline_is_refused() -> None:
    first, subject = PROMPTS["single"](), model()
    cache = DynamicCache(config=subject.config)
    with tr.reduce(subject, BY_NAME["framefusion"].load(), layout=first.layout):
        turn(subject, cache, first)
    with pytest.raises(UnsupportedError, match="attach it again"):
        turn(subject, cache, prompt([5]), first)


def test_a_layout_that_fits_no_turn_is_refused() -> None:
    first, subject = PROMPTS["single"](), model()
    with (
        tr.reduce(subject, BY_NAME["framefusion"].load(), layout=first.layout),
        pytest.raises(LayoutError, match="a new prompt needs its own layout"),
    ):
        turn(subject, DynamicCache(config=subject.config), prompt([5]))


@pytest.mark.parametrize("name", SOME)
def test_rows_of_a_cache_change_places(name: str) -> None:
    """Padding, places and spans go along with keys and values."""
    first, case, subject, order = PROMPTS["ragged"](), BY_NAME[name], model(), [2, 0, 1]
    cache, expected = DynamicCache(config=subject.config), known(name, "ragged")
    with tr.reduce(subject, case.load(), layout=first.layout):
        turn(subject, cache, first)
        cache.reorder_cache(torch.tensor(order))
        before = Prompt(first.ids[order], first.mask[order], first.positions[order], first.layout)
        rows = Expected([expected.rows[i] for i in order], [])
        compare(turn(subject, cache, TEXT, before), expect(case, TEXT, before=rows))
