"""Every strategy and preset, in every condition of a prefill: the oracle's tokens and logits.

Generation, turns, gradients and other wrappers have files of their own; what they share is in `matrix`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.matrix import (
    BY_NAME,
    CASES,
    FAMILIES,
    METHODS,
    PROMPTS,
    TOLERANCE,
    TOWER_METHODS,
    Case,
    check_prefill,
    decoder,
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
from tokenreduce import plugins
from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import build_vision
from tokenreduce.strategy import Strategy

NAMES = list(BY_NAME)
SOME = ["framefusion", "prune_only", "noncascaded_merge", "prune_then_window", "uniform_frames"]
"""One of each kind, for conditions that are the same code for all."""


def prefill(subject: Any, case: Case, prompt: str, embeds: bool = False, **more: Any) -> tuple[Tensor, tr.Trace]:
    """Logits (B, M, V) and trace of the prompt."""
    given = PROMPTS[prompt]()
    inputs = dict(given.inputs)
    if embeds:
        inputs["inputs_embeds"] = subject.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad(), tr.reduce(subject, case.load(), layout=given.layout) as run:
        out = subject(**inputs, position_ids=given.positions, **more)
        return out.logits, run.trace


def test_every_strategy_and_preset_is_in_the_matrix() -> None:
    """Those that act in the decoder; stages in the vision tower have an oracle of their own in test_vision_stages."""
    known = plugins.strategies()
    own = {name for name, s in known.items() if s.__module__.startswith("tokenreduce.") and issubclass(s, Strategy)}
    used = {stage.strategy for case in [*CASES, *METHODS] for stage in case.load().stages}
    assert own <= used | {*TOWER_METHODS}
    bare = {name for name in plugins.presets() if not build_vision(tr.load_pipeline(name))}
    named = {case.pipeline for case in [*CASES, *METHODS] if isinstance(case.pipeline, str)}
    # A preset that acts deeper than six layers has its strategy's line with another layer.
    deeper = {name for name in bare - named if tr.load_pipeline(name).stages[0].strategy in used}
    tower = {name for name in bare if tr.load_pipeline(name).stages[0].strategy in TOWER_METHODS}
    assert bare <= named | deeper | tower


def test_the_oracle_is_the_dense_model_without_a_pipeline() -> None:
    given = PROMPTS["ragged"]()
    dense = expect(None, given)
    subject = model()
    with torch.no_grad():
        logits = subject(**given.inputs, position_ids=given.positions).logits
    for number, own in enumerate(dense.logits):
        near(logits[number, logits.shape[1] - len(own) :], own, TOLERANCE[torch.float64])
    tokens, states = generate(subject, given)
    ours, expected = greedy(dense)
    assert torch.equal(tokens, ours)
    near(states, expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("prompt", ["single", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_prefill(name: str, prompt: str) -> None:
    logits, trace = prefill(model(), BY_NAME[name], prompt)
    expected = known(name, prompt)
    check_prefill(expected, logits, trace, TOLERANCE[torch.float64])
    reduced = [
        len(row.receipt.kept) < len(row.receipt.source) or min(row.receipt.held) < row.seen for row in expected.rows
    ]
    assert any(reduced) or len(set(expected.rows[-1].receipt.source.values())) < expected.rows[-1].seen


@pytest.mark.parametrize("name", each())
def test_prompt_that_ends_with_its_video(name: str) -> None:
    """Its last tokens may be merged or dropped; what follows keeps its place all the same."""
    logits, trace = prefill(model(), BY_NAME[name], "open_end")
    expected = known(name, "open_end")
    check_prefill(expected, logits, trace, TOLERANCE[torch.float64])
    given, subject = PROMPTS["open_end"](), model()
    with tr.reduce(subject, BY_NAME[name].load(), layout=given.layout):
        tokens, states = generate(subject, given)
    ours, own = greedy(expected)
    assert torch.equal(tokens, ours)
    near(states, own, TOLERANCE[torch.float64])


@pytest.mark.parametrize("share", [0.65, 0.8])
def test_a_cache_that_may_hold_more_tokens_than_the_video_has(share: float) -> None:
    """Its budget counts words too, of which this prompt has more than vision tokens."""
    case, given, subject = Case("", "noncascaded_merge", share), prompt([30, range(9), 30]), model()
    with torch.no_grad(), tr.reduce(subject, case.load(), layout=given.layout) as run:
        logits = subject(**given.inputs).logits
    expected = expect(case, given)
    check_prefill(expected, logits, run.trace, TOLERANCE[torch.float64])
    assert run.trace.relative_tokens[0] > share - 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(PROMPTS))
def test_a_window_that_hides_nothing_yet_changes_no_bit(name: str, attention: str) -> None:
    """Nor is it forgotten: decoding slides out of it at once."""
    subject, given = model(dtype=torch.float32, attention=attention), PROMPTS[name]()
    longest = int(given.mask.sum(1).max())
    case = Case("", {"stages": [{"strategy": "streaming_window", "sinks": 3, "window": longest - 3, "from": 1}]})
    with torch.no_grad():
        dense = subject(**given.inputs, position_ids=given.positions).logits
    logits, trace = prefill(subject, case, name)
    assert torch.equal(logits[given.mask.bool()], dense[given.mask.bool()])
    assert trace.relative_flops == 1
    narrower = {"stages": [case.pipeline["stages"][0] | {"window": longest - 4}]}
    _, less = prefill(subject, Case("", narrower), name)
    assert [int(layer.tokens.max()) for layer in less.layers[1:]] == [longest - 1] * (len(less.layers) - 1)
    with tr.reduce(subject, case.load(), layout=given.layout):
        tokens, states = generate(subject, given)
    ours, own = greedy(expect(case, given, decoder(attention=attention)))
    assert torch.equal(tokens, ours)
    near(states, own, TOLERANCE[torch.float32])


# Eager attention only in float32: transformers' own makes NaN of padding in float64, where its mask overflows its softmax.
CONDITIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "eager": {"attention": "eager", "dtype": torch.float32},
    "inputs_embeds": {"embeds": True},
    "use_cache=False": {"use_cache": False},
    "own cache": {"past_key_values": DynamicCache},
}


@pytest.mark.parametrize("name", each())
@pytest.mark.parametrize("condition", CONDITIONS)
def test_condition(name: str, condition: str) -> None:
    settings = dict(CONDITIONS[condition])
    dtype, attention = settings.pop("dtype", torch.float64), settings.pop("attention", "sdpa")
    subject = model(dtype=dtype, attention=attention)
    if "past_key_values" in settings:
        settings["past_key_values"] = DynamicCache(config=subject.config)
    logits, trace = prefill(subject, BY_NAME[name], "ragged", **settings)
    check_prefill(known(name, "ragged", attention), logits, trace, TOLERANCE[dtype])


def test_stages_that_get_in_each_others_way_are_refused() -> None:
    """Two stages at one layer's cache, and importance of a layer whose keys are merged or bounded."""
    window, merge = (
        {"strategy": "streaming_window", "window": 9},
        {"strategy": "similarity_merge", "site": "kv", "keep": 0.5},
    )
    prune = {"strategy": "importance_prune", "at": 3, "keep": 0.5}
    subject, layout = model(), PROMPTS["single"]().layout
    with pytest.raises(PipelineError, match=r"both act at layer\[4\]\.kv"):
        tr.reduce(subject, {"stages": [window | {"until": 4}, merge | {"from": 4}]}, layout=layout)
    for other in (window, merge):
        with pytest.raises(PipelineError, match="attention of layer 3"):
            tr.reduce(subject, {"stages": [prune, other]}, layout=layout)
        with pytest.raises(PipelineError, match="attention of layer 2"):
            tr.reduce(subject, {"stages": [prune | {"site": "pre_attention"}, other]}, layout=layout)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_family(family: str, name: str) -> None:
    logits, trace = prefill(model(family), BY_NAME[name], "ragged")
    check_prefill(known(name, "ragged", family=family), logits, trace, TOLERANCE[torch.float64])


@pytest.fixture(scope="module")
def bfloat16_error() -> float:
    """How far the dense model is from the oracle in bfloat16."""
    subject, given = model(dtype=torch.bfloat16), PROMPTS["ragged"]()
    with torch.no_grad():
        dense = subject(**given.inputs, position_ids=given.positions).logits.double()
    rows = expect(None, given, decoder(dtype=torch.bfloat16)).logits
    return max(float((dense[i, dense.shape[1] - len(row) :] - row).abs().max()) for i, row in enumerate(rows))


@pytest.mark.parametrize("name", [case.name for case in CASES if case.steady])
def test_bfloat16_where_the_choice_does_not_hang_on_states(name: str, bfloat16_error: float) -> None:
    """The same tokens, and logits no further from the oracle than the dense model's in bfloat16 are, give or take a half."""
    logits, trace = prefill(model(dtype=torch.bfloat16), BY_NAME[name], "ragged")
    expected = expect(BY_NAME[name], PROMPTS["ragged"](), decoder(dtype=torch.bfloat16))
    check_prefill(expected, logits, trace, 1.5 * bfloat16_error)


@pytest.mark.parametrize("name", ["prune_only", "fastv", "merge_only", "framefusion", "pyramid"])
def test_bfloat16_keeps_nearly_the_same_tokens(name: str) -> None:
    """Scores differ in their third digit, so a few tokens at the edge change places; counts must not."""
    subject, given = model(dtype=torch.bfloat16), PROMPTS["ragged"]()
    expected = expect(BY_NAME[name], given, decoder(dtype=torch.bfloat16))
    _, trace = prefill(subject, BY_NAME[name], "ragged")
    for number, row in enumerate(expected.rows):
        ours, own = set(trace.kept[number].tolist()), set(row.receipt.kept)
        assert len(ours) == len(own)
        assert len(ours & own) >= 0.9 * len(own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["framefusion", "prune_last", "merge_late"])
def test_flex_attention(name: str) -> None:
    """Prefill only: torch 2.13 does not compile the one-token kernel for CPUs, with or without a pipeline."""
    logits, trace = prefill(model(dtype=torch.float32, attention="flex_attention"), BY_NAME[name], "ragged")
    check_prefill(known(name, "ragged"), logits, trace, TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_everything_with_everything(name: str, family: str, prompt: str, dtype: torch.dtype, attention: str) -> None:
    if attention == "eager" and prompt == "ragged":
        dtype = torch.float32  # See CONDITIONS.
    expected = known(name, prompt, attention, family)
    if dtype != torch.float64 and expected.margin < 1e-5:
        dtype = torch.float64  # A decision this close may go the other way in float32.
        if attention == "eager" and prompt == "ragged":
            attention = "sdpa"  # Transformers' eager attention is NaN there without a pipeline too.
            expected = known(name, prompt, attention, family)
    subject = model(family, dtype, attention)
    logits, trace = prefill(subject, BY_NAME[name], prompt)
    # Eager attention rounds its softmax to float32 whatever the model's dtype, and blocks of keys round differently.
    tolerance = TOLERANCE[torch.float32 if attention == "eager" else dtype]
    check_prefill(expected, logits, trace, tolerance)
    with tr.reduce(subject, BY_NAME[name].load(), layout=PROMPTS[prompt]().layout):
        tokens, states = generate(subject, PROMPTS[prompt]())
    ours, own = greedy(expected)
    assert torch.equal(tokens, ours)
    near(states, own, tolerance)
