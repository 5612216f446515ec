"""The way into attention: an attention function of our own around each of transformers'.

`tokenreduce_<impl>` is registered in both of transformers' interfaces (in the first alone, the mask would become None and
padding would be ignored). It does what `<impl>` does, except for layers of the forward that runs in this thread. A decoder's
configuration names it as long as a pipeline is attached, because a graph compiled without one is told apart by that name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tokenreduce.engine.cache.layers import Joined, TokenLayer, running, shared
from tokenreduce.errors import UnsupportedError

Attention = Callable[..., tuple[Tensor, Tensor | None]]
PREFIX = "tokenreduce_"
below: dict[str, Attention | None] = {}
"""What each implementation was when a pipeline was last attached; None for what belongs to the family, as eager attention."""
UNREADABLE = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention that is not a softmax of scaled products alone: importance is not defined there."""
ATTACHED = "_tokenreduce_attached"
"""An attribute that attention modules have while a pipeline is attached."""


@dataclass(frozen=True)
class DecoderFacts:
    """What a forward has to know of the decoder whose attention comes by."""

    modules: Mapping[int, int]
    """id of each attention module, and its layer."""
    attention: Mapping[int, nn.Module]
    """The attention module of each layer."""
    implementation: str
    """Of the attention below the tap, as transformers names it."""
    config: Any
    """The decoder's configuration."""
    group: Any
    """The process group over which the attention heads are sharded; None if they are not."""
    states: Mapping[int, str] = field(default_factory=dict)
    """Layers without attention, and what their KV cache holds (cache.states: STATE or NOTHING)."""


def tapped(implementation: str) -> str:
    """The name of the tap around `implementation`, registered on first use. UnsupportedError without masks that we know."""
    name = PREFIX + implementation
    below[implementation] = _registered(implementation)
    if name not in ALL_ATTENTION_FUNCTIONS:
        if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise UnsupportedError(
                f"attention implementation '{implementation}' makes no masks that token reduction knows"
            )
        AttentionInterface.register(name, _tap(implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _tap(implementation: str) -> Attention:
    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        base = below[implementation] or attention_below(implementation, module)
        # Guards a compiled graph without a pipeline: hooks that come later do not, and models may share one configuration.
        getattr(module, ATTACHED, False)
        forward = running.forward
        layer = None if forward is None or forward.idle else forward.attention_layer(module)
        if forward is None or layer is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        attend = forward.attend
        if torch.compiler.is_compiling() and not forward.traced:
            # Only a part of a layer is compiled.
            attend = torch.compiler.disable(attend)
        return attend(layer, base, module, query, key, value, attention_mask, kwargs)

    return attention


class RowSums:
    """The log-sum-exp of each row of scores, which flash attention on a CPU computes beside its output.

    The output is the very one that would have come without."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def around(self, base: Attention) -> Attention:
        """`base`, watched. A compiled forward knows no dispatch modes."""

        def attention(module: torch.nn.Module, query: Tensor, *arguments: Any, **kwargs: Any) -> Any:
            if query.device.type != "cpu" or torch.compiler.is_compiling():
                return base(module, query, *arguments, **kwargs)
            with _Watch(self.parts):
                return base(module, query, *arguments, **kwargs)

        return attention

    def lse(self, query: Tensor, row: int, places: slice) -> Tensor | None:
        """(H, n) of the queries (B, H, q, d) at `places` of `row`; None where another kernel ran."""
        if len(self.parts) == 1 and len(self.parts[0]) == len(query):
            part = self.parts[0][row]
        elif len(self.parts) == len(query):
            part = self.parts[row][0]
        else:
            return None
        padding = query.shape[2] - part.shape[1]
        return part[:, places.start - padding : places.stop - padding]


class _Watch(TorchDispatchMode):
    def __init__(self, parts: list[Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # In inference mode it arrives whole.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.parts.append(out[1])
        return out


def attention_below(implementation: str, module: torch.nn.Module) -> Attention:
    """The attention function that the tap is around."""
    # Eager attention belongs to the family: its own module has it.
    family = sys.modules[type(module).__module__]
    return _registered(implementation) or family.eager_attention_forward


def _registered(implementation: str) -> Attention | None:
    """What transformers knows as `implementation`. Flash attention of any kind looks up its own name in a module's config."""
    base: Attention | None = ALL_ATTENTION_FUNCTIONS.get(implementation, None)
    if base is None or "flash" not in implementation:
        return base

    def attention(module: torch.nn.Module, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        config = _Changed(module.config, _attn_implementation=implementation)
        return base(_Changed(module, config=config), *arguments, **kwargs)

    return attention


class _Changed:
    """An object with some attributes of its own instead, for those who only read."""

    def __init__(self, whole: Any, **own: Any) -> None:
        self.__dict__.update(own, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def causal_mask(implementation: str, config: Any, query: Tensor, keys: int, valid: Tensor | None) -> Tensor | None:
    """The mask for the last queries of `keys` tokens, as transformers makes it for `implementation`.

    query: (B, H, q, d). valid: (B, keys) bool, False on padding."""
    rows, _, q_length, _ = query.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](  # type: ignore[no-any-return]
        batch_size=rows,
        q_length=q_length,
        kv_length=keys,
        q_offset=keys - q_length,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=valid,
        allow_is_causal_skip=valid is None,  # Else it would ask whether there really is padding.
        use_vmap=False,
        dtype=mask_dtype(query),
        config=config,
        device=query.device,
    )


def mask_dtype(query: Tensor) -> torch.dtype:
    """Of an eager mask: its softmax is in float32, where the least float64 is −inf, and a row of nothing but padding NaN."""
    return torch.float32 if query.dtype == torch.float64 else query.dtype


def attend_by_row(
    base: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Sequence[int],
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Causal attention of a left-padded prefill without a mask: SDPA takes twice as long with one.

    query: (B, H, n, d). starts: the first column of each row that is not padding. Padding attends to nothing and is zero.
    """
    rows, heads, count, _ = query.shape
    out = query.new_zeros(rows, count, heads, value.shape[-1])
    for row, start in enumerate(starts):
        q, k, v = (x[row : row + 1, :, start:] for x in (query, key, value))
        out[row, start:] = base(module, q, k, v, None, **kwargs)[0][0]
    return out, None


def attend_by_position(
    base: Attention,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: TokenLayer,
    implementation: str,
    block: int,
    known: Joined,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention at a layer whose keys were reduced at a `kv` site: what a query sees goes by positions (`layer.seen`).

    query: (B, H, q, d). Works block by block over the queries, so that no q×keys mask is ever whole, with all rows at once. Which
    keys a block can see follows from numbers alone: positions grow by at least one from key to key, so that a window of w
    positions lies within the last w keys. known: what layers of this forward share, masks among it.
    """
    seen, count, held = layer.seen, query.shape[2], key.shape[2]
    assert seen is not None
    if seen.columns is not None:
        sinks, window = seen.columns
        if sinks + window < held:
            key, value = (torch.cat([x[:, :, :sinks], x[:, :, held - window :]], 2) for x in (key, value))
        return base(module, query, key, value, None, **kwargs)
    sinks, window = (0, held) if layer.span is None else layer.limit
    # One output, written block by block: parts put together at the end would hold it twice.
    out = query.new_empty(query.shape[0], count, query.shape[1], value.shape[-1])
    for number, start in enumerate(range(0, count, block)):
        stop = min(start + block, count)
        later = count - stop if seen.borders is None else seen.borders[-1] - seen.borders[number]
        end = held - later
        begin = 0 if seen.borders is not None else max(0, held - count + start - window + 1)
        ahead = min(begin, sinks)
        facts = seen.position, seen.valid, seen.queries, layer.span
        # Layers share a step's one mask. Those of a prefill, all blocks together, would be a mask of queries × keys.
        mask, first = shared(
            known if count <= block else {},
            ("mask", start, begin, end, ahead, implementation),
            facts,
            lambda: _position_mask(layer, slice(start, stop), begin, end, ahead, implementation, query),  # noqa: B023
        )
        k, v = key[:, :, begin:end], value[:, :, begin:end]
        if ahead:
            k, v = (
                torch.cat([x[:, :, :ahead] if first is None else _columns(x, first), part], 2)
                for x, part in ((key, k), (value, v))
            )
        out[:, start:stop] = base(module, query[:, :, start:stop], k, v, mask, **kwargs)[0]
    return out, None


def _position_mask(
    layer: TokenLayer, rows: slice, begin: int, end: int, ahead: int, implementation: str, query: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Mask (B, 1, q, k) for the queries `rows` and the first `ahead` tokens, then the key columns from `begin` to `end`.

    Also (B, ahead) long, the columns of those first tokens, None where they are simply the first. Padding sees all keys, so that
    no row of scores is empty.
    """
    seen = layer.seen
    assert seen is not None
    places, at, first = seen.position[:, begin:end], seen.queries[:, rows, None], None
    real = None if seen.valid is None else seen.valid[:, begin:end]
    if ahead:
        columns = torch.arange(ahead, device=places.device)[None]
        if seen.valid is not None:
            first = columns = (seen.valid.to(torch.uint8).argmax(1, keepdim=True) + columns).clamp(max=end - 1)
        there = columns < begin
        own = seen.position[:, :ahead] if first is None else seen.position.gather(1, first)
        places = torch.cat([own, places], 1)
        if real is not None:
            assert seen.valid is not None
            there = there & seen.valid.gather(1, columns)
            real = torch.cat([there, real], 1)
    allowed = places[:, None] <= at
    if layer.span is not None:
        spans = layer.span[:, :, None, None]
        allowed &= (places[:, None] < spans[:, 0]) | (at - places[:, None] < spans[:, 1])
    if real is not None:
        allowed &= real[:, None]
        allowed |= at < 0
    mask: Tensor = allowed[:, None]
    if implementation == "eager":
        dtype = mask_dtype(query)
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    return mask, first


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Columns (B, n) of keys or values (B, G, k, d)."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
