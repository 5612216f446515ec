"""Train the embedded model: `python -m lab.training.train`. Killed at any moment, it goes on where it was."""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from lab.training.curriculum import CURRICULUM, Stage, lesson
from lab.training.encoder import train_encoder
from lab.training.forward import answer_logits
from lab.training.lessons import CLOSING, Batch, Writer
from tokenreduce.testbed.embedded import WEIGHTS, build_model, build_tokenizer

ENCODER_STEPS = 1000
STREAM = 7_000_000
"""Seeds of training streams start here, so that the small seeds of evaluations are never trained on."""
SAVE_EVERY, REPORT_EVERY = 25, 20


@dataclass
class Progress:
    """Where training stands; written beside the weights at each checkpoint.

    stage, step: next step to do. total: decoder steps done. seconds: wall-clock time spent. accuracy: running mean per kind
    in this stage.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)


class Trainer:
    """A model, its optimiser and its progress, in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.tokenizer = build_tokenizer()
        self.model: PreTrainedModel = build_model(seed)
        # The read-out starts as the embedding table: a token that a state holds is the token it says.
        self.model.lm_head.weight.data.copy_(self.model.get_input_embeddings().weight.data)
        self.writer = Writer(self.tokenizer, self.model.config.tokens_per_frame)
        self.progress = Progress()
        self.started = time.monotonic()
        frozen = (self.model.model.vision_tower, self.model.model.multi_modal_projector)
        fixed = {id(p) for module in frozen for p in module.parameters()}
        self.trained = {name: p for name, p in self.model.named_parameters() if id(p) not in fixed}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def resume(self) -> bool:
        """Load the last checkpoint of the folder; False if there is none."""
        state = self.folder / "progress.json"
        if not state.is_file():
            return False
        self.progress = Progress(**json.loads(state.read_text(encoding="utf-8")))
        self.model.load_state_dict(load_file(self.folder / f"model-{self.progress.total}.safetensors"))
        moments = load_file(self.folder / f"moments-{self.progress.total}.safetensors")
        for name, parameter in self.trained.items():
            if f"{name}.exp_avg" in moments:
                entry: dict[str, Any] = {key: moments[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
                self.optimizer.state[parameter] = entry
        return True

    def save(self) -> None:
        """Write a checkpoint: weights and moments first, then the file that names them, then remove the older ones."""
        total = self.progress.total
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        moments = {
            f"{name}.{key}": self.optimizer.state[parameter][key]
            for name, parameter in self.trained.items()
            for key in self.optimizer.state.get(parameter, {})
        }
        for name, tensors in (("model", weights), ("moments", moments)):
            aside = self.folder / f"{name}-{total}.part"
            save_file(tensors, aside)
            aside.replace(self.folder / f"{name}-{total}.safetensors")
        part = self.folder / "progress.json.part"
        part.write_text(json.dumps(asdict(self.progress)) + "\n", encoding="utf-8")
        part.replace(self.folder / "progress.json")
        for old in self.folder.glob("*-*.safetensors"):
            if old.stem.rpartition("-")[2] != str(total):
                old.unlink()

    def report(self, phase: str, row: dict[str, Any]) -> None:
        """Print a line of progress and append it to the log."""
        line = {"phase": phase, "seconds": round(self.seconds()), **row}
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()
            ),
            flush=True,
        )
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def seconds(self) -> float:
        """Time spent so far, earlier runs included."""
        return self.progress.seconds + time.monotonic() - self.started

    def checkpoint(self) -> None:
        """Note the time and save."""
        self.progress.seconds = self.seconds()
        self.started = time.monotonic()
        self.save()

    def run_stage(self, stage: Stage, limit: int | None) -> bool:
        """Train one stage; False if `limit` decoder steps were reached before its end."""
        progress, number = self.progress, self.progress.stage
        while progress.step < stage.steps and not self._mastered(stage):
            if limit is not None and progress.total >= limit:
                return False
            for group in self.optimizer.param_groups:
                group["lr"] = rate(stage, progress.step)
            batch, kinds = lesson(stage, self.writer, STREAM + 1000 * self.seed + number, progress.step)
            loss, right = self._learn(batch, len(kinds))
            for kind, value in zip(kinds, right, strict=True):
                progress.accuracy[kind] = 0.9 * progress.accuracy.get(kind, value) + 0.1 * value
            progress.step += 1
            progress.total += 1
            if progress.step % REPORT_EVERY == 0:
                self.report(stage.name, {"step": progress.step, "loss": loss, **progress.accuracy})
            if progress.step % SAVE_EVERY == 0:
                self.checkpoint()
        self.report(stage.name, {"step": progress.step, "done": True, **progress.accuracy})
        return True

    def _mastered(self, stage: Stage) -> bool:
        if stage.until is None or self.progress.step < 2 * REPORT_EVERY:
            return False
        return all(self.progress.accuracy.get(kind, 0.0) > stage.until for kind in stage.gates())

    def _learn(self, batch: Batch, turns: int) -> tuple[float, list[float]]:
        """One step. Returns the loss and, per turn, the share of wholly right answers."""
        logits, labels, turn = answer_logits(self.model, batch)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        weight = torch.where(turn == CLOSING, 0.1, 1.0)
        loss = (losses * weight).sum() / (weight.sum() * len(labels))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        self.optimizer.step()
        right = (logits.argmax(-1) == labels).float()
        # Drills are scored by the digit, conversations by the whole answer.
        scores = (
            [right.mean()]
            if bool((turn == CLOSING).sum() == 0)
            else [right[:, turn == t].prod(1).mean() for t in range(turns)]
        )
        return loss.item(), [score.item() for score in scores]


def rate(stage: Stage, step: int) -> float:
    """Learning rate at a step of a stage: 30 steps of warm-up, then level, or a cosine down to a tenth in the last stage."""
    level = stage.rate * min(1.0, (step + 1) / 30)
    if stage.until is not None:
        return level
    return level * (0.55 + 0.45 * math.cos(math.pi * step / stage.steps))


def export(trainer: Trainer, output: Path) -> None:
    """Write the model, its tokenizer and the training log into `output`."""
    trainer.model.save_pretrained(output)
    trainer.tokenizer.save_pretrained(output)
    lines = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # Steps that a killed run did twice stand in the log twice; the later ones count.
    rows = list({(line["phase"], line["step"], line.get("done")): line for line in lines}.values())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (output / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)


def train(
    folder: Path, seed: int, output: Path | None, limit: int | None = None, encoder_steps: int = ENCODER_STEPS
) -> Trainer:
    """Run or resume the whole training in `folder`; `limit` stops after so many decoder steps, and `output` is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(folder, seed)
    if not trainer.resume():
        train_encoder(
            trainer.model,
            trainer.tokenizer,
            encoder_steps,
            STREAM + 1000 * seed + 999,
            lambda row: trainer.report("encoder", row),
        )
        trainer.checkpoint()
    while trainer.progress.stage < len(CURRICULUM):
        if not trainer.run_stage(CURRICULUM[trainer.progress.stage], limit):
            trainer.checkpoint()
            return trainer
        trainer.progress.stage, trainer.progress.step, trainer.progress.accuracy = trainer.progress.stage + 1, 0, {}
        trainer.checkpoint()
    if output is not None:
        export(trainer, output)
    return trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.training.train", description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/testbed"), help="folder of checkpoints and log; resumed if it holds any"
    )
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the finished model is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--limit",
        type=int,
        default=None,
        help="stop after so many decoder steps (a trial run; no weights are exported)",
    )
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS)
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.work, args.seed, args.output, args.limit, args.encoder_steps)


if __name__ == "__main__":
    main()
