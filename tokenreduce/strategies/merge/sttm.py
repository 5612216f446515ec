"""STTM: even areas of a frame become one token each, and tokens of the same area are united from frame to frame.

Paper: Hyun et al., Multi-Granular Spatio-Temporal Token Merging (ICCV 2025), §3. Thresholds of its scripts at half of the tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.ops.choose import directions
from tokenreduce.ops.quadtree import nodes, pyramid, united
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Layer, Outcome, StageConfig, StageContext, Strategy


class Sttm(Strategy):
    """A quadtree per frame: a node stays whole if it resembles all its children. Then nodes of successive frames, one of which
    contains the other, are united where their cosine reaches `temporal`; the new token is the mean of the nodes.

    `released: true` also compares border nodes of odd grids with the frame's first token, as the public code does. Positions are
    those of the first top-left token; its scripts number LLaVA's anew (`positions: contiguous`).
    """

    name = "sttm"
    capabilities = Capabilities(sites=("pre_attention",), merges=True, content_dependent=True, needs=("grid",))

    class Config(StageConfig):
        """Fields of an sttm stage."""

        strategy: Literal["sttm"] = "sttm"
        at: Layer = Field(2, description="Layer before which the stage acts.")
        spatial: float = Field(0.85, ge=-1, le=1, description="Cosine to all children from which a node stays whole.")
        temporal: float | None = Field(
            0.65, ge=-1, le=1, description="Cosine from which nodes are united; null: none are."
        )
        root: int = Field(1, ge=0, description="Level at which the trees begin, 0 is the coarsest.")
        weighted: bool = Field(False, description="Nodes count by their tokens in a union, instead of alike.")
        released: bool = Field(False, description="Compare border nodes of odd grids with the first token too.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        exact = torch.promote_types(ctx.hidden.dtype, torch.float32)
        target = torch.arange(ctx.n, device=ctx.hidden.device)
        weights = torch.ones(ctx.n, device=target.device, dtype=exact)
        inside = ctx.reducible & (ctx.row >= 0)
        media = ctx.groups(torch.where(inside, ctx.medium, -1))
        for medium in range(len(media)):
            own = media.mask(medium).nonzero().squeeze(1)
            frame = ctx.frame[own].unique(return_inverse=True)[1]
            shape = [int(axis.max()) + 1 for axis in (frame, ctx.row[own], ctx.column[own])]
            place = torch.full(shape, -1, device=target.device)
            place[frame, ctx.row[own], ctx.column[own]] = own
            here = place >= 0
            x = torch.where(here[..., None], ctx.hidden[place.clamp(min=0)].to(exact), 0)
            node, share = self._nodes(x, here)
            # The first token of a node, and of a union, is its top-left one.
            flat, token = here.flatten(), place.flatten()
            head = torch.full((int(node.max()) + 1,), ctx.n, device=target.device)
            head.scatter_reduce_(0, node.flatten()[flat], token[flat], "amin")
            target[token[flat]] = head[node.flatten()[flat]]
            weights[token[flat]] = share.flatten()[flat]
        return ctx.merge(target, weights=weights)

    def _nodes(self, x: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H, W): the node that each token ends in, numbered by frame and place, and what it counts there."""
        config = self.config
        levels = pyramid(x, here)
        level = nodes(levels, config.root, config.spatial, config.released)
        frames = len(here)
        share, corner = torch.zeros_like(levels[0].weight), torch.zeros_like(level)
        value = x.clone()
        numbers = torch.arange(here.numel(), device=x.device).view(here.shape)
        for number, one in enumerate(levels):
            at = level == number
            # A node's corner: the lowest place of the full grid under it.
            key = (torch.arange(frames, device=x.device)[:, None, None] * len(one.here[0]) + one.row[:, None]) * len(
                one.here[0, 0]
            ) + one.column
            low = numbers.new_full((one.here.numel(),), here.numel()).scatter_reduce_(
                0, key.flatten(), numbers.flatten(), "amin"
            )
            corner = torch.where(at, low[key], corner)
            share = torch.where(at, one.weight, share)
            value = torch.where(at[..., None], one.value[:, one.row][:, :, one.column], value)
        heads, node = corner.unique(return_inverse=True)
        patches = torch.bincount(node[here], minlength=len(heads)).to(x.dtype)
        if config.temporal is not None and frames > 1:
            u = directions(value.flatten(0, 2)[heads])
            pairs = torch.stack([node[:-1], node[1:]]).flatten(1)[:, (here[:-1] & here[1:]).flatten()].unique(dim=1)
            pairs = pairs[:, (u[pairs[0]] * u[pairs[1]]).sum(-1) >= config.temporal]
            union = united(pairs[0], pairs[1], len(heads))
            filled = (patches > 0).to(x.dtype)
            each = patches if config.weighted else filled
            total = torch.zeros_like(patches).index_add_(0, union, each)
            share = share * (each / total[union].clamp(min=1))[node]
            node = union[node]
        return node, share

    def forecast(self, view: CountView) -> Outcome:
        """Each token that resembles its predecessor is taken to be united with it, areas to stay apart."""
        gone = int(view.similar * view.reducible_count * (1 - 1 / max(view.frames, 1)))
        return Outcome(view.reducible_count - gone, assumed=f"{view.similar:.0%} of the tokens are similar")
