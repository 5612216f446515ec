"""The receipt of a run: what happened to every token, layer by layer and stage by stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenreduce.errors import TokenReduceError

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


@dataclass(repr=False)
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
    dense: str = ""
    """Why the call ran dense, "" where the stages were asked."""

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
        return self.head_flops_per_token * self.head_tokens * len(self.tokens)

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

    @property
    def reduced(self) -> bool:
        """Whether any token went, in the decoder or in the vision tower."""
        return any(stage.after < stage.before for stage in self.stages)

    @property
    def idle(self) -> list[str]:
        """Stages that were asked and left every token, and the sites at which others did without a word why, a line each."""
        found: dict[str, list[int]] = {}
        looks = sorted(self.stages, key=lambda look: (look.stage, look.row))
        for (number, row), group in groupby(looks, key=lambda look: (look.stage, look.row)):
            own = list(group)
            who = f"stage {number + 1}, {own[0].strategy}, did nothing"
            if all(look.after == look.before for look in own):
                note = f" ({own[-1].note})" if own[-1].note else ""
                found.setdefault(f"{who}: it left all {own[0].before} tokens it saw{note}", []).append(row)
                continue
            where = ", ".join(look.site for look in own if look.after == look.before and not look.note)
            if where:
                found.setdefault(f"{who} at {where}: it left all tokens it saw there", []).append(row)
        several = len(self.tokens) > 1
        return [
            f"{line}{' in row ' + ', '.join(map(str, rows)) if several and min(rows) >= 0 else ''}"
            for line, rows in found.items()
        ]

    def light(self) -> Trace:
        """The same without `kept` and `source`, which have an entry per token: a few kilobytes, none of them on a device."""
        return replace(self, tokens=self.tokens.cpu(), kept=[], source=self.source.new_empty(0).cpu())

    def rows(self) -> list[dict[str, Any]]:
        """A record per layer and row of the batch, for a data frame: counts of tokens, bytes of keys and values.

        flops: of the row's batch at that layer, None where they are not known.
        """
        return [
            {
                "pipeline": self.pipeline,
                "row": row,
                "layer": layer.layer,
                "tokens": int(layer.tokens[row]),
                "ffn_tokens": int(layer.ffn_tokens[row]),
                "input_tokens": int(self.tokens[row]),
                "flops": layer.flops,
                "kv_bytes": layer.kv_bytes,
            }
            for row in range(len(self.tokens))
            for layer in self.layers
        ]

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write `to_dict` as JSON. TokenReduceError if the file exists and `force` is False, or cannot be written."""
        path = Path(path)
        try:
            with path.open("w" if force else "x", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=2)
        except FileExistsError:
            raise TokenReduceError(f"{path} exists; give another path, or force=True to overwrite it") from None
        except OSError as error:
            raise TokenReduceError(f"{path} cannot be written: {error.strerror}") from None
        return path

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib Figure of the tokens that each layer holds, a line per row of the batch; saved to `path` if given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot()
        for row, total in enumerate(self.tokens.tolist()):
            held = [int(layer.tokens[row]) for layer in self.layers]
            name = f"row {row}" if len(self.tokens) > 1 else self.pipeline
            axes.step(range(len(held)), held, where="mid", label=f"{name}: {total} tokens of input")
        axes.set(xlabel="layer", ylabel="tokens held", ylim=(0, None), title=f"{self.pipeline}, budget {self.budget}")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

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
            "idle": self.idle,
            "dense": self.dense,
            "kept": [row.tolist() for row in self.kept],
            "source": self.source.tolist(),
        }

    @property
    def _headline(self) -> str:
        share = self.relative_flops
        flops = "FLOPs not known" if share is None else f"{share:.4f} of the FLOPs ({self.flops:.4g})"
        what = f"dense ({self.dense}): " if self.dense else ""
        return (
            f"pipeline {self.pipeline}, budget {self.budget}: {what}"
            f"{', '.join(f'{share:.4f}' for share in self.relative_tokens)} of the tokens, "
            f"{flops}, KV cache {self.kv_bytes / 2**20:.2f} MiB"
        )

    def _remarks(self) -> Iterator[str]:
        yield from self.skipped
        yield from self.idle
        if self.uncounted:
            yield f"no FLOPs: {self.uncounted}"

    def _levels(self) -> Iterator[tuple[int, list[int]]]:
        """(layer, tokens per row), where that differs from the layer before."""
        last: list[int] | None = None
        for layer in self.layers:
            tokens = layer.tokens.tolist()
            if tokens != last:
                yield layer.layer, tokens
                last = tokens

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._headline}>"

    def __str__(self) -> str:
        rows = [self._headline]
        for stage in self.stages:
            where = "tower" if stage.row < 0 else f"row {stage.row}"
            rows.append(
                f"  {stage.site:<24} {where}  {stage.strategy:<18} {stage.before:>7} → {stage.after:<7}"
                f" {stage.merged} merged, {stage.dropped} dropped{'  (' + stage.note + ')' if stage.note else ''}"
            )
        rows += [f"  {line}" for line in self._remarks()]
        rows += [f"  from layer {layer}: {' '.join(map(str, tokens))} tokens" for layer, tokens in self._levels()]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        stages = [
            (
                s.site,
                "tower" if s.row < 0 else s.row,
                s.strategy,
                f"{s.before} → {s.after}",
                s.merged,
                s.dropped,
                s.note,
            )
            for s in self.stages
        ]
        levels = [(layer, " ".join(map(str, tokens))) for layer, tokens in self._levels()]
        return "".join(
            [
                f"<p>{escape(self._headline)}</p>",
                html_table(["site", "row", "stage", "tokens", "merged", "dropped", "note"], stages) if stages else "",
                html_table(["from layer", "tokens held"], levels),
                *(f"<p>{escape(line)}</p>" for line in self._remarks()),
            ]
        )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a notebook; every cell is text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
