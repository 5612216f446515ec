"""First phase of training: the frame encoder and projector alone, on patches whose content is known.

A projected patch is to hold the token embeddings of its tile's colour and digit, the colour of a spot (through a head that is
thrown away), and the patch's own colours, so that frames of a clip stay as alike as they look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lab.training.forward import patch_features
from tokenreduce.errors import TokenReduceError
from tokenreduce.testbed.embedded import GRID
from tokenreduce.testbed.glyphs import COLOURS, DIGITS
from tokenreduce.testbed.needle import Example, NeedleSpec, NeedleTask, Placement

BATCH, RATE = 24, 2e-3
_LOGIT_SCALE = 20.0
_POINTERS = {1: 4, 2: 2, 3: 1}

Report = Callable[[dict[str, float]], None]


class PatchHeads(nn.Module):
    """What a projected patch is asked for. colour and digit are read with the model's own token embeddings."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        table = model.get_input_embeddings().weight.detach()
        self.register_buffer("colours", table[tokenizer.convert_tokens_to_ids(list(COLOURS))].clone())
        self.register_buffer("digits", table[tokenizer.convert_tokens_to_ids(list(DIGITS))].clone())
        self.nothing = nn.Parameter(torch.zeros(2, table.shape[1]))
        self.spot = nn.Linear(table.shape[1], len(COLOURS) + 1, bias=False)
        self.pixels = nn.Linear(table.shape[1], 12)

    def forward(self, patches: Tensor) -> tuple[list[Tensor], Tensor]:
        """(n, P, D) patches to logits (n, P, classes) of colour, digit and spot, and the 2×2 mean colours (n, P, 12)."""
        tables: list[Tensor] = [
            torch.cat([self.get_buffer("colours"), self.nothing[:1]]),
            torch.cat([self.get_buffer("digits"), self.nothing[1:]]),
        ]
        return [*(patches @ table.T * _LOGIT_SCALE for table in tables), self.spot(patches)], self.pixels(patches)


def patch_labels(example: Example, spec: NeedleSpec) -> NDArray[np.int64]:
    """(3, F, grid, grid): index of the tile's colour, of its digit, of its spot's colour; the number of classes for none."""
    labels = np.empty((3, len(example.frames), spec.grid, spec.grid), dtype=np.int64)
    labels[0], labels[1], labels[2] = len(COLOURS), len(DIGITS), len(COLOURS)
    colours = list(COLOURS)
    for tile in example.needles:
        cells = (tile.frame, slice(tile.row, tile.row + spec.size), slice(tile.column, tile.column + spec.size))
        labels[(0, *cells)] = colours.index(tile.colour)
        if tile.content in DIGITS:
            labels[(1, *cells)] = int(tile.content)
        else:
            labels[(2, *cells)] = colours.index(tile.content)
    return labels


def mean_colours(frames: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 to (n, patches, 12): mean RGB, in −1 … 1, of the quarters of each patch."""
    scaled: Tensor = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    quarters: Tensor = F.adaptive_avg_pool2d(scaled, 2 * GRID).unflatten(3, (GRID, 2)).unflatten(2, (GRID, 2))
    return quarters.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def train_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int, report: Report
) -> None:
    """Train the vision tower and the projector of `model` for `steps` steps of 24 frames."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = PatchHeads(model, tokenizer)
    modules = (model.model.vision_tower, model.model.multi_modal_projector, heads)
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (frames, labels) in enumerate(_batches(steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        patches = patch_features(model, frames)
        logits, pixels = heads(patches)
        classes = sum(F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in zip(logits, labels, strict=True))
        likeness = F.mse_loss(pixels, mean_colours(frames))
        # The penalty keeps patches about as long as token embeddings; without it they grow to twenty times that.
        loss = classes + 0.5 * likeness + 0.003 * patches.pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            on_tile = labels[0] < len(COLOURS)
            right = [(x.argmax(-1) == y)[on_tile].float().mean().item() for x, y in zip(logits, labels, strict=True)]
            report({"step": step, "loss": loss.item(), "colour": right[0], "digit": right[1], "spot": right[2]})


def _batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames (24, H, W, 3) uint8 and labels (3, 24, patches) long."""
    for step in range(steps):
        made = [_frame(np.random.default_rng([seed, step, row]), seed, step * BATCH + row) for row in range(BATCH)]
        frames = np.concatenate([example.frames for example, _ in made])
        labels = np.concatenate([patch_labels(example, spec) for example, spec in made], axis=1)
        yield torch.from_numpy(frames), torch.from_numpy(labels).flatten(2)


def _frame(rng: np.random.Generator, seed: int, index: int) -> tuple[Example, NeedleSpec]:
    """One frame with up to eight tiles of one size."""
    size = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
    tiles = int(rng.integers(3, 5)) if size < 3 else int(rng.integers(1, 3))
    placement: Placement = "insert" if rng.random() < 0.15 else "edit"
    spec = NeedleSpec(
        frames=1, tiles=tiles, pointers=_POINTERS[size], size=size, placement=placement, clips="train", augment=True
    )
    try:
        return NeedleTask(spec).example(seed, index), spec
    except TokenReduceError:  # large tiles that did not fit side by side
        spec = replace(spec, tiles=1, pointers=1, size=min(size, 2))
        return NeedleTask(spec).example(seed, index), spec
