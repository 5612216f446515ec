"""Held-out accuracy of an embedded model, per kind of question and number of frames: `python -m lab.training.evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.training.forward import answer_logits
from lab.training.lessons import Writer
from tokenreduce.compare.statistics import Interval, wilson
from tokenreduce.models import load_model
from tokenreduce.testbed.embedded import WEIGHTS, read_saved_tokenizer
from tokenreduce.testbed.needle import NeedleSpec, NeedleTask
from tokenreduce.testbed.questions import KINDS


@dataclass(frozen=True)
class Score:
    """Right answers among `examples`, with the 95 % Wilson interval."""

    kind: str
    frames: int
    size: int
    placement: str
    right: int
    examples: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.examples

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.right, self.examples)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: NeedleSpec,
    examples: int,
    seed: int,
    batch: int = 8,
) -> Score:
    """Answer `examples` of `spec`. Right means: greedy decoding gives exactly the expected words of the scored turn.

    An earlier turn is answered for the model, rightly, as a conversation would go on.
    """
    writer, task, right = Writer(tokenizer, model.config.tokens_per_frame), NeedleTask(spec), 0
    for start in range(0, examples, batch):
        made = [task.example(seed, index) for index in range(start, min(start + batch, examples))]
        lesson = writer.batch(made, [example.turns for example in made])
        logits, labels, turn = answer_logits(model, lesson)
        scored = turn == len(made[0].turns) - 1
        right += int((logits.argmax(-1) == labels)[:, scored].all(1).sum())
    return Score(spec.kind, spec.frames, spec.size, spec.placement, right, examples)


def table(scores: Sequence[Score]) -> str:
    """Scores as a Markdown table."""
    lines = ["| task | frames | needle cells | placement | accuracy | 95 % interval | examples |", "|---" * 7 + "|"]
    for s in scores:
        low, high = s.interval
        cells = (
            s.kind,
            s.frames,
            f"{s.size}×{s.size}",
            s.placement,
            f"{s.accuracy:.3f}",
            f"{low:.3f}–{high:.3f}",
            s.examples,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.training.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--frames", type=int, nargs="+", default=[16], help="numbers of frames")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of question")
    parser.add_argument("--size", type=int, default=1, help="side of a needle in cells")
    parser.add_argument("--placement", default="edit", choices=["edit", "insert", "mixed"])
    parser.add_argument("--clips", nargs="+", default=None, help="videos by path instead of the held-out clips")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="also write the scores to this file")
    args = parser.parse_args(arguments)
    model = load_model(args.weights)
    tokenizer = read_saved_tokenizer(args.weights)
    base = NeedleSpec(size=args.size, placement=args.placement, clips=tuple(args.clips) if args.clips else "heldout")
    scores = []
    for frames in args.frames:
        for kind in args.kinds:
            spec = replace(base, kind=kind, frames=frames)
            scores.append(score(model, tokenizer, spec, args.examples, args.seed))
            print(table(scores).splitlines()[-1] if len(scores) > 1 else table(scores), flush=True)
    if args.json:
        rows = [{**vars(s), "accuracy": s.accuracy, "interval": s.interval, "seed": args.seed} for s in scores]
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
