"""The identity probe: proves on the real layers what an adapter says about them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache

from tokenreduce.adapter import FfnPair
from tokenreduce.engine.cache.layers import Activity, running
from tokenreduce.engine.cache.states import TOKENS as HOLDS_TOKENS
from tokenreduce.engine.cache.states import contents
from tokenreduce.engine.model.meter import Measured, Meter
from tokenreduce.engine.model.tap import UNREADABLE
from tokenreduce.errors import UnsupportedError, one_line

TOKENS = 3


class _Spy(Activity):
    """Stands in for a Forward during the probe and notes which layers' attention comes by."""

    def __init__(self, modules: Mapping[int, int], meter: Meter) -> None:
        self.modules, self.meter, self.seen, self.beside = modules, meter, set[int](), set[str]()

    def attention_layer(self, module: nn.Module) -> int | None:
        return self.modules.get(id(module))

    def attend(
        self,
        layer: int,
        base: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: Any,
    ) -> Any:
        self.seen.add(layer)
        self.beside |= {name for name in UNREADABLE if kwargs.get(name) is not None}
        before = self.meter.flops
        with _disable_current_modes():  # The meter counts it by its shapes; flex attention would not run under one.
            out = base(module, query, key, value, mask, **kwargs)
        self.meter.attention(layer, query, value, before)
        return out


_proved: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Measured]] = weakref.WeakKeyDictionary()


def prove(
    text: nn.Module,
    family: str,
    implementation: str,
    layers: Sequence[nn.Module],
    pairs: Mapping[int, FfnPair],
    modules: Mapping[int, int],
) -> Measured:
    """`prove_decoder`, but only once for a decoder, as long as its modules, their forwards and their hooks are the same.

    The probe reads all weights, as a decode step does; a pipeline attached for every request should not pay for it.
    """
    facts = (implementation, tuple(pairs), tuple(map(_likeness, text.modules())))
    proved = _proved.setdefault(text, {})
    if facts not in proved:
        proved[facts] = prove_decoder(text, family, layers, pairs, modules)
    return proved[facts]


def _likeness(module: nn.Module) -> tuple[Any, ...]:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return id(module), type(module).forward, id(module.__dict__.get("forward")), tuple(map(id, hooks))


def prove_decoder(
    text: nn.Module,
    family: str,
    layers: Sequence[nn.Module],
    pairs: Mapping[int, FfnPair | None],
    modules: Mapping[int, int],
) -> Measured:
    """Run three random tokens through the decoder and refuse the model by name unless

    - every layer's attention goes through transformers' attention interface, and
    - in every layer of `pairs`, the output is x + y bit for bit, x being what the pair's entry read and y what its exit gave.

    Returns what they cost.
    """
    for number, pair in pairs.items():
        if pair is None:
            raise UnsupportedError(
                f"{family}: layer {number} has no point between attention and FFN; stages at site pre_ffn cannot run in it"
            )
    seen: dict[int, dict[str, Tensor]] = {number: {} for number in pairs}
    handles = []
    for number, pair in pairs.items():
        assert pair is not None
        note = seen[number]
        handles.append(
            pair.entry.register_forward_pre_hook(lambda m, a, note=note: note.__setitem__("x", a[0].clone()))
        )
        handles.append(
            pair.exit.register_forward_hook(lambda m, a, o, note=note: note.__setitem__("y", _state(o).clone()))
        )
        handles.append(
            layers[number].register_forward_hook(lambda m, a, o, note=note: note.__setitem__("out", _state(o).clone()))
        )
    meter, cache = Meter(), DynamicCache(config=text.config)  # type: ignore[arg-type]
    spy = _Spy(modules, meter)
    handles += meter.watch(layers)
    modes = [(module, module.training) for module in text.modules()]
    tables = [(m, dict(m._buffers), _counts(m)) for m in text.modules() if m._non_persistent_buffers_set]
    before = running.forward
    try:
        text.eval()
        running.forward = spy
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), meter:
            text(inputs_embeds=_noise(text), past_key_values=cache, use_cache=True)
    except ValueError as error:  # MiniMax: a cache of its own.
        raise UnsupportedError(
            f"{family}: its decoder does not run on a plain DynamicCache: {one_line(error)}"
        ) from error
    finally:
        running.forward = before
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        for (
            module,
            buffers,
            counts,
        ) in tables:  # Rotary tables that grow with the input (dynamic NTK) begin anew with a short one.
            module._buffers.update(buffers)
            vars(module).update(counts)
    without = {number for number, what in enumerate(contents(text.config, len(layers))) if what != HOLDS_TOKENS}
    missing = sorted(set(range(len(layers))) - spy.seen - without)
    if missing:
        raise UnsupportedError(
            f"{family}: the attention of layer {missing[0]} does not go through transformers' attention interface; its masks "
            "could not be corrected"
        )
    for number, note in seen.items():
        if set(note) == {"x", "y", "out"} and not all(bool(note[part].isfinite().all()) for part in ("x", "y", "out")):
            raise UnsupportedError(_not_finite(family, text, number, note))
        if set(note) != {"x", "y", "out"} or not torch.equal(note["x"] + note["y"], note["out"]):
            raise UnsupportedError(
                f"{family}: layer {number} is not x + FFN(x) with the pair its adapter names, so stages at site pre_ffn would be "
                "silently wrong; state the right pair in the adapter's ffn_pair(), or use stages at pre_attention"
            )
    return meter.measured(TOKENS, cache, sorted(spy.beside))


def _not_finite(family: str, text: nn.Module, number: int, note: Mapping[str, Tensor]) -> str:
    """Why nothing can be proved of a layer: where the first NaN or infinity is, or where it came up."""
    for name, tensor in (*text.named_parameters(), *text.named_buffers()):
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            return (
                f"{family}: {kind} values are in its weights, first in {name}, so that its answers mean nothing; load the "
                "checkpoint again, or get a whole copy of it"
            )
    where = "what comes into" if not bool(note["x"].isfinite().all()) else "what comes out of"
    return (
        f"{family}: {where} the FFN of layer {number} is not finite (NaN or infinite) in {note['out'].dtype}, though all weights "
        "are; load it in a wider dtype, such as bfloat16 or float32"
    )


def _counts(module: nn.Module) -> dict[str, Any]:
    """What a module has noted of the inputs that it has seen."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, Tensor))}


def _state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _noise(text: nn.Module) -> Tensor:
    """Three random token states where the decoder expects its embeddings."""
    weight = text.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    device = weight.device
    if device.type == "meta":
        hook = getattr(text, "_hf_hook", None)
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, TOKENS, weight.shape[1], generator=generator)
    return noise.to(device=device, dtype=weight.dtype)
