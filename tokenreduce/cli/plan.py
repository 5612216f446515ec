"""`tokenreduce plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tokenreduce.pipeline import Pipeline
    from tokenreduce.planning.account import Account
    from tokenreduce.planning.architectures import Architecture

BLOCKS = "▏▎▍▌▋▊▉█"


def plan(
    pipeline: Annotated[list[str], typer.Argument(help="Presets or YAML files.")],
    model: Annotated[str, typer.Option(help="A known architecture, or the path of a config.json.")] = "llava-video-7b",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the video. Default: the model's.")] = None,
    budget: Annotated[str | None, typer.Option(help="Share in (0, 1] that remains, for all pipelines.")] = None,
    similar: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of tokens taken to be similar to the frame before at the first merge."),
    ] = 0.5,
    memory: Annotated[
        str | None, typer.Option(help="Such as 24GiB: say the longest video that fits, dense and with each pipeline.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and KV cache. Default: the model's.")] = None,
    output: Annotated[Path | None, typer.Option(help="PNG to draw; must be new.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the PNG.")] = False,
) -> None:
    """Say what a pipeline will hold and cost, layer by layer, without weights.

    \b
    Examples:
      tokenreduce plan framefusion --model llava-video-7b --frames 64
      tokenreduce plan fastv streaming_llm --model path/to/config.json --budget 0.2 --output plan.png
      tokenreduce plan framefusion fastv --model llava-video-7b --memory 24GiB
    """
    from tokenreduce.cli._output import print_json
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.pipeline import load_pipeline
    from tokenreduce.planning.architectures import architecture

    if output is not None and output.exists() and not force:
        raise TokenReduceError(f"{output} exists; give another --output, or --force to overwrite it")
    arch = architecture(model)
    arch = arch if dtype is None else arch.with_dtype(dtype)
    loaded = [load_pipeline(source) for source in pipeline]
    loaded = loaded if budget is None else [one.with_budget(budget) for one in loaded]
    if memory is not None:
        if frames is not None or output is not None:
            raise TokenReduceError("--memory asks how many frames fit: leave out --frames and --output")
        _largest(loaded, arch, memory, similar, json)
        return
    plans = {one.name: _forecast(one, arch, frames, similar) for one in loaded}
    towers = {one.name: _tower_lines(one) for one in loaded}
    if json:
        print_json({name: _data(account) for name, account in plans.items()})
    else:
        print(
            f"{arch.name}: {arch.shape.layers} layers, {arch.frames if frames is None else frames} frames, "
            f"{arch.tokens(frames)} tokens ({arch.text_tokens} of text){'; ' + arch.note if arch.note else ''}"
        )
        for name, account in plans.items():
            _print(name, account, similar)
            for line in towers[name]:
                print(line)
    if output is not None:
        _draw(plans, output)


def _forecast(pipeline: Pipeline, arch: Architecture, frames: int | None, similar: float) -> Account:
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.pipeline import build
    from tokenreduce.planning.account import Account
    from tokenreduce.planning.feasibility import check
    from tokenreduce.planning.schedule import forecast

    strategies = build(pipeline)
    total, reducible = arch.tokens(frames), arch.vision_tokens(frames)
    account = Account(pipeline.budget, arch.shape, total, reducible, arch.dtype_bytes)
    try:
        check(strategies, account)
        forecast(strategies, account, similar=similar, frames=arch.steps(frames))
    except TokenReduceError as error:
        raise type(error)(f"{pipeline.name} on {arch.name}: {error}") from None
    return account


def _largest(pipelines: list[Pipeline], arch: Architecture, memory: str, similar: float, json: bool) -> None:
    from tokenreduce.cli._plan_memory import Plan, dense, show
    from tokenreduce.pipeline import build
    from tokenreduce.planning.feasibility import read_later, spans
    from tokenreduce.planning.memory import parse_bytes

    available, arch = parse_bytes(memory), arch.counted()
    plans = {"dense": dense(arch)}
    for one in pipelines:
        stages = build(one)
        plans[one.name] = Plan(
            lambda frames, one=one: _forecast(one, arch, frames, similar),  # type: ignore[misc]
            read_later(stages, arch.shape.layers),
            spans(stages, arch.shape.layers),
            one.budget is None or one.budget.relative,
        )
    show(arch, plans, available, similar, json)


def _tower_lines(pipeline: Pipeline) -> list[str]:
    """What stages in the vision tower leave of its work. The table above is the decoder's alone."""
    from tokenreduce.pipeline import build_vision

    lines = []
    for strategy in build_vision(pipeline):
        at, keep = getattr(strategy.config, "at", None), getattr(strategy.config, "keep", None)
        where = strategy.capabilities.sites[0] if at is None else f"vision.block[{at}]"
        left = "as much as the video asks for" if keep is None else f"{keep} of each frame's patches"
        lines.append(f"vision tower (not in the table): {strategy.name} at {where} leaves {left}")
    return lines


def _data(account: Account) -> dict[str, Any]:
    from tokenreduce.planning.cost import kv_bytes, layer_flops, prefill_flops

    shape, n = account.shape, account.total
    dense = [n] * shape.layers
    layers = [
        {
            "layer": number,
            "tokens": held,
            "flops": layer_flops(shape, attn, ffn, pairs=pairs),
            "kv_bytes": kv_bytes(shape, [held], account.cache_bytes),
        }
        for number, (attn, ffn, held, pairs) in enumerate(
            zip(account.attn, account.ffn, account.kv, account.pairs, strict=True)
        )
    ]
    # Merged keys are compared under a causal mask, half of the pairs; the blocks of a span are counted as they are.
    causal = [
        pairs // 2 if pairs == attn * held else pairs
        for attn, held, pairs in zip(account.attn, account.kv, account.pairs, strict=True)
    ]
    return {
        "tokens": n,
        "relative_tokens": sum(account.kv) / (shape.layers * n),
        "flops": prefill_flops(shape, account.attn, account.ffn, pairs=account.pairs),
        "relative_flops": prefill_flops(shape, account.attn, account.ffn, pairs=account.pairs)
        / prefill_flops(shape, dense, dense),
        "predicted_speedup": prefill_flops(shape, dense, dense, form="causal")
        / prefill_flops(shape, account.attn, account.ffn, form="causal", pairs=causal),
        "kv_bytes": kv_bytes(shape, account.kv, account.cache_bytes),
        "dense_kv_bytes": kv_bytes(shape, dense, account.cache_bytes),
        "layers": layers,
    }


def _print(name: str, account: Account, similar: float) -> None:
    from tokenreduce.cli._output import print_table

    data = _data(account)
    print(f"\n{name}, budget {account.budget or 'none'}")
    rows, start = [], 0
    layers = data["layers"]
    for number, layer in enumerate(layers):
        last = number + 1 == len(layers)
        if last or any(layers[number + 1][key] != layer[key] for key in ("tokens", "flops")):
            which = f"{start}" if start == number else f"{start}–{number}"
            rows.append(
                [
                    which,
                    f"{layer['tokens']:,}",
                    _bar(layer["tokens"] / data["tokens"]),
                    f"{layer['flops'] / 1e9:,.1f}",
                    f"{layer['kv_bytes'] / 2**20:,.2f}",
                ]
            )
            start = number + 1
    print_table(["layers", "tokens", "share of the input", "GFLOP/layer", "KV MiB/layer"], rows)
    print(
        f"mean {sum(account.kv) / len(account.kv):,.1f} tokens per layer ({data['relative_tokens']:.4f}), "
        f"{data['flops'] / 1e12:.2f} TFLOP ({data['relative_flops']:.4f}), KV cache {data['kv_bytes'] / 2**20:,.1f} MiB of "
        f"{data['dense_kv_bytes'] / 2**20:,.1f}, predicted prefill speedup {data['predicted_speedup']:.2f}× (causal FLOPs)"
    )
    print(f"merging by threshold is taken to find {similar:.0%} similar tokens at its first look and none later")


def _bar(share: float, width: int = 24) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8 - 1] if eighths % 8 else "")


def _draw(plans: dict[str, Account], output: Path) -> None:
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.media.pictures import plan_plot
    from tokenreduce.planning.cost import layer_flops

    some = next(iter(plans.values()))
    dense = layer_flops(some.shape, some.total, some.total)
    tokens = {"dense": [some.total] * some.shape.layers} | {name: account.kv for name, account in plans.items()}
    flops = {"dense": [dense] * some.shape.layers}
    for name, account in plans.items():
        flops[name] = [layer["flops"] for layer in _data(account)["layers"]]
    try:
        plan_plot(tokens, flops, output)
    except (OSError, ValueError) as error:
        raise TokenReduceError(f"{output} cannot be written: {error}") from None
    print(f"wrote {output}")
