"""One forward of a compiled model: what torch.compile traces, and what the operators in its graph do when they run.

Traced are tensors and plain attributes, which guards can watch. A stage is one opaque operator: when it runs, it lets the
stage act on the real tokens with the very code of a forward that is not compiled. The graph has to know how many tokens
come out, so that is forecast; an operator whose stage leaves another number raises.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

from torch import Tensor, nn

from tokenreduce.engine.cache.layers import KvPlan, TokenLayer
from tokenreduce.engine.compiled import operators
from tokenreduce.engine.compiled.layer_plans import PHASES, LayerPlan, chain
from tokenreduce.engine.forward.batch import Batch, gather_tables
from tokenreduce.engine.forward.importance import AttentionRecord
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.tap import UNREADABLE, Attention, DecoderFacts, RowSums, attention_below, causal_mask
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.planning.schedule import account_attention
from tokenreduce.strategy import Site, Strategy


class CompiledForward(Forward):
    """State of one forward of a compiled model."""

    traced = True
    layer_plan: LayerPlan | None
    """Of the layer that runs, before the first one a plan that leads to it; None in a forward without vision tokens."""
    opaque: bool
    """Cache and attention are left to operators, as stages at `kv` sites need it."""
    last_layer: TokenLayer | None
    """The cache layer that was updated last, until its attention runs."""
    read: tuple[Tensor, Tensor, Tensor | None, float] | None
    """Query (B, H, q, d), key (B, G, k, d), which keys are valid (B, k) bool, and scale: of what the next stage reads."""
    input: Tensor | None
    """(B, m, D) residual stream before the attention of the layer that runs, where `kv` stages are to see it."""
    running: bool
    """An operator runs: attention and cache are now to be worked on, not traced."""
    clock: int
    """Phases that are accounted for: four for each layer, see PHASES."""

    def __init__(
        self,
        batch: Batch,
        layers: list[TokenLayer],
        facts: DecoderFacts,
        deepstack: list[Tensor],
        *,
        family: str,
        strategies: Many[Strategy],
    ) -> None:
        super().__init__(batch, layers, facts, deepstack)
        self.family, self.attention_modules = family, facts.attention
        self.opaque = self.kv_sites or any(layer.position is not None for layer in self.layers)
        self.layer_plan = chain(self.sequences, strategies, len(self.deepstack)) if self.sequences else None
        self.last_layer = self.read = self.input = None
        self.running, self.clock = False, 0

    # Traced -----------------------------------------------------------------------------------------------------------

    def visit(self, site: Site, x: Tensor) -> Tensor | None:
        """As Forward.visit: an operator where stages act, nothing elsewhere."""
        assert self.layer_plan is not None
        if site.kind == "pre_attention":
            assert self.layer_plan.following is not None
            self.layer_plan = self.layer_plan.following
        todo = self.layer_plan.before if site.kind == "pre_attention" else self.layer_plan.ffn
        if todo is None:
            return None
        query, key, valid, scale = (None, None, None, 1.0) if self.read is None else self.read
        self.read = None
        out, index, there = operators.visit(
            x, query, key, valid, scale, todo.layer, todo.phase, todo.counts, self.batch.draft
        )
        if not todo.changes:
            return None
        self.batch.index = index
        self.batch.valid = there if todo.padded else None
        return out  # type: ignore[no-any-return]

    def enter_attention(self, layer: int, x: Tensor) -> None:
        """Only note the input: `defers` tells the cache, `catch_up` accounts."""
        self.input = x if self.opaque else None

    def finish_layer(self, layer: int, out: Tensor) -> Tensor:
        """Add the layer's deepstack rows."""
        assert self.layer_plan is not None
        return operators.add_deepstack(out, self.layer_plan.number) if self.layer_plan.deep else out

    def rotate(self, embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As Forward.rotate, but for each layer anew: in a graph it cannot be seen whether two tuples are one."""
        index = self.batch.index
        return embeddings if index is None else gather_tables(embeddings, index)

    def attention_layer(self, module: nn.Module) -> int | None:
        """Not asked for: a layer is known by its plan, or by its cache."""
        return 0

    def defers(self, layer: TokenLayer) -> bool:
        """Whether an operator will update `layer`; else tell it what comes."""
        if self.running:
            return False
        self.last_layer = layer
        if not self.opaque and self.layer_plan is not None:
            layer.plan = KvPlan(
                self.logical, self.batch.valid, draft=self.batch.draft, repacked=self.batch.index is not None
            )
        return self.opaque

    def attend(
        self,
        layer: int,
        base: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """As Forward.attend."""
        if self.running:
            return super().attend(layer, base, module, query, key, value, mask, kwargs)
        cache, self.last_layer = self.last_layer, None
        reads = self.layer_plan is not None and self.layer_plan.read
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        if reads or self.opaque:
            refused = [name for name in UNREADABLE if kwargs.get(name) is not None]
            if refused:
                raise UnsupportedError(
                    f"stages are not supported in a compiled model whose attention has {', '.join(refused)}"
                )
        if self.opaque:
            assert cache is not None
            out = operators.reduced_attention(self.input, query, key, value, mask, scale, cache.number)
            self.read = (query, key, None, scale) if reads else None
            return out, None
        valid = self.batch.valid if cache is None else cache.valid
        if reads:
            self.read = (query, key, valid, scale)
        if self.batch.index is not None or (cache is not None and cache.reduced):
            mask = causal_mask(self.implementation, self.config, query, key.shape[-2], valid)
        return base(module, query, key, value, mask, **kwargs)

    # When operators run -----------------------------------------------------------------------------------------------

    def run_visit(
        self,
        x: Tensor,
        query: Tensor | None,
        key: Tensor | None,
        valid: Tensor | None,
        scale: float,
        layer: int,
        phase: int,
        counts: Many[int],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Let the stages act. Also their result's index and validity; None for what stays as it was."""
        self.catch_up(layer, phase)
        self.clock += 1
        site = Site(layer, PHASES[phase])  # type: ignore[arg-type]
        # The graph may use the memory of its tensors again: nothing of them stays in here.
        source = layer if phase == 2 else layer - 1
        lent = self.layers[source] if self.layers and query is not None and not self.opaque else None
        before = None if lent is None else lent.not_padding
        alive = [len(sequence) for sequence in self.sequences]
        try:
            if query is not None and key is not None:
                self.attention = AttentionRecord(source, query, key, scale, RowSums())
            if lent is not None:
                lent.not_padding = valid
            out = super().visit(site, x.clone())
        finally:
            self.attention = None
            if lent is not None:
                lent.not_padding = before
        self.looks.notify_observers()
        self._hold_to(site, counts)
        if out is not None and alive == list(counts):
            raise PipelineError(
                f"a stage at {site} mixes states without a token less, which a compiled model has no place for"
            )
        return (None, None, None) if out is None else (out, self.batch.index, self.batch.valid)

    def _hold_to(self, site: Site, counts: Many[int]) -> None:
        """Refuse what the graph was not made for."""
        for sequence, count in zip(self.sequences, counts, strict=True):
            if len(sequence) != count:
                names = ", ".join(
                    dict.fromkeys(run.strategy.name for run in sequence.conductor.runs if site in run.sites)
                )
                raise PipelineError(
                    f"{names} at {site} left {len(sequence)} tokens of row {sequence.row}, where its forecast said {count}; a "
                    "compiled model needs counts that are known before: call it without torch.compile"
                )

    def run_attention(
        self,
        x: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        layer: int,
    ) -> Tensor:
        """Attention of a layer with all that its `kv` stages do."""
        self.running = True
        try:
            if self.sequences:
                assert x is not None
                self.catch_up(layer, 1)
                self.clock += 1
                super().enter_attention(layer, x)
                self.looks.notify_observers()
            keys, values = self.layers[layer].update(key.clone(), value.clone())
            module = self.attention_modules[layer]
            base = attention_below(self.implementation, module)
            out, _ = super().attend(layer, base, module, query, keys, values, mask, {"scaling": scale, "dropout": 0.0})
        finally:
            self.running = False
            self.attention = None
        return out  # type: ignore[no-any-return]

    def run_deepstack(self, out: Tensor, layer: int) -> Tensor:
        """Add deepstack rows."""
        self.catch_up(layer, 3)
        self.clock += 1
        return super().finish_layer(layer, out)

    def catch_up(self, layer: int, phase: int) -> None:
        """Account for all that was passed since the last operator: nothing has acted there."""
        while self.clock < 4 * layer + phase:
            place, kind = self.clock // 4, PHASES[self.clock % 4]
            for sequence in self.sequences:
                if kind is None:
                    sequence.conductor.account.ffn.append(len(sequence))
                    continue
                site = Site(place, kind)
                for run in sequence.conductor.due(site, sequence.__len__):
                    raise PipelineError(
                        f"{run.strategy.name} is due at {site}, where its forecast had no stage; call the model without "
                        "torch.compile"
                    )
                if kind == "kv":
                    sequence.attended = sequence.alive
                    account_attention(sequence.conductor.account, len(sequence), None, False)
            self.clock += 1

    def finish(self) -> None:
        """Account for the layers that ran since the last operator."""
        if self.layer_plan is not None:
            self.catch_up(self.layer_plan.number + 1, 0)
