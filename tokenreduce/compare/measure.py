"""Examples through a model, every arm in turn, each part timed on its own."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from tokenreduce.compare.arms import Arm
from tokenreduce.compare.clock import now
from tokenreduce.compare.conversation import Reply, Speaker, converse, kl_divergence
from tokenreduce.compare.memory import PeakMemory
from tokenreduce.compare.prefill import PrefillCounts, count_prefill
from tokenreduce.compare.tasks import Item
from tokenreduce.engine.attach import reduce
from tokenreduce.engine.run import Run
from tokenreduce.errors import BudgetError, MediaError, NotFiredError, PipelineError, TokenReduceError
from tokenreduce.models import load_model, prepare
from tokenreduce.models.placement import placement_line
from tokenreduce.pipeline import Pipeline
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.testbed.embedded import EMBEDDED, MAX_FRAMES, load_embedded

NOTHING = Pipeline.model_validate({"name": "dense", "stages": []})
Row = dict[str, Any]


@dataclass(frozen=True)
class ArmOutcome:
    """What one arm made of one example."""

    reply: Reply
    """The conversation, with its times."""
    counts: PrefillCounts
    """What its prefill did."""
    selector_seconds: float
    """Seconds spent inside strategies."""


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen from video files. None leaves it to the model."""

    max_frames: int | None = None
    """Frames at most."""
    fps: float | None = None
    """Frames per second of video."""
    allow_truncated: bool = False
    """Whether to go on with what is there of a file that broke off."""


@dataclass
class _Watch:
    """A stop watch around the decisions of strategies."""

    seconds: float = 0.0
    """Seconds spent inside strategies so far."""
    inside: bool = False
    """Whether one is deciding now; a decision within a decision is not counted twice."""

    def wrap(self, run: Run, device: torch.device) -> None:
        """Time every decision of the strategies of `run`, which belong to it alone."""
        for strategy in (*run.strategies, *run.vision):
            if hasattr(strategy, "measure"):  # Not those of the tower.
                strategy.measure = self._timed(strategy.measure, device)  # type: ignore[method-assign]
            strategy.decide = self._timed(strategy.decide, device)  # type: ignore[method-assign,union-attr,attr-defined]

    def _timed(self, decide: Any, device: torch.device) -> Any:
        def timed(context: Any) -> Any:
            if self.inside:
                return decide(context)
            self.inside, started = True, now(device)
            try:
                return decide(context)
            finally:
                self.seconds, self.inside = self.seconds + now(device) - started, False

        return timed


class Bench:
    """A model and the arms that share it."""

    def __init__(
        self,
        model: str,
        arms: Sequence[Arm],
        new_tokens: int,
        frame_times: bool,
        sampling: Sampling = Sampling(),
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.arms, self.new_tokens, self.sampling = model, list(arms), new_tokens, sampling
        self.model = open_model(model, loading or {})
        # The embedded model spells numbers digit by digit: frame times would be a third of its input.
        self.frame_times = frame_times and model != EMBEDDED
        self.speaker = Speaker(self.model)
        self.adapter = reduce(self.model, NOTHING).adapter
        self.decoder = self.adapter.text_model(self.model)
        self.shape = DecoderShape.from_config(self.model.config)
        self._peaks: dict[str, Row] = {}

    def options(self) -> dict[str, Any]:
        """Arguments of `prepare` and `look` about a video file."""
        options = vars(self.sampling).copy()
        if options["max_frames"] is None and self.name == EMBEDDED:
            options["max_frames"] = MAX_FRAMES
        return options

    def prepare(self, item: Item) -> Any:
        """Inputs of the first turn."""
        options: dict[str, Any] = {"time_instruction": self.frame_times}
        if isinstance(item.video, Path):
            options |= self.options()
        try:
            return prepare(self.model, item.video, item.turns[0][0], **options)
        except MediaError as error:
            raise MediaError(f"{item.id}: {error}") from None

    def turns(self, item: Item) -> list[list[int]]:
        """Ids of the later turns. Earlier answers are given for the model, rightly."""
        pairs = zip(item.turns[:-1], item.turns[1:], strict=True)
        return [self.speaker.turn(answer, question) for (_, answer), (question, _) in pairs]

    def rows(self, item: Item, index: int) -> tuple[list[Row], dict[str, ArmOutcome]]:
        """One row per arm, in the order of the arms, whichever ran first; and the outcomes behind them."""
        inputs, turns = self.prepare(item), self.turns(item)
        # Arms begin in turns, so that no one always runs on a warm or a hot machine.
        first = index % len(self.arms)
        outcomes = {}
        for arm in self.arms[first:] + self.arms[:first]:
            outcomes[arm.name] = self._outcome(arm, item, inputs, turns)
        dense = next(outcomes[arm.name] for arm in self.arms if arm.pipeline is None)
        shared = {
            "model": self.name,
            "index": index,
            "id": item.id,
            "question": item.turns[-1][0],
            "expected": item.expected,
            "chance": 1 / len(item.options) if item.options and len(item.expected.split()) == 1 else None,
            "cell": item.cell,
            "input_tokens": int(inputs["input_ids"].shape[1]),
            "worker": f"{platform.node()}:{os.getpid()}",
            "ran_on": placement_line(self.model),
        }
        peaks, self._peaks = self._peaks, {}
        rows = [shared | self._row(arm, item, outcomes[arm.name], dense) | peaks.get(arm.name, {}) for arm in self.arms]
        return rows, outcomes

    def outcome(self, arm: Arm, inputs: Mapping[str, Any], turns: Sequence[Sequence[int]]) -> ArmOutcome:
        """Run one arm once."""
        watch, width = _Watch(), int(inputs["input_ids"].shape[1])
        counts: list[PrefillCounts] = []
        with self.attached(arm.pipeline or NOTHING) as run:
            watch.wrap(run, inputs["input_ids"].device)
            reply = converse(
                self.model, self.decoder, inputs, turns, self.speaker.ends, self.new_tokens,
                lambda output: counts.append(count_prefill(run, self.shape, output, width)),
            )  # fmt: skip
        return ArmOutcome(reply, counts[0], watch.seconds)

    def _outcome(self, arm: Arm, item: Item, inputs: Mapping[str, Any], turns: Sequence[Sequence[int]]) -> ArmOutcome:
        """`outcome` with errors that say where."""
        try:
            return self.outcome(arm, inputs, turns)
        except TokenReduceError as error:
            raise type(error)(f"arm {arm.name}, example {item.id}: {error}") from None

    def attached(self, pipeline: Pipeline) -> AbstractContextManager[Run]:
        """`reduce`, for a `with` block."""
        run = reduce(self.model, pipeline)
        run.silent = True  # `check_fired` says it of an arm as a whole.
        return run

    @torch.inference_mode()
    def refusal(self, arm: Arm, item: Item) -> TokenReduceError | None:
        """Why `arm` cannot run on `item`, found by its prefill; None if it can."""
        try:
            with self.attached(arm.pipeline or NOTHING):
                self.model(**self.prepare(item), use_cache=True, logits_to_keep=1)
        except (BudgetError, PipelineError, NotFiredError) as error:
            return error
        return None

    def warm_up(self, item: Item) -> None:
        """Run each arm once untimed, and once more for its peak memory, which the next rows will carry."""
        inputs, turns = self.prepare(item), self.turns(item)
        for arm in self.arms:
            self._outcome(arm, item, inputs, turns)
        for arm in self.arms:
            with PeakMemory(inputs["input_ids"].device) as peak:
                self.outcome(arm, inputs, turns)
            self._peaks[arm.name] = {"peak_bytes": peak.peak, "growth_bytes": peak.growth}

    def _row(self, arm: Arm, item: Item, outcome: ArmOutcome, dense: ArmOutcome) -> Row:
        reply, counts = outcome.reply, outcome.counts
        ids = [token for token in reply.ids if token not in self.speaker.ends]
        text = self.speaker.text(ids)
        said = item.read(text)
        steps = reply.decode
        reduced = arm.pipeline is not None
        # NaN answers nothing: what it happens to spell is neither right nor like dense.
        finite = reply.finite
        both = finite and dense.reply.finite
        return {
            "arm": arm.name,
            "reply": text,
            "said": said if finite else "",
            "finite": finite,
            "right": finite and said == item.expected,
            "agrees": both and reply.ids[0] == dense.reply.ids[0] if reduced else None,
            "kl": kl_divergence(dense.reply, reply) if reduced and both else None,
            "tokens": counts.tokens,
            "fired": counts.spared
            or counts.tokens != dense.counts.tokens
            or counts.layer_flops != dense.counts.layer_flops,
            "relative_tokens": sum(counts.tokens) / sum(dense.counts.tokens),
            "layer_flops": counts.layer_flops,
            "flops": counts.flops,
            "relative_flops": counts.flops / counts.dense_flops,
            "selector_flops": counts.selector_flops,
            "kv_bytes": counts.kv_bytes,
            "new_tokens": len(reply.ids),
            "seconds": {
                "vision": reply.vision,
                "prefill": reply.prefill,
                "selector": outcome.selector_seconds,
                "turns": reply.turn,
                "decode_per_token": sum(steps) / len(steps) if steps else None,
            },
            "finished": time.time(),
        }


def open_model(name: str, loading: Mapping[str, Any]) -> Any:
    """A model by the name a user gives it, in eval mode, without transformers' bars of progress.

    loading: arguments of `load_model` that say where and how.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load_embedded(**loading) if name == EMBEDDED else load_model(name, **loading)
    finally:
        if bars:
            logging.enable_progress_bar()
