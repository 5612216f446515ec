"""One input through a model several ways: dense and with each pipeline, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.engine.attach import Run, reduce
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.pipeline import Pipeline
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.trace import Trace

DENSE = "dense"


@dataclass
class Arm:
    """One way of running the input, and what came of it.

    tokens: per layer of the KV cache after the prefill. llm_seconds, total_seconds: of each repetition of the prefill, the
    decoder alone and with the vision tower. decode_seconds: median per generated token
    after the first, None if there is none. cache_bytes: of the cache's tensors.
    source: (N,) long, the column whose token stands for each input token when decoding begins, −1 if none does.
    """

    name: str
    pipeline: Pipeline | None = None
    trace: Trace | None = None
    tokens: list[int] = field(default_factory=list)
    flops: int = 0
    dense_flops: int = 0
    cache_bytes: int = 0
    llm_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)
    decode_seconds: float | None = None
    answer: str = ""
    logits: Tensor | None = None
    source: Tensor | None = None

    @property
    def llm_median(self) -> float:
        """Seconds."""
        return statistics.median(self.llm_seconds)

    @property
    def total_median(self) -> float:
        """Seconds."""
        return statistics.median(self.total_seconds)


def name_arms(pipelines: Sequence[Pipeline]) -> list[Arm]:
    """The dense arm and one per pipeline; names that repeat get a number."""
    arms = [Arm(DENSE)]
    for pipeline in pipelines:
        taken = [arm.name for arm in arms]
        name, number = pipeline.name, 2
        while name in taken:
            name, number = f"{pipeline.name}-{number}", number + 1
        arms.append(Arm(name, pipeline))
    return arms


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    arms: Sequence[Arm],
    *,
    repeats: int = 3,
    new_tokens: int = 16,
    decode: Callable[[Tensor], str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Fill in `arms`: one warm-up prefill each, then `repeats` timed ones with the arms taking turns, then an answer.

    inputs: of batch 1, from `prepare`. decode: token ids to text. progress: called with a line before each forward.
    """
    tell = progress or (lambda line: None)
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for arm in arms:
                tell(f"{arm.name}: {'warm-up' if turn == 0 else f'prefill {turn} of {repeats}'}")
                with _attached(model, arm) as run:
                    llm, total, out = _prefill(model, inputs)
                    if turn == 0:
                        _note(model, arm, run, out, inputs["input_ids"].shape[1])
                    else:
                        arm.llm_seconds.append(llm)
                        arm.total_seconds.append(total)
        for arm in arms:
            tell(f"{arm.name}: answer")
            with _attached(model, arm), _timed(model) as spans:
                ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            arm.decode_seconds = statistics.median(spans[1:]) if len(spans) > 1 else None
            width = inputs["input_ids"].shape[1]
            new = ids[0, width:] if ids.shape[1] > width else ids[0]
            arm.answer = decode(new).strip() if decode is not None else " ".join(map(str, new.tolist()))


@contextmanager
def _attached(model: nn.Module, arm: Arm) -> Iterator[Run | None]:
    if arm.pipeline is None:
        yield None
        return
    with reduce(model, arm.pipeline) as run:
        yield run


@contextmanager
def _timed(model: Any) -> Iterator[list[float]]:
    """Seconds of each forward of the decoder inside `model`."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model
    starts: list[float] = []
    spans: list[float] = []
    handles = [
        text.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        text.register_forward_hook(lambda *_: spans.append(time.perf_counter() - starts[-1])),
    ]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _prefill(model: Any, inputs: Mapping[str, Any]) -> tuple[float, float, Any]:
    """(decoder's seconds, all seconds, output) of one prefill."""
    with _timed(model) as spans:
        started = time.perf_counter()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        total = time.perf_counter() - started
    return spans[0], total, out


def _note(model: Any, arm: Arm, run: Run | None, out: Any, width: int) -> None:
    """What does not vary: tokens, FLOPs, cache, logits."""
    layers = out.past_key_values.layers
    arm.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    arm.logits = out.logits[0, -1].float()
    shape = DecoderShape.from_config(model.config)
    arm.dense_flops = prefill_flops(shape, [width] * shape.layers, [width] * shape.layers)
    if run is None:
        arm.tokens = [int(layer.keys.shape[-2]) for layer in layers]
        arm.flops = arm.dense_flops
        arm.source = torch.arange(width)
        return
    if not run.pipeline.stages:
        raise PipelineError(f"pipeline {arm.name} has no stages; the dense arm runs anyway")
    arm.trace = run.trace
    arm.tokens = [int(layer.tokens[0]) for layer in run.trace.layers]
    if run.trace.flops is None:
        raise UnsupportedError(f"pipeline {arm.name}: {run.trace.uncounted}")
    arm.flops = run.trace.flops
    arm.source = run.trace.source[0].cpu()
    seen = getattr(layers[-1], "position", None)
    if seen is not None:  # Hidden states all stay at `kv` sites; what decoding can see is what the last cache holds.
        held = torch.isin(torch.arange(width), seen[0].cpu())
        arm.source = torch.where(held, torch.arange(width), -1)
