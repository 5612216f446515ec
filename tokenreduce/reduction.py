"""The one result of every strategy, and the one piece of code that applies it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenreduce.errors import LayoutError
from tokenreduce.ops.blocks import block_columns, block_rows

Weighting = Literal["size", "plain", "keep_first"]


@dataclass(frozen=True)
class Mixture:
    """New states of tokens that stay: token into[e] becomes Σ weight[e] · x[source[e]] over its edges e.

    into, source: (E,) long, places in the sequence; every `into` stays, a source may be any token that the stage may touch, and
    may go to several. weight: (E,) float, as they are, whether or not they sum to one. A token without edges keeps its bits.
    """

    into: Tensor
    source: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Reduced:
    """What is left after a reduction: M is the longest row, shorter rows are padded on the left.

    hidden: (B, M, D), or None if none was given. size: (B, M) long, how many original tokens each one stands for.
    index: (B, M) long, the column each token came from. valid: (B, M) bool, False on padding; None if nothing is padded.
    counts: tokens per row.
    """

    hidden: Tensor | None
    size: Tensor
    index: Tensor
    valid: Tensor | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """A decision about every token.

    Args:
        target: (B, N) long. target[b, i] = i: token i stays; = j: it is merged into the staying token j; −1: it is dropped.
        weighting: `size` weighs each token of a group by the originals it stands for, so that repeated merging is the mean of
            the originals; `plain` averages what is there (the released FrameFusion code); `keep_first` leaves the token that
            stays as it is, and what is merged into it only counts towards its size.
        counts: tokens that stay in each row, where the strategy knows it; saves a device synchronisation.
        merges: False promises that nothing is merged, so that kept states pass through untouched.
        mixture: states of tokens that stay by weights of your own, in place of `weighting`. For one sequence only (B = 1).
    """

    target: Tensor
    weighting: Weighting = "size"
    counts: tuple[int, ...] | None = None
    merges: bool = True
    mixture: Mixture | None = None
    dropped: int | None = field(default=None, repr=False, compare=False)
    """Tokens that go without being merged, where the engine knows it."""
    proven: bool = field(default=False, repr=False, compare=False)
    """Made by the engine's own code from facts that it trusts: `counts` are right, and it keeps the contract."""

    @classmethod
    def keep(cls, mask: Tensor, counts: tuple[int, ...] | None = None) -> Reduction:
        """Keep the tokens where `mask` (B, N) is True and drop the others."""
        column = torch.arange(mask.shape[1], device=mask.device)
        return cls(torch.where(mask, column, -1), counts=counts, merges=False)

    @classmethod
    def merge(cls, target: Tensor, weighting: Weighting = "size") -> Reduction:
        """Merge each token into `target` (B, N) long; a token that stays is its own target."""
        return cls(target, weighting=weighting)

    @classmethod
    def mix(cls, target: Tensor, mixture: Mixture) -> Reduction:
        """As `merge`, with states by `mixture`."""
        return cls(target, mixture=mixture)

    @property
    def kept(self) -> Tensor:
        """(B, N) bool: tokens that stay."""
        return self.target == torch.arange(self.target.shape[1], device=self.target.device)

    def validate(self) -> None:
        """Raise LayoutError unless every token is kept, merged into a kept token of its row, or dropped."""
        self.check_types()
        n = self.target.shape[1]
        if n and (int(self.target.min()) < -1 or int(self.target.max()) >= n):
            raise LayoutError(f"Reduction.target must lie in −1 … {n - 1}")
        kept = self.kept
        into = kept.gather(1, self.target.clamp(min=0)) | (self.target < 0)
        if not bool(into.all()):
            row, column = (int(i) for i in (~into).nonzero()[0])
            raise LayoutError(
                f"Reduction.target merges token {column} of row {row} into {int(self.target[row, column])}, which does not stay"
            )
        if not self.merges and not torch.equal(kept, self.target >= 0):
            raise LayoutError("Reduction says merges=False, but merges tokens")
        if self.counts is not None and list(self.counts) != kept.sum(1).tolist():
            raise LayoutError(f"Reduction says counts={self.counts}, but keeps {kept.sum(1).tolist()}")
        if self.mixture is not None:
            self._check_mixture(self.mixture, kept)

    def _check_mixture(self, mixture: Mixture, kept: Tensor) -> None:
        rows, n = kept.shape
        if rows != 1:
            raise LayoutError(f"Reduction.mixture is for one sequence, and these are {rows}")
        for name, whole in (("into", True), ("source", True), ("weight", False)):
            value = getattr(mixture, name)
            kind = isinstance(value, Tensor) and (value.dtype == torch.long if whole else value.is_floating_point())
            if not kind or value.shape != mixture.into.shape or value.dim() != 1:
                raise LayoutError(f"Mixture.{name} must be an (E,) {'long' if whole else 'float'} tensor")
            if value.device != kept.device:
                raise LayoutError(f"Mixture.{name} is on {value.device}, but the tokens are on {kept.device}")
        for name, places in (("into", mixture.into), ("source", mixture.source)):
            if len(places) and (int(places.min()) < 0 or int(places.max()) >= n):
                raise LayoutError(f"Mixture.{name} must lie in 0 … {n - 1}")
        if not bool(kept[0, mixture.into].all()):
            raise LayoutError("Mixture.into names a token that does not stay")

    def check_types(self) -> None:
        """LayoutError where it is not made of what it should be. Looks at no number of a tensor."""
        target, counts = self.target, self.counts
        if not isinstance(target, Tensor):
            raise LayoutError(f"Reduction.target must be a (B, N) long tensor, got a {type(target).__name__}")
        if target.dtype != torch.long or target.dim() != 2 or target.layout != torch.strided:
            kind = target.dtype if target.layout == torch.strided else target.layout
            raise LayoutError(f"Reduction.target must be a (B, N) long tensor, got {kind} {target.shape}")
        if not isinstance(self.weighting, str) or self.weighting not in get_args(Weighting):
            got = repr(self.weighting) if isinstance(self.weighting, str) else f"a {type(self.weighting).__name__}"
            raise LayoutError(f"Reduction.weighting must be size, plain or keep_first, got {got}")
        if not isinstance(self.merges, bool):
            raise LayoutError(f"Reduction.merges must be True or False, got a {type(self.merges).__name__}")
        if self.mixture is not None and not isinstance(self.mixture, Mixture):
            raise LayoutError(f"Reduction.mixture must be a Mixture, got a {type(self.mixture).__name__}")
        each = counts if isinstance(counts, (tuple, list)) else () if counts is None else (counts,)
        odd = [type(count).__name__ for count in each if type(count) is not int or each is not counts]
        if odd:
            raise LayoutError(f"Reduction.counts must be a tuple of one whole number per row, got a {odd[0]}")

    def apply(self, hidden: Tensor | None, size: Tensor) -> Reduced:
        """Reduce `hidden` (B, N, D) and `size` (B, N) long. The caller's tensors are left as they are."""
        kept = self.kept
        rows, n = kept.shape
        counts = self.counts if self.counts is not None else tuple(kept.sum(1).tolist())
        longest = max(counts, default=0)
        # A stable sort puts what goes first and what stays, in order, last: the rows come out left-padded.
        index = kept.to(torch.uint8).argsort(dim=1, stable=True)[:, n - longest :]
        valid = None
        if any(count != longest for count in counts):
            missing = longest - torch.tensor(counts, device=kept.device)
            valid = torch.arange(longest, device=kept.device) >= missing[:, None]
        total = size
        if self.merges:
            moved = (self.target >= 0) & ~kept
            total = size.scatter_add(1, self.target.clamp(min=0), torch.where(moved, size, 0))
        out = None
        if hidden is not None:
            gathered = hidden.index_select(1, index[0]) if rows == 1 else _gather(hidden, index)
            if self.mixture is not None:
                out = _mixed(self.mixture, hidden, gathered, index)
            elif self.merges and self.weighting != "keep_first":
                out = self._average(hidden, size, moved, gathered, index)
            else:
                out = gathered
        return Reduced(out, total.gather(1, index), index, valid, counts)

    def _average(self, hidden: Tensor, size: Tensor, moved: Tensor, out: Tensor, index: Tensor) -> Tensor:
        """Put group means over the first tokens of the groups in `out`; every other state keeps its bits.

        Asks the device nothing: every token that goes is added, with a weight of zero where it is dropped.
        """
        rows, n, width = hidden.shape
        longest, device = index.shape[1], hidden.device
        # Sums in at least float32: a hundred bf16 frames averaged in bf16 err by 2.5 %.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        flat, weights = hidden.reshape(rows * n, width), size.reshape(-1).to(exact)
        if self.weighting == "plain":
            weights = torch.ones_like(weights)
        stay = sum(self.counts) if self.counts is not None else None
        goes = (~self.kept).reshape(-1)
        if stay is None:
            members = goes.nonzero().squeeze(1)
        else:
            members = goes.to(torch.uint8).argsort(descending=True, stable=True)[: rows * n - stay]
        if not longest or not len(members):
            return out
        real = moved.reshape(-1)[members]
        row = members // n
        # Where each token that stays comes out; the left padding repeats tokens that go.
        place = torch.zeros(rows * n, dtype=torch.long, device=device)
        first = torch.arange(rows, device=device)[:, None]
        place[(first * n + index).reshape(-1)] = torch.arange(rows * longest, device=device)
        into = place[row * n + self.target.reshape(-1)[members].clamp(min=0)]
        source = (first * n + index).reshape(-1)
        out = out.reshape(-1, width)
        heads = torch.zeros(len(out), dtype=torch.long, device=device).index_add_(0, into, real.long()) > 0
        weight = torch.where(real, weights[members], 0)
        # Weights are divided by a power of two first, which changes no bit of the mean: the sum of large rows overflows.
        total, exponent = weights[source].index_add(0, into, weight).frexp()
        share = torch.ldexp(torch.ones_like(total), -exponent)
        weight, own = (weight * share[into])[:, None], (weights[source] * share)[:, None]
        # A few columns at a time: of the sums in full precision, and of the members' copies, only one block lives.
        block = block_columns(out)
        for start in range(0, width, block):
            columns = slice(start, start + block)
            some = flat[:, columns]
            # What indexing gives is ours to change: no second copy.
            values = some[members].to(exact)
            if not self.proven:  # A token that is dropped may be infinite.
                values.masked_fill_(~real[:, None], 0)
            summed = some[source].to(exact).mul_(own).index_add_(0, into, values.mul_(weight))
            del values
            mean = summed.div_(total[:, None]).to(hidden.dtype)
            del summed
            out[:, columns] = torch.where(heads[:, None], mean, out[:, columns])
        return out.view(rows, -1, width)


def _mixed(mixture: Mixture, hidden: Tensor, out: Tensor, index: Tensor) -> Tensor:
    """`out` (1, M, D), the states of the tokens `index` (1, M) of hidden (1, N, D), with the mixed ones put over theirs."""
    into, group = mixture.into.unique(return_inverse=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    weight, flat = mixture.weight.to(exact)[:, None], hidden[0]
    summed = flat.new_zeros(len(into), flat.shape[1], dtype=exact)
    block = block_rows(flat)  # Of the sources' copies in full precision, only one block lives at a time.
    for start in range(0, len(group), block):
        some = slice(start, start + block)
        summed.index_add_(0, group[some], flat[mixture.source[some]].to(exact) * weight[some])
    return out.index_copy(1, torch.searchsorted(index[0], into), summed.to(hidden.dtype)[None])


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) and (B, M) to (B, M, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
