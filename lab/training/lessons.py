"""Training material of the decoder: conversations of several questions per video, and drills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenreduce.errors import TokenReduceError
from tokenreduce.testbed.embedded import END, START, VIDEO
from tokenreduce.testbed.needle import Example, NeedleSpec, NeedleTask, Placement
from tokenreduce.testbed.questions import Kind, Question, phrase, pick

SYSTEM = f"{START}system\nYou are a helpful assistant.{END}\n{START}user\n"
TURN = f"{END}\n{START}user\n"
REPLY = f"{END}\n{START}assistant\n"
QUIET, CLOSING = -1, -2
"""Values of `Batch.turn`: nothing is asked here; the end of an answer. Turns count from 0."""


@dataclass(frozen=True)
class Batch:
    """Conversations of equal length about B videos of F frames.

    frames: (B, F, H, W, 3) uint8. ids: (B, N) long, with a placeholder for each video token. labels: (B, N) long, the token
    that each position should foretell, −1 where nothing is asked. turn: (N,) long, the turn that a label belongs to.
    """

    frames: Tensor
    ids: Tensor
    labels: Tensor
    turn: Tensor


class Writer:
    """Turns conversations into token ids, with `per_frame` placeholders per frame where the video goes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, per_frame: int) -> None:
        self._tokenizer, self._per_frame = tokenizer, per_frame

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def batch(self, examples: Sequence[Example], talks: Sequence[Sequence[Question]], times: str = "") -> Batch:
        """Conversations as the chat template writes them; each turn must be equally long in every row."""
        rows = [self._talk(len(e.frames), talk, times) for e, talk in zip(examples, talks, strict=True)]
        return _stack(examples, rows)

    def drill(self, examples: Sequence[Example], rng: np.random.Generator) -> Batch:
        """Right after the video, the colour of each tile, in any order; its digit or spot is to follow."""
        rows = []
        for example in examples:
            ids = self._video(len(example.frames))
            labels, turn = [-1] * len(ids), [QUIET] * len(ids)
            for i in rng.permutation(len(example.needles)):
                tile = example.needles[int(i)]
                colour, content = self.ids(f"{tile.colour} {tile.content}")
                ids, labels, turn = [*ids, colour, content], [*labels, content, -1], [*turn, 0, QUIET]
            rows.append((ids, labels, turn))
        return _stack(examples, rows)

    def _video(self, frames: int) -> list[int]:
        return self.ids(SYSTEM) + self.ids(VIDEO) * (frames * self._per_frame)

    def _talk(self, frames: int, questions: Sequence[Question], times: str) -> tuple[list[int], list[int], list[int]]:
        ids = self._video(frames)
        labels, turns = [-1] * len(ids), [QUIET] * len(ids)
        for number, question in enumerate(questions):
            asked = self.ids((times if number == 0 else TURN) + question.text + REPLY)
            answer = self.ids(question.answer)
            ids += asked + answer
            labels += [-1] * (len(asked) - 1) + answer + self.ids(END)
            turns += [QUIET] * (len(asked) - 1) + [number] * len(answer) + [CLOSING]
        return ids, labels, turns


def _stack(examples: Sequence[Example], rows: Sequence[tuple[list[int], list[int], list[int]]]) -> Batch:
    frames = torch.from_numpy(np.stack([example.frames for example in examples]))
    ids, labels = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    return Batch(frames, ids, labels, torch.tensor(rows[0][2]))


def time_instruction(frames: int, fps: float = 1.0) -> str:
    """LLaVA-Video's sentence on the times of the frames."""
    times = ",".join(f"{i / fps:.2f}s" for i in range(frames))
    return (
        f"The video lasts for {frames / fps:.2f} seconds, and {frames} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video.\n"
    )


def converse(example: Example, kinds: Sequence[Kind], rng: np.random.Generator) -> list[Question]:
    """One question of each of `kinds` about the tiles of `example`, none asked twice while there are others."""
    asked: list[Question] = []
    for kind in kinds:
        for _ in range(8):
            question = phrase(kind, example.needles, pick(kind, example.needles, rng)[-1])
            if question.text not in {earlier.text for earlier in asked}:
                break
        asked.append(question)
    return asked


def varied(spec: NeedleSpec, seed: int, index: int) -> Example:
    """Example `index` of `spec` with tiles of one cell (70 %), 2×2 or 3×3, half of the videos with inserted frames."""
    rng = np.random.default_rng([seed, index, 1])
    size = int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
    placement: Placement = "mixed" if spec.frames > 1 and rng.random() < 0.5 else "edit"
    try:
        return NeedleTask(replace(spec, size=size, placement=placement)).example(seed, index)
    except TokenReduceError:  # large tiles that did not fit side by side
        return NeedleTask(replace(spec, placement=placement)).example(seed, index)
