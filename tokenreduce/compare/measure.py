"""Examples through a model, every arm in turn, each part timed on its own."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from tokenreduce.compare.arms import Arm
from tokenreduce.compare.conversation import Reply, Speaker, converse, kl_divergence, now
from tokenreduce.compare.memory import Peak
from tokenreduce.compare.tasks import Item
from tokenreduce.engine.attach import reduce
from tokenreduce.engine.run import Run
from tokenreduce.errors import MediaError, TokenReduceError, UnsupportedError
from tokenreduce.models import load_model, prepare
from tokenreduce.pipeline import Pipeline
from tokenreduce.planning.cost import DecoderShape, layer_flops, prefill_flops
from tokenreduce.testbed.embedded import EMBEDDED, MAX_FRAMES, load_embedded

NOTHING = Pipeline.model_validate({"name": "dense", "stages": []})
Row = dict[str, Any]


@dataclass
class Outcome:
    """What one arm made of one example. source: (N,) long, where each input token ended, −1 if dropped. spared: whether stages in
    the vision tower left something out."""

    reply: Reply
    tokens: list[int]
    layer_flops: list[int]
    flops: int
    dense_flops: int
    selector_flops: int
    kv_bytes: int
    selector_seconds: float
    source: Tensor
    spared: bool = False


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen from video files: at most so many, so many a second; None leaves it to the model."""

    max_frames: int | None = None
    fps: float | None = None


@dataclass
class _Watch:
    """Seconds spent inside strategies."""

    seconds: float = 0.0
    inside: bool = False

    def wrap(self, run: Run, device: torch.device) -> None:
        """Time every decision of the strategies of `run`, which belong to it alone."""
        for strategy in (*run.strategies, *run.vision):
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
        self, model: str, arms: Sequence[Arm], new_tokens: int, frame_times: bool, sampling: Sampling = Sampling()
    ) -> None:
        self.name, self.arms, self.new_tokens, self.sampling = model, list(arms), new_tokens, sampling
        self.model = open_model(model)
        # The embedded model spells numbers digit by digit: frame times would be a third of its input.
        self.frame_times = frame_times and model != EMBEDDED
        self.speaker = Speaker(self.model)
        self.adapter = reduce(self.model, NOTHING).adapter
        self.decoder = self.adapter.text_model(self.model)
        self.shape = DecoderShape.from_config(self.model.config)
        self._peaks: dict[str, Row] = {}

    def prepare(self, item: Item) -> Any:
        """Inputs of the first turn."""
        most = self.sampling.max_frames or (MAX_FRAMES if self.name == EMBEDDED else None)
        options: dict[str, Any] = {"time_instruction": self.frame_times}
        if isinstance(item.video, Path):
            options |= {"max_frames": most, "fps": self.sampling.fps}
        try:
            return prepare(self.model, item.video, item.turns[0][0], **options)
        except MediaError as error:
            raise MediaError(f"{item.id}: {error}") from None

    def turns(self, item: Item) -> list[list[int]]:
        """Ids of the later turns. Earlier answers are given for the model, rightly."""
        pairs = zip(item.turns[:-1], item.turns[1:], strict=True)
        return [self.speaker.turn(answer, question) for (_, answer), (question, _) in pairs]

    def rows(self, item: Item, index: int) -> tuple[list[Row], dict[str, Outcome]]:
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
        }
        peaks, self._peaks = self._peaks, {}
        rows = [shared | self._row(arm, item, outcomes[arm.name], dense) | peaks.get(arm.name, {}) for arm in self.arms]
        return rows, outcomes

    def outcome(self, arm: Arm, inputs: Mapping[str, Any], turns: Sequence[Sequence[int]]) -> Outcome:
        """Run one arm once."""
        watch = _Watch()
        noted: dict[str, Any] = {}
        with self.attached(arm.pipeline or NOTHING) as run:
            watch.wrap(run, inputs["input_ids"].device)
            reply = converse(
                self.model, self.decoder, inputs, turns, self.speaker.ends, self.new_tokens,
                lambda output: noted.update(self._note(run, output, inputs["input_ids"].shape[1])),
            )  # fmt: skip
        return Outcome(reply=reply, selector_seconds=watch.seconds, **noted)

    def _outcome(self, arm: Arm, item: Item, inputs: Mapping[str, Any], turns: Sequence[Sequence[int]]) -> Outcome:
        """`outcome` with errors that say where."""
        try:
            return self.outcome(arm, inputs, turns)
        except TokenReduceError as error:
            raise type(error)(f"arm {arm.name}, example {item.id}: {error}") from None

    @contextmanager
    def attached(self, pipeline: Pipeline) -> Iterator[Run]:
        """`reduce` for a while."""
        with reduce(self.model, pipeline) as run:
            yield run

    def warm_up(self, item: Item) -> None:
        """Run each arm once untimed, and once more for its peak memory, which the next rows will carry."""
        inputs, turns = self.prepare(item), self.turns(item)
        for arm in self.arms:
            self._outcome(arm, item, inputs, turns)
        for arm in self.arms:
            with Peak(inputs["input_ids"].device) as peak:
                self.outcome(arm, inputs, turns)
            self._peaks[arm.name] = {"peak_bytes": peak.peak, "growth_bytes": peak.growth}

    def _note(self, run: Run, output: Any, width: int) -> dict[str, Any]:
        """Counts that do not vary, from the trace; of a dense run from the cache."""
        layers, shape = output.past_key_values.layers, self.shape
        dense = prefill_flops(shape, [width] * shape.layers, [width] * shape.layers)
        noted: dict[str, Any] = {
            "kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            "dense_flops": dense,
        }
        if not run.pipeline.stages:
            return noted | {
                "tokens": [int(layer.keys.shape[-2]) for layer in layers],
                "layer_flops": [layer_flops(shape, width, width)] * shape.layers,
                "flops": dense,
                "selector_flops": 0,
                "source": torch.arange(width),
            }
        trace = run.trace
        if trace.flops is None:
            raise UnsupportedError(trace.uncounted)
        source = trace.source[0].cpu()
        seen = getattr(layers[-1], "position", None)
        if (
            seen is not None
        ):  # Hidden states all stay at `kv` sites; what later queries see is what the last cache holds.
            columns = torch.arange(width)
            source = torch.where(torch.isin(columns, seen[0].cpu()), columns, -1)
        return noted | {
            "tokens": [int(layer.tokens[0]) for layer in trace.layers],
            "layer_flops": [layer.flops for layer in trace.layers],
            "flops": trace.flops,
            "selector_flops": trace.selector_flops,
            "source": source,
            "spared": any(stage.site.startswith("vision.") and stage.after < stage.before for stage in trace.stages),
        }

    def _row(self, arm: Arm, item: Item, outcome: Outcome, dense: Outcome) -> Row:
        reply = outcome.reply
        ids = [token for token in reply.ids if token not in self.speaker.ends]
        text = self.speaker.text(ids)
        said = item.read(text)
        steps = reply.decode
        reduced = arm.pipeline is not None
        return {
            "arm": arm.name,
            "reply": text,
            "said": said,
            "right": said == item.expected,
            "agrees": reply.ids[0] == dense.reply.ids[0] if reduced else None,
            "kl": kl_divergence(dense.reply, reply) if reduced else None,
            "tokens": outcome.tokens,
            "fired": outcome.spared or outcome.tokens != dense.tokens or outcome.layer_flops != dense.layer_flops,
            "relative_tokens": sum(outcome.tokens) / sum(dense.tokens),
            "layer_flops": outcome.layer_flops,
            "flops": outcome.flops,
            "relative_flops": outcome.flops / outcome.dense_flops,
            "selector_flops": outcome.selector_flops,
            "kv_bytes": outcome.kv_bytes,
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


def open_model(name: str) -> Any:
    """A model by the name a user gives it, in eval mode, without transformers' bars of progress."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load_embedded() if name == EMBEDDED else load_model(name).eval()
    finally:
        if bars:
            logging.enable_progress_bar()
