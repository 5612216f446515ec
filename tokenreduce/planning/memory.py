"""Bytes of a prefill at its worst moment, from a decoder's shape and its token counts per layer, and what fits in a memory.

Integers throughout; no tensor is made. The terms are what transformers holds at once in a prefill of one sequence with sdpa
attention (no N × N matrix), as its allocations show; tests hold them to torch's own storages, `benchmarks` to the resident set.
Not counted: the interpreter, libraries and GPU context, what an allocator keeps back, pixels, and the vision tower's own
activations, which have gone before the decoder begins and shrink if frames are encoded in parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tokenreduce.errors import BudgetError, TokenReduceError
from tokenreduce.planning.account import SPAN_BLOCK
from tokenreduce.planning.cost import DecoderShape, kv_bytes

UNITS = {"b": 1} | {
    f"{letter}{suffix}": base ** (power + 1)
    for power, letter in enumerate("kmgt")
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_AMOUNT = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Peak:
    """What lives at the moment of a prefill that takes most, in bytes."""

    weights: int
    """Bytes of the parameters."""
    inputs: int
    """Bytes of embeddings, rotary tables and what the vision tower left, from beginning to end."""
    kv: int
    """Bytes of keys and values cached by then."""
    activations: int
    """Bytes of everything else."""
    layer: int
    """Where it is; the depth for the LM head."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.inputs + self.kv + self.activations


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as `24GiB` or `8.5 GB`. Raises TokenReduceError."""
    match = _AMOUNT.fullmatch(text)
    scale = UNITS.get(match[2].lower()) if match else None
    amount = int(Fraction(match[1]) * scale) if match and scale else 0
    if amount < 1:
        raise TokenReduceError(
            f"cannot read {text!r:.40} as an amount of memory: write a number above 0 and one of B, KiB, MiB, GiB, TiB, KB, "
            "MB, GB, TB, such as 24GiB"
        )
    return amount


def decoder_parameters(shape: DecoderShape, tied: bool = False) -> int:
    """Parameters of a decoder's matrices and norms; biases, which a shape does not tell, are less than a thousandth.

    tied: the LM head is the embedding. Raises BudgetError for a mixture of experts: a shape counts only those visited.
    """
    if shape.router:
        raise BudgetError("the weights of a mixture of experts cannot be counted from its shape: give its config.json")
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    ffn = (3 if shape.gated else 2) * shape.hidden * shape.ffn
    table = shape.vocab * shape.hidden
    return shape.layers * (attention + ffn + 2 * shape.hidden) + shape.hidden + table * (1 if tied else 2)


def prefill_peak(
    shape: DecoderShape,
    tokens: int,
    attn: Sequence[int],
    ffn: Sequence[int],
    kv: Sequence[int],
    dtype_bytes: int,
    *,
    weights: int = 0,
    held: int = 0,
    read_later: Collection[int] = (),
    spans: Collection[int] = (),
    head_tokens: int = 1,
    eager: bool = False,
) -> Peak:
    """The worst moment of the prefill of one sequence.

    Args:
        tokens: of the input. attn, ffn, kv: tokens that enter each layer's attention and FFN, and that its cache then holds.
        dtype_bytes: of one element, weights, cache and activations alike. weights: their bytes.
        held: elements that live from beginning to end beside the embeddings: vision features (0 for a bare decoder).
        read_later: layers whose queries a stage reads before the next layer's attention. head_tokens: positions with logits.
        spans: layers whose queries see a moving span of keys; another layer that holds fewer than enter merges them.
        eager: attention with N × N scores: the softmax makes a second copy in float32, one lives until the layer ends.
    """
    width, heads, groups = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inputs = (tokens * (width + 2 * shape.head_dim) + held) * dtype_bytes
    wide = (3 if shape.gated else 2) * shape.ffn
    moments: list[Peak] = []

    def moment(layer: int, cached: int, elements: int, exact: int = 0) -> None:
        cache = kv_bytes(shape, kv[:cached], dtype_bytes)
        moments.append(Peak(weights, inputs, cache, elements * dtype_bytes + 2 * exact * max(dtype_bytes, 4), layer))

    before = tokens
    for layer, (a, f) in enumerate(zip(attn, ffn, strict=True)):
        # The model holds the layer's input until it returns; at layer 0 that is the embeddings.
        stream = (before * width if layer else 0) + (a * width if a < before else 0)
        stream += 2 * a * shape.head_dim if a < tokens else 0
        scores = shape.heads * a * a if eager else 0
        # A norm squares and scales in float32, two copies at once.
        moment(layer, layer, stream, exact=a * width)
        # Rotary embedding: the norm's output, queries, keys, values, and the products that become the queries, then the keys.
        rotary = max(4 * heads + 2 * groups, 2 * heads + 5 * groups)
        moment(layer, layer, stream + a * (width + rotary))
        if layer in spans and kv[layer] < a:
            # A block of queries: the keys and values it sees; then distances (int64, three bools) or a mask and all heads' keys.
            seen = min(kv[layer] + SPAN_BLOCK, a)
            making = SPAN_BLOCK * 11 // dtype_bytes
            using = SPAN_BLOCK * (dtype_bytes + 1) // dtype_bytes + (2 * heads if heads != groups else 0)
            block = seen * (2 * groups + max(making, using))
            moment(layer, layer + 1, stream + a * (width + 2 * heads + 2 * groups) + block)
        elif kv[layer] < a:
            # Keys and values side by side, those that stay, and three copies of those averaged into them, in float32.
            update = stream + a * (width + heads + 4 * groups) + 2 * kv[layer] * groups
            moment(layer, layer, update, exact=3 * (a - kv[layer]) * groups)
        if eager:
            softmax = stream + a * (width + 4 * heads) + (scores if dtype_bytes < 4 else 0)
            moment(layer, layer + 1, softmax, exact=scores)
        stream += a * width + (f * width if f < a else 0) + (a * heads if layer in read_later else 0)
        # The norm before the FFN, with the layer's keys and values cached.
        moment(layer, layer + 1, stream + scores, exact=f * width)
        moment(layer, layer + 1, stream + scores + f * (width + wide))
        before = f
    moment(shape.layers, shape.layers, before * width, exact=before * width)
    moment(shape.layers, shape.layers, 2 * before * width + head_tokens * (width + shape.vocab))
    return max(moments, key=lambda peak: peak.total)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1 … `most` for which `fits(n)`, 0 if there is none, where what fits also fits when it is smaller."""
    high = 1
    while high < most and fits(high):
        high *= 2
    low, high = 0, min(high, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
