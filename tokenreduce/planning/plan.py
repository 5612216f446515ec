"""A plan: what a pipeline will hold and cost on a model, layer by layer, before there are weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, TokenReduceError
from tokenreduce.pipeline import Pipeline, build, build_vision, load_pipeline
from tokenreduce.planning.account import Account
from tokenreduce.planning.architectures import Architecture, architecture
from tokenreduce.planning.cost import kv_bytes, layer_flops, prefill_flops
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.schedule import Conductor, forecast, least_cost
from tokenreduce.strategy import Contents, Strategy


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the decoder in a plan."""

    layer: int
    """Its number, from 0."""
    tokens: int
    """Tokens that its KV cache holds after the prefill."""
    flops: int
    """FLOPs of its attention and its FFN: 2 per multiply-add, attention over full squares."""
    kv_bytes: int
    """Bytes of its keys and values."""


@dataclass(frozen=True, repr=False)
class Plan:
    """What a pipeline will hold and cost in the prefill of one sequence. FLOPs and bytes are the decoder's alone."""

    name: str
    """Of the pipeline."""
    model: str
    """Name of the architecture, or where its config came from."""
    budget: Budget | None
    """What the pipeline was planned under; None where its stages say themselves how much they keep."""
    tokens: int
    """Tokens of the input, text included."""
    relative_tokens: float
    """Mean over layers of the tokens held, divided by `tokens` (FrameFusion §5.1)."""
    flops: int
    """FLOPs of the prefill with one position of the LM head; those of importance are not counted."""
    relative_flops: float
    """`flops` divided by those of the dense prefill."""
    predicted_speedup: float
    """FLOPs of the dense prefill divided by those of this one, both of causal attention."""
    kv_bytes: int
    """Bytes of keys and values after the prefill."""
    dense_kv_bytes: int
    """The same without reduction."""
    layers: tuple[PlannedLayer, ...]
    """One per layer, from the first."""
    tower: tuple[str, ...] = field(default=(), kw_only=True)
    """What each stage in the vision tower leaves of its work, a line each; no number above counts it."""
    counts: tuple[str, ...] = field(default=(), kw_only=True)
    """Where each stage's count comes from, a line each: known from shapes, solved from the budget, or left to the video."""
    idle: tuple[str, ...] = field(default=(), kw_only=True)
    """Stages, and layers of stages, that leave every token they see, a line each."""
    depends: str = field(default="", kw_only=True)
    """Where only some videos meet the budget: what decides, what is held in reserve, what every video meets. Else ""."""

    @property
    def mean_tokens(self) -> float:
        """Mean over layers of the tokens held."""
        return sum(layer.tokens for layer in self.layers) / len(self.layers)

    @property
    def summary(self) -> str:
        """The totals in one line."""
        return (
            f"mean {self.mean_tokens:,.1f} tokens per layer ({self.relative_tokens:.4f}), "
            f"{self.flops / 1e12:.2f} TFLOP ({self.relative_flops:.4f}), KV cache {self.kv_bytes / 2**20:,.1f} MiB of "
            f"{self.dense_kv_bytes / 2**20:,.1f}, predicted prefill speedup {self.predicted_speedup:.2f}× (causal FLOPs)"
        )

    def alike(self) -> Iterator[tuple[str, PlannedLayer]]:
        """Neighbouring layers that hold and cost the same: their numbers, such as `1–27`, and the last of them."""
        for _, group in groupby(self.layers, lambda layer: (layer.tokens, layer.flops)):
            first, *rest = group
            last = rest[-1] if rest else first
            yield (f"{first.layer}–{last.layer}" if rest else f"{first.layer}"), last

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the numbers, as `tokenreduce plan --json` prints them."""
        return {
            "tokens": self.tokens,
            "relative_tokens": self.relative_tokens,
            "flops": self.flops,
            "relative_flops": self.relative_flops,
            "predicted_speedup": self.predicted_speedup,
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "layers": [asdict(layer) for layer in self.layers],
            "counts": list(self.counts),
            "idle": list(self.idle),
            "depends": self.depends,
        }

    @property
    def remarks(self) -> list[str]:
        """What a reader of the numbers must know beside them, a line each."""
        return [*([self.depends] if self.depends else []), *self.idle]

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.model}, budget {self.budget or 'none'}, {self.tokens:,} tokens of input"]
        for which, layer in self.alike():
            lines.append(
                f"  layers {which:<7} {layer.tokens:>9,} tokens {layer.flops / 1e9:>11,.1f} GFLOP "
                f"{layer.kv_bytes / 2**20:>9,.2f} MiB of keys and values each"
            )
        lines += [f"  vision tower (not counted): {line}" for line in self.tower]
        lines += [f"  {line}" for line in self.remarks]
        return "\n".join([*lines, f"  {self.summary}"])

    def __repr__(self) -> str:
        return f"<Plan {self.name} on {self.model}: {self.summary}>"


def plan(
    pipeline: str | Path | Mapping[str, Any] | Pipeline,
    model_or_config: Any = "llava-video-7b",
    *,
    frames: int | None = None,
    budget: Any = None,
    similar: float = 0.5,
    dtype: str | None = None,
    on_infeasible: str | None = None,
) -> Plan:
    """What `pipeline` will hold and cost on a model, layer by layer. Needs no weights and runs no model.

    Args:
        pipeline: the name of a preset, the path of a YAML file, a mapping, or a Pipeline.
        model_or_config: a name that `tokenreduce.planning.architectures.architectures` lists, the path of a `config.json` or
            of a checkpoint's folder, a transformers config, or a loaded model (whose weights are not touched).
        frames: of the video; None: as many as the model takes by default.
        budget: what remains instead of the pipeline's own budget, see `Pipeline.with_budget`.
        similar: share of tokens, in [0, 1], that merging by threshold is taken to find similar at its first look.
        dtype: of the KV cache, such as `bfloat16`; None: the model's.
        on_infeasible: `refuse` or `least`, instead of the pipeline's own, see `Pipeline.on_infeasible`.

    Raises UnsupportedError for a model, a config or a dtype that is not known, PipelineError for a pipeline that is none or
    cannot act on this decoder, and BudgetError, which says the smallest feasible budget, where it cannot be met.
    """
    arch = architecture(model_or_config)
    arch = arch if dtype is None else arch.with_dtype(dtype)
    loaded = load_pipeline(pipeline)
    loaded = loaded if budget is None else loaded.with_budget(budget)
    return plan_on(loaded if on_infeasible is None else loaded.where_infeasible(on_infeasible), arch, frames, similar)


def plan_on(pipeline: Pipeline, arch: Architecture, frames: int | None = None, similar: float = 0.5) -> Plan:
    """As `plan`, of what is loaded already."""
    account, conductor, depends = _forecast(pipeline, arch, frames, similar)
    shape, n = account.shape, account.total
    dense = [n] * shape.layers
    layers = tuple(
        PlannedLayer(
            number, held, layer_flops(shape, attn, ffn, pairs=pairs), kv_bytes(shape, [held], account.cache_bytes)
        )
        for number, (attn, ffn, held, pairs) in enumerate(
            zip(account.attn, account.ffn, account.kv, account.pairs, strict=True)
        )
    )
    # Merged keys are compared under a causal mask, half of the pairs; the blocks of a span are counted as they are.
    causal = [
        pairs // 2 if pairs == attn * held else pairs
        for attn, held, pairs in zip(account.attn, account.kv, account.pairs, strict=True)
    ]
    flops = prefill_flops(shape, account.attn, account.ffn, pairs=account.pairs)
    return Plan(
        name=pipeline.name,
        model=arch.name,
        budget=pipeline.budget,
        tokens=n,
        relative_tokens=sum(account.kv) / (shape.layers * n),
        flops=flops,
        relative_flops=flops / prefill_flops(shape, dense, dense),
        predicted_speedup=prefill_flops(shape, dense, dense, form="causal")
        / prefill_flops(shape, account.attn, account.ffn, form="causal", pairs=causal),
        kv_bytes=kv_bytes(shape, account.kv, account.cache_bytes),
        dense_kv_bytes=kv_bytes(shape, dense, account.cache_bytes),
        layers=layers,
        tower=tuple(_tower(pipeline)),
        counts=tuple(_counts(pipeline, conductor)),
        idle=tuple(idle_stages(conductor)),
        depends=depends or account.shortfall,
    )


def counts(pipeline: Pipeline, arch: Architecture, frames: int | None, similar: float) -> Account:
    """The token counts of every layer. Errors name the pipeline and the model."""
    return _forecast(pipeline, arch, frames, similar)[0]


def _forecast(
    pipeline: Pipeline, arch: Architecture, frames: int | None, similar: float
) -> tuple[Account, Conductor, str]:
    """The account and the stages after the last layer, and `Plan.depends`."""
    if not 0 <= similar <= 1:
        raise BudgetError(f"similar: expected a share in [0, 1] of the tokens, got {similar}")
    total, reducible = arch.tokens(frames), arch.vision_tokens(frames)
    account = Account(pipeline.budget, arch.shape, total, reducible, arch.dtype_bytes)
    account.contents = Contents.even(reducible, arch.steps(frames))
    account.lenient = pipeline.on_infeasible == "least"
    try:
        strategies = build(pipeline)
        if check(strategies, account) or account.lenient:
            return account, forecast(strategies, account, similar=similar), ""
        depends = _depends(strategies, account)
        tried = account.afresh()
        try:
            return tried, forecast(strategies, tried, similar=similar), depends
        except BudgetError:
            best = account.afresh()
            conductor = forecast(strategies, best, similar=1.0)
            return best, conductor, f"{depends}; the numbers are of a video whose frames are all alike"
    except TokenReduceError as error:
        raise type(error)(f"{pipeline.name} on {arch.name}: {error}") from None


def _depends(strategies: Sequence[Strategy], account: Account) -> str:
    sure, conductor = least_cost(strategies, account)
    reserve = next(((site, run) for site, run in conductor.visited if run.solved and run.once), None)
    held = "" if reserve is None else f"; reserve: {reserve[1].strategy.name} (prune) at layer {reserve[0].layer}"
    return f"depends on the video: merging has to find enough{held}; every video meets {account.amount(sure)}"


def idle_stages(conductor: Conductor) -> Iterator[str]:
    """Stages of a forecast that leave every token they see, and the layers at which others do, a line each."""
    for run in conductor.runs:
        name = f"stage {run.strategy.place + 1}, {run.strategy.name}"
        looks = [(site, gone) for (site, one), gone in conductor.changed if one is run]
        if not looks:
            yield f"{name}: does nothing: {run.note or 'it is never asked'}"
        elif not any(gone for _, gone in looks):
            yield f"{name}: does nothing at {looks[0][0]}: it may keep as many tokens as there are"
        elif run.fixed and not all(gone for _, gone in looks):
            where = ", ".join(str(site) for site, gone in looks if not gone)
            yield f"{name}: does nothing at {where}: it may keep as many tokens as there are"


def _counts(pipeline: Pipeline, conductor: Conductor) -> Iterator[str]:
    """Where the count of each stage in the decoder comes from."""
    assumed = {run.strategy.place: run.assumed for run in conductor.runs}
    says = {"known": "known from shapes", "solved": "solved from the budget", "video": "depends on the video"}
    for strategy in build(pipeline):
        kind = says[strategy.count_kind]
        if strategy.count_kind == "video":
            kind += f"; assumed here: {assumed.get(strategy.place) or 'what its forecast says'}"
        late = " (it acts in decoding, which is not in the table)" if strategy.decodes else ""
        yield f"{strategy.name}: count {kind}{late}"


def _tower(pipeline: Pipeline) -> Iterator[str]:
    for strategy in build_vision(pipeline):
        at, keep = getattr(strategy.config, "at", None), getattr(strategy.config, "keep", None)
        where = strategy.capabilities.sites[0] if at is None else f"vision.block[{at}]"
        left = "as much as the video asks for" if keep is None else f"{keep} of each frame's patches"
        yield f"{strategy.name} at {where} leaves {left}"
