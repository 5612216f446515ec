"""Merging of runs over tokens that come in chunks: what must be remembered between one chunk and the next.

A run's mean is not known before its last token has come, which may be chunks away. So the first token of an open run, and
every token after it, is held back; of a run's other tokens only their sum stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.ops.blocks import block_rows
from tokenreduce.ops.similarity import cosine_to, merge_runs, previous_in_slot, within_span


class Carry:
    """The merge of `merge_runs` by a cosine `threshold`, over one sequence in chunks: the same groups, the same means.

    Args:
        threshold: least cosine with the token before in its slot. max_run: see `within_span`; None for no bound.

    Attributes:
        seen, similar, candidates: tokens so far, how many of them merge, and how many could have.
    """

    def __init__(self, threshold: float, max_run: int | None = None) -> None:
        self.threshold, self.max_run = threshold, max_run
        self.seen = self.similar = self.candidates = 0
        self._held: Queue | None = None
        self._open: _Runs | None = None

    @property
    def held(self) -> int:
        """Survivors held back."""
        return 0 if self._held is None else len(self._held)

    @property
    def closed(self) -> int:
        """How many of the held survivors come before every run that may still grow."""
        if self._held is None or self._open is None or not len(self._open.head):
            return self.held
        return int(self._open.head.min()) - self._held.first

    @property
    def next_position(self) -> int:
        """Position of the first held survivor; of the next token, if none is held."""
        return int(self._held.positions[0]) if self._held is not None and len(self._held) else self.seen

    def feed(self, hidden: Tensor, slot: Tensor, frame: Tensor, medium: Tensor, candidates: Tensor) -> Tensor:
        """Take the next n tokens, and say for each the position of the token that it ends in: (n,) long.

        A run of a medium ends where a token of a later medium comes, or of a frame beyond its span; media and frames must
        not go back. hidden: (n, D). slot, frame, medium: (n,) long. candidates: (n,) bool, tokens that may merge.
        """
        if self._held is None or self._open is None:
            self._held, self._open = Queue(hidden), _Runs.none(hidden)
        held, runs, device = self._held, self._open, hidden.device
        known, position = len(runs.head), torch.arange(self.seen, self.seen + len(hidden), device=device)
        # The last token of each slot stands before the chunk, with the state that the next one is compared with.
        states, slots, frames, media, able = (
            torch.cat(pair)
            for pair in (
                (runs.last, hidden), (runs.slot, slot), (runs.frame, frame), (runs.medium, medium),
                (candidates.new_ones(known), candidates),
            )
        )  # fmt: skip
        previous = previous_in_slot(slots, media, able)
        similar = cosine_to(states, previous) >= self.threshold
        if self.max_run is not None:
            similar = within_span(frames, previous, similar, self.max_run)
        target = merge_runs(previous, similar)
        fresh = target[known:] == torch.arange(known, len(target), device=device)
        ordinal = torch.cat([runs.head, held.next - 1 + fresh.cumsum(0)])
        place = torch.cat([runs.position, position])
        held.append(hidden[fresh], position[fresh])
        self.seen += len(hidden)
        self.similar += int(similar.sum())
        self.candidates += int(candidates.sum())

        last = able.clone()
        last[previous[previous >= 0]] = False
        last = last.nonzero().squeeze(1)
        heads, ending, sums = runs.grown(states, target, last)
        going = self._may_grow(media[last], frames[last])
        done = sums.size > 1
        done[ending[going]] = False
        held.write(ordinal[heads[done]], sums.mean(done), sums.size[done])
        ends, which = last[going], ending[going]
        self._open = _Runs(
            states[ends],
            slots[ends],
            frames[ends],
            media[ends],
            ordinal[heads[which]],
            place[heads[which]],
            sums.of(which),
        )
        return place[target[known:]]

    def _may_grow(self, medium: Tensor, frame: Tensor) -> Tensor:
        """(k,) bool: whether the run of a token, the last of its slot, can have more tokens."""
        if not len(medium):
            return medium.bool()
        going = medium == medium.max()
        if self.max_run is not None:
            span = frame // self.max_run
            going &= span == span[going].max()
        return going

    def close(self) -> None:
        """End every run: no more tokens come."""
        if self._held is None or self._open is None:
            return
        runs, several = self._open, self._open.sums.size > 1
        self._held.write(runs.head[several], runs.sums.mean(several), runs.sums.size[several])
        self._open = _Runs.none(self._held.states[:0])

    def take(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count` held survivors, at most `closed`: states (count, D), positions and sizes (count,) long."""
        if count > self.closed:
            raise ValueError(f"only {self.closed} of the survivors held are closed, {count} were asked for")
        assert self._held is not None
        return self._held.pop(count)


@dataclass(frozen=True)
class _Sums:
    """Sums of the states of runs, each divided by 2**exponent, or that of large rows would overflow; it changes no bit of
    the mean. total: (k, D), at least float32. size, exponent: (k,)."""

    total: Tensor
    size: Tensor
    exponent: Tensor

    def of(self, which: Tensor) -> _Sums:
        """Those of some runs."""
        return _Sums(self.total[which], self.size[which], self.exponent[which])

    def mean(self, which: Tensor) -> Tensor:
        """Means of some runs."""
        some = self.of(which)
        return some.total / torch.ldexp(some.size.to(some.total.dtype), -some.exponent)[:, None]


@dataclass(frozen=True)
class _Runs:
    """The open runs, one per slot. last: (k, D) state of the slot's last token; slot, frame, medium: (k,) its place.
    head, position: (k,) the run's first token, as an ordinal among the survivors and as a place in the sequence."""

    last: Tensor
    slot: Tensor
    frame: Tensor
    medium: Tensor
    head: Tensor
    position: Tensor
    sums: _Sums

    @classmethod
    def none(cls, hidden: Tensor) -> _Runs:
        """No run. hidden: (n, D), whose dtype and device the runs will have."""
        nothing = torch.zeros(0, dtype=torch.long, device=hidden.device)
        total = hidden[:0].to(torch.promote_types(hidden.dtype, torch.float32))
        return cls(hidden[:0], nothing, nothing, nothing, nothing, nothing, _Sums(total, nothing, nothing.int()))

    def grown(self, states: Tensor, target: Tensor, last: Tensor) -> tuple[Tensor, Tensor, _Sums]:
        """The sums of these runs and of those that begin in the chunk, unless they are of one token and have ended.

        states: (k + n, D), of these runs' last tokens and of the chunk. target: (k + n,) long, the first token of each one's
        run. last: the rows that are last in their slot. Returns the runs' first rows (r,), growing; the run of each of
        `last`, as an index into them; their sums.
        """
        known = len(self.head)
        rows = torch.arange(len(target), device=target.device)
        joined = (target != rows).nonzero().squeeze(1)
        heads, run = torch.cat([target[last], target[joined], rows[:known]]).unique(return_inverse=True)
        ending, into = run[: len(last)], run[len(last) : len(last) + len(joined)]
        total = states[heads].to(self.sums.total.dtype)
        size, exponent = torch.ones_like(heads), torch.zeros_like(heads, dtype=torch.int)
        # Every open run is among them, and they come first.
        total[:known], size[:known], exponent[:known] = self.sums.total, self.sums.size, self.sums.exponent
        size = size.index_add(0, into, torch.ones_like(joined))
        _, grown = size.to(total.dtype).frexp()
        total = torch.ldexp(total, (exponent - grown)[:, None])
        block = block_rows(states)
        for some, runs in zip(joined.split(block), into.split(block), strict=True):
            total.index_add_(0, runs, torch.ldexp(states[some].to(total.dtype), -grown[runs][:, None]))
        return heads, ending, _Sums(total, size, grown)


class Queue:
    """Survivors in order, each with an ordinal: appended at the end, popped at the front, in amortised constant time."""

    def __init__(self, like: Tensor) -> None:
        self._states = like.new_empty(0, like.shape[1])
        self._places = torch.empty(2, 0, dtype=torch.long, device=like.device)
        self._start = self._stop = self.first = 0

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def next(self) -> int:
        """The ordinal of the next one appended."""
        return self.first + len(self)

    @property
    def states(self) -> Tensor:
        """(p, D)."""
        return self._states[self._start : self._stop]

    @property
    def positions(self) -> Tensor:
        """(p,) long."""
        return self._places[0, self._start : self._stop]

    def append(self, states: Tensor, position: Tensor) -> None:
        """Add survivors, states (m, D) at position (m,), each of size 1."""
        stop = self._stop + len(states)
        if stop > len(self._states):
            room = 2 * (len(self) + len(states))
            grown, places = self._states.new_empty(room, self._states.shape[1]), self._places.new_empty(2, room)
            grown[: len(self)], places[:, : len(self)] = self.states, self._places[:, self._start : self._stop]
            stop -= self._start
            self._start, self._stop, self._states, self._places = 0, len(self), grown, places
        self._states[self._stop : stop] = states
        self._places[0, self._stop : stop], self._places[1, self._stop : stop] = position, 1
        self._stop = stop

    def write(self, ordinal: Tensor, states: Tensor, size: Tensor) -> None:
        """Give the survivors of these ordinals another state and size."""
        rows = ordinal - self.first + self._start
        self._states[rows] = states.to(self._states.dtype)
        self._places[1, rows] = size

    def pop(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count`: states, positions, sizes."""
        rows = slice(self._start, self._start + count)
        out = self._states[rows].clone(), self._places[0, rows].clone(), self._places[1, rows].clone()
        self._start, self.first = self._start + count, self.first + count
        return out
