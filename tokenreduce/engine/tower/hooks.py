"""Stages in the vision tower: hooks around it and its blocks, while a pipeline with such stages is attached.

Frames that others stand for do not enter the tower, merged patches do not enter its later blocks; what it returns is whole again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import VisionTower
from tokenreduce.engine.forward.looks import notify_observers
from tokenreduce.engine.model.callers import encoding
from tokenreduce.engine.model.hooks import Hook, remove_handles
from tokenreduce.engine.model.host import Host
from tokenreduce.engine.model.leases import Leases
from tokenreduce.engine.tower.frames import Frames, frames_of_call, map_tensors, pixels_of, tensors, video_lengths
from tokenreduce.errors import NotFiredError, PipelineError, PluginError, UnsupportedError
from tokenreduce.plugin_checks import check_reduction, decide_with, lent, reduction_of, vision_sites_of
from tokenreduce.reduction import Reduction
from tokenreduce.trace import StageTrace
from tokenreduce.vision import VisionContext, VisionSite, VisionStrategy

INPUT = VisionSite("vision.input")
MASKED = ("eager", "sdpa")
"""Attention implementations that add a mask of numbers to the logits."""


@dataclass
class _TowerCall:
    """One call of the tower."""

    frames: Frames
    """What it is called with."""
    place: Tensor | None = None
    """(F, n) long, where each token of the start is among those left; None before the first block with a stage."""
    size: Tensor | None = None
    """(F, left) long, how many tokens each of those left stands for."""
    ways: dict[int, Tensor] = field(default_factory=dict)
    """`place` as it was when so many tokens were left, to put back what the tower recorded in between."""
    acted: set[int] = field(default_factory=set)
    """Blocks whose stages have acted."""
    events: list[StageTrace] = field(default_factory=list)
    """What the stages did."""


class NoTower:
    """A pipeline without stages in the vision tower."""

    modules: Sequence[nn.Module] = ()
    """The tower, if there are any."""

    def install(self) -> None:
        """Put the hooks on."""

    def remove(self) -> None:
        """Take the hooks off."""

    def take_events(self) -> list[StageTrace]:
        """What the stages did in this thread since the last prefill with vision tokens."""
        return []

    def expect(self, ids: Tensor | None, kwargs: Mapping[str, Any], outermost: bool) -> None:
        """A call of the model, or of the one within it, begins with these token ids and arguments."""


class TowerHooks(NoTower):
    """The vision stages of a pipeline on one tower."""

    def __init__(
        self, tower: VisionTower | None, strategies: Sequence[VisionStrategy], host: Host, leases: Leases
    ) -> None:
        self.host, self.leases, family = host, leases, host.family
        if tower is None:
            raise UnsupportedError(
                f"{family}: its adapter describes no vision tower, so the stage {strategies[0].name} cannot act; leave out the "
                "stages in the vision tower, or state the adapter's vision_tower()"
            )
        self.tower, self.strategies, self.family, self.modules = tower, strategies, family, (tower.module,)
        depth = len(tower.blocks)
        self.sites = {strategy: vision_sites_of(strategy, depth) for strategy in strategies}
        blocks = [site.block for sites in self.sites.values() for site in sites if site.kind == "vision.block"]
        inside = [strategy for strategy, sites in self.sites.items() if sites[0].kind == "vision.block"]
        if inside and tower.grid is not None:
            raise UnsupportedError(
                f"{family}: its vision tower packs the patches of all frames into one sequence, in which {inside[0].name} "
                "cannot merge; frame_reuse can act there"
            )
        if len(strategies) - len(inside) > 1:
            raise PipelineError(f"{strategies[1].name}: only one stage can act at {INPUT}")
        weighing = [strategy for strategy in inside if strategy.proportional]
        attention = getattr(getattr(tower.module, "config", None), "_attn_implementation", None)
        if weighing and (tower.mask is None or attention not in MASKED):
            why = "take no mask" if tower.mask is None else f"use {attention} attention, which takes no weights"
            raise PipelineError(
                f"{weighing[0].name}: the blocks of the vision tower of {family} {why}, so proportional attention cannot be had; "
                "set `proportional: false`"
            )
        first = min((site.block for strategy in weighing for site in self.sites[strategy]), default=depth)
        self._weighed = range(first, depth)
        self.blocks = sorted({*blocks, *self._weighed})
        self._local = threading.local()
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on."""
        tower = self.tower.module
        self._handles.append(tower.register_forward_pre_hook(Hook(self.enter, tower), with_kwargs=True))
        self._handles.append(tower.register_forward_hook(Hook(self.leave, tower), with_kwargs=True, always_call=True))
        for number in self.blocks:
            block = self.tower.blocks[number]
            hook = Hook(self.enter_block, block, number)
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        remove_handles(self._handles)

    def take_events(self) -> list[StageTrace]:
        """What the stages did in this thread since the last prefill with vision tokens. NotFiredError: the tower did not run."""
        events: list[StageTrace] = getattr(self._local, "events", [])
        self._local.events, self._local.prompt_call = [], None
        if not events:
            raise NotFiredError(
                f"stage {self.strategies[0].name} never acted: the vision tower did not run before this prefill with vision "
                "tokens; pass pixels, not features, or leave out the stages in the vision tower"
            )
        return events

    def expect(self, ids: Tensor | None, kwargs: Mapping[str, Any], outermost: bool) -> None:
        """See NoTower. What the tower did in this thread before, for a call that failed, is not this one's."""
        if pixels_of(kwargs):
            self._local.events = []
            self._local.prompt_call = ids, {name: value for name, value in kwargs.items() if name != "past_key_values"}
        elif outermost:
            self._local.prompt_call = ids, {}

    # One call of the tower --------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the tower: stages at `vision.input`."""
        if kwargs.get("output_attentions"):
            raise UnsupportedError(
                f"{self.family}: output_attentions of a vision tower with stages in it is not supported"
            )
        frames = frames_of_call(self.tower, self.family, args, kwargs)
        if not self.leases.hold("tower"):
            return None
        self._local.call = _TowerCall(frames)
        for strategy in self._at(INPUT):
            groups = [video for group in frames.groups for video in self._videos(strategy, group)]
            decisions = [self._frame_decision(strategy, video) for video in groups]
            total, kept = sum(len(d.target[0]) for d in decisions), sum(int(d.kept.sum()) for d in decisions)
            self._note(strategy, INPUT, total, kept, "frames")
            if kept < total:
                return frames.reduce(decisions)
        return None

    def _videos(self, strategy: VisionStrategy, group: Tensor) -> list[Tensor]:
        """The frames that may stand for each other: what becomes of a row must not depend on the others in its batch."""
        if strategy.lossless or self.tower.grid is not None:
            return [group]
        # Under generate() the tower runs before the first forward; where neither calls it, its frames are all there is.
        prompt_call = encoding() or getattr(self._local, "prompt_call", None)
        ids, kwargs = prompt_call or (None, {})
        lengths = video_lengths(len(group), ids, kwargs, self.host)
        if lengths is None:
            raise UnsupportedError(
                f"{self.family}: its vision tower is given the frames of all rows without saying whose they are, so "
                f"{strategy.name} cannot act on a batch; set `threshold: 0`, or give the videos one by one"
            )
        return list(group.split(lengths))

    def _frame_decision(self, strategy: VisionStrategy, group: Tensor) -> Reduction:
        count, n, _ = group.shape
        everything = torch.arange(count, device=group.device)[None]
        ones = torch.ones(count, n, dtype=torch.long, device=group.device)
        ctx = VisionContext(INPUT, len(self.tower.blocks), lent(group), ones, ones[0].bool(), n)
        reduction = self._decide(strategy, ctx) or Reduction.merge(everything)
        self._check(strategy, INPUT, reduction, (1, count), everything[0] >= 0)
        return reduction

    def enter_block(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a block: its stages, and the weights of merged tokens in its attention."""
        call: _TowerCall | None = getattr(self._local, "call", None)
        if call is None:  # Called outside its tower.
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        self._refuse_misfit(call, hidden, args, kwargs)
        if call.place is None:
            frames, n, _ = hidden.shape
            call.place = torch.arange(n, device=hidden.device).expand(frames, -1)
            call.size = torch.ones_like(call.place)
        site = VisionSite("vision.block", number)
        for strategy in self._at(site):
            hidden = self._merge(call, strategy, site, hidden)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        if number in self._weighed and call.ways:
            assert call.size is not None
            bias = call.size.to(hidden.dtype).log()[:, None, None].expand(-1, 1, hidden.shape[1], -1)
            args, kwargs = args[:1], {**kwargs, str(self.tower.mask): bias}
        return args, kwargs

    def _merge(self, call: _TowerCall, strategy: VisionStrategy, site: VisionSite, hidden: Tensor) -> Tensor:
        frames, n, _ = hidden.shape
        assert call.place is not None
        assert call.size is not None
        movable = torch.arange(n, device=hidden.device) >= self.tower.prefix
        patches = call.place.shape[1] - self.tower.prefix
        ctx = VisionContext(site, len(self.tower.blocks), lent(hidden), call.size.clone(), movable.clone(), patches)
        reduction = self._decide(strategy, ctx)
        after = n
        if reduction is not None:
            self._check(strategy, site, reduction, (frames, n), movable)
            left = reduction.apply(hidden, call.size)
            if left.valid is not None:
                raise PluginError(
                    f"strategy {strategy.name} at {site} keeps different numbers of tokens in different frames"
                )
            assert left.hidden is not None
            after = left.index.shape[1]
            if after < n:
                where = torch.zeros_like(reduction.target).scatter(
                    1, left.index, torch.arange(after, device=hidden.device).expand(frames, -1)
                )
                call.place = where.gather(1, reduction.target.gather(1, call.place))
                call.ways[after], call.size, hidden = call.place, left.size, left.hidden
        self._note(strategy, site, frames * n, frames * after, "tokens of all frames")
        call.acted.add(site.block)
        return hidden

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After the tower: put everything back. Also called when it raised, with None."""
        call, self._local.call = getattr(self._local, "call", None), None
        self.leases.end("tower")
        if call is None or output is None:
            return None
        for strategy, sites in self.sites.items():
            missed = [site for site in sites if site.kind == "vision.block" and site.block not in call.acted]
            if missed:
                raise NotFiredError(f"stage {strategy.name} never acted: {missed[0]} of {self.family} did not run")
        whole = map_tensors(output, partial(_restored, call))
        first = next((x for x in tensors(whole) if x.dim() > 1), None)
        tokens = None if call.place is None else call.place.shape[1]
        if first is None or not call.frames.has_all_frames(first) or (tokens is not None and first.shape[1] != tokens):
            raise UnsupportedError(f"{self.family}: its vision tower does not return one state per frame and token")
        self._local.events = [*getattr(self._local, "events", []), *call.events]
        return whole

    # Small parts ------------------------------------------------------------------------------------------------------

    def _at(self, site: VisionSite) -> list[VisionStrategy]:
        return [strategy for strategy, sites in self.sites.items() if site in sites]

    def _decide(self, strategy: VisionStrategy, ctx: VisionContext) -> Reduction | None:
        who = f"strategy {strategy.name} at {ctx.site}"
        return reduction_of(who, decide_with(who, strategy.decide, ctx))

    def _note(self, strategy: VisionStrategy, site: VisionSite, before: int, after: int, what: str) -> None:
        event = StageTrace(
            stage=strategy.place, strategy=strategy.name, site=str(site), layer=site.block, row=-1, before=before, after=after,
            merged=before - after, dropped=0, finished=site == self.sites[strategy][-1], note=what,
        )  # fmt: skip
        self._local.call.events.append(event)
        notify_observers([event])

    def _refuse_misfit(self, call: _TowerCall, hidden: Tensor, args: Any, kwargs: Any) -> None:
        """Refuse states that are not (F, n, D), and a mask that could not follow the tokens."""
        if hidden.dim() != 3 or len(hidden) != call.frames.count:
            raise UnsupportedError(
                f"{self.family}: a block of its vision tower works on {tuple(hidden.shape)}, not (F, n, D)"
            )
        if any(isinstance(x, Tensor) and x.dim() for x in (*args[1:], *kwargs.values())):
            raise UnsupportedError(
                f"{self.family}: the blocks of its vision tower are given a mask, which cannot follow merged tokens"
            )

    def _check(
        self, strategy: VisionStrategy, site: VisionSite, reduction: Reduction, shape: tuple[int, int], movable: Tensor
    ) -> None:
        """Hold a strategy to its contract: PluginError where it drops, misses or moves what it may not."""
        name = f"strategy {strategy.name} at {site}"
        check_reduction(name, reduction, shape, movable.device)
        if reduction.mixture is not None:
            raise PluginError(f"{name} merges by a mixture, which only stages in the decoder can")
        if bool((reduction.target < 0).any()):
            raise PluginError(f"{name} drops tokens, but the projector needs them all; merge them")
        if not bool((reduction.kept | (movable & movable[reduction.target])).all()):
            raise PluginError(f"{name} merges a class token, or merges into one")


def _restored(call: _TowerCall, x: Tensor) -> Tensor:
    """`x` with all tokens and frames, where it has those that were left."""
    if x.dim() > 2 and len(x) == call.frames.count and x.shape[1] in call.ways:
        place = call.ways[x.shape[1]].to(x.device)
        x = x.gather(1, place.view(*place.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))
    return call.frames.restore(x)
