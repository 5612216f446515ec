"""What a stream has been fed and what it has done: the order of its frames, FLOPs of its pieces, and its receipt."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import TokenLayer
from tokenreduce.errors import LayoutError
from tokenreduce.layout import TokenLayout
from tokenreduce.ops.carry import Carry
from tokenreduce.planning import cost
from tokenreduce.planning.account import SPAN_BLOCK, Account
from tokenreduce.planning.schedule import forecast
from tokenreduce.plugin_checks import sites_of
from tokenreduce.strategy import Site, Strategy
from tokenreduce.trace import LayerTrace, StageTrace, Trace


class Ledger:
    """A stream's account."""

    medium: int
    """Of the last vision token; −1 before the first."""
    frame: int
    """Of the last vision token; −1 before the first."""
    vision: int
    """Vision tokens so far."""
    reducible: int
    """Those of them that may go."""

    def __init__(self, shape: cost.DecoderShape) -> None:
        self.shape = shape
        self.medium = self.frame = -1
        self.vision = self.reducible = 0
        self._source: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._flops = [0] * shape.layers
        self._before: list[int] = []

    def check(self, layout: TokenLayout) -> None:
        """LayoutError where media or frames go back: a run that has been closed cannot be opened again."""
        vision = layout.vision[0]
        medium, frame = layout.media()[0][vision].cpu(), layout.frame[0][vision].cpu()
        medium = torch.cat([torch.tensor([self.medium]), medium])
        frame = torch.cat([torch.tensor([self.frame]), frame])
        back = (medium[1:] < medium[:-1]) | ((medium[1:] == medium[:-1]) & (frame[1:] < frame[:-1]))
        if bool(back.any()):
            at = int(back.nonzero()[0])
            raise LayoutError(
                f"frame {int(frame[at + 1])} of medium {int(medium[at + 1])} comes after frame {int(frame[at])} of medium "
                f"{int(medium[at])}: a stream numbers both on over all its chunks (TokenLayout.video(first_frame=...))"
            )

    def note_chunk(self, layout: TokenLayout, reducible: Tensor, source: Tensor) -> None:
        """Take note of a chunk. reducible: (n,) bool. source: (n,) long, the position that each of its tokens ended in."""
        vision = layout.vision[0].nonzero().squeeze(1)
        if len(vision):
            self.medium, self.frame = (int(facts[0, vision[-1]]) for facts in (layout.media(), layout.frame))
        self.vision += len(vision)
        self.reducible += int(reducible.sum())
        self._source.append(source)

    def next_frames(self, frames: int, per_frame: int, marker: Tensor | None, new: bool) -> TokenLayout:
        """The layout of the next whole frames; see Stream.feed_frames."""
        first = 0 if new else self.frame + 1
        layout = TokenLayout.video(before=0, frames=frames, per_frame=per_frame, after=0, first_frame=first)
        medium = torch.full_like(layout.slot, max(self.medium, 0) + (new and self.medium >= 0))
        if marker is not None and marker.shape != (per_frame,):
            raise LayoutError(f"marker is for {tuple(marker.shape)} tokens, a frame has {per_frame}")
        return TokenLayout(layout.slot, layout.frame, medium, None if marker is None else marker.repeat(frames)[None])

    # Pieces -----------------------------------------------------------------------------------------------------------

    def before(self, layers: list[TokenLayer]) -> None:
        """Before a piece: what the cache holds."""
        self._before = [layer.held for layer in layers]

    def after(self, layers: list[TokenLayer], position: Tensor) -> None:
        """After a piece, whose tokens stand at `position` (m,)."""
        m = len(position)
        for number, (layer, held) in enumerate(zip(layers, self._before, strict=True)):
            pairs = m * (held + m)
            if layer.position is not None:
                sinks, window = (0, None) if layer.span is None else layer.limit
                pairs = pairs_seen(held + m, m, sinks, window)
            self._flops[number] += cost.layer_flops(self.shape, m, m, pairs=pairs)
        self._kept.append(position)

    def receipt(
        self,
        pipeline: str,
        strategies: Many[Strategy],
        merging: Strategy | None,
        carry: Carry,
        cache_bytes: int,
        head: int,
    ) -> Trace:
        """The trace of the whole stream. merging: the one of `strategies` that the carry stands for. head: see `receipt`."""
        kept, n, depth = torch.cat(self._kept), carry.seen, self.shape.layers
        left = len(kept)
        account = Account(None, self.shape, left, max(self.reducible - (n - left), 0), cache_bytes)
        forecast([strategy for strategy in strategies if strategy is not merging], account)
        stages = []
        for number, strategy in enumerate(strategies):
            sites = sites_of(strategy, depth)
            for site in sites:
                note, before, after, merged = "", left, account.kv[site.layer], 0
                if strategy is merging:
                    note = f"{carry.similar / max(carry.candidates, 1):.1%} similar"
                    before, after, merged = n, left, n - left
                dropped, finished = before - after - merged, site == sites[-1]
                stages.append(
                    StageTrace(
                        number, strategy.name, str(site), site.layer, 0, before, after, merged, dropped, finished, note
                    )
                )
        return Trace(
            pipeline=pipeline,
            budget="none",
            tokens=torch.tensor([n]),
            kept=[kept],
            source=torch.cat(self._source)[None],
            layers=[
                LayerTrace(
                    layer=layer,
                    tokens=torch.tensor([account.kv[layer]]),
                    ffn_tokens=torch.tensor([left]),
                    flops=self._flops[layer],
                    kv_bytes=cost.kv_bytes(self.shape, [account.kv[layer]], cache_bytes),
                )
                for layer in range(depth)
            ],
            stages=sorted(
                stages, key=lambda stage: (stage.layer, stage.site != str(Site(stage.layer, "pre_attention")))
            ),
            dense_flops=cost.prefill_flops(self.shape, [n] * depth, [n] * depth, 0),
            selector_flops=0,
            head_flops_per_token=head,
        )


def pairs_seen(held: int, count: int, sinks: int, window: int | None) -> int:
    """(query, key) pairs of `attend_by_position`, where the last `count` of `held` tokens in the cache are the queries."""
    pairs = 0
    for start in range(0, count, SPAN_BLOCK):
        stop = min(start + SPAN_BLOCK, count)
        begin = 0 if window is None else max(0, held - count + start - window + 1)
        pairs += (stop - start) * (held - count + stop - begin + min(begin, sinks))
    return pairs
