"""One input through a model several ways: dense and with each pipeline, measured side by side, for `tokenreduce run`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenreduce.compare.arms import BASELINE, name_pipelines
from tokenreduce.compare.clock import now
from tokenreduce.compare.prefill import PrefillCounts, count_prefill, is_finite, timed
from tokenreduce.engine.attach import reduce
from tokenreduce.engine.run import Run
from tokenreduce.errors import BudgetError, NotFiredError, PipelineError, TokenReduceError, UnsupportedError
from tokenreduce.pipeline import Pipeline
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.trace import Trace


@dataclass
class MeasuredArm:
    """What came of one way of running the input."""

    name: str
    """`dense`, or the pipeline's name, with a number where that repeats."""
    pipeline: Pipeline | None
    """None for the dense arm, which runs with nothing attached."""
    counts: PrefillCounts
    """What its prefill did."""
    trace: Trace | None
    """Receipt of the prefill, None for the dense arm."""
    llm_seconds: list[float] = field(default_factory=list)
    """Seconds of the decoder in each timed prefill."""
    total_seconds: list[float] = field(default_factory=list)
    """Seconds of each timed prefill with the vision tower."""
    decode_seconds: float | None = None
    """Median seconds of the decoder per generated token after the first, None if there is none."""
    answer: str = ""
    """The generated text."""
    finite: bool = True
    """Whether the logits that the prefill ends with are numbers; else the answer means nothing."""

    @property
    def llm_median(self) -> float:
        """Median of `llm_seconds`."""
        return statistics.median(self.llm_seconds)

    @property
    def total_median(self) -> float:
        """Median of `total_seconds`."""
        return statistics.median(self.total_seconds)


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    pipelines: Sequence[Pipeline],
    *,
    repeats: int = 3,
    new_tokens: int = 16,
    decode: Callable[[Tensor], str] | None = None,
    progress: Callable[[str], None] | None = None,
    refused: Callable[[str, TokenReduceError], None] | None = None,
) -> list[MeasuredArm]:
    """The dense arm and one per pipeline: a warm-up prefill each, `repeats` timed ones with the arms in turns, then an answer.

    inputs: of batch 1, from `prepare`. decode: token ids to text. progress: called with a line before each forward.
    refused: called, before anything is measured, with the name of each arm that cannot run and why; the others run. Left out, or
    where no pipeline can run, the error is raised. Raises PipelineError for a pipeline without stages.
    """
    tell = progress or (lambda line: None)
    width = int(inputs["input_ids"].shape[1])
    ways: list[tuple[str, Pipeline | None]] = [(BASELINE, None), *name_pipelines(pipelines)]
    arms = []
    errors: list[TokenReduceError] = []
    with torch.inference_mode():
        for name, pipeline in ways:
            tell(f"{name}: warm-up")
            try:
                with _attached(model, pipeline) as run:
                    arms.append(_counted(name, model, run, _prefill(model, inputs)[2], width))
            except (BudgetError, PipelineError, NotFiredError) as error:
                if refused is None or len(errors) + 1 == len(pipelines):
                    raise
                errors.append(error)
                refused(name, error)
        for turn in range(1, repeats + 1):
            for arm in arms:
                tell(f"{arm.name}: prefill {turn} of {repeats}")
                with _attached(model, arm.pipeline):
                    llm, total, _ = _prefill(model, inputs)
                arm.llm_seconds.append(llm)
                arm.total_seconds.append(total)
        for arm in arms:
            tell(f"{arm.name}: answer")
            with _attached(model, arm.pipeline), timed(_decoder(model), inputs["input_ids"].device) as spans:
                ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            arm.decode_seconds = statistics.median(spans[1:]) if len(spans) > 1 else None
            new = ids[0, width:] if ids.shape[1] > width else ids[0]
            arm.answer = decode(new).strip() if decode is not None else " ".join(map(str, new.tolist()))
    return arms


def _attached(model: Any, pipeline: Pipeline | None) -> AbstractContextManager[Run | None]:
    if pipeline is None:
        return nullcontext()
    run = reduce(model, pipeline)
    run.silent = True  # The tables show it.
    return run


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _prefill(model: Any, inputs: Mapping[str, Any]) -> tuple[float, float, Any]:
    """(decoder's seconds, all seconds, output) of one prefill."""
    device = inputs["input_ids"].device
    with timed(_decoder(model), device) as spans:
        started = now(device)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        total = now(device) - started
    return spans[0], total, output


def _counted(name: str, model: Any, run: Run | None, output: Any, width: int) -> MeasuredArm:
    if run is not None and not run.pipeline.stages:
        raise PipelineError(f"pipeline {name} has no stages; the dense arm runs anyway")
    try:
        counts = count_prefill(run, DecoderShape.from_config(model.config), output, width)
    except UnsupportedError as error:
        raise UnsupportedError(f"pipeline {name}: {error}") from None
    finite = is_finite(output.logits)
    if run is None:
        return MeasuredArm(name, None, counts, None, finite=finite)
    return MeasuredArm(name, run.pipeline, counts, run.trace, finite=finite)
