"""A pipeline on a model: its hooks around the decoder, and what happens when a forward begins and ends."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenreduce.adapter import ModelAdapter, Prompt
from tokenreduce.engine.active import ActiveForwards
from tokenreduce.engine.cache.adopt import adopt, forget_plans, refuse_cache, token_layers
from tokenreduce.engine.cache.layers import KvPlan, TokenLayer
from tokenreduce.engine.compiled.state import CompiledForward
from tokenreduce.engine.forward import call as calls
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.call import Call
from tokenreduce.engine.forward.decode_step import DecodeStep, any_reduced, cache_of_decode_step
from tokenreduce.engine.forward.receipt import dense_receipt, receipt
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.callers import calls_of, in_compiled_call, is_compiled
from tokenreduce.engine.model.host import EntryPoints, Host
from tokenreduce.engine.model.leases import Leases
from tokenreduce.engine.refusals import (
    check_ran,
    check_spent,
    refuse_call,
    refuse_compiled,
    refuse_later_padding,
    refuse_mode,
    refuse_needs,
    refuse_outputs,
    refuse_packed,
)
from tokenreduce.engine.tower.hooks import NoTower, TowerHooks
from tokenreduce.engine.tower.signals import TowerFacts, signals_for, tower_needs
from tokenreduce.errors import AttachError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.pipeline import Pipeline, build, build_vision
from tokenreduce.planning import cost
from tokenreduce.planning.account import Account
from tokenreduce.planning.feasibility import check_pipeline, check_rows
from tokenreduce.plugin_checks import sites_of
from tokenreduce.trace import Trace


class _Local(threading.local):
    """What a thread keeps between the hooks of one call. Read at every token: class attributes are always there."""

    trace: Trace | None = None
    """Of its last prefill."""
    light: Trace | None = None
    """What `Run.traces` keeps of it."""
    prompt_call: tuple[Tensor, dict[str, Any]] | None = None
    """Token ids (B, n) and arguments of the call around the decoder, until the decoder is called."""
    await_head = False
    """The head's next output belongs to `trace`."""
    refused = False
    """A call within a forward was refused; the end hook that comes next is that call's, not the forward's."""


attached: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
"""The run of each decoder that has one. It lives as long as the decoder, also if the caller of `reduce` let go of it."""
_attaching = threading.Lock()
TRACES = 1000
"""Calls that `Run.traces` goes back: some 10 KB each for a decoder of 28 layers."""


class Run:
    """A pipeline attached to a model. Made by `reduce`; the end of a `with` block, or `detach`, takes it off."""

    pipeline: Pipeline
    """What is attached."""
    signals: Mapping[str, Tensor] | None
    """What stages read of the vision tower, where the caller knows it and the tower does not run: (B, N, C) each by name
    (`tower.cls`, `tower.mean`: C heads; `tower.keys`; `tower.pooled`), whatever the block."""
    attached: bool
    """The pipeline is on the model now."""
    entered: bool
    """A `with` block was begun, which will take it off."""
    silent: bool
    """The end of a `with` block says nothing where nothing was ever reduced, for callers that say it themselves."""

    def __init__(
        self, model: nn.Module, pipeline: Pipeline, adapter: ModelAdapter, layout: TokenLayout | None = None
    ) -> None:
        self.pipeline, self.budget, self.adapter = pipeline, pipeline.budget, adapter
        self.strategies, self.vision = build(pipeline), build_vision(pipeline)
        self._layout, self._fresh = layout, layout is not None
        self._local = _Local()
        self._last: Trace | None = None
        self._traces: deque[Trace] = deque(maxlen=TRACES)
        self._prefills = self._dense = 0
        self._reduced = self.silent = False
        self.attached = self.entered = False
        self.signals = None
        if pipeline.stages:
            self.host = Host(model, adapter)
            self.shape = self.host.shape
            self._leases = Leases()
            self._tower = NoTower()
            inside = self.vision[0].name if self.vision else None
            self._signals = signals_for(self.strategies, model, adapter, pipeline.name, layout is not None, inside)
            if self.vision:
                self._tower = TowerHooks(adapter.vision_tower(model), self.vision, self.host, self._leases)
            with _attaching:
                self._attach()

    # The user's side --------------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """The receipt of this thread's last call; of any thread's, if this one made none.

        A prefill without vision tokens has one that says dense; a later turn of text alone, and decoding, belong to the prefill
        that they go on with. AttachError if nothing has run yet.
        """
        trace = self._local.trace or self._last
        if trace is None:
            raise AttachError(
                f"pipeline {self.pipeline.name} has no trace yet: no forward with vision tokens has run"
                if self.pipeline.stages
                else "an empty pipeline adds no hook to the model, and so it has no trace"
            )
        return trace

    @property
    def traces(self) -> tuple[Trace, ...]:
        """One per call, in the order of their ends, of all threads: the last TRACES, without what has an entry per token.

        `kept` and `source` are in `trace` alone: of a thousand calls they would fill the memory of a GPU.
        """
        return tuple(self._traces)

    @property
    def layout(self) -> TokenLayout | None:
        """The explicit layout, if any; set a new one before a later turn that brings vision tokens of its own."""
        return self._layout

    @layout.setter
    def layout(self, layout: TokenLayout | None) -> None:
        self._layout, self._fresh = layout, layout is not None

    def detach(self) -> None:
        """Take every hook off and restore the model's configuration. A second call does nothing.

        Waits for forwards that run in other threads. AttachError if one does not end, and then nothing has changed.
        """
        if not self.attached:
            return
        text = self.host.decoder()
        modules = [*self._tower.modules, *(() if text is None else (text,))]
        if self._leases.in_this_thread() and (in_compiled_call() or any(map(calls_of, modules))):
            raise AttachError(f"pipeline {self.pipeline.name} cannot be detached within a forward of its own model")
        with self._leases.alone(self.pipeline.name):
            if self.attached:  # Not by another thread, while this one waited.
                self._take_off()
        self._local.prompt_call = None

    def _take_off(self) -> None:
        self._active.forget()
        self._tower.remove()
        self._signals.remove()
        self.host.uninstall()
        text = self.host.decoder()
        if text is not None:
            attached.pop(text, None)
        self.attached = False

    @property
    def used(self) -> bool:
        """Whether a forward with vision tokens has run, in any thread."""
        return self._prefills > 0

    def __enter__(self) -> Self:
        self.entered = True
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.detach()
        except KeyboardInterrupt:
            self.detach()  # Perhaps nobody outside holds the run: what Ctrl-C left is taken off here or never.
            raise
        idle = "" if self.silent or exc[0] is not None else self._idle()
        if idle:
            warnings.warn(f"pipeline {self.pipeline.name} reduced nothing: {idle}", stacklevel=2)

    def _idle(self) -> str:
        """Why nothing was ever reduced although forwards ran; "" if something was, or a budget of 1 asked for everything."""
        calls = self._prefills + self._dense
        if self._reduced or not calls or (self.budget is not None and self.budget.amount == 1):
            return ""
        if not self._prefills:
            return f"none of its {calls} calls had vision tokens; see run.trace, and whether the inputs hold the video"
        last = next((trace for trace in reversed(self._traces) if not trace.dense), None)
        why = "; ".join(last.idle + last.skipped) if last is not None else ""
        return f"{self._prefills} calls with vision tokens kept them all{'; ' if why else ''}{why}"

    def __repr__(self) -> str:
        state = "attached; detach() takes it off" if self.attached else "not attached"
        return f"<{type(self).__name__} of pipeline {self.pipeline.name}: {state}>"

    def _repr_html_(self) -> str:
        state = "attached" if self.attached else "not attached"
        trace = self._local.trace or self._last
        calls = f"{state}; {self._prefills} calls with vision tokens, {self._dense} dense"
        return f"<p>{calls}</p>{self.pipeline._repr_html_()}{'' if trace is None else trace._repr_html_()}"

    # Attaching --------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        host = self.host
        other = attached.get(host.text)
        if other is not None:
            raise AttachError(
                f"pipeline {other.pipeline.name} is attached to this model already; detach it first (several stages belong in "
                "one pipeline)"
            )
        self._check_pipeline()
        sites = {site for strategy in self.strategies for site in sites_of(strategy, len(host.layers))}
        self._kv_sites = any(site.kind == "kv" for site in sites)
        if self._kv_sites and host.implementation not in ("sdpa", "eager"):
            raise UnsupportedError(
                f"{host.family}: stages at `kv` sites need sdpa or eager attention, not {host.implementation}; call "
                'model.set_attn_implementation("sdpa")'
            )
        self._cache_sites = any(site.kind == "cache" for site in sites)
        self._ahead = any(strategy.capabilities.own_attention for strategy in self.strategies)
        self._decoding = {
            site.layer: s for s in self.strategies for site in sites_of(s, len(host.layers)) if site.kind == "decode"
        }
        self._special = ""
        if self._cache_sites or self._decoding:
            self._special = "at `cache` sites" if self._cache_sites else "at `decode` sites"
        elif self._ahead:
            self._special = "that look at attention ahead of its layer"
        if self._special and host.facts.group is not None:
            raise UnsupportedError(f"{host.family}: stages {self._special} do not support tensor parallelism")
        pairs = host.pairs(sorted({site.layer for site in sites if site.kind == "pre_ffn"}))
        self._active = ActiveForwards(host, pairs)
        entries = EntryPoints(self._before_model, self._before_decoder, self._after_decoder, self._after_head)
        host.install(entries, pairs, self.strategies, self.budget)
        self.shape = host.shape  # As it was measured.
        if self._layout is not None:
            try:
                reducible = self._reducible(self._layout)
                rows = [
                    (int(row.sum()), int(row.int().argmax()), calls.contents_of(self._layout, row, number))
                    for number, row in enumerate(reducible)
                    if row.any()
                ]
                if self.budget is None or self.budget.per == "sequence":  # Else each call is checked, medium by medium.
                    check_rows(self.strategies, reducible.shape[1], rows, self._account)
            except BaseException:
                host.uninstall()
                raise
        self._tower.install()
        self._signals.install()
        attached[host.text] = self
        self.attached = True

    def _check_pipeline(self) -> None:
        """Refuse what cannot be, whatever the layout."""
        check_pipeline(self.strategies, self.budget, self.shape)

    def _account(self, total: int, reducible: int) -> Account:
        return Account(
            self.budget, self.shape, total, reducible, self.host.cache_bytes, pipeline=self.pipeline.name,
            lenient=self.pipeline.on_infeasible == "least",
        )  # fmt: skip

    def _reducible(self, layout: TokenLayout) -> Tensor:
        return layout.reducible(self.pipeline.newlines, self.pipeline.wrappers)

    # One forward ------------------------------------------------------------------------------------------------------

    def _before_model(self, outermost: bool, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a module around the decoder: keep the token ids for `_begin`."""
        kwargs = calls.named(module, args, kwargs)
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._local.prompt_call = ids, kwargs
        elif outermost:
            self._local.prompt_call = None  # Left by a call that failed before it came to the decoder.
        if self.vision:
            self._tower.expect(ids, kwargs, outermost)
        refuse_outputs(self.host.family, self.host.config, kwargs)
        if outermost and not (isinstance(ids, Tensor) and ids.shape[-1] == 1):  # Not at every token.
            self.host.check_decoder(module)

    def _before_decoder(self, text: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the decoder: refuse what must be refused, and start the state of this forward."""
        if not self._leases.hold("decoder"):
            return None
        try:
            changed = self._begin(text, calls.named(text, args, kwargs))
        finally:
            if self._active.current() is None:
                self._leases.end("decoder")
        return None if changed is None else ((), changed)

    def _begin(self, text: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments with which the decoder is to run, None for those that it was given."""
        local = self._local
        prompt_call, local.prompt_call, local.await_head = local.prompt_call, None, False
        self._ready(kwargs)
        forget_plans(kwargs.get("past_key_values"))
        layers = cache_of_decode_step(kwargs, self._layout)
        if layers is not None:  # A step of decoding: what is cheap is asked first.
            if not any_reduced(layers) and not self._decoding:
                return None
            if not self._decoding and DecodeStep.applies(
                kwargs.get("attention_mask"), self.host.implementation, self.host.config, layers
            ):
                self._active.start(DecodeStep(layers))
                return {**kwargs, "attention_mask": None}
        call = Call.read(kwargs, None if prompt_call is None else Prompt.read(*prompt_call))
        layout = self._find_layout(call)
        if layout is None:
            self._begin_text(call)
            return None
        events = self._tower.take_events()
        if call.cache is not None:
            refuse_cache(call.cache)
        refuse_call(self.host.family, self.host.config, call)
        refuse_mode(self.host.family, text, self.host.config, call, self.host.recomputable())
        if self._compiled():
            refuse_compiled(self.host.family, text, self.strategies, self.host.facts.states)
            if self.budget is not None and self.budget.per == "medium":
                raise UnsupportedError(
                    f"{self.host.family}: a budget per medium is not supported in a compiled model; call it without torch.compile"
                )
            if self._special:
                raise UnsupportedError(
                    f"{self.host.family}: stages {self._special} are not supported in a compiled model; call it without "
                    "torch.compile"
                )
        refuse_later_padding(self.host.family, self.host.facts.states, call)
        if self._kv_sites and call.past and call.host_valid is not None:
            raise UnsupportedError(f"{self.host.family}: stages at `kv` sites do not support padding in a later turn")
        sequences = calls.sequences(
            call, layout, self._reducible(layout), self.strategies, self._account, self.host.turn_ends
        )
        self._tell(call, sequences)
        refuse_needs(self.pipeline.name, self.strategies, sequences)
        cache, use_cache = call.cache, kwargs.get("use_cache")
        use_cache = self.host.config.use_cache if use_cache is None else use_cache
        if not use_cache:
            refuse_packed(self.host.family, call)
        if cache is None and (use_cache or self._kv_sites or self._special):
            from transformers import DynamicCache

            cache = DynamicCache(config=self.host.config)
            kwargs = {**kwargs, "past_key_values": cache}
        layers = [] if cache is None else adopt(cache, len(self.host.layers), call.valid_past)
        forward = self._forward(call, sequences, layers, calls.deepstack(self.adapter.deepstack, kwargs))
        forward.looks.traces += events
        self._active.start(forward)
        return kwargs

    def _tell(self, call: Call, sequences: list[TokenSequence]) -> None:
        """Let the stages ask for what the vision tower told, or for what the caller gave in its place."""
        calls = self._signals.take()
        if not any(tower_needs(strategy) for strategy in self.strategies):
            return
        told = TowerFacts(self.host.model, self.adapter, call.prompt, calls, self.signals)
        for sequence in sequences:
            sequence.facts.tower = partial(told.at, sequence.row, sequence.columns)

    def _ready(self, kwargs: dict[str, Any]) -> None:
        if self._active.current() is not None:
            if calls_of(self.host.text) > 1:
                self._local.refused = True
                raise UnsupportedError(
                    f"{self.host.family}: called within a forward of its own, which is not supported while a pipeline is attached"
                )
            self._undo_broken(kwargs)
        self.host.check_depth()
        if not self.host.tapped:
            raise AttachError(
                f"{self.host.family}: its attention implementation was changed while a pipeline is attached; detach first"
            )

    def _undo_broken(self, kwargs: dict[str, Any]) -> None:
        """The last forward of this thread was broken off by Ctrl-C, of which torch tells no hook."""
        broken = self._active.end()
        changed, cache = broken.undo(), token_layers(kwargs.get("past_key_values"))
        if changed and any(map(broken.holds, cache)):
            raise UnsupportedError(
                f"{self.host.family}: the last forward on this KV cache was broken off, and only now is it as it was before; its "
                "length has changed, so call again"
            )

    def _begin_text(self, call: Call) -> None:
        """A forward without vision tokens: dense, unless the cache that it goes on with has been reduced."""
        if self._layout is not None and call.width - call.draft == self._layout.shape[1]:
            self._fresh = False  # A layout of text alone was this call's.
        layers = token_layers(call.cache)
        if any_reduced(layers) or (self._decoding and layers and call.past):
            refuse_call(self.host.family, self.host.config, call)
            refuse_later_padding(self.host.family, self.host.facts.states, call)
            if call.host_valid is not None and any(layer.position is not None for layer in layers):
                raise UnsupportedError(
                    f"{self.host.family}: stages at `kv` sites do not support padding in a later turn"
                )
            self._active.start(self._forward(call, [], layers, []))
        if layers and isinstance(call.mask, Tensor) and call.mask.dim() == 2 and call.host_valid is not None:
            for layer in layers:
                layer.plan = KvPlan(call.width, call.valid)
        if not call.past and call.width > 1:
            self._keep(self._dense_trace(call))

    def _dense_trace(self, call: Call) -> Trace:
        width = call.width - call.draft
        everything = torch.arange(width)
        real = None if call.host_valid is None else call.host_valid[:, :width]
        kept = [everything if real is None else real[row].nonzero()[:, 0] for row in range(call.batch)]
        trace = dense_receipt(
            [len(columns) for columns in kept], kept, width, self.pipeline.name,
            str(self.budget) if self.budget else "none", self.shape, self.host.cache_bytes, self._head_flops,
            "no vision tokens in this call",
        )  # fmt: skip
        return self.host.corrected(trace)

    @property
    def _head_flops(self) -> int:
        return cost.head_flops(self.shape, 1) if self.host.has_head else 0

    def _keep(self, trace: Trace) -> None:
        """The trace of a call that has ended, or that runs dense."""
        light = trace.light()
        self._local.trace = self._last = trace
        self._local.light = light
        self._traces.append(light)
        self._prefills, self._dense = self._prefills + (not trace.dense), self._dense + bool(trace.dense)
        self._reduced = self._reduced or trace.reduced
        self._local.await_head = True

    def _find_layout(self, call: Call) -> TokenLayout | None:
        """The layout of the call's vision tokens; None if it has none."""
        if self._layout is not None:
            layout = calls.given_layout(call, self._layout, self._fresh)
        else:
            layout = calls.found_layout(call, self.adapter, self.host.family, self.host.model)
        layout = None if layout is None else layout.to(torch.device("cpu"))
        return layout if layout is not None and bool(layout.vision[:, : call.width - call.draft].any()) else None

    def _forward(
        self, call: Call, sequences: list[TokenSequence], layers: list[TokenLayer], deepstack: list[Tensor]
    ) -> Forward:
        host, valid, draft = self.host, call.valid if sequences else None, call.draft if sequences else 0
        batch = Batch(sequences, call.width, valid, draft)
        if not self._compiled():
            forward = Forward(batch, layers, host.facts, deepstack)
            forward.decoding = self._decoding
            return forward
        return CompiledForward(batch, layers, host.facts, deepstack, family=host.family, strategies=self.strategies)

    def _compiled(self) -> bool:
        return is_compiled([self.host.text, *self.host.layers])

    def _after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the decoder, also when it raised: drop the state, and write the trace."""
        if self._local.refused:
            self._local.refused = False
            return
        if output is None:  # The forward raised, and the hook is called all the same.
            forget_plans(calls.named(module, args, kwargs).get("past_key_values"))
        forward = self._active.current()
        if forward is None:
            return
        self._end()
        if isinstance(forward, DecodeStep):
            return
        if output is None:
            forward.undo()
        elif forward.sequences:
            try:
                self._receive(forward)
            except BaseException:
                forward.undo()
                raise

    def _end(self) -> None:
        """The forward of this thread has ended."""
        self._active.end()
        self._leases.end("decoder")

    def _receive(self, forward: Forward) -> None:
        """Hold a forward that has ended to what it had to do, and write its trace."""
        self._fresh = False
        total = [s.total for s in forward.sequences]
        layers = self.shape.layers
        forward.finish()
        check_ran(self.host.family, layers, forward.sequences)
        trace = receipt(
            forward,
            self.pipeline.name,
            str(self.budget) if self.budget else "none",
            self.host.cache_bytes,
            sum(cost.prefill_flops(self.shape, [n] * layers, [n] * layers, 0) for n in total),
            self._head_flops,
        )
        check_spent(self.pipeline.name, self.budget, forward.sequences)
        self._keep(self.host.corrected(trace))

    def _after_head(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the head: how many positions had logits made."""
        if self._local.await_head and self._local.trace is not None:
            self._local.await_head = False
            self._local.trace.head_tokens = int(output.shape[1])
            if self._local.light is not None:
                self._local.light.head_tokens = self._local.trace.head_tokens
