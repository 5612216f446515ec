"""What a stage reads of the attention that ran last: how much each token received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import TokenLayer, lengthened
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.engine.model.parallel import over_ranks
from tokenreduce.engine.model.tap import UNREADABLE, RowSums
from tokenreduce.errors import UnsupportedError
from tokenreduce.ops.attention import attention_rows, importance
from tokenreduce.planning.cost import importance_flops
from tokenreduce.planning.schedule import StageRun
from tokenreduce.strategy import Heads, Queries, Rows, Site, SiteKind


@dataclass
class AttentionRecord:
    """What went into the attention of one layer."""

    layer: int
    """Counted from 0."""
    query: Tensor
    """(B, H, q, d), rotated."""
    key: Tensor
    """(B, G, k, d), rotated, those of earlier turns included."""
    scale: float
    """Of the products."""
    rows: RowSums
    """Log-sum-exp of the rows, where attention has computed it."""
    value: Tensor | None = None
    """(B, G, k, d), where a stage reads it; else None."""
    held: Tensor | None = None
    """(B, k) bool, which keys are no padding, where a stage has changed what the cache holds since."""
    attended: dict[int, Tensor] | None = None
    """Of each row, (n,) long places of the tokens, where it is attention that a layer is yet to compute."""

    @classmethod
    def of(
        cls, layer: int, query: Tensor, key: Tensor, kwargs: Mapping[str, Any], value: Tensor | None = None
    ) -> AttentionRecord:
        """UnsupportedError where attention is not a softmax of scaled products alone."""
        refused = [name for name in UNREADABLE if kwargs.get(name) is not None]
        if refused:
            raise UnsupportedError(f"importance is not defined here for attention with {', '.join(refused)}")
        scale = kwargs.get("scaling")
        return cls(layer, query, key, query.shape[-1] ** -0.5 if scale is None else float(scale), RowSums(), value)

    def importance(
        self,
        batch: Batch,
        cache: TokenLayer | None,
        sequence: TokenSequence,
        queries: Queries | Tensor,
        heads: Heads | Literal["each"],
        rows: Rows,
        all_heads: int,
        group: Any,
    ) -> Tensor:
        """(…, n) attention that the tokens of `sequence`, a row of `batch`, receive. Accounts for its FLOPs.

        cache: the cache layer of `layer`, if there is one. all_heads: heads of the layer, those of other ranks too (`group`).
        """
        attended = self._attended(sequence)
        n = len(attended)
        places = batch.columns_of(n, self.query.shape[2])
        q = self.query[sequence.row, :, places]
        k = self._of_row(self.key, batch, cache, sequence)
        if isinstance(queries, Tensor):
            count = len(queries)
            chosen = queries if len(sequence) == n else torch.searchsorted(attended, sequence.alive[queries])
        else:
            count = n if queries == "all" else 1 if queries == "last" else min(int(queries), n)
            chosen = torch.arange(n - count, n, device=q.device)
        if isinstance(queries, Tensor) or heads == "each" or rows != "sum":
            scores = attention_rows(q, k, self.scale, chosen.to(q.device), heads, rows)
        else:
            lse = self.rows.lse(self.query, sequence.row, places)
            scores = importance(q, k, self.scale, count, heads, lse)
        scores = scores[..., k.shape[1] - n :]
        if all_heads != q.shape[0]:
            if heads == "each":
                raise UnsupportedError("attention of each head is not on one rank under tensor parallelism")
            scores = over_ranks(scores, heads, q.shape[0] / all_heads, group)
        # Like the attention itself, accounted without the keys of earlier turns; chosen rows as if they were the last.
        sequence.conductor.account.selector_flops += importance_flops(all_heads, q.shape[-1], n, n, count)
        if len(sequence) != n:
            alive = torch.searchsorted(attended, sequence.alive)
            scores = scores.to(sequence.alive.device)[..., alive]
        return scores

    def _attended(self, sequence: TokenSequence) -> Tensor:
        return sequence.attended if self.attended is None else self.attended[sequence.row]

    def _of_row(self, x: Tensor, batch: Batch, cache: TokenLayer | None, sequence: TokenSequence) -> Tensor:
        """(G, k, d): keys or values of a row, those of earlier turns first, without padding and draft."""
        mine = x[sequence.row]
        if self.held is not None:
            mine = mine[:, self.held[sequence.row]]
        elif cache is None or self._alone(cache):  # Nothing before these tokens but padding.
            mine = mine[:, batch.columns_of(len(self._attended(sequence)), mine.shape[1]).start :]
        else:
            real = cache.not_padding if cache.seen is None else cache.seen.valid
            if real is not None:
                mine = mine[:, lengthened(real, mine.shape[1])[sequence.row]]
        return mine[:, : mine.shape[1] - batch.draft]

    def _alone(self, cache: TokenLayer) -> bool:
        reduced = cache.seen is not None and cache.seen.borders is not None
        return self.key.shape[2] == self.query.shape[2] and not reduced

    def keys_and_values(self, batch: Batch, cache: TokenLayer | None, sequence: TokenSequence) -> tuple[Tensor, Tensor]:
        """(G, n, d) each, of the tokens alive."""
        assert self.value is not None
        attended = self._attended(sequence)
        n, alive = len(attended), torch.searchsorted(attended, sequence.alive)
        sides = []
        for side in (self.key, self.value):
            mine = self._of_row(side, batch, cache, sequence)[:, -n:]
            sides.append(mine if len(sequence) == n else mine[:, alive.to(mine.device)])
        return sides[0], sides[1]


def reading_sites(run: StageRun) -> list[Site]:
    """Sites at which a stage reads attention that a layer has computed."""
    kinds: tuple[SiteKind, ...] = ("pre_ffn", "pre_attention", "cache")
    own = run.strategy.capabilities.own_attention
    return [
        site
        for site in run.sites
        if run.strategy.reads(site) and site.kind in kinds and not (own and site.kind == "pre_attention")
    ]
