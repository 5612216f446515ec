"""FLOPs and bytes of a decoder, from its shape and its token counts per layer. Integers throughout; no tensor is made.

Three forms of the same count:

- `exact`: what torch.utils.flop_counter.FlopCounterMode counts on a prefill: 2 per multiply-add, every matrix product
  of the true architecture (grouped-query projections, gated FFN, LM head), attention over the full square.
- `causal`: the same with the (query, key) pairs a causal kernel works on, N(N+1)/2 of the N².
- `paper`: Eq. 5 of the FrameFusion paper, F(N_l, N_{l+1}) = 4 N_l D² + 2 N_l² D + 3 N_{l+1} D M. It counts a
  multiply-add as one, takes the key and value projections to be as wide as the model, and has no LM head.

All counts are for one sequence. A padded batch costs its padded length, times its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tokenreduce.config.yaml_source import short
from tokenreduce.errors import BudgetError, UnsupportedError, nearest, one_line
from tokenreduce.ops.blocks import query_block
from tokenreduce.planning.model_config import MOST_LAYERS, MOST_WIDTH, MOST_WORDS, check_config, read_config

Form = Literal["exact", "causal", "paper"]
FORMS: tuple[str, ...] = get_args(Form)

REQUIRED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "ffn": "intermediate_size",
}
"""Our facts that every config states itself, and what it calls them."""

UNGATED = ("apertus", "arcee", "gpt_neox", "nemotron", "persimmon", "phi", "starcoder2")
UNLIKE = (
    *("first_k_dense_replace", "interleave_moe_layer_step", "mlp_only_layers"),
    *("moe_num_shared_experts", "n_shared_experts", "shared_expert_intermediate_size", "shared_intermediate_size"),
    "kv_lora_rank",
)
"""Fields that mean, where set: experts in some layers only, shared experts, another width of keys and values."""
OTHER = ("mamba_d_state", "num_kv_shared_layers")
"""Fields that mean another kind of layer or cache."""


@dataclass(frozen=True)
class DecoderShape:
    """The widths of a decoder that decide its cost, all in numbers of elements."""

    layers: int
    """Decoder layers, all alike."""
    hidden: int
    """D, width of the residual stream."""
    ffn: int
    """M, width of the FFN that one token passes through; the sum over those it visits in a mixture of experts."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads, fewer than `heads` in grouped-query attention."""
    head_dim: int
    """Width of one head; heads · head_dim need not be `hidden`."""
    vocab: int
    """Rows of the LM head."""
    gated: bool = True
    """The FFN has three matrices (gate, up, down) instead of two."""
    router: int = 0
    """Experts that a router scores for each token, 0 without a mixture of experts."""

    @property
    def cached(self) -> int:
        """Elements of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("gated", "router") else 1
            most = MOST_LAYERS if field.name == "layers" else MOST_WORDS if field.name == "vocab" else MOST_WIDTH
            if not isinstance(value, int) or not least <= value <= most:
                raise UnsupportedError(
                    f"decoder shape: {field.name} must be a whole number of {least} to {most:,}, got {short(value)}"
                )
        if self.heads % self.kv_heads:
            raise UnsupportedError(
                f"decoder shape: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly"
            )

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """The shape that a configuration describes.

        config: a transformers config (of the decoder, or of a composite around it), a dict of the same fields, or the
        path of a `config.json` or of the folder that holds one. Raises UnsupportedError where a fact is missing, or
        where the layers are not alike (shared experts, latent or linear attention), naming which.
        """
        return _shape(_facts(config))

    @classmethod
    def candidates(cls, config: Any) -> tuple[list[DecoderShape], str]:
        """As `from_config`, where a model is there to be measured: the shapes that it may have, and what `from_config` misses.

        A token budget needs no more of them than how many layers there are."""
        facts = _facts(config)
        try:
            return [_shape(facts)], ""
        except UnsupportedError as error:
            return [_shape(facts, gated) for gated in (True, False)], str(error)


def attention_pairs(tokens: int, kv_tokens: int | None = None, form: Form = "exact") -> int:
    """(query, key) pairs that one head works on: `tokens` queries, the last of `kv_tokens` keys (default: no others).

    Full for `exact` and `paper`; for `causal` each query sees the keys up to itself.
    """
    _known(form)
    keys = tokens if kv_tokens is None else kv_tokens
    if form == "causal":
        return tokens * (keys - tokens) + tokens * (tokens + 1) // 2
    return tokens * keys


def span_pairs(tokens: int, sinks: int, window: int) -> int:
    """(query, key) pairs where each of `tokens` sees the first `sinks` and the last `window` up to and with itself."""
    most = sinks + window
    ramp = min(tokens, most)
    return ramp * (ramp + 1) // 2 + (tokens - ramp) * most


def attention_flops(shape: DecoderShape, tokens: int, pairs: int, form: Form = "exact") -> int:
    """Query, key, value and output projections of `tokens`, and the two products over `pairs` (query, key) pairs."""
    _known(form)
    if form == "paper":
        return 4 * tokens * shape.hidden**2 + 2 * pairs * shape.hidden
    projections = 2 * tokens * shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return projections + 4 * pairs * shape.heads * shape.head_dim


def ffn_flops(shape: DecoderShape, tokens: int, form: Form = "exact") -> int:
    """The FFN's matrices, and a router's where there is one, on `tokens`."""
    _known(form)
    if form == "paper":
        return 3 * tokens * shape.hidden * shape.ffn
    return 2 * tokens * shape.hidden * ((3 if shape.gated else 2) * shape.ffn + shape.router)


def layer_flops(
    shape: DecoderShape,
    attn_tokens: int,
    ffn_tokens: int,
    *,
    kv_tokens: int | None = None,
    pairs: int | None = None,
    form: Form = "exact",
) -> int:
    """FLOPs of one layer.

    attn_tokens: tokens that enter its attention (N_l). ffn_tokens: tokens that enter its FFN (N_{l+1}; fewer where a
    stage acts between the two). kv_tokens: keys in sight where they are more than that: earlier turns, or decoding.
    pairs: the (query, key) pairs themselves, where they follow neither form (`span_pairs`); wins over kv_tokens.
    """
    pairs = attention_pairs(attn_tokens, kv_tokens, form) if pairs is None else pairs
    return attention_flops(shape, attn_tokens, pairs, form) + ffn_flops(shape, ffn_tokens, form)


def head_flops(shape: DecoderShape, tokens: int, form: Form = "exact") -> int:
    """FLOPs of the LM head on `tokens` positions; 0 in the paper's form, which leaves it out."""
    _known(form)
    return 0 if form == "paper" else 2 * tokens * shape.hidden * shape.vocab


def prefill_flops(
    shape: DecoderShape,
    attn: Sequence[int],
    ffn: Sequence[int],
    head_tokens: int = 1,
    form: Form = "exact",
    *,
    kv: Sequence[int | None] | None = None,
    pairs: Sequence[int | None] | None = None,
) -> int:
    """FLOPs of a whole forward.

    attn, ffn: tokens that enter the attention and the FFN of each layer, one number per layer. head_tokens: positions
    the LM head computes (1 under `generate`, all in a plain forward). kv, pairs: per layer, see `layer_flops`; None
    where it follows from `attn`. Raises BudgetError where a list is not as long as the decoder is deep.
    """
    none: Sequence[int | None] = [None] * shape.layers
    columns = (attn, ffn, none if kv is None else kv, none if pairs is None else pairs)
    for name, column in zip(("attn", "ffn", "kv", "pairs"), columns, strict=True):
        if len(column) != shape.layers:
            raise BudgetError(f"prefill_flops: {name} has {len(column)} numbers, the decoder has {shape.layers} layers")
    layers = (layer_flops(shape, a, f, kv_tokens=k, pairs=p, form=form) for a, f, k, p in zip(*columns, strict=True))
    return sum(layers) + head_flops(shape, head_tokens, form)


def similarity_flops(shape: DecoderShape, tokens: int) -> int:
    """Eq. 6: cosine similarity of `tokens` tokens with one other token each, 3 N D (a dot product and two norms)."""
    return 3 * tokens * shape.hidden


def importance_flops(heads: int, width: int, n: int, m: int, queries: int) -> int:
    """Multiply-adds × 2 that `ops.attention.importance` spends on scores without `lse` (the softmax is not counted).

    heads: query heads, `width` wide. n: queries of the sequence. m: keys, m ≥ n. queries: how many of the last ones are summed.
    """
    block = query_block(heads, m, queries)
    whole, rest = divmod(queries, block)
    # Block number i of the whole ones sees the keys before the first query and (i + 1) · block more; the last one sees all.
    pairs = block * (whole * (m - queries) + block * whole * (whole + 1) // 2) + rest * m
    return 2 * heads * width * pairs


def kv_bytes(shape: DecoderShape, tokens_per_layer: Sequence[int], dtype_bytes: int) -> int:
    """Bytes of keys and values, where layer l holds `tokens_per_layer[l]` tokens of `dtype_bytes` bytes per element."""
    return shape.cached * sum(tokens_per_layer) * dtype_bytes


def _known(form: str) -> None:
    if form not in FORMS:
        raise BudgetError(f"unknown form of FLOPs '{form}'{nearest(form, FORMS)}")


def _shape(facts: Mapping[str, Any], gated: bool | None = None) -> DecoderShape:
    """The shape in a decoder's own config fields. gated: whether its FFN is; then it is a guess at layers that are unlike."""
    family = str(facts.get("model_type") or "decoder")
    strict = gated is None
    listed = facts.get("layer_types") or facts.get("layers_block_type") or ()
    kinds = set(listed)
    unlike = [f"{field}={facts[field]!r}" for field in (*UNLIKE, *OTHER) if strict and facts.get(field)]
    unlike += sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}) if strict else []
    if strict and not unlike and facts.get("decoder_sparse_step", 1) != 1:
        unlike = [f"decoder_sparse_step={facts['decoder_sparse_step']}"]
    if unlike:
        raise UnsupportedError(
            f"{family}: its config has {', '.join(unlike)}; only decoders of like layers, plain attention, count"
        )
    values: dict[str, Any] = {ours: facts.get(theirs) for ours, theirs in REQUIRED.items()}
    values["layers"] = values["layers"] or len(listed) or None  # Nemotron-H lists its layers, and does not count them.
    for ours, value in values.items():
        if not isinstance(value, int):
            if strict or ours != "ffn":
                raise UnsupportedError(f"{family}: its config has {REQUIRED[ours]}={value!r}, where one number belongs")
            values[ours] = 1
    visited = facts.get("num_experts_per_tok") or 0
    router = facts.get("num_local_experts") or facts.get("num_experts") or 0
    if visited and router:
        values |= {"ffn": visited * (facts.get("moe_intermediate_size") or values["ffn"]), "router": router}
    return DecoderShape(
        **values,
        kv_heads=facts.get("num_key_value_heads") or values["heads"],
        head_dim=facts.get("head_dim") or values["hidden"] // max(values["heads"], 1),
        gated=_gated(family, facts) if gated is None else gated,
    )


def _gated(family: str, facts: Mapping[str, Any]) -> bool:
    """Whether the FFN has a gate: no config says so, but families with SiLU have one, and with GELU only Gemma's do."""
    activation = facts.get("hidden_act") or facts.get("hidden_activation")
    if family in UNGATED:
        return False
    if activation in ("silu", "swish") or family.startswith(("gemma", "paligemma")):
        return True
    raise UnsupportedError(
        f"{family}: hidden_act={activation!r} does not tell whether its FFN is gated; give a DecoderShape instead"
    )


def _facts(config: Any) -> Mapping[str, Any]:
    """The decoder's fields of any config; fields that a dict leaves to its family's defaults are filled in."""
    if isinstance(config, str | Path):
        config = read_config(Path(config))
    elif isinstance(config, Mapping):
        check_config(config, "config")
    if isinstance(config, Mapping):
        config = _completed(config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config().to_dict()
    if not isinstance(config, Mapping):
        raise UnsupportedError(f"no decoder's shape in a {type(config).__name__}; give a config, a dict or its path")
    return config


def _completed(facts: Mapping[str, Any]) -> Any:
    """`facts`, or the transformers config they stand for where something is left to the family's defaults."""
    inner = facts.get("text_config") or facts.get("llm_config") or facts
    if not isinstance(inner, Mapping):
        return inner
    if all(inner.get(name) for name in (*REQUIRED.values(), "num_key_value_heads", "head_dim")):
        return inner
    from transformers import CONFIG_MAPPING

    for candidate in (facts, inner):
        family = candidate.get("model_type")
        if family in CONFIG_MAPPING:
            try:
                return CONFIG_MAPPING[family].from_dict(dict(candidate))
            except Exception as error:  # each config class has its own kinds
                raise UnsupportedError(f"{family}: not a config of it: {one_line(error)}") from None
    return inner
