"""The receipt of a run: what happened to every token, layer by layer and stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

VERSION = 1
"""Of `Trace.to_dict`: it goes up when a field of it goes or changes its meaning, not when one is added."""


@dataclass(frozen=True)
class StageTrace:
    """One look of one stage at one sequence, or of a stage in the vision tower at all frames of one call of it.

    stage: its place in the pipeline. layer: of the decoder, or block of the tower (−1: before it). row: of the batch; −1 in the
    tower, which knows no rows. before, after: tokens alive; in the tower those of all its frames, at `vision.input` frames.
    merged, dropped: where the others went. note: why, in the strategy's words. finished: whether the stage is done with this
    sequence.
    """

    stage: int
    strategy: str
    site: str
    layer: int
    row: int
    before: int
    after: int
    merged: int
    dropped: int
    finished: bool
    note: str = ""


@dataclass(frozen=True)
class LayerTrace:
    """One layer of the prefill.

    tokens: (B,) long, tokens that its KV cache holds after the prefill (what its attention saw; earlier turns not counted).
    ffn_tokens: (B,) long, tokens that went through its FFN. flops: of the batch, unpadded; see Trace. kv_bytes: of `tokens`.
    """

    layer: int
    tokens: Tensor
    ffn_tokens: Tensor
    flops: int | None
    kv_bytes: int


@dataclass
class Trace:
    """What one prefill did.

    kept: B LongTensors, the input columns alive after the last layer. source: (B, N) long, the column each token ended in,
    −1 if it was dropped or is padding. tokens: (B,) long, tokens per row of the input. head_tokens: positions the LM head
    computed, per row. selector_flops: spent on importance. All FLOPs are what torch's FlopCounterMode counts on eager
    attention: 2 per multiply-add, full squares; None where the decoder costs other than its config says: see `uncounted`.
    """

    pipeline: str
    budget: str
    tokens: Tensor
    kept: list[Tensor]
    source: Tensor
    layers: list[LayerTrace]
    stages: list[StageTrace]
    dense_flops: int | None
    selector_flops: int | None
    head_flops_per_token: int
    head_tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    uncounted: str = ""

    def without_flops(self, reason: str) -> Trace:
        """The same without FLOPs."""
        layers = [replace(layer, flops=None) for layer in self.layers]
        return replace(self, layers=layers, dense_flops=None, selector_flops=None, uncounted=reason)

    @property
    def flops(self) -> int | None:
        """FLOPs of the decoder's prefill, importance and LM head included."""
        if self.selector_flops is None:
            return None
        return sum(layer.flops or 0 for layer in self.layers) + self.selector_flops + self._head

    @property
    def _head(self) -> int:
        return self.head_flops_per_token * self.head_tokens * len(self.kept)

    @property
    def relative_flops(self) -> float | None:
        """`flops` over those of the dense prefill with the same LM head."""
        if self.flops is None or self.dense_flops is None:
            return None
        return self.flops / (self.dense_flops + self._head)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values after the prefill, padding not counted."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def relative_tokens(self) -> list[float]:
        """C, per row: mean over layers of the tokens held, divided by the input length (FrameFusion §5.1)."""
        held = sum(layer.tokens for layer in self.layers)
        return [int(h) / (len(self.layers) * int(n)) for h, n in zip(held, self.tokens, strict=True)]  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "version": VERSION,
            "pipeline": self.pipeline,
            "budget": self.budget,
            "tokens": self.tokens.tolist(),
            "relative_tokens": self.relative_tokens,
            "flops": self.flops,
            "relative_flops": self.relative_flops,
            "selector_flops": self.selector_flops,
            "uncounted": self.uncounted,
            "kv_bytes": self.kv_bytes,
            "layers": [
                {
                    "layer": layer.layer,
                    "tokens": layer.tokens.tolist(),
                    "ffn_tokens": layer.ffn_tokens.tolist(),
                    "flops": layer.flops,
                    "kv_bytes": layer.kv_bytes,
                }
                for layer in self.layers
            ],
            "stages": [vars(stage) for stage in self.stages],
            "skipped": self.skipped,
            "kept": [row.tolist() for row in self.kept],
            "source": self.source.tolist(),
        }

    def __str__(self) -> str:
        share = self.relative_flops
        flops = "FLOPs not known" if share is None else f"{share:.4f} of the FLOPs ({self.flops:.4g})"
        rows = [
            f"pipeline {self.pipeline}, budget {self.budget}: "
            f"{', '.join(f'{share:.4f}' for share in self.relative_tokens)} of the tokens, "
            f"{flops}, KV cache {self.kv_bytes / 2**20:.2f} MiB"
        ]
        for stage in self.stages:
            where = "tower" if stage.row < 0 else f"row {stage.row}"
            rows.append(
                f"  {stage.site:<24} {where}  {stage.strategy:<18} {stage.before:>7} → {stage.after:<7}"
                f" {stage.merged} merged, {stage.dropped} dropped{'  (' + stage.note + ')' if stage.note else ''}"
            )
        rows += [f"  {line}" for line in self.skipped]
        if self.uncounted:
            rows.append(f"  no FLOPs: {self.uncounted}")
        last: list[int] | None = None
        for layer in self.layers:
            tokens = layer.tokens.tolist()
            if tokens != last:
                rows.append(f"  from layer {layer.layer}: {' '.join(map(str, tokens))} tokens")
                last = tokens
        return "\n".join(rows)
