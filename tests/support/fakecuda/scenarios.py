"""Runs to be had on the CPU and on pretended GPUs: presets × families × batch × turns × where the seam is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny
from support.fakecuda.machine import Event, FakeTensor, Machine, inner, on
from support.fakecuda.placing import place, seam
from support.families import FAMILIES, Text, Video
from support.subjects import SUBJECTS
from torch import Tensor

import tokenreduce as tr
from tokenreduce.ops import attention

PRESETS = (*tiny.PRESETS, "framefusion_end_to_end", "framefusion_minicpm_v")
MODELS = ("decoder", "llava_video", "qwen2_5_vl", "qwen3_vl", "internvl")
BEHIND: dict[str, dict[str, Any]] = {
    "fastv_late": {"stages": [{"strategy": "fastv", "at": [1, 3], "keep": [0.6, 0.3]}]},
    "prune_late": {"stages": [{"strategy": "importance_prune", "at": 2, "keep": 0.5}]},
    "merge_on": {"stages": [{"strategy": "similarity_merge", "threshold": 0.3, "stop_below": 0.0}]},
    "random_late": {"stages": [{"strategy": "random", "at": 3, "keep": 0.5}]},
    "window_late": {"stages": [{"strategy": "streaming_window", "from": 2, "sinks": 4, "window": 9}]},
    "merge_then_kv": {
        "stages": [
            {"strategy": "similarity_merge", "at": 0, "keep": 0.7},
            {"strategy": "similarity_merge", "site": "kv", "from": 2, "keep": 0.4},
        ]
    },
}
"""Pipelines whose stages act at later layers than the presets'."""


@dataclass(frozen=True)
class Scenario:
    """One pipeline on one model."""

    pipeline: str
    """Name of a preset, or of one in BEHIND; empty for the dense model."""
    model: str = "decoder"
    """One of MODELS."""
    rows: int = 1
    """Of the batch; several are of different length."""
    first: int | None = None
    """First layer on the second GPU; None for one GPU."""
    tower: int = 0
    """GPU of what lies outside the decoder."""
    turns: int = 1
    """Turns of the conversation, of two generated tokens each."""

    def __str__(self) -> str:
        where = "one" if self.first is None else f"seam{self.first}" + (f"-tower{self.tower}" if self.tower else "")
        return f"{self.pipeline or 'dense'}-{self.model}-{self.rows}rows-{where}-{self.turns}turns"


class Kernels(SimpleNamespace):
    """In the place of the Triton kernels, with their signature."""

    DTYPES, MAX_WIDTH = (torch.float32, torch.float16, torch.bfloat16), 256

    @staticmethod
    def gpu_column_sums(q: Tensor, k: Tensor, scale: float, queries: int) -> Tensor:
        return attention.column_sums(q, k, scale, queries)


@cache
def inputs_of(model: str, rows: int, frames: int = 4) -> tuple[dict[str, Tensor], tr.TokenLayout | None]:
    """Inputs of a prefill, and its layout where the family does not tell."""
    if model != "decoder":
        video = Video(frames)
        parts = [[Text(3), video, Text(4)], [Text(6), video, Text(6)], [Text(2), video, Text(3)]][:rows]
        return _family(model).sample(parts).inputs, None
    ids, layout = tiny.prompt(rows=rows), tiny.layout().expand(rows)
    mask = torch.ones_like(ids)
    slot, frame = layout.slot.clone(), layout.frame.clone()
    for row in range(1, rows):  # Shorter at its start, where its text is.
        mask[row, :row], slot[row, :row], frame[row, :row] = 0, -1, -1
    return {"input_ids": ids, "attention_mask": mask}, tr.TokenLayout(slot=slot, frame=frame)


def _family(name: str) -> Any:
    return SUBJECTS[name] if name in SUBJECTS else FAMILIES[name]


def model_of(name: str, **changes: Any) -> Any:
    """A tiny model on the CPU."""
    return tiny.tiny_model(**changes) if name == "decoder" else _family(name).model()


def decoder_of(model: Any) -> Any:
    """Its decoder."""
    return next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))


def pipeline_of(name: str) -> tuple[str | Mapping[str, Any], float | None]:
    """A pipeline, and the budget that it needs."""
    if name in BEHIND:
        return BEHIND[name], None
    return name, 0.9 if name == "prune_then_merge" else tiny.SHARE


@dataclass
class Result:
    """What came of a run."""

    logits: list[Tensor]
    """(B, V) of each generated token, on the CPU."""
    kept: list[list[int]]
    """Columns that were left after the prefill, per row."""


def run(scenario: Scenario, machine: Machine | None = None) -> Result:
    """Run it on the CPU, or on the machine's GPUs where there is one."""
    inputs, layout = inputs_of(scenario.model, scenario.rows)
    model = model_of(scenario.model)
    if machine is not None:
        decoder = decoder_of(model)
        places = {"": 0} if scenario.first is None else seam(model, decoder, scenario.first, scenario.tower)
        place(model, places)
        inputs = on(inputs)
    pipeline, budget = pipeline_of(scenario.pipeline or "random")
    attached = tr.reduce(model, pipeline, budget=budget, layout=layout) if scenario.pipeline else nullcontext()
    with attached as attachment:
        logits = list(forwards(model, inputs, scenario.turns))
    kept = [] if attachment is None else [inner(row).tolist() for row in attachment.trace.kept]
    return Result([inner(each) for each in logits], kept)


def forwards(model: Any, inputs: Mapping[str, Any], turns: int) -> Iterator[Tensor]:
    """(B, V) logits of the two tokens that each turn generates; later turns bring three tokens of text."""
    given, text = dict(inputs), inputs["input_ids"][:, -3:]
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for _ in range(turns):
        out = model.generate(**given, **options)
        yield from out.logits
        ids = torch.cat([out.sequences, text], 1)
        new = torch.ones_like(ids[:, given["input_ids"].shape[1] :])
        mask = torch.cat([given["attention_mask"], new], 1)
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.past_key_values}


@dataclass
class Counts:
    """Host synchronisations of one run on one GPU, with their lines."""

    prefill: list[Event]
    """Of the first forward, the finding of the layout included."""
    token: list[Event]
    """Of the last generated token's forward."""
    looks: int
    """Content-dependent looks in the prefill: those of one batch at one site count once."""


def synchronisations(pipeline: str, model: str, rows: int, frames: int = 4, **changes: Any) -> Counts:
    """Count them in a prefill and in a step of decoding. changes: of the plain decoder's configuration."""
    inputs, layout = inputs_of(model, rows, frames)
    made = model_of(model, **changes)
    with torch.no_grad(), Machine() as machine:
        place(made, {"": 0})
        name, budget = pipeline_of(pipeline or "random")
        attached = tr.reduce(made, name, budget=budget, layout=layout) if pipeline else nullcontext()
        with attached as attachment:
            marks: list[int] = []
            made.register_forward_pre_hook(lambda *_: marks.append(len(machine.events)), prepend=True)
            made.register_forward_hook(lambda *_: marks.append(len(machine.events)))
            made.generate(**on(inputs), max_new_tokens=4, do_sample=False)
    waits = [[e for e in machine.events[marks[i] : marks[i + 1]] if e.kind == "sync"] for i in (0, -2)]
    traces = [] if attachment is None else attachment.trace.stages
    content = {} if attachment is None else {s.place for s in attachment.strategies if not s.fixed_count}
    return Counts(*waits, looks=len({(t.stage, t.site) for t in traces if t.stage in content}))


def several_gpus() -> list[Scenario]:
    """Every scenario with layers on two GPUs."""
    found = [
        Scenario(pipeline, model, rows, first, turns=turns)
        for pipeline, model, rows, first, turns in itertools.product(PRESETS, MODELS, (1, 3), (1, 3), (2,))
    ]
    found += [
        Scenario(pipeline, model, rows, first, turns=1)
        for pipeline, model, rows, first in itertools.product(BEHIND, ("decoder", "qwen3_vl"), (1, 3), (1, 2, 3))
    ]
    found += [
        Scenario(pipeline, model, rows, first, tower=1, turns=1)
        for pipeline, model, rows, first in itertools.product(
            ("framefusion", "fastv", "streaming_llm", "framefusion_end_to_end"), MODELS[1:], (1, 3), (2,)
        )
    ]
    return [s for s in found if not refused(s)]


def refused(scenario: Scenario) -> bool:
    """Whether it is refused on any device: no tower, or one whose blocks cannot merge patches."""
    ends = scenario.pipeline == "framefusion_end_to_end"
    return ends and scenario.model in ("decoder", "qwen2_5_vl", "qwen3_vl")


def stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no Triton on a pretended GPU."""
    monkeypatch.setattr(attention, "_kernels", lambda: Kernels)


def same(on_gpu: Result, on_cpu: Result, tolerance: float = 2e-5) -> None:
    """The pretended GPU kept the same tokens, and its logits are the CPU's."""
    assert on_gpu.kept == on_cpu.kept
    for ours, theirs in zip(on_gpu.logits, on_cpu.logits, strict=True):
        assert not isinstance(ours, FakeTensor)
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
