"""The model that a pipeline is put on: its facts, the hooks around its decoder, its configuration."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from tokenreduce.adapter import FfnPair, ModelAdapter
from tokenreduce.budget import Budget
from tokenreduce.engine.cache.states import TOKENS, contents
from tokenreduce.engine.model import tap
from tokenreduce.engine.model.hooks import Hook, remove_handles
from tokenreduce.engine.model.meter import Measured
from tokenreduce.engine.model.mixers import refuse_model, refuse_sites
from tokenreduce.engine.model.parallel import head_group
from tokenreduce.engine.model.private_names import INTERNAL, prove_names
from tokenreduce.engine.model.probe import prove
from tokenreduce.engine.model.tap import DecoderFacts
from tokenreduce.errors import AttachError, UnsupportedError
from tokenreduce.planning import cost
from tokenreduce.strategy import Strategy
from tokenreduce.trace import Trace


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile made `module` of."""
    return module._modules.get("_orig_mod") or module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and PEFT; UnsupportedError where PEFT's adds tokens to the prompt."""
    model = uncompiled(model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not callable(getattr(model, "get_base_model", None)):
        return model
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UnsupportedError(
                f"{type(model).__name__}: adapter {name} ({kind}) puts tokens of its own before the prompt, which is not "
                "supported; LoRA and other adapters that change weights are"
            )
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return unwrapped(inner)


class EntryPoints(NamedTuple):
    """Bound methods of an attachment, which hooks around the decoder call. Their object is held weakly."""

    before_model: Callable[..., None]
    """(outermost, module, args, kwargs) before each module around the decoder that sees the prompt."""
    before_decoder: Callable[..., tuple[Any, dict[str, Any]] | None]
    """(decoder, args, kwargs); returns the arguments with which it is to run, None for those it was given."""
    after_decoder: Callable[..., None]
    """(decoder, args, kwargs, output); output is None where the decoder raised."""
    after_head: Callable[..., None]
    """(head, args, logits)."""


class Host:
    """A model and its decoder. Holds both weakly, so that a run does not keep its model alive."""

    decoder: weakref.ref[nn.Module]
    """The decoder, as long as it lives."""
    family: str
    """The model's class and its adapter, for messages."""
    config: Any
    """Of the decoder."""
    layers: list[nn.Module]
    """Those of the decoder that it runs, as they are without torch.compile."""
    shape: cost.DecoderShape
    """For costs: what the configuration says, as far as it was measured to be true."""
    unlike: str
    """Why the FLOPs of `shape` are not to be believed; empty if they are."""
    cached: list[int] | None
    """Elements that each layer's KV cache holds per token; None where they were not measured."""
    implementation: str
    """Of the attention below the tap, as transformers names it."""
    facts: DecoderFacts
    """What each forward has to know of the decoder."""
    has_head: bool
    """Whether the model makes logits."""
    turn_ends: tuple[int, ...]
    """Token ids that end a turn of the chat."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        text: Any = uncompiled(adapter.text_model(model))
        self._model, self.decoder, self.adapter = weakref.ref(model), weakref.ref(text), adapter
        self.family = f"{type(model).__name__} ({adapter.name})"
        self.config = text.config
        prove_names(self.family, model, self.config)
        self.layers = [uncompiled(layer) for layer in text.layers[: self.config.num_hidden_layers]]
        refuse_model(self.family, self.config)
        self._shapes, self.unlike = cost.DecoderShape.candidates(self.config)
        self.shape = self._shapes[0]
        self.cached = None
        states = {n: kind for n, kind in enumerate(contents(self.config, len(self.layers))) if kind != TOKENS}
        attention = {
            module: number
            for number, layer in enumerate(self.layers)
            for module in layer.modules()
            if number not in states and getattr(module, "layer_idx", None) is not None and hasattr(module, "config")
        }
        # A copy of an attached model is dense, but its configuration still names the tap.
        self.implementation = str(self.config._attn_implementation).removeprefix(tap.PREFIX)
        self.facts = DecoderFacts(
            {id(module): number for module, number in attention.items()},
            {number: module for module, number in attention.items()},
            self.implementation,
            self.config,
            head_group(self.layers[0]),
            states,
        )
        # Each step of decoding looks: a configuration's own attributes take ten times as long.
        self._settings, self._tapped = vars(self.config), tap.PREFIX + self.implementation
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        self._head = weakref.ref(head) if isinstance(head, nn.Module) else None
        self.has_head = self._head is not None
        self.turn_ends = tuple(adapter.turn_ends(model))
        self._handles: list[Any] = []

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        model = self._model()
        assert model is not None, "a hook ran, so its model lives"
        return model

    @property
    def text(self) -> nn.Module:
        """Its decoder."""
        text: nn.Module | None = self.decoder()
        assert text is not None, "a hook ran, so its model lives"
        return text

    @property
    def cache_bytes(self) -> int:
        """Bytes of one element of the KV cache as the model is now: `model.to(dtype)` may come after attaching."""
        return next(self.text.parameters()).element_size()

    def check_decoder(self, model: nn.Module) -> None:
        """AttachError where `model`, the whole one, has another decoder now: it would run dense, and say nothing."""
        text = uncompiled(self.adapter.text_model(model))
        now: Any = text.layers
        if text is not self.text or any(a is not uncompiled(b) for a, b in zip(self.layers, now, strict=False)):
            raise AttachError(
                f"{self.family}: its decoder or a layer of it was replaced while a pipeline is attached; detach first"
            )

    def check_depth(self) -> None:
        """UnsupportedError where the decoder is to run fewer layers than it has, with its depth restored."""
        depth = len(self.layers)
        if self._settings.get("num_hidden_layers", depth) != depth:
            # The early exit of assisted decoding lowers it for its drafts, and does not raise it again after an error.
            self.config.num_hidden_layers = depth
            raise UnsupportedError(
                f"{self.family}: leaving the decoder early (assistant_early_exit) is not supported while a pipeline is attached"
            )

    @property
    def tapped(self) -> bool:
        """Whether the decoder's attention goes through the tap."""
        return bool(self._settings[INTERNAL] == self._tapped)

    def recomputable(self) -> list[nn.Module]:
        """The modules that may be asked to recompute their forward for a gradient."""
        return [self.model, self.text, *self.layers]

    def pairs(self, numbers: list[int]) -> dict[int, FfnPair]:
        """Where the FFN of each of these layers is. UnsupportedError where a layer has no such point."""
        pairs = {}
        for number in numbers:
            pair = self.adapter.ffn_pair(self.layers[number])
            if pair is None:
                raise UnsupportedError(
                    f"{self.family}: layer {number} has no point between attention and FFN; stages at site "
                    "pre_ffn cannot run in it"
                )
            pairs[number] = pair
        return pairs

    def install(
        self, entries: EntryPoints, pairs: dict[int, FfnPair], strategies: Sequence[Strategy], budget: Budget | None
    ) -> None:
        """Tap the attention, prove `pairs`, and put on the hooks; all undone again if anything fails."""
        tap.tapped(self.implementation)
        try:
            with _tapping:
                _hosts.add(self)
                # The public setter would also rename the sub-configs' attention; only the decoder's own is ours to change.
                self.config._attn_implementation_internal = self._tapped
            measured = prove(self.text, self.family, self.implementation, self.layers, pairs, self.facts.modules)
            refuse_sites(self.family, self.facts.states, strategies, len(self.layers))
            reading = [strategy.name for strategy in strategies if strategy.capabilities.attention]
            if reading and measured.beside:
                raise UnsupportedError(
                    f"{self.family}: {reading[0]} reads attention, and importance is not defined for attention with "
                    f"{', '.join(measured.beside)}"
                )
            self._learn(measured, budget)
            self._hook(entries)
            for module in self.facts.attention.values():
                module.__dict__[tap.ATTACHED] = True
        except BaseException:
            self.uninstall()
            raise

    def _learn(self, measured: Measured, budget: Budget | None) -> None:
        """Believe what was measured. UnsupportedError for a budget in a unit that `shape` gets wrong."""
        if self.facts.group is not None:
            if self.unlike:  # One rank does not see the whole.
                raise UnsupportedError(self.unlike)
            return
        self.cached = measured.cached
        if getattr(self.config, "quantization_config", None) is None:  # Its kernels are in nobody's registry.
            reasons = [measured.mismatch(shape) for shape in self._shapes]
            best = reasons.index("") if "" in reasons else 0
            self.shape, self.unlike = self._shapes[best], reasons[best]
        wrong, unit, found = "", budget.unit if budget is not None else "tokens", set(self.cached)
        if unit == "flops":
            wrong = self.unlike
        elif unit == "kv_cache" and found != {self.shape.cached} and (len(found) > 1 or not budget.relative):  # type: ignore[union-attr]
            counts = " or ".join(f"{count:,}" for count in sorted(found))
            wrong = (
                f"its config says {self.shape.cached:,} cached numbers per token in a layer, its layers hold {counts}"
            )
        if wrong:
            raise UnsupportedError(
                f"{self.family}: {wrong}; a budget in {unit} cannot be solved for it, one in tokens can"
            )

    def corrected(self, trace: Trace) -> Trace:
        """The receipt as far as it is true of this model: bytes of the cache as measured, FLOPs only if they are known."""
        if self.cached is not None:
            for number, layer in enumerate(trace.layers):
                held = int(layer.tokens.sum()) * self.cached[layer.layer] * self.cache_bytes
                trace.layers[number] = replace(layer, kv_bytes=held)
        return trace.without_flops(self.unlike) if self.unlike else trace

    def uninstall(self) -> None:
        """Take the hooks off and restore the configuration."""
        remove_handles(self._handles)
        with _tapping:
            _hosts.discard(self)
            if not any(host.config is self.config for host in _hosts):
                self.config._attn_implementation_internal = self.implementation
        for module in self.facts.attention.values():
            module.__dict__.pop(tap.ATTACHED, None)

    def _hook(self, entries: EntryPoints) -> None:
        model, text, handles = self.model, self.text, self._handles
        handles.append(text.register_forward_pre_hook(Hook(entries.before_decoder, text), with_kwargs=True))
        handles.append(
            text.register_forward_hook(Hook(entries.after_decoder, text), with_kwargs=True, always_call=True)
        )
        for outer in (model, getattr(model, "model", None)):  # The modules around the decoder that see the prompt.
            if isinstance(outer, nn.Module) and outer is not text:
                handles.append(
                    outer.register_forward_pre_hook(Hook(entries.before_model, outer, outer is model), with_kwargs=True)
                )
        head = None if self._head is None else self._head()
        if head is not None:
            handles.append(head.register_forward_hook(Hook(entries.after_head, head)))


_hosts: weakref.WeakSet[Host] = weakref.WeakSet()
"""Those that have a pipeline now. Models may share a configuration: it names the tap until the last one has none."""
_tapping = threading.Lock()
