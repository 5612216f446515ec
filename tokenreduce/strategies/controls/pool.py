"""Control: of each s × s tokens of a frame one is left. What a method must beat that looks at content.

Named by VTC-Bench (2026) and by the page of V-CAST (2026), where one at random of 2 × 2 scores above their mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategy import Capabilities, CountView, Layer, Outcome, StageConfig, StageContext, Strategy


class Pool(Strategy):
    """Each frame's grid in cells of `stride` × `stride`; of each cell the mean, the first or a random token is left.

    Rows and columns beyond the last whole cell are dropped, as average pooling has it. `bilinear` resizes the grid instead, to
    ⌈side / stride⌉, as LLaVA's faster stream does. Tokens in no grid, such as newlines, stay.
    """

    name = "pool"
    capabilities = Capabilities(sites=("pre_attention",), merges=True, content_dependent=True, needs=("grid",))

    class Config(StageConfig):
        """Fields of a pool stage."""

        strategy: Literal["pool"] = "pool"
        at: Layer = Field(0, description="Layer before which the stage acts.")
        stride: int = Field(2, ge=1, description="Side of a cell in tokens.")
        keep_of_cell: Literal["mean", "first", "random", "bilinear"] = Field(
            "mean", description="What is left of a cell."
        )
        seed: int = Field(0, ge=0, description="Seed of `random`.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        stride, kind = self.config.stride, self.config.keep_of_cell
        frames = ctx.groups("frame")
        inside = ctx.reducible & (ctx.row >= 0)
        index = torch.where(inside, frames.index, -1)
        rows, columns = (_sides(axis, index, len(frames)) for axis in (ctx.row, ctx.column))
        if kind == "bilinear":
            return self._resized(ctx, index, rows.tolist(), columns.tolist())
        whole = inside & (ctx.row < frames.spread(rows) // stride * stride)
        whole &= ctx.column < frames.spread(columns) // stride * stride
        width = ctx.column.max() // stride + 1
        height = ctx.row.max() // stride + 1
        key = (index * height + ctx.row // stride) * width + ctx.column // stride
        cells = ctx.groups(torch.where(whole, key, -1))
        stays = ~inside
        if kind == "random":
            return _only(ctx, cells.index, ctx.random(self.config.seed), len(cells), stays)
        place = torch.arange(ctx.n, device=index.device)
        first = cells.first(place) if len(cells) else place[:0]
        if kind == "first" or not len(cells):
            stays[first] = True
            return ctx.keep(stays)
        target = torch.where(cells.index >= 0, first[cells.index.clamp(min=0)], -1)
        return ctx.merge(torch.where(stays, place, target), "plain")

    def _resized(self, ctx: StageContext, index: torch.Tensor, rows: list[int], columns: list[int]) -> Reduction:
        place, stride = torch.arange(ctx.n, device=index.device), self.config.stride
        stays, into, source, weight = index < 0, [], [], []
        for frame, (height, width) in enumerate(zip(rows, columns, strict=True)):
            if not height:
                continue
            own = (index == frame).nonzero().squeeze(1)
            grid = torch.full((height, width), -1, device=index.device)
            grid[ctx.row[own], ctx.column[own]] = own
            flat = grid.flatten()
            down, right = (_linear(side, -(-side // stride)).to(index.device) for side in (height, width))
            shares = torch.einsum("ih,jw->ijhw", down, right).flatten(2).flatten(0, 1)
            shares = shares * (flat >= 0)
            anchor = flat[shares.argmax(1)]
            cell, patch = (shares > 0).nonzero(as_tuple=True)
            stays[anchor] = True
            into.append(anchor[cell])
            source.append(flat[patch])
            weight.append(shares[cell, patch])
        target = torch.where(stays, place, -1)
        if not into:
            return ctx.merge(target, "plain")
        return ctx.merge(target, mixture=Mixture(torch.cat(into), torch.cat(source), torch.cat(weight)))

    def forecast(self, view: CountView) -> Outcome:
        """As if every side were a multiple of the stride."""
        count = max(view.reducible_count // self.config.stride**2, 1)
        return Outcome(count, assumed=f"grids with sides that are multiples of {self.config.stride}")


def _sides(axis: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """(g,) long: rows or columns of each frame's grid."""
    inside = index >= 0
    return axis.new_zeros(count).scatter_reduce_(0, index[inside], axis[inside] + 1, "amax")


def _linear(side: int, wanted: int) -> torch.Tensor:
    """(wanted, side) float64: weights of a linear resize without corners aligned."""
    eye = torch.eye(side, dtype=torch.float64)[None]
    return nn.functional.interpolate(eye, size=wanted, mode="linear", align_corners=False)[0].T


def _only(ctx: StageContext, cell: torch.Tensor, scores: torch.Tensor, count: int, stays: torch.Tensor) -> Reduction:
    """Of each cell the token of highest score."""
    best = scores.new_full((count,), -torch.inf).scatter_reduce_(0, cell.clamp(min=0), _inside(scores, cell), "amax")
    return ctx.keep(stays | ((cell >= 0) & (scores == best[cell.clamp(min=0)])))


def _inside(scores: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    return torch.where(cell >= 0, scores, -torch.inf)
