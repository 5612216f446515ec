"""What each token of an input is: vision or text, and where in which frame. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from tokenreduce.errors import LayoutError

PLAIN, NEWLINE, WRAPPER, TIMESTAMP = 0, 1, 2, 3
"""Values of `TokenLayout.marker`: patch or text, learned separator embedding, special token around a frame, time text."""

VISION, SYSTEM, BEFORE, AROUND, QUESTION, TAIL = range(6)
"""Values of a role, see `roles`."""

MarkerPolicy = Literal["merge", "protect"]


@dataclass(frozen=True)
class TokenLayout:
    """Per token facts of a batch, each tensor (B, N) long; −1 where a token is not vision.

    Args:
        slot: place of the token inside its frame. Tokens that show the same spot of successive frames share a slot.
        frame: index of the frame in its medium, counted in time order.
        medium: which video or image the token belongs to; by default all vision tokens belong to medium 0.
        marker: PLAIN, NEWLINE, WRAPPER or TIMESTAMP (see above). A marker with a slot may be reduced like a patch if the
            pipeline says so (`newlines: merge`, `wrappers: merge`); one without a slot is text.
        protected: (B, N) bool, vision tokens that no stage may touch.
        row, column: place of the token in the grid of its frame, both or neither. −1 for tokens in no grid (text, newlines).
            Where a frame has several grids (an overview and tiles), the rows of each begin below those of the one before.
    """

    slot: Tensor
    frame: Tensor
    medium: Tensor | None = None
    marker: Tensor | None = None
    protected: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = torch.bool if field.name == "protected" else torch.long
            if (value is not None or field.name in ("slot", "frame")) and getattr(value, "dtype", None) != wanted:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise LayoutError(
                    f"layout.{field.name} must be a {'bool' if wanted == torch.bool else 'long'} tensor, got {got}"
                )
        shape = self.slot.shape
        if self.slot.dim() != 2:
            raise LayoutError(f"layout.slot must be (batch, tokens), got shape {tuple(shape)}; add the batch dimension")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value.shape != shape:
                raise LayoutError(
                    f"layout.{field.name} has shape {tuple(value.shape)}, but layout.slot has {tuple(shape)}"
                )
        if bool(((self.slot >= 0) != (self.frame >= 0)).any()):
            raise LayoutError("layout.slot and layout.frame disagree on which tokens are vision; both are −1 for text")
        if (self.row is None) != (self.column is None):
            raise LayoutError("layout.row and layout.column go together; one of them is missing")
        if self.medium is not None and bool(((self.medium < 0) & (self.slot >= 0)).any()):
            raise LayoutError("layout.medium is negative for a vision token; media are numbered from 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        return self.slot.shape[0], self.slot.shape[1]

    @property
    def vision(self) -> Tensor:
        """(B, N) bool: tokens that have a place in a frame, markers included."""
        return self.slot >= 0

    def reducible(self, newlines: MarkerPolicy = "merge", wrappers: MarkerPolicy = "protect") -> Tensor:
        """(B, N) bool: tokens a stage may merge or drop under the pipeline's choice for markers."""
        allowed = self.vision
        if self.protected is not None:
            allowed = allowed & ~self.protected
        if self.marker is not None:
            for policy, kind in ((newlines, NEWLINE), (wrappers, WRAPPER)):
                if policy == "protect":
                    allowed = allowed & (self.marker != kind)
            allowed = allowed & (self.marker != TIMESTAMP)
        return allowed

    def media(self) -> Tensor:
        """(B, N) long: `medium`, or 0 for every vision token where it was left out."""
        return self.medium if self.medium is not None else torch.where(self.vision, 0, -1)

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on `device`."""
        if self.slot.device == torch.device(device):
            return self
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **moved)

    def expand(self, batch: int) -> TokenLayout:
        """Rows repeated for beams or return sequences: row b becomes rows b·k … b·k+k−1, as generate() orders them."""
        rows = self.slot.shape[0]
        if batch == rows:
            return self
        if batch % rows:
            raise LayoutError(
                f"the layout has {rows} rows, the forward {batch}: not a multiple (beams repeat whole rows)"
            )
        grown = {
            f.name: getattr(self, f.name).repeat_interleave(batch // rows, 0)
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        return replace(self, **grown)

    def followed_by_text(self, tokens: int) -> TokenLayout:
        """The layout with `tokens` more text tokens at the end of each row."""
        blank = {"slot": -1, "frame": -1, "medium": -1, "marker": PLAIN, "protected": False, "row": -1, "column": -1}
        longer = {
            name: torch.nn.functional.pad(getattr(self, name), (0, tokens), value=value)
            for name, value in blank.items()
            if getattr(self, name) is not None
        }
        return replace(self, **longer)

    @classmethod
    def text(cls, batch: int, tokens: int) -> TokenLayout:
        """A layout without vision tokens."""
        nothing = torch.full((batch, tokens), -1)
        return cls(slot=nothing, frame=nothing.clone())

    @classmethod
    def video(
        cls,
        *,
        before: int,
        frames: int,
        per_frame: int,
        after: int,
        first_frame: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> TokenLayout:
        """One row: `before` text tokens, `frames` × `per_frame` vision tokens in time order, `after` text tokens.

        first_frame: number of the first frame, where these are a later piece of a video. grid: rows and columns of a frame, in
        raster order, for strategies that look at them."""
        if grid is not None and grid[0] * grid[1] != per_frame:
            raise LayoutError(f"a grid of {grid[0]} × {grid[1]} is not {per_frame} tokens per frame")
        tokens = torch.arange(frames * per_frame)
        text = [torch.full((n,), -1) for n in (before, after)]
        slot = torch.cat([text[0], tokens % per_frame, text[1]])[None]
        frame = torch.cat([text[0], tokens // per_frame + first_frame, text[1]])[None]
        if grid is None:
            return cls(slot=slot, frame=frame)
        row, column = (torch.where(slot >= 0, x, -1) for x in (slot // grid[1], slot % grid[1]))
        return cls(slot=slot, frame=frame, row=row, column=column)


def roles(slot: Tensor, marker: Tensor | None = None, ids: Tensor | None = None, ends: Sequence[int] = ()) -> Tensor:
    """(N,) long: what each token of one sequence without padding is for.

    VISION: a token with a slot. Text before the first of them is BEFORE, after the last QUESTION, between them AROUND; so is
    text that the layout marks (timestamps, and wrappers such as the tokens that open and close an image). Where `ids` (N,) long
    are known and hold one of `ends`, the ids that end a turn of the chat: SYSTEM is what comes before the first vision token up
    to the last such id, and TAIL what follows the last vision token from the first such id on (the template that opens the
    answer). A template that ends turns by words, not by an id, leaves its words in BEFORE and QUESTION.
    """
    n = len(slot)
    place, vision = torch.arange(n, device=slot.device), slot >= 0
    any_vision = vision.any()
    first = torch.where(any_vision, vision.int().argmax() if n else 0, n)
    last = torch.where(any_vision, n - 1 - vision.flip(0).int().argmax() if n else 0, -1)
    role = torch.where(place < first, BEFORE, torch.where(place > last, QUESTION, AROUND))
    if ids is not None and len(ends):
        end = torch.isin(ids, torch.tensor(list(ends), dtype=ids.dtype, device=ids.device)) & ~vision
        closed = (end & (place < first)).flip(0).cumsum(0).flip(0) > 0
        tail = (end & (place > last)).cumsum(0) > 0
        role = torch.where(closed, SYSTEM, torch.where(tail, TAIL, role))
    if marker is not None:
        role = torch.where(marker != PLAIN, AROUND, role)
    return torch.where(vision, VISION, role)
