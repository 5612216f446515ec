"""`tokenreduce plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce.cli._output import BUDGET_HELP

if TYPE_CHECKING:
    from tokenreduce.pipeline import Pipeline
    from tokenreduce.planning.architectures import Architecture
    from tokenreduce.planning.plan import Plan

DRAWN = ("", ".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
"""Endings of files that a plan can be drawn in; without one it is a PNG."""
BLOCKS = "▏▎▍▌▋▊▉█"


def plan_command(
    pipeline: Annotated[list[str], typer.Argument(help="Presets or YAML files.")],
    model: Annotated[
        str, typer.Option(help="A known model, a family of `models`, or the path of a config.json.")
    ] = "llava-video-7b",
    frames: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="Frames of the video. Default: the model's.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP)] = None,
    on_infeasible: Annotated[
        str | None,
        typer.Option(help="Where an input cannot meet the budget: refuse it, or go as low as possible (least)."),
    ] = None,
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
    from tokenreduce.config.outputs import reserved
    from tokenreduce.errors import TokenReduceError
    from tokenreduce.pipeline import load_pipeline
    from tokenreduce.planning.architectures import architecture
    from tokenreduce.planning.plan import plan_on

    if output is not None and output.suffix.lower() not in DRAWN:
        raise TokenReduceError(f"{output}: a plan is drawn as {', '.join(DRAWN[1:])}; give --output such an ending")
    arch = architecture(model)
    arch = arch if dtype is None else arch.with_dtype(dtype)
    loaded = [load_pipeline(source) for source in pipeline]
    loaded = loaded if budget is None else [one.with_budget(budget) for one in loaded]
    loaded = loaded if on_infeasible is None else [one.where_infeasible(on_infeasible) for one in loaded]
    if memory is not None:
        if frames is not None or output is not None:
            raise TokenReduceError("--memory asks how many frames fit: leave out --frames and --output")
        _largest(loaded, arch, memory, similar, json)
        return
    with reserved(output, force):
        plans = {one.name: plan_on(one, arch, frames, similar) for one in loaded}
        _show(plans, arch, frames, similar, json)
        if output is not None:
            _draw(plans, arch, output, json)


def _show(plans: dict[str, Plan], arch: Architecture, frames: int | None, similar: float, json: bool) -> None:
    from tokenreduce.cli._output import print_json, print_prose

    if json:
        print_json({name: one.to_dict() for name, one in plans.items()})
    else:
        print_prose(
            f"{arch.name}: {arch.shape.layers} layers, {arch.frames if frames is None else frames} frames, "
            f"{arch.tokens(frames)} tokens ({arch.text_tokens} of text){'; ' + arch.note if arch.note else ''}"
        )
        for one in plans.values():
            _print(one, similar)


def _largest(pipelines: list[Pipeline], arch: Architecture, memory: str, similar: float, json: bool) -> None:
    from tokenreduce.cli._plan_memory import show
    from tokenreduce.planning.architectures import architectures
    from tokenreduce.planning.longest import dense, reduced
    from tokenreduce.planning.memory import parse_bytes

    available = parse_bytes(memory)
    if arch.name not in architectures():  # Of a known model nothing is counted, and transformers is not loaded.
        from tokenreduce.models.parameters import counted

        arch = counted(arch)
    loads = {"dense": dense(arch)} | {one.name: reduced(one, arch, similar) for one in pipelines}
    show(arch, loads, available, similar, json)


def _print(plan: Plan, similar: float) -> None:
    from tokenreduce.cli._output import print_prose, print_table

    print_prose(f"\n{plan.name}, budget {plan.budget or 'none'}")
    rows = [
        [
            which,
            f"{layer.tokens:,}",
            _bar(layer.tokens / plan.tokens),
            f"{layer.flops / 1e9:,.1f}",
            f"{layer.kv_bytes / 2**20:,.2f}",
        ]
        for which, layer in plan.alike()
    ]
    print_table(["layers", "tokens", "share of the input", "GFLOP/layer", "KV MiB/layer"], rows)
    print_prose(plan.summary)
    print_prose(f"merging by threshold is taken to find {similar:.0%} similar tokens at its first look and none later")
    for line in plan.counts:
        print_prose(line)
    for line in plan.remarks:
        print_prose(line)
    for line in plan.tower:
        print_prose(f"vision tower (not in the table): {line}")


def _bar(share: float, width: int = 24) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8 - 1] if eighths % 8 else "")


def _draw(plans: dict[str, Plan], arch: Architecture, output: Path, json: bool) -> None:
    import sys
    import tempfile

    from tokenreduce.cli._output import print_prose
    from tokenreduce.config.outputs import replacing, unwritable
    from tokenreduce.media.pictures import plan_plot
    from tokenreduce.planning.cost import layer_flops

    total, depth = next(iter(plans.values())).tokens, arch.shape.layers
    tokens = {"dense": [total] * depth}
    flops = {"dense": [layer_flops(arch.shape, total, total)] * depth}
    for name, plan in plans.items():
        tokens[name] = [layer.tokens for layer in plan.layers]
        flops[name] = [layer.flops for layer in plan.layers]
    try:
        with tempfile.TemporaryDirectory() as folder, replacing(output) as part:
            drawn = Path(folder) / f"plan{output.suffix or DRAWN[1]}"
            plan_plot(tokens, flops, drawn)
            part.write_bytes(drawn.read_bytes())
    except OSError as error:
        raise unwritable(output, error) from None
    print_prose(f"wrote {output}", file=sys.stderr if json else sys.stdout)
