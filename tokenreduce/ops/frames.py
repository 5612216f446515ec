"""Frames of one video by slot, and which slots stand still."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.ops.choose import directions


def slot_table(frame: Tensor, slot: Tensor, inside: Tensor) -> Tensor:
    """(F, S) long: the place of each frame's token by slot, −1 for none, frames in order.

    frame, slot: (n,) long; inside: (n,) bool.

    Of several tokens of one frame and slot the last is taken.
    """
    place = inside.nonzero().squeeze(1)
    frames, row = frame[place].unique(return_inverse=True)
    slots, column = slot[place].unique(return_inverse=True)
    table = torch.full((len(frames), len(slots)), -1, device=frame.device)
    table[row, column] = place
    return table


def still_slots(x: Tensor, table: Tensor, threshold: float) -> Tensor:
    """(S,) bool: slots that all frames of table (W, S) have and whose mean cosine over pairs of frames is above `threshold`.

    x: (n, D). The sum over pairs is the square of the summed directions, so no pair is looked at. One frame: none is still.
    """
    window = len(table)
    if window < 2:
        return torch.zeros(table.shape[1], dtype=torch.bool, device=x.device)
    total = sum((directions(x[row.clamp(min=0)]) for row in table[1:]), directions(x[table[0].clamp(min=0)]))
    mean = (total.square().sum(-1) - window) / (window * (window - 1))
    return (mean > threshold) & (table >= 0).all(0)
