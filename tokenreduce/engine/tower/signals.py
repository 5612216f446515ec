"""What the vision tower tells stages of the decoder: attention that its patches receive, their keys, its pooled output.

The tower's attention function is wrapped, as the decoder's is: the tower runs as it would, sdpa stays, and beside it one row,
or the mean of all rows frame by frame, is computed anew in float32. No block's code is copied.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tokenreduce.adapter import ModelAdapter, Prompt, TowerCall, VisionTower
from tokenreduce.engine.model.hooks import Hook, remove_handles
from tokenreduce.engine.model.tap import attention_below
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.strategy import Strategy

PREFIX = "tokenreduce_tower_"
RECORDER = "_tokenreduce_recorder"
"""An attribute of the attention modules of a tower that is listened to."""
READABLE = ("sdpa", "eager")
Key = tuple[str, int]
"""A signal (`tower.cls` …) and the block that it is of; −1 for the tower's output."""


class NoSignals:
    """A pipeline in which no stage reads the tower."""

    def install(self) -> None:
        """Listen."""

    def remove(self) -> None:
        """Stop listening."""

    def take(self) -> list[dict[Key, TowerCall]]:
        """What this thread's calls of the tower have told since the last prefill, one entry a call."""
        return []


class Signals(NoSignals):
    """Listens to one tower, in every thread for itself.

    wanted: the signals that stages need, and of which blocks.
    """

    def __init__(self, tower: VisionTower, wanted: Collection[Key], family: str) -> None:
        self.tower, self.wanted = tower, frozenset(wanted)
        blocks = {block for name, block in wanted if name != "tower.pooled"}
        self.blocks = {id(module): block for block in blocks for module in tower.blocks[block].modules()}
        self.configs = list(
            {id(c): c for m in tower.module.modules() if (c := getattr(m, "config", None)) is not None}.values()
        )
        own: Any = tower.module.config
        self.implementation = str(own._attn_implementation).removeprefix(PREFIX)
        if self.implementation not in READABLE:
            raise UnsupportedError(
                f"{family}: stages that read the vision tower need it to use sdpa or eager attention, not {self.implementation}"
            )
        self._local = threading.local()
        self._handles: list[Any] = []

    def install(self) -> None:
        """Listen."""
        name, tower = PREFIX + self.implementation, self.tower.module
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _listening(self.implementation))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[self.implementation])
        for module in tower.modules():
            if id(module) in self.blocks:
                module.__dict__[RECORDER] = weakref.ref(self)
        for config in self.configs:
            config._attn_implementation_internal = name
        self._handles.append(tower.register_forward_pre_hook(Hook(self.enter, tower), with_kwargs=True))
        self._handles.append(tower.register_forward_hook(Hook(self.leave, tower)))

    def remove(self) -> None:
        """Stop listening."""
        remove_handles(self._handles)
        for module in self.tower.module.modules():
            module.__dict__.pop(RECORDER, None)
        for config in self.configs:
            config._attn_implementation_internal = self.implementation

    def take(self) -> list[dict[Key, TowerCall]]:
        """See NoSignals."""
        calls = getattr(self._local, "calls", [])
        self._local.calls = []
        return calls  # type: ignore[no-any-return]

    # While the tower runs ---------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A call of the tower begins."""
        names = ("pixels", self.tower.grid)
        grid = kwargs.get(names[1]) if names[1] else None
        if names[1] and grid is None:
            grid = args[1] if len(args) > 1 else None
        self._local.parts, self._local.grid = {}, grid

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """It ends: put the parts of each block together."""
        told: dict[Key, TowerCall] = {}
        for key, parts in self._local.parts.items():
            packed = self.tower.grid is not None
            # A packed tower calls attention once for each frame or window, in the order of the block's patches.
            value = (
                torch.cat([part.flatten(0, 1) for part in parts])
                if packed
                else torch.cat(parts)[:, self.tower.prefix :]
            )
            told[key] = TowerCall(value, self._local.grid)
        if ("tower.pooled", -1) in self.wanted:
            pooled = getattr(output, "pooler_output", None)
            if isinstance(pooled, Tensor):
                told["tower.pooled", -1] = TowerCall(pooled[:, None], self._local.grid)
        self._local.parts = {}
        if not hasattr(self._local, "calls"):
            self._local.calls = []
        self._local.calls.append(told)

    def listen(self, block: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Attention of `block` over query and key (P, H, n, d): P frames or windows."""
        parts: dict[Key, list[Tensor]] = self._local.parts
        with torch.no_grad():
            if ("tower.cls", block) in self.wanted:
                parts.setdefault(("tower.cls", block), []).append(_row(query[:, :, :1], key, scale).squeeze(1))
            if ("tower.mean", block) in self.wanted:
                # Scores of all frames at once would be a gigabyte; of one they are 32 MiB.
                each = [_row(q[None], k[None], scale).mean(1) for q, k in zip(query, key, strict=True)]
                parts.setdefault(("tower.mean", block), []).append(torch.cat(each))
            if ("tower.keys", block) in self.wanted:
                parts.setdefault(("tower.keys", block), []).append(key.detach().transpose(1, 2).flatten(2))


def _row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(P, q, n, H) float32: the softmax of the queries (P, H, q, d)."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).transpose(-1, -2) * scale
    return scores.softmax(-1).permute(0, 2, 3, 1)


def _listening(implementation: str) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = module.__dict__.get(RECORDER)
        recorder = None if found is None else found()
        block = None if recorder is None else recorder.blocks.get(id(module))  # A copy of the model is none of ours.
        if recorder is not None and block is not None:
            scale = kwargs.get("scaling")
            recorder.listen(block, query, key, query.shape[-1] ** -0.5 if scale is None else float(scale))
        return attention_below(implementation, module)(module, query, key, value, *args, **kwargs)

    return attention


# Whether and which ----------------------------------------------------------------------------------------------------


def signals_for(
    strategies: Sequence[Strategy],
    model: nn.Module,
    adapter: ModelAdapter,
    pipeline: str,
    given: bool,
    vision: str | None,
) -> NoSignals:
    """What to listen to for these stages. UnsupportedError where the family cannot tell what one of them needs.

    given: whether the caller brings the layout, and may bring the signals (`run.signals`), too. vision: a stage inside the tower.
    """
    needy = [strategy for strategy in strategies if tower_needs(strategy)]
    if not needy:
        return NoSignals()
    for strategy in needy:
        problem = lacking(strategy, model, adapter)
        if problem:
            if given:
                return NoSignals()
            raise UnsupportedError(f"{pipeline}: {problem}")
    if vision is not None:
        raise PipelineError(
            f"{pipeline}: {needy[0].name} reads the vision tower, in which {vision} merges; one of the two has to go"
        )
    tower = adapter.vision_tower(model)
    assert tower is not None
    depth, wanted = len(tower.blocks), set[Key]()
    for strategy in needy:
        blocks = [block_of(strategy, block, depth) for block in strategy.tower_blocks(depth)]
        for name in tower_needs(strategy):
            wanted |= {(name, -1)} if name == "tower.pooled" else {(name, block) for block in blocks}
    return Signals(tower, wanted, adapter.name)


def tower_needs(strategy: Strategy | type[Strategy]) -> list[str]:
    """What it needs of the tower."""
    return [need for need in strategy.capabilities.needs if need.startswith("tower.")]


def lacking(strategy: Strategy | type[Strategy], model: nn.Module, adapter: ModelAdapter) -> str:
    """Why the family of `model` cannot give `strategy` what it needs of the tower, in a clause; empty if it can."""
    offered = adapter.tower_signals(model)
    for need in tower_needs(strategy):
        why = offered.get(need, "its adapter does not say how they come to the decoder")
        if why:
            return f"{strategy.name} needs {need}, which {adapter.name} cannot give: {why}"
    return ""


def block_of(strategy: Strategy, block: int, depth: int) -> int:
    """`block` of a tower of `depth` blocks, from 0; below 0 counted from the last. PipelineError where there is none."""
    if not -depth <= block < depth:
        raise PipelineError(
            f"{strategy.name} reads block {block} of the vision tower, but its features come from 0 … {depth - 1}"
        )
    return block % depth


# To the decoder -------------------------------------------------------------------------------------------------------


class TowerFacts:
    """Signals of one prefill at its tokens, carried through the family's pooling when they are first asked for.

    given: (B, N, …) by name, in place of what the tower told.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        prompt: Prompt | None,
        calls: Sequence[Mapping[Key, TowerCall]],
        given: Mapping[str, Tensor] | None,
    ) -> None:
        self.model, self.adapter, self.prompt, self.calls, self.given = model, adapter, prompt, calls, given
        self.depth = 0
        tower = None if given is not None else adapter.vision_tower(model)
        if tower is not None:
            self.depth = len(tower.blocks)
        self._known: dict[Key, Tensor] = {}

    def at(self, row: int, columns: Tensor, name: str, block: int) -> Tensor:
        """(N, …) of the tokens at `columns` of `row`; NaN where a token stands for no patch."""
        return self._whole(name, block)[row, columns].to(columns.device)

    def _whole(self, name: str, block: int) -> Tensor:
        if self.given is not None:
            if name not in self.given:
                raise UnsupportedError(f"run.signals has no {name}")
            return self.given[name]
        key = (name, -1 if name == "tower.pooled" else block % max(self.depth, 1))
        if key not in self._known:
            calls = [call[key] for call in self.calls if key in call]
            if not calls or self.prompt is None:
                raise UnsupportedError(
                    f"{self.adapter.name}: the vision tower has told nothing of {name} of block {block} in this call; pass the "
                    "pixels with the ids, and let the strategy name its blocks in `tower_blocks`"
                )
            self._known[key] = self.adapter.to_tokens(self.model, self.prompt, calls)
        return self._known[key]
