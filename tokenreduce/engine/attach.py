"""Putting a pipeline on a model and taking it off again, bit for bit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce import cost, plugins
from tokenreduce.adapter import FfnPair, ModelAdapter, Prompt
from tokenreduce.budget import Account, Budget
from tokenreduce.engine import tap
from tokenreduce.engine.cache import adopt, running, token_layers
from tokenreduce.engine.forward import Forward
from tokenreduce.engine.hooks import Hook
from tokenreduce.engine.probe import probe
from tokenreduce.engine.schedule import Conductor, check
from tokenreduce.engine.sequence import Sequence
from tokenreduce.errors import AttachError, LayoutError, PipelineError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.pipeline import Pipeline, build, load_pipeline
from tokenreduce.strategy import Site
from tokenreduce.trace import Trace

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Run]] = weakref.WeakKeyDictionary()


class Run:
    """A pipeline attached to a model. Made by `attach` or `reduce`; `detach` takes it off.

    trace: the receipt of this thread's last prefill with vision tokens (of any thread's, if this one ran none).
    layout: the explicit layout, if any; set a new one before a later turn that brings vision tokens of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Pipeline,
        *,
        layout: TokenLayout | None = None,
        adapter: ModelAdapter | None = None,
    ) -> None:
        self.pipeline, self.budget = pipeline, pipeline.budget
        self.strategies = build(pipeline)
        self.adapter = adapter or _adapter_for(model, explicit=layout is not None)
        self._model, self._text = weakref.ref(model), self.adapter.text_model(model)
        self._layout, self._fresh = layout, layout is not None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._active: dict[int, Forward] = {}
        self._handles: list[Any] = []
        self._layer_handles: list[Any] = []
        self._last: Trace | None = None
        self.attached = False
        if self.strategies:
            self._prepare(model)

    # The user's side --------------------------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """See the class. AttachError if nothing has run yet."""
        trace = getattr(self._local, "trace", None) or self._last
        if trace is None:
            raise AttachError(
                f"pipeline {self.pipeline.name} has no trace yet: no forward with vision tokens has run"
                if self.strategies
                else "an empty pipeline adds no hook to the model, and so it has no trace"
            )
        return trace

    @property
    def layout(self) -> TokenLayout | None:
        """The explicit layout."""
        return self._layout

    @layout.setter
    def layout(self, layout: TokenLayout | None) -> None:
        self._layout, self._fresh = layout, layout is not None

    def detach(self) -> None:
        """Take every hook off and restore the model's configuration. A second call does nothing."""
        with self._lock:
            for handle in self._layer_handles + self._handles:
                handle.remove()
            self._layer_handles, self._handles = [], []
            self._active.clear()
        if self.attached:
            self.attached = False
            self._config._attn_implementation_internal = self._implementation
            _attached.pop(self._text, None)
        self._local.prompt = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # Attaching --------------------------------------------------------------------------------------------------------

    def _prepare(self, model: nn.Module) -> None:
        text = self._text
        holder = _attached.get(text)
        if holder is not None and (other := holder()) is not None:
            raise AttachError(
                f"pipeline {other.pipeline.name} is attached to this model already; detach it first (several stages belong in "
                "one pipeline)"
            )
        self._family = f"{type(model).__name__} ({self.adapter.name})"
        config: Any = text.config
        self._config = config
        self._layers = list(text.layers)[: config.num_hidden_layers]  # type: ignore[arg-type, call-overload]
        _refuse_config(self._family, config)
        self.shape = cost.DecoderShape.from_config(config)
        self._sites = {site for strategy in self.strategies for site in strategy.schedule(len(self._layers))}
        if self.budget is not None and not any(strategy.needs_budget() for strategy in self.strategies):
            check(self.strategies, Account(self.budget, self.shape, 1, 1))
        if self.budget is None:
            needy = [strategy.name for strategy in self.strategies if strategy.needs_budget()]
            if needy:
                raise PipelineError(f"{needy[0]} solves its count from a budget: give `budget`, or the stage's `keep`")
        self._cache_bytes = next(text.parameters()).element_size()
        if self._layout is not None:
            for row in self._layout.reducible(self.pipeline.newlines, self.pipeline.wrappers):
                if bool(row.any()):
                    check(self.strategies, self._account(len(row), int(row.sum())))
        self._modules = {
            id(module): number
            for number, layer in enumerate(self._layers)
            for module in layer.modules()
            if getattr(module, "layer_idx", None) is not None and hasattr(module, "config")
        }
        ffn_layers = sorted({site.layer for site in self._sites if site.kind == "pre_ffn"})
        self._pairs: dict[int, FfnPair | None] = {l: self.adapter.ffn_pair(self._layers[l]) for l in ffn_layers}
        self._implementation = str(config._attn_implementation)
        if self._implementation.startswith(tap.PREFIX):
            self._implementation = self._implementation.removeprefix(tap.PREFIX)
        name = tap.tapped(self._implementation)
        # The setter would also rename the sub-configs' attention; only the decoder's own is ours to change.
        config._attn_implementation_internal = name
        try:
            probe(text, self._family, self._layers, self._pairs, self._modules)
        except BaseException:
            config._attn_implementation_internal = self._implementation
            raise
        self.attached = True
        _attached[text] = weakref.ref(self)
        self._hook(text, "_begin", pre=True)
        self._hook(text, "_end", always=True)
        for outer in _outer(model, text):
            self._hook(outer, "_note_prompt", pre=True)
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        self._has_head = isinstance(head, nn.Module)
        if isinstance(head, nn.Module):
            self._handles.append(head.register_forward_hook(Hook(self, "_note_head", head)))

    def _account(self, total: int, reducible: int) -> Account:
        return Account(self.budget, self.shape, total, reducible, self._cache_bytes)

    def _hook(self, module: nn.Module, method: str, pre: bool = False, always: bool = False) -> None:
        hook = Hook(self, method, module)
        if pre:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always))

    def _hook_layers(self) -> None:
        """Hooks of the layers: there only while a forward reduces, because permanent ones cost 0.5 ms per decode step."""
        handles = self._layer_handles
        for number, layer in enumerate(self._layers):
            handles.append(layer.register_forward_pre_hook(Hook(self, "_enter_layer", layer, number), with_kwargs=True))
            pair = self._pairs.get(number)
            if pair is not None:
                entry, exit_ = pair.entry, pair.exit
                handles.append(entry.register_forward_pre_hook(Hook(self, "_enter_ffn", entry, number)))
                handles.append(exit_.register_forward_hook(Hook(self, "_leave_ffn", exit_)))
            # Before other people's hooks, so that they see the layer's real output.
            handles.append(layer.register_forward_hook(Hook(self, "_leave_layer", layer, number), prepend=True))

    # One forward ------------------------------------------------------------------------------------------------------

    def _note_prompt(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._local.prompt = Prompt(ids, kwargs.get("position_ids"), kwargs.get("attention_mask"), kwargs)
        if kwargs.get("labels") is not None:
            raise UnsupportedError(
                "labels are not supported while a pipeline is attached: the logits are those of the kept tokens"
            )

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        stale = self._active.get(threading.get_ident())
        if stale is not None:  # The last forward of this thread was broken off by Ctrl-C.
            self._release()
        x = kwargs.get("inputs_embeds")
        if x is None:
            x = kwargs.get("input_ids", args[0] if args else None)
        assert isinstance(x, Tensor)
        batch, width = x.shape[:2]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt, self._local.prompt = getattr(self._local, "prompt", None), None
        layout = self._find_layout(prompt, kwargs, batch, width, past, x.device)
        held = token_layers(cache)
        if layout is None:
            if any(layer.reduced for layer in held):
                self._refuse_call(kwargs, past + width)
                self._start(self._forward(kwargs, [], held, width, None))
            return None
        self._refuse_call(kwargs, past + width)
        mask = kwargs.get("attention_mask")
        valid = None
        if mask is not None and width > 1:
            valid = mask[:, -width:].to(device=x.device, dtype=torch.bool)
            valid = None if bool(valid.all()) else valid
        sequences = self._sequences(layout, valid)
        use_cache = kwargs.get("use_cache")
        use_cache = self._config.use_cache if use_cache is None else use_cache
        if cache is None and (use_cache or any(site.kind == "kv" for site in self._sites)):
            from transformers import DynamicCache

            kwargs["past_key_values"] = cache = DynamicCache(config=self._config)
        layers = adopt(cache, len(self._layers)) if cache is not None else []
        forward = self._forward(kwargs, sequences, layers, width, valid)
        with self._lock:
            if not self._layer_handles:
                self._hook_layers()
        self._start(forward)
        return args, kwargs

    def _forward(
        self, kwargs: dict[str, Any], sequences: list[Sequence], layers: Any, width: int, valid: Tensor | None
    ) -> Forward:
        deepstack: list[Tensor] = []
        names = self.adapter.deepstack
        if sequences and names is not None and kwargs.get(names[1]) is not None:
            where, rows = kwargs.pop(names[0]), kwargs.pop(names[1])
            for some in rows:
                whole = some.new_zeros(*where.shape, some.shape[-1])
                whole[where.to(some.device)] = some
                deepstack.append(whole)
        return Forward(
            sequences=sequences,
            layers=layers,
            modules=self._modules,
            implementation=self._implementation,
            config=self._config,
            width=width,
            valid=valid,
            deepstack=deepstack,
        )

    def _start(self, forward: Forward) -> None:
        with self._lock:
            self._active[threading.get_ident()] = forward
        running.forward = forward

    def _release(self) -> None:
        running.forward = None
        with self._lock:
            self._active.pop(threading.get_ident(), None)
            # Another thread's forward may still need the layers' hooks.
            if not any(forward.sequences for forward in self._active.values()):
                for handle in self._layer_handles:
                    handle.remove()
                self._layer_handles = []

    def _current(self) -> Forward | None:
        forward = self._active.get(threading.get_ident())
        return forward if forward is not None and forward.sequences else None

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._active.get(threading.get_ident())
        if forward is None:
            return
        self._release()
        if output is None or not forward.sequences:  # None: the forward raised, and the hook is called all the same
            return
        shape = self.shape
        total = [s.total for s in forward.sequences]
        dense = sum(cost.prefill_flops(shape, [n] * shape.layers, [n] * shape.layers, 0) for n in total)
        trace = forward.finish(
            self.pipeline.name,
            str(self.budget) if self.budget else "none",
            self._cache_bytes,
            dense,
            cost.head_flops(shape, 1) if self._has_head else 0,
        )
        self._check_budget(forward)
        self._local.trace = self._last = trace
        self._local.await_head = True

    def _check_budget(self, forward: Forward) -> None:
        """No strategy, a plugin's least of all, may spend more than it was given."""
        budget = self.budget
        for sequence in forward.sequences:
            account = sequence.conductor.account
            if budget is None or budget.arithmetic == "released" or not sequence.original_reducible:
                continue
            spent = account.cost(account.attn, account.ffn, account.kv, account.pairs)
            if spent > account.limit:
                raise PipelineError(
                    f"pipeline {self.pipeline.name} held {account.share(spent):.4f} of row {sequence.row}, above its budget {budget}: "
                    "a stage kept more than its allowance"
                )

    def _note_head(self, module: nn.Module, args: Any, output: Any) -> None:
        if getattr(self._local, "await_head", False):
            self._local.await_head = False
            self._local.trace.head_tokens = int(output.shape[1])

    # Layers -----------------------------------------------------------------------------------------------------------

    def _enter_layer(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = self._current()
        if forward is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        changed = forward.visit(Site(number, "pre_attention"), x)
        self._observe(forward)
        x = x if changed is None else changed
        forward.enter_attention(number, x)
        self._observe(forward)
        if forward.index is None:
            return None
        for name, value in kwargs.items():
            known = name in ("hidden_states", "attention_mask", "position_ids", "position_embeddings")
            if not known and isinstance(value, Tensor) and value.dim() > 1 and forward.width in value.shape[:3]:
                raise UnsupportedError(
                    f"{self._family}: its layers take {name}, one per token, which cannot follow reduced tokens"
                )
        kwargs = {**kwargs, "position_embeddings": forward.rotate(kwargs["position_embeddings"])}
        # Positions with gaps would look like packed sequences to flash attention.
        kwargs["position_ids"] = None
        if args:
            return (x, *args[1:]), kwargs
        kwargs["hidden_states"] = x
        return args, kwargs

    def _enter_ffn(self, number: int, module: nn.Module, args: Any) -> Any:
        forward = self._current()
        if forward is None:
            return None
        forward.ffn = forward.visit(Site(number, "pre_ffn"), args[0])
        self._observe(forward)
        return None if forward.ffn is None else (forward.ffn, *args[1:])

    def _leave_ffn(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        forward = self._current()
        if forward is None or forward.ffn is None:
            return None
        # The layer adds what comes back here to the tokens it still has; `_leave_layer` puts the real sum in its place.
        forward.ffn_output = output
        return output.new_zeros(1, 1, output.shape[-1])

    def _leave_layer(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        forward = self._current()
        if forward is None:
            return None
        state = output[0] if isinstance(output, tuple) else output
        if forward.ffn is not None and forward.ffn_output is not None:
            state = forward.ffn + forward.ffn_output
            forward.ffn = forward.ffn_output = None
        state = forward.leave_layer(number, state)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _observe(self, forward: Forward) -> None:
        """Tell the observers what the stages just did."""
        events, forward.unseen = forward.unseen, []
        for event in events:
            plugins.manager().hook.tokenreduce_observe(event=event)

    # Layouts ----------------------------------------------------------------------------------------------------------

    def _find_layout(
        self, prompt: Prompt | None, kwargs: dict[str, Any], batch: int, width: int, past: int, device: torch.device
    ) -> TokenLayout | None:
        """The layout of this forward, None if it has no vision tokens."""
        if self._layout is not None:
            if width != self._layout.shape[1]:
                if past == 0:
                    raise LayoutError(
                        f"the layout given is for {self._layout.shape[1]} tokens, the forward has {width}; chunked prefill is not "
                        "supported, and a new prompt needs its own layout"
                    )
                return None
            if past and not self._fresh:
                return None
            self._fresh = False
            layout: TokenLayout | None = self._layout.expand(batch)
        elif width == 1 and past:
            return None
        elif prompt is None or prompt.input_ids.shape != (batch, width):
            if past == 0 and width > 1:
                raise LayoutError(
                    f"{self._family}: where are the vision tokens? The call gave no input_ids; pass layout=TokenLayout(...) to attach"
                )
            return None
        else:
            positions = kwargs.get("position_ids")
            prompt = Prompt(
                prompt.input_ids,
                prompt.position_ids if positions is None else positions,
                prompt.attention_mask,
                prompt.kwargs,
            )
            model = self._model()
            assert model is not None
            layout = self.adapter.layout(model, prompt)
            if layout is None:
                raise LayoutError(
                    f"{self._family}: this family has no vision tokens of its own; pass layout=TokenLayout(slot=..., frame=...)"
                )
        assert layout is not None
        layout = layout.to(device)
        return layout if bool(layout.vision.any()) else None

    def _sequences(self, layout: TokenLayout, valid: Tensor | None) -> list[Sequence]:
        reducible = layout.reducible(self.pipeline.newlines, self.pipeline.wrappers)
        media = layout.media()
        if valid is not None:
            reducible = reducible & valid
        counts = reducible.sum(1).tolist()
        sequences = []
        for row, count in enumerate(counts):
            if valid is None:
                columns = torch.arange(layout.shape[1], device=reducible.device)
            else:
                columns = valid[row].nonzero().squeeze(1)
                if not bool(valid[row, -1]):
                    raise UnsupportedError("right-padded batches are not supported; pad on the left")
            account = self._account(len(columns), count)
            strategies = self.strategies if count else []
            if count:
                check(strategies, account)
            elif bool((layout.slot[row] >= 0).any()):
                raise LayoutError(
                    f"row {row} has vision tokens, and the pipeline protects all of them; nothing could fire"
                )
            sequences.append(
                Sequence(
                    row,
                    columns,
                    layout.slot[row, columns],
                    layout.frame[row, columns],
                    media[row, columns],
                    reducible[row, columns],
                    count,
                    Conductor(strategies, account),
                )
            )
        return sequences

    def _refuse_call(self, kwargs: dict[str, Any], length: int) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedError(
                f"{self._family}: a prepared attention mask ({type(mask).__name__}) is not supported; pass the 2-D mask of padding"
            )
        window = getattr(self._config, "sliding_window", None)
        if window and getattr(self._config, "use_sliding_window", True) and length > window:
            raise UnsupportedError(
                f"{self._family}: {length} tokens are beyond its sliding window of {window}, which is not supported"
            )
        text: Any = self._text
        if getattr(text, "gradient_checkpointing", False) and text.training:
            raise UnsupportedError("gradient checkpointing is not supported while a pipeline is attached")


def attach(
    model: nn.Module,
    pipeline: str | Path | dict[str, Any] | Pipeline,
    *,
    budget: Any = None,
    layout: TokenLayout | None = None,
) -> Run:
    """Attach a pipeline to a model until `detach()` of the returned Run, which is a context manager too.

    Args:
        model: an unmodified transformers model of a supported family, or a bare decoder with `layout`.
        pipeline: preset name, path of a YAML file, mapping, or Pipeline.
        budget: overrides the pipeline's: a share in (0, 1] of tokens, or a mapping such as {"flops": 0.25}.
        layout: where the vision tokens of the next prefill are; left out, the family's adapter says it.

    Raises PipelineError, BudgetError, UnsupportedError or AttachError before anything has run.
    """
    loaded = load_pipeline(pipeline)
    if budget is not None:
        loaded = loaded.model_copy(update={"budget": Budget.parse(budget)})
    return Run(model, loaded, layout=layout)


@contextmanager
def reduce(
    model: nn.Module,
    pipeline: str | Path | dict[str, Any] | Pipeline,
    *,
    budget: Any = None,
    layout: TokenLayout | None = None,
) -> Iterator[Run]:
    """`attach` for the length of a `with` block; undone on exit, also after an exception. Arguments as for `attach`."""
    run = attach(model, pipeline, budget=budget, layout=layout)
    try:
        yield run
    finally:
        run.detach()


def _adapter_for(model: nn.Module, explicit: bool) -> ModelAdapter:
    """The first adapter that matches, a third party's before ours; with an explicit layout any decoder will do."""
    adapters = [cls() for cls in plugins.adapters()]
    for adapter in adapters:
        if adapter.matches(model):
            return adapter
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnsupportedError(
        f"no adapter for model type '{kind}'{'' if explicit else ' (nor an explicit layout)'}; supported families: "
        f"{', '.join(sorted(adapter.name for adapter in adapters))}; docs/adapters.md shows how to write one"
    )


def _outer(model: nn.Module, text: nn.Module) -> list[nn.Module]:
    """The modules around the decoder that see the prompt."""
    base = getattr(model, "model", None)
    outer = [model, base] if isinstance(base, nn.Module) else [model]
    return [module for module in outer if module is not text]


def _refuse_config(family: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds == {"sliding_attention"} and window:
        kinds = set()  # Like full attention up to the window's length, which every call is held to.
    if kinds:
        raise UnsupportedError(
            f"{family}: its decoder has {', '.join(sorted(kinds))} layers, whose state does not follow reduced tokens; not supported"
        )
