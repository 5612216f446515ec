"""Examples through the arms that they are asked of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lab.reproduce.plan import PER_FRAME, Condition, digest, pipeline
from tokenreduce.compare.arms import BASELINE, Arm
from tokenreduce.compare.measure import NOTHING, Bench
from tokenreduce.compare.needles import Needles
from tokenreduce.compare.tasks import Item
from tokenreduce.engine.run import Run
from tokenreduce.errors import BudgetError
from tokenreduce.pipeline import Pipeline
from tokenreduce.testbed.embedded import GRID
from tokenreduce.testbed.needle import NeedleTask

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: some arms on some examples of a condition."""

    condition: Condition
    indices: tuple[int, ...]
    arms: tuple[str, ...]

    @property
    def rows(self) -> int:
        """How many rows it brings."""
        return len(self.indices) * len(self.arms)


class _Bench(Bench):
    """A bench that can leave a pipeline on the model from one example to the next."""

    held: Run | None = None

    @contextmanager
    def attached(self, pipeline: Pipeline) -> Iterator[Run]:
        if self.held is not None:
            yield self.held
            return
        with super().attached(pipeline) as run:
            yield run

    @contextmanager
    def hold(self, pipeline: Pipeline | None) -> Iterator[None]:
        """Attach once; every `outcome` inside runs under this pipeline."""
        with self.attached(pipeline or NOTHING) as run:
            self.held = run
            try:
                yield
            finally:
                self.held = None


@dataclass(frozen=True)
class _Example:
    """An example, ready to run. needle: column of the vision token that shows the tile which decides the answer."""

    index: int
    position: float
    inputs: Mapping[str, Any]
    turns: list[list[int]]
    answer: str
    ids: list[int]
    needle: int


class Worker:
    """A model in this process. model: `embedded`, or a checkpoint folder of the same shape."""

    def __init__(self, model: str, seed: int) -> None:
        self.seed = seed
        self.bench = _Bench(model, [Arm(BASELINE, BASELINE, model)], 1, frame_times=False)
        self._tokenizer = self.bench.speaker.tokenizer

    def run(self, unit: Unit) -> list[Row]:
        """One row per arm and example."""
        task = unit.condition.task(self.seed)
        examples = [self._example(unit.condition, task, index) for index in unit.indices]
        rows = []
        for name in unit.arms:
            with self.bench.hold(pipeline(name, unit.condition.frames)):
                rows += [self._row(unit.condition, name, example) for example in examples]
        return rows

    def _row(self, condition: Condition, name: str, example: _Example) -> Row:
        """Right means, as in `lab.training.evaluate`: greedy decoding says exactly the words of the answer."""
        row: Row = {
            "condition": condition.key,
            "arm": name,
            "pipeline": digest(name, condition.frames),
            "index": example.index,
            "position": example.position,
        }
        started = time.process_time()
        self.bench.new_tokens = len(example.ids)
        arm = Arm(name, name, self.bench.name, pipeline(name, condition.frames))
        try:
            outcome = self.bench.outcome(arm, example.inputs, example.turns)
        except BudgetError as error:
            return row | {"refused": str(error), "cpu_seconds": round(time.process_time() - started, 4)}
        counts = outcome.counts
        ended, width = int(counts.source[example.needle]), int(example.inputs["input_ids"].shape[1])
        return row | {
            "right": outcome.reply.ids == example.ids,
            "reply": self.bench.speaker.text(outcome.reply.ids),
            "answer": example.answer,
            "input_tokens": width,
            "tokens": counts.tokens,
            "relative_tokens": round(sum(counts.tokens) / (width * len(counts.tokens)), 6),
            "relative_flops": round(counts.flops / counts.dense_flops, 6),
            "needle": "kept" if ended == example.needle else "dropped" if ended < 0 else "merged",
            "cpu_seconds": round(time.process_time() - started, 4),
        }

    def _example(self, condition: Condition, task: Needles, index: int) -> _Example:
        item = task.item(index)
        inputs = self.inputs(item)
        position = item.cell["position"]
        spec = replace(task.spec, frames=condition.frames, position=position if condition.positions else None)
        made = NeedleTask(spec).example(self.seed, index)
        tile = made.needles[made.scored.needs[-1]]
        first = int((inputs["input_ids"][0] == self.bench.model.config.video_token_id).nonzero()[0])
        needle = first + PER_FRAME * tile.frame + (GRID + 1) * tile.row + tile.column
        answer = item.turns[-1][1]
        ids = list(self._tokenizer(answer, add_special_tokens=False)["input_ids"])
        return _Example(index, position, inputs, self.bench.turns(item), answer, ids, needle)

    @torch.inference_mode()
    def inputs(self, item: Item) -> dict[str, Any]:
        """What `prepare` makes of an example, with the vision tower's work done once for all arms."""
        made = dict(self.bench.prepare(item))
        seen = self.bench.model.get_video_features(made.pop("pixel_values_videos"), return_dict=True)
        return made | {"mm_encoder_outputs": {"video": seen}}
