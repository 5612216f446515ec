"""What the condition tests share: tiny decoders, inputs, the list of pipelines, and both ways of running them.

A new strategy, preset or plugin joins by one line in CASES (and one in `oracle_strategies.RULES`, if its decision is new).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from support.oracle import Decoder, Row
from support.oracle_stages import Token
from torch import Tensor

import tokenreduce as tr
from tokenreduce.layout import NEWLINE, TIMESTAMP, WRAPPER

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-5}
LAYERS, WIDTH, SLOTS, TEXT_IDS, VOCABULARY = 6, 48, 6, 84, 252
"""Ids from TEXT_IDS on are the tokens of a video of (VOCABULARY − TEXT_IDS) / SLOTS = 28 frames, slot by slot."""
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FULL = {"layer_types": ["full_attention"] * LAYERS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3", FULL),
    "phi3": ("Phi3", {"sliding_window": None}),
}


@cache
def _weights(family: str, seed: int) -> Any:
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}{'TextConfig' if name == 'Gemma3' else 'Config'}")(**(TINY | more))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.get_input_embeddings().weight.copy_(_vocabulary(generator))
        model.lm_head.weight.mul_(2)
    return model


def _vocabulary(generator: torch.Generator) -> Tensor:
    """(V, D) embeddings: words, then a video whose slots change slowly, each at a pace of its own."""
    words = torch.randn(TEXT_IDS, WIDTH, generator=generator)
    state, frames = torch.randn(SLOTS, WIDTH, generator=generator), []
    for _ in range((VOCABULARY - TEXT_IDS) // SLOTS):
        pace = 0.4 + 0.6 * torch.rand(SLOTS, 1, generator=generator)
        state = (state + pace * torch.randn(SLOTS, WIDTH, generator=generator)) / (1 + pace**2).sqrt()
        frames.append(state)
    return torch.cat([words, *frames]).double()


@cache
def decoder(family: str = "qwen2", attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Decoder:
    """The oracle of a family; dtype: that the weights are rounded to."""
    return Decoder(model(family, dtype), softmax=torch.float32 if attention == "eager" else torch.float64)


def model(family: str = "qwen2", dtype: torch.dtype = torch.float64, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model, a new one for every call."""
    fresh = copy.deepcopy(_weights(family, seed)).to(dtype)
    fresh.set_attn_implementation(attention)
    return fresh


# Inputs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch: ids, mask, positions (B, N) long and the layout that belongs to it."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    layout: tr.TokenLayout

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def row(self, number: int) -> tuple[Tensor, list[int]]:
        """Ids and columns of a row without its padding."""
        columns = self.mask[number].nonzero()[:, 0].tolist()
        return self.ids[number, columns], columns

    def tokens(self, number: int, newlines: str = "merge", wrappers: str = "protect") -> list[Token]:
        """The oracle's facts of a row."""
        layout, tokens = self.layout, []
        media = layout.media()
        for column in self.row(number)[1]:
            slot = int(layout.slot[number, column])
            marker = 0 if layout.marker is None else int(layout.marker[number, column])
            spared = layout.protected is not None and bool(layout.protected[number, column])
            spared |= marker == NEWLINE and newlines == "protect"
            spared |= marker == WRAPPER and wrappers == "protect"
            spared |= marker == TIMESTAMP
            facts = (slot, int(layout.frame[number, column]), int(media[number, column]))
            tokens.append(Token(column, *facts, reducible=slot >= 0 and not spared))
        return tokens


Piece = int | range
"""So many words, or these frames of the video."""


def prompt(*rows: Sequence[Piece], seed: int = 3, markers: bool = False) -> Prompt:
    """A batch of rows made of words and videos; with `markers` the last slot of each frame is a newline and others vary."""
    generator = torch.Generator().manual_seed(seed)
    columns: list[list[tuple[int, int, int, int, int, bool]]] = []
    for pieces in rows:
        row: list[tuple[int, int, int, int, int, bool]] = []
        medium = 0
        for piece in pieces:
            if isinstance(piece, int):
                words = torch.randint(2, TEXT_IDS, (piece,), generator=generator).tolist()
                row += [(word, -1, -1, -1, 0, False) for word in words]
                continue
            for number, frame in enumerate(piece):
                for slot in range(SLOTS):
                    marker = NEWLINE if slot == SLOTS - 1 else WRAPPER if slot == 0 and frame % 5 == 0 else 0
                    spared = markers and slot == 1 and frame % 4 == 1
                    word = TEXT_IDS + frame * SLOTS + slot
                    row.append((word, slot, number, medium, marker if markers else 0, spared))
            medium += 1
        columns.append(row)
    width = max(map(len, columns))
    padded = [[(0, -1, -1, -1, 0, False)] * (width - len(row)) + row for row in columns]
    ids, slot, frame, medium_, marker_, protected = (
        torch.tensor([[facts[n] for facts in row] for row in padded]) for n in range(6)
    )
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in columns])
    layout = tr.TokenLayout(slot, frame, medium_, marker_, protected.bool())
    return Prompt(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), layout)


@cache
def single() -> Prompt:
    """One row: a video of 9 frames."""
    return prompt([4, range(9), 6])


@cache
def ragged() -> Prompt:
    """Three rows: words alone; two videos with words between; one video. Frames have newlines, wrappers, protected tokens."""
    return prompt([7], [3, range(14, 18), 4, range(20, 25), 5], [4, range(9), 6], markers=True)


@cache
def open_end() -> Prompt:
    """One row that ends with its video, the last tokens of which may go."""
    return prompt([4, range(5), 3, range(5, 9)])


PROMPTS = {"single": single, "ragged": ragged, "open_end": open_end}


# Pipelines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pipeline under test. steady: its choice does not hang on states, so that it is the same in bfloat16."""

    name: str
    pipeline: Any
    budget: Any = None
    steady: bool = False

    def load(self) -> tr.Pipeline:
        loaded = tr.load_pipeline(self.pipeline)
        if self.budget is None:
            return loaded
        return loaded.model_copy(update={"budget": tr.Budget.parse(self.budget)})

    def plain(self) -> dict[str, Any]:
        """What the oracle reads."""
        return self.load().model_dump(by_alias=True)


def _stages(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": list(stages), **more}


MERGE, PRUNE = {"strategy": "similarity_merge"}, {"strategy": "importance_prune"}
WINDOW = {"importance": "window", "window": 5, "heads": "max"}
RELEASED = {"tokens": 0.6, "of": "vision", "arithmetic": "released"}
CASES: list[Case] = [
    # Every preset, at a budget that six layers can meet.
    Case("framefusion", "framefusion", 0.6),
    Case("framefusion_official", "framefusion_official", RELEASED),
    Case("framefusion_minicpm_v", "framefusion_minicpm_v", 0.6),
    Case("framefusion_equal", "framefusion_equal", 0.6),
    Case("fastv", "fastv", 0.6),
    Case("merge_only", "merge_only", 0.6),
    Case("noncascaded_merge", "noncascaded_merge", 0.6),
    Case("prune_only", "prune_only", 0.6),
    Case("prune_then_merge", "prune_then_merge", 0.65),
    Case("random", "random", 0.6, steady=True),
    Case("streaming_llm", "streaming_llm", 0.6, steady=True),
    Case("uniform_frames", "uniform_frames", 0.6, steady=True),
    # Every strategy with other settings, and pipelines in which they meet.
    Case("flops", "framefusion", {"flops": 0.6}),
    Case("vision_share", "framefusion", {"tokens": 0.5, "of": "vision"}),
    Case("kv_bytes", "prune_only", {"kv_cache": 0.7}),
    Case("token_count", "framefusion", {"tokens": 50}),
    Case("capped_merge", _stages(MERGE | {"threshold": 0.3}, PRUNE, budget=0.7)),
    Case("merge_to_the_end", _stages(MERGE | {"threshold": 0.5, "stop_below": 0.0}, PRUNE, budget=0.7)),
    Case("merge_threshold_only", _stages(MERGE | {"threshold": 0.7})),
    Case("merge_plain", _stages(MERGE | {"threshold": 0.65, "weighting": "plain", "merge_below": True}, PRUNE, budget=0.6)),
    Case("merge_in_spans", _stages(MERGE | {"threshold": 0.5, "max_run": 2}, PRUNE, budget=0.7)),
    Case("merge_late", _stages(MERGE | {"at": [1, 3], "site": "pre_ffn", "keep": [0.7, 0.4]})),
    Case("merge_protects_newlines", _stages(MERGE | {"keep": 0.5}, newlines="protect", wrappers="merge")),
    Case("prune_last", _stages(PRUNE | {"at": 2, "importance": "last", "keep": 0.4})),
    Case("prune_window", _stages(PRUNE | WINDOW | {"at": [1, 3], "keep": [0.6, 0.3]})),
    Case("pyramid", _stages(PRUNE | {"at": [1, 2, 4], "site": "pre_attention"}, budget=0.5)),
    Case("prune_in_layer_0", _stages(PRUNE | {"at": 0, "keep": 0.3})),
    Case("fastv_flops", _stages({"strategy": "fastv", "at": 1, "heads": "max"}, budget={"flops": 0.5})),
    Case("random_twice", _stages({"strategy": "random", "at": [0, 3], "site": "pre_ffn", "seed": 7}, budget=0.5), steady=True),
    Case("frames_then_prune", _stages({"strategy": "uniform_frames", "keep": 0.8}, PRUNE | {"at": 2, "keep": 0.3})),
    Case("window_given", _stages({"strategy": "streaming_window", "sinks": 2, "window": 20, "from": 2}), steady=True),
    Case("window_no_sinks", _stages({"strategy": "streaming_window", "sinks": 0}, budget={"kv_cache": 0.5}), steady=True),
    Case("kv_merge_some", _stages(MERGE | {"site": "kv", "at": [1, 4], "keep": 0.5, "weighting": "plain"})),
    Case("merge_then_kv_merge", _stages(MERGE | {"keep": 0.7}, MERGE | {"site": "kv", "from": 2, "keep": 0.4})),
    Case("prune_then_window", _stages(PRUNE | {"at": 1, "keep": 0.6}, {"strategy": "streaming_window", "from": 3, "window": 25})),
]  # fmt: skip
METHODS: list[Case] = [
    # Published methods whose decisions are held to recordings of their public code (tests/strategies/zoo), not to a second
    # implementation in the oracle; test_methods runs them in batches, turns and families.
    Case("divprune", "divprune"),
    Case("cdpruner", "cdpruner", 0.5),
    Case("vidcom2", "vidcom2"),
    Case("vidcom2_released", "vidcom2_released"),
    Case("v_cast", "v_cast", 0.6),
    Case("evs", "evs", 0.7),
    Case("dtd", "dtd"),
    Case("dtd_relative", _stages({"strategy": "dtd", "relative": 0.4})),
    Case("dycoke", "dycoke"),
    Case("dycoke_budget", _stages({"strategy": "dycoke"}, budget=0.8)),
    Case("dycoke_released", "dycoke_released"),
    Case("aim", "aim"),
    Case("llava_scissor", "llava_scissor"),
    Case("prunevid", _stages({"strategy": "prunevid", "select_at": 2})),
    Case("sttm", "sttm"),
    Case("pool", "pool"),
    Case("pool_bilinear", _stages({"strategy": "pool", "keep_of_cell": "bilinear"})),
    Case("pool_random", _stages({"strategy": "pool", "keep_of_cell": "random"})),
    Case("text_only", "text_only"),
    Case("pyramid_drop", "pyramid_drop"),
    Case("sparsevlm", _stages({"strategy": "sparsevlm", "at": [2, 4], "keep": [0.6, 0.3]})),
    Case("mmtok", "mmtok"),
    Case("dart", _stages({"strategy": "dart", "keep": 0.4})),
    Case("snapkv", _stages({"strategy": "snapkv", "window": 4, "keep": 0.5})),
    Case("pyramidkv", _stages({"strategy": "pyramidkv", "window": 2, "beta": 4, "keep": 0.5})),
    Case("h2o", _stages({"strategy": "h2o", "keep": 0.5})),
    Case("infinipot_v", "infinipot_v"),
]  # fmt: skip
TOWER_METHODS = ("fastervlm", "vispruner", "visionzip", "prumerge", "fastvid", "holitom")
"""Methods that read the vision tower, which these decoders have not: tests/strategies/zoo runs them, and test_methods."""
BY_NAME = {case.name: case for case in CASES}
CORE = (
    *("framefusion", "framefusion_official", "fastv", "noncascaded_merge", "random", "streaming_llm", "uniform_frames"),
    *("merge_late", "prune_window", "fastv_flops", "merge_then_kv_merge", "prune_then_window"),
)
"""One case of each kind of code."""


def each(core: Sequence[str] = CORE) -> list[Any]:
    """The names of all cases as test parameters; those out of `core` are left to the slow suite."""
    return [pytest.param(name, marks=() if name in core else pytest.mark.slow) for name in BY_NAME]


# Running --------------------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What the oracle says of a prompt, row by row, and the rows themselves, to go on with."""

    rows: list[Row]
    logits: list[Tensor]

    @property
    def margin(self) -> float:
        """How near the closest decision was to another one."""
        return min(row.receipt.margin for row in self.rows)

    def fork(self) -> Expected:
        return replace(self, rows=[row.fork() for row in self.rows])


def expect(
    case: Case | None, prompt: Prompt, oracle: Decoder | None = None, before: Expected | None = None
) -> Expected:
    """Run the oracle; `before`: an earlier turn to go on from."""
    oracle = oracle or decoder()
    plain = case.plain() if case is not None else None
    rows = [Row(oracle, plain) for _ in prompt.ids] if before is None else before.fork().rows
    logits = []
    for number, row in enumerate(rows):
        ids, _ = prompt.row(number)
        policy = (plain["newlines"], plain["wrappers"]) if plain is not None else ()
        logits.append(row.turn(oracle.embed(ids), prompt.tokens(number, *policy)))
    return Expected(rows, logits)


@cache
def known(case: str, prompt: str, attention: str = "sdpa", family: str = "qwen2") -> Expected:
    """`expect` for named things, computed once in a test session; to be forked, not changed."""
    return expect(BY_NAME[case], PROMPTS[prompt](), decoder(family, attention))


def greedy(expected: Expected, count: int = 16) -> tuple[Tensor, Tensor]:
    """(B, count) tokens and (B, count, V) logits that the oracle generates. Goes on from a copy of the rows."""
    tokens, logits = [], []
    for row, last in zip(expected.fork().rows, expected.logits, strict=True):
        states = [last[-1]]
        words = [int(states[0].argmax())]
        while len(words) < count:
            states.append(row.next(words[-1]))
            words.append(int(states[-1].argmax()))
        tokens.append(words)
        logits.append(torch.stack(states))
    return torch.tensor(tokens), torch.stack(logits)


def generate(model: Any, prompt: Prompt, embeds: bool = False, **more: Any) -> tuple[Tensor, Tensor]:
    """(B, count) tokens and (B, count, V) logits that the model generates."""
    inputs = dict(prompt.inputs)
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    settings = {"max_new_tokens": 16, "do_sample": False, **more}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    first = 0 if embeds else prompt.ids.shape[1]
    return out.sequences[:, first:], torch.stack(out.logits, 1)


def check_prefill(expected: Expected, logits: Tensor, trace: Any, tolerance: float) -> None:
    """Kept tokens, their sources, counts per layer and logits are the oracle's."""
    for number, (row, own) in enumerate(zip(expected.rows, expected.logits, strict=True)):
        receipt = row.receipt
        assert trace.kept[number].tolist() == receipt.kept, f"row {number}"
        source = [receipt.source.get(column, -1) for column in range(trace.source.shape[1])]
        assert trace.source[number].tolist() == source, f"row {number}"
        assert [int(layer.tokens[number]) for layer in trace.layers] == receipt.held, f"row {number}"
        assert [int(layer.ffn_tokens[number]) for layer in trace.layers] == receipt.fed, f"row {number}"
        near(logits[number, logits.shape[1] - len(own) :], own, tolerance)


def near(ours: Tensor, oracle: Tensor, tolerance: float) -> None:
    """Within `tolerance` everywhere."""
    torch.testing.assert_close(ours.double(), oracle.double(), atol=tolerance, rtol=0)
