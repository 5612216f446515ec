"""The tokens of one forward that are alive, as the left-padded batch that the layers see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import Joined
from tokenreduce.engine.forward.sequence import TokenSequence


class Batch:
    """Where every token of a forward stands: m columns in each of B rows, padding in front, the draft at the end.

    Args:
        sequences: one per row; empty in a forward without vision tokens (a later turn on a reduced cache).
        width: tokens that came in, padding and draft included.
        valid: (B, width) bool, False on padding; None if no token is padding.
        draft: last tokens of the input that assisted decoding only guesses and may take back.
    """

    sequences: list[TokenSequence]
    """One per row; empty in a forward without vision tokens."""
    width: int
    """Tokens that came in, padding and draft included."""
    draft: int
    """Last tokens, which assisted decoding only guesses: the stages do not know of them."""
    valid: Tensor | None
    """(B, m) bool, False on padding; None if no token is padding."""
    index: Tensor | None
    """(B, m) long, input column of each token that is alive, 0 on padding; None as long as no token has gone."""
    known: Joined
    """What layers with the same tokens share; see cache.layers.shared."""

    def __init__(self, sequences: list[TokenSequence], width: int, valid: Tensor | None, draft: int) -> None:
        self.sequences, self.width, self.valid, self.draft = sequences, width, valid, draft
        self.index = None
        self.known = {}
        self._tables: tuple[Tensor, ...] | None = None
        self._gathered: tuple[Tensor, ...] | None = None

    def move(self, device: torch.device) -> None:
        """Take what is known of the tokens to `device`."""
        for sequence in self.sequences:
            sequence.move(device)
        self.index = None if self.index is None else self.index.to(device)
        self.valid = None if self.valid is None else self.valid.to(device)

    def columns_of(self, count: int, width: int) -> slice:
        """Columns of a row's `count` tokens where the batch has `width`: after the padding, before the draft."""
        return slice(width - self.draft - count, width - self.draft)

    def pack(self, rows: list[Tensor], x: Tensor) -> Tensor:
        """The states that are left of each row (n, D), and the draft of x (B, m, D), as one left-padded batch."""
        if self.draft:
            rows = [torch.cat([row, x[s.row, -self.draft :]]) for row, s in zip(rows, self.sequences, strict=True)]
        self._gathered = None
        draft = torch.arange(self.width - self.draft, self.width, device=rows[0].device)
        columns = [torch.cat([s.columns[s.alive], draft]) for s in self.sequences]
        if len(rows) == 1:
            self.index, self.valid = columns[0][None], None
            return rows[0][None]
        longest = max(len(row) for row in rows)
        zeros = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
        index = torch.zeros(len(rows), longest, dtype=torch.long, device=zeros.device)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool, device=zeros.device)
        parts = []
        for number, row in enumerate(rows):
            index[number, longest - len(row) :] = columns[number]
            valid[number, longest - len(row) :] = True
            parts.append(torch.cat([zeros[number, : longest - len(row)], row]))
        self.index = index
        self.valid = None if all(len(row) == longest for row in rows) else valid
        return torch.stack(parts)

    def rotate(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables (1 or B, N, d) at the original positions of the tokens that are alive."""
        if self.index is None:
            return tables
        if self._tables is not tables or self._gathered is None:
            self._tables = tables
            self._gathered = gather_tables(tables, self.index)
        return self._gathered

    def positions(self, places: Tensor, implementation: str) -> Tensor | None:
        """Position ids (1 or B, N) of the tokens that are alive, for attention that scales its queries by them.

        None where flash attention would take their gaps for packed sequences."""
        if self.index is None:
            return places
        if places.dim() != 2 or implementation not in ("sdpa", "eager"):
            return None
        return gather_table(places[..., None], self.index)[..., 0]


def gather_tables(tables: Any, index: Tensor) -> Any:
    """Rows `index` of the rotary tables: cosine and sine, or one of complex numbers."""
    return gather_table(tables, index) if isinstance(tables, Tensor) else tuple(gather_table(t, index) for t in tables)


def gather_table(table: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, m) of a rotary table (1 or B, N, d)."""
    places = index.to(table.device)
    if len(places) == 1 and table.shape[0] == 1:
        return table.index_select(1, places[0])
    table = table.expand(len(places), -1, -1)
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))
