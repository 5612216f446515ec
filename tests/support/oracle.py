"""A slow decoder with token lists instead of tensors, batches and caches: what every fast path is held to.

One `Row` is one conversation. It keeps, for every layer, the list of tokens that later queries may see, and of each only
the hidden state it had there: keys and values are computed anew whenever they are looked at. Attention is a softmax over a
list; nothing of transformers' attention, masks or caches is used, and nothing of tokenreduce. All arithmetic is float64,
but for what the families define as float32: norms and rotary angles. What the stages of a pipeline decide is in
`oracle_stages` and `oracle_strategies`, written a second time from the methods' descriptions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import support.oracle_strategies  # noqa: F401  (fills the table of strategies)
import torch
from support.oracle_stages import Choice, Look, Plan, Shape, Token
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A token as it entered a layer: its weight in what is held, its hidden state (D,), its rotary tables (d,)."""

    weight: float
    state: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Held:
    """What a layer holds in one place: one token, or several whose keys and values are averaged."""

    place: int
    parts: tuple[Part, ...]


@dataclass
class Receipt:
    """What one turn did: columns alive at the end, where each column went, tokens held and fed forward per layer."""

    kept: list[int] = field(default_factory=list)
    source: dict[int, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    margin: float = float("inf")


class Decoder:
    """The weights of a transformers model, read by name.

    text: the path of the module with `layers`, by default found in `model`. softmax: eager attention's is float32.
    """

    def __init__(self, model: nn.Module, text: str = "", softmax: torch.dtype = torch.float64) -> None:
        self.softmax = softmax
        own: Any = copy.deepcopy(model).double().eval()
        self.text: Any = own.get_submodule(text) if text else getattr(own, "model", own)
        self.head = own.get_output_embeddings()
        self.embed = own.get_input_embeddings()
        config: Any = self.text.config
        attention = self.text.layers[0].self_attn
        width = int(attention.head_dim)
        self.shape = Shape(
            layers=len(self.text.layers),
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=width,
            vocab=config.vocab_size,
            bytes=next(model.parameters()).element_size(),
        )
        self.act = config.hidden_act if hasattr(config, "hidden_act") else config.hidden_activation

    def rotary(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(n, d) cos and sin at `places`; angles are float32, as a model's are in every dtype."""
        module = self.text.rotary_emb
        kind = "" if hasattr(module, "inv_freq") else "full_attention_"
        angle = torch.tensor(places).float()[:, None] * getattr(module, f"{kind}inv_freq").float()
        angle = torch.cat([angle, angle], -1)
        scale = getattr(module, f"{kind}attention_scaling")
        return (angle.cos() * scale).double(), (angle.sin() * scale).double()

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """Root mean square norm, whose mean is float32 by the families' definition; Gemma's weights count from one."""
        weight: Any = module.weight
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        single = x.float()
        single = single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + eps)
        if type(module).__name__.startswith("Gemma"):
            return (single * (1 + weight.float())).double()
        return single.double() * weight

    def heads(self, layer: Any, name: str, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """(heads, n, d): one projection of x (n, D), turned by the rotary tables if there are any."""
        attention = layer.self_attn
        weight, bias = _projection(attention, name, self.shape)
        out = x @ weight.T + (0 if bias is None else bias)
        out = out.view(len(x), -1, self.shape.head_dim)
        if hasattr(attention, f"{name}_norm"):
            out = self.norm(getattr(attention, f"{name}_norm"), out)
        out = out.transpose(0, 1)
        if cos is None or sin is None:
            return out
        rotated = cos.shape[-1]
        turned, rest = out[..., :rotated], out[..., rotated:]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """The gated FFN of x (n, D), norms included."""
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        y = self.norm(layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm, x)
        if hasattr(layer.mlp, "gate_up_proj"):
            gate, up = layer.mlp.gate_up_proj(y).chunk(2, -1)
        else:
            gate, up = layer.mlp.gate_proj(y), layer.mlp.up_proj(y)
        gate = nn.functional.silu(gate) if self.act == "silu" else nn.functional.gelu(gate, approximate="tanh")
        y = layer.mlp.down_proj(gate * up)
        return self.norm(layer.post_feedforward_layernorm, y) if gemma else y

    def logits(self, x: Tensor) -> Tensor:
        """(n, V) of x (n, D)."""
        out: Tensor = self.head(self.norm(self.text.norm, x))
        return out


class Row:
    """One conversation. pipeline: what `Pipeline.model_dump` gives, None for a dense decoder.

    shift: rotary position of the next token, less its place; not 0 after the videos of some families.
    """

    def __init__(self, decoder: Decoder, pipeline: dict[str, Any] | None = None) -> None:
        self.decoder, self.pipeline = decoder, pipeline
        layers = decoder.shape.layers
        self.memory: list[list[Held]] = [[] for _ in range(layers)]
        self.spans: list[tuple[int, int] | None] = [None] * layers
        self.seen = self.shift = 0
        self.receipt = Receipt()

    def fork(self) -> Row:
        """The same conversation, to be continued in another way."""
        other = copy.copy(self)
        other.memory, other.spans = [list(held) for held in self.memory], list(self.spans)
        return other

    @torch.no_grad()
    def turn(
        self,
        x: Tensor,
        facts: Sequence[Token] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        tail: int = 0,
    ) -> Tensor:
        """(n, V) logits of the tokens left of x (N, D), which come next. facts: what they are, None if all are text.

        rotary: (N, d) tables, by default of plain counting. tail: last tokens that no stage may know of.
        """
        x = x.double()
        count = len(x)
        first = self.seen + self.shift
        cos, sin = rotary or self.decoder.rotary(range(first, first + count))
        tokens = list(facts) if facts is not None else [Token(i) for i in range(count)]
        tokens = [
            replace(t, position=i, place=self.seen + i, cos=cos[i].double(), sin=sin[i].double(), members=(t.column,))
            for i, t in enumerate(tokens)
        ]
        self.seen += count
        inside = tokens[: count - tail]
        acts = self.pipeline is not None and any(token.reducible for token in inside)
        plan = Plan(self.pipeline, self.decoder.shape, inside) if self.pipeline and acts else None
        self.receipt = Receipt()
        probs: Tensor | None = None
        asked: list[Token] = []
        for number, layer in enumerate(self.decoder.text.layers):
            tokens, x = self._reduce(plan, (number, "pre_attention"), tokens, x, probs, asked, tail)
            asked = tokens
            attended, probs = self._attend(number, layer, plan, tokens, x, tail)
            x = x + attended
            tokens, x = self._reduce(plan, (number, "pre_ffn"), tokens, x, probs, asked, tail)
            if plan is not None:
                plan.ffn.append(len(tokens) - tail)
            self.receipt.fed.append(len(tokens))
            x = x + self.decoder.feed_forward(layer, x)
            for i, token in enumerate(tokens):
                if number < len(token.deepstack):
                    x[i] = x[i] + token.deepstack[number]
        self.receipt.kept = [token.column for token in tokens]
        self.receipt.source = {member: token.column for token in tokens for member in token.members}
        if plan is not None:
            self.receipt.margin = plan.margin
        return self.decoder.logits(x)

    def next(self, token: int) -> Tensor:
        """(V,) logits after one more text token."""
        return self.turn(self.decoder.embed(torch.tensor([token])))[-1]

    def _reduce(
        self,
        plan: Plan | None,
        site: tuple[int, str],
        tokens: list[Token],
        x: Tensor,
        probs: Tensor | None,
        asked: list[Token],
        tail: int,
    ) -> tuple[list[Token], Tensor]:
        if plan is None:
            return tokens, x
        kept, behind = tokens[: len(tokens) - tail], tokens[len(tokens) - tail :]
        inside = x[: len(kept)]
        for stage in plan.due(site, lambda: len(kept)):  # noqa: B023  (asked before `kept` changes)
            choice = plan.ask(stage, site, Look(kept, inside, _columns(probs, asked, tail), asked))
            kept, inside = _apply(choice, kept, inside)
        return kept + behind, torch.cat([inside, x[len(x) - tail :]])

    def _attend(
        self, number: int, layer: Any, plan: Plan | None, tokens: list[Token], x: Tensor, tail: int
    ) -> tuple[Tensor, Tensor]:
        decoder, memory = self.decoder, self.memory[number]
        groups = [(i, [(i, 1.0)]) for i in range(len(tokens))]
        span, reduced = None, False
        held = n = len(tokens) - tail
        for stage in plan.due((number, "kv"), lambda: n) if plan is not None else ():
            assert plan is not None
            choice = plan.ask(stage, (number, "kv"), Look(tokens[:n], x[:n], None, []))
            span = choice.span
            if span is not None:
                held = min(sum(span), n)
            elif choice.target:
                groups = _groups(choice, tokens[:n]) + groups[n:]
                held, reduced = len(groups) - tail, True
        if plan is not None:
            plan.enter_attention(n, held, span is not None)
        self.receipt.held.append(held)
        self.spans[number] = span or self.spans[number]
        span = self.spans[number]
        for head, members in groups:
            parts = tuple(Part(w, x[i], tokens[i].cos, tokens[i].sin) for i, w in members)
            memory.append(Held(tokens[head].place, parts))
        keys, values = self._keys_and_values(layer, memory)
        y = decoder.norm(layer.input_layernorm, x)
        cos, sin = torch.stack([t.cos for t in tokens]), torch.stack([t.sin for t in tokens])
        query = decoder.heads(layer, "q", y, cos, sin)
        share = query.shape[0] // keys.shape[0]
        rows, probs = [], torch.zeros(query.shape[0], len(tokens), len(memory), dtype=torch.float64)
        for i, token in enumerate(tokens):
            seen = [j for j, key in enumerate(memory) if _sees(token.place, key.place, span)]
            k, v = (side[:, seen].repeat_interleave(share, 0) for side in (keys, values))
            weights = (k @ query[:, i, :, None])[..., 0] * layer.self_attn.scaling
            weights = weights.softmax(-1, dtype=decoder.softmax).double()
            probs[:, i, seen] = weights
            rows.append((weights[:, :, None] * v).sum(1).reshape(-1))
        out = layer.self_attn.o_proj(torch.stack(rows))
        if hasattr(layer, "pre_feedforward_layernorm"):
            out = decoder.norm(layer.post_attention_layernorm, out)
        fresh = {token.place for token in tokens}
        if span is not None and plan is not None:
            last = tokens[n - 1].place
            memory[:] = [h for h in memory if h.place < span[0] or h.place > last - span[1]]
        # Attention on averaged keys is nobody's importance.
        order = [] if reduced or span else [j for j, h in enumerate(self.memory[number]) if h.place in fresh]
        return out, probs[:, :, order]

    def _keys_and_values(self, layer: Any, memory: list[Held]) -> tuple[Tensor, Tensor]:
        """(G, m, d) each, from the hidden states that entered the layer."""
        parts = [part for held in memory for part in held.parts]
        y = self.decoder.norm(layer.input_layernorm, torch.stack([part.state for part in parts]))
        cos, sin = torch.stack([part.cos for part in parts]), torch.stack([part.sin for part in parts])
        keys = self.decoder.heads(layer, "k", y, cos, sin)
        values = self.decoder.heads(layer, "v", y, None, None)
        if len(parts) == len(memory):
            return keys, values
        averaged, first = [], 0
        for held in memory:
            last = first + len(held.parts)
            weight = torch.tensor([part.weight for part in held.parts], dtype=torch.float64)[:, None]
            averaged.append([(side[:, first:last] * weight).sum(1) / weight.sum() for side in (keys, values)])
            first = last
        return torch.stack([k for k, _ in averaged], 1), torch.stack([v for _, v in averaged], 1)


def _sees(query: int, key: int, span: tuple[int, int] | None) -> bool:
    return key <= query and (span is None or key < span[0] or query - key < span[1])


def _columns(probs: Tensor | None, asked: list[Token], tail: int) -> Tensor | None:
    """(heads, queries, keys) without the tail."""
    if probs is None:
        return None
    n = len(asked) - tail
    return probs[:, :n, :n]


def _groups(choice: Choice, tokens: list[Token]) -> list[tuple[int, list[tuple[int, float]]]]:
    """Each token that stays, with the tokens it stands for and their weights."""
    groups: dict[int, list[tuple[int, float]]] = {i: [] for i, into in enumerate(choice.target) if into == i}
    for i, into in enumerate(choice.target):
        if into >= 0:
            groups[into].append((i, float(tokens[i].size) if choice.weighted else 1.0))
    return list(groups.items())


def _apply(choice: Choice, tokens: list[Token], x: Tensor) -> tuple[list[Token], Tensor]:
    """The tokens and states (n, D) that a choice leaves."""
    if not choice.target:
        return tokens, x
    left, states = [], []
    for head, members in _groups(choice, tokens):
        whole = sum(weight for _, weight in members)
        states.append(sum(weight * x[i] for i, weight in members) / whole)
        rows = range(len(tokens[head].deepstack))
        left.append(
            replace(
                tokens[head],
                size=sum(tokens[i].size for i, _ in members),
                members=tuple(member for i, _ in members for member in tokens[i].members),
                deepstack=tuple(sum(w * tokens[i].deepstack[r] for i, w in members) / whole for r in rows),
            )
        )
    return left, torch.stack(states)


def _projection(attention: Any, name: str, shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the query, key or value projection, also where a family stores all three as one."""
    if hasattr(attention, f"{name}_proj"):
        linear = getattr(attention, f"{name}_proj")
        return linear.weight, linear.bias
    sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    place = "qkv".index(name)
    return attention.qkv_proj.weight.split(sizes)[place], None
