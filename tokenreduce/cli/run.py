"""`tokenreduce run`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli._loading import Attention, Device, DeviceMap, Dtype, loading_of
from tokenreduce.cli._output import BUDGET_HELP, print_prose, print_table
from tokenreduce.cli._progress import progress
from tokenreduce.cli._voice import voice

if TYPE_CHECKING:
    from tokenreduce.cli._media import Asking
    from tokenreduce.compare.side_by_side import MeasuredArm
    from tokenreduce.pipeline import Pipeline


def run_command(
    video: Annotated[
        str,
        typer.Argument(
            help="A video file, a folder of frame files (with --fps), or `demo`: a real clip with numbered tiles drawn into it."
        ),
    ],
    question: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    pipeline: Annotated[
        list[str] | None, typer.Option(help="Preset or YAML file; may be given several times. Default: framefusion.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET_HELP)] = None,
    on_infeasible: Annotated[
        str | None,
        typer.Option(help="Where an input cannot meet the budget: refuse it, or go as low as possible (least)."),
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name.")] = "embedded",
    output: Annotated[Path | None, typer.Option(help="Folder to write; must be new. Default: runs/NAME.")] = None,
    fps: Annotated[
        float | None,
        typer.Option(max=1e6, help="Frames per second to sample, or of frame files. Default: 1."),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(max=100_000, help="Frames at most. Default: 64; for the embedded model 32.")
    ] = None,
    allow_truncated: Annotated[
        bool, typer.Option("--allow-truncated", help="Go on with what is there of a file that broke off.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    attn: Attention = None,
    device_map: DeviceMap = None,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="Timed prefills per arm, after one warm-up.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Length of the answer, at most.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that exists.")] = False,
) -> None:
    """Ask a model about a video, dense and with each pipeline, and show what was kept, saved and changed.

    \b
    Examples:
      tokenreduce run demo --pipeline framefusion --pipeline fastv
      tokenreduce run clip.mp4 --question "What happens?" --pipeline my.yaml --budget 0.3 --model PATH

    The default model reads numbered tiles alone; ask about a video of your own with --model.
    """
    with progress("run") as state:
        state.step("starting")
        from tokenreduce.pipeline import load_pipeline

        pipelines = [load_pipeline(source) for source in pipeline or ["framefusion"]]
        if budget is not None:
            pipelines = [loaded.with_budget(budget) for loaded in pipelines]
        if on_infeasible is not None:
            pipelines = [loaded.where_infeasible(on_infeasible) for loaded in pipelines]
        from tokenreduce.cli._media import read_question
        from tokenreduce.config.outputs import give_back, reserve_folder

        state.step("reading the video")
        asking = read_question(video, question, model, fps, max_frames, allow_truncated)
        where = loading_of(device, dtype, attn, device_map)
    folder = output or Path("runs") / asking.name
    made = reserve_folder(folder, force)
    try:
        _measure_and_write(asking, where, folder, pipelines, repeats, new_tokens)
    finally:
        give_back(made)


def _measure_and_write(
    asking: Asking, where: dict[str, Any], folder: Path, pipelines: list[Pipeline], repeats: int, new_tokens: int
) -> None:
    from tokenreduce.compare.side_by_side import measure
    from tokenreduce.models.placement import placement_line
    from tokenreduce.testbed.embedded import ABOUT, EMBEDDED

    with progress("run") as state:
        state.total = len(pipelines) + 1  # Arms; each takes a warm-up, its timed prefills, and an answer.
        state.total = 2 + state.total * (repeats + 2)
        state.step("loading the model")
        loaded, note = asking.load(where)
        state.step("preparing the video")
        inputs = asking.prepare(loaded)
        arms = measure(
            loaded,
            inputs,
            pipelines,
            repeats=repeats,
            new_tokens=new_tokens,
            decode=asking.decoder(loaded),
            progress=state.step,
            refused=_refused,
        )
    # Before anything is written: what was measured is not lost to a full disk.
    print_prose(f"model: {asking.model} on {placement_line(loaded)}", indent="  ")
    if asking.model == EMBEDDED:
        print_prose(ABOUT, indent="  ")
    for line in note:
        voice.say(line)
    _print(arms, asking.question, asking.expected, int(inputs["input_ids"].shape[1]))
    from tokenreduce.cli._report import save_folder

    written = save_folder(folder, loaded, inputs, arms, asking)
    for line in written:
        print_prose(line, indent="  ")


def _print(arms: list[MeasuredArm], question: str, expected: str | None, width: int) -> None:
    dense = arms[0]
    print_prose(f"question: {question}" + (f" (expected: {expected})" if expected else ""), indent="  ")
    print(f"input: {width} tokens")
    rows = []
    dense_tokens = sum(dense.counts.tokens)
    for arm in arms:
        tokens = sum(arm.counts.tokens)
        rows.append(
            [
                arm.name,
                f"{tokens / len(arm.counts.tokens):.0f} ({tokens / dense_tokens:.3f})",
                f"{arm.counts.flops / 1e9:.2f} ({arm.counts.flops / dense.counts.flops:.3f})",
                f"{arm.counts.kv_bytes / 2**20:.2f}",
                f"{1e3 * arm.llm_median:.0f} ({dense.llm_median / arm.llm_median:.2f}×)",
                f"{1e3 * arm.total_median:.0f} ({dense.total_median / arm.total_median:.2f}×)",
                "-" if arm.decode_seconds is None else f"{1e3 * arm.decode_seconds:.1f}",
                arm.answer,
            ]
        )
    columns = ["arm", "tokens/layer", "GFLOP", "KV MiB", "LLM prefill ms", "with vision ms", "ms/token", "answer"]
    print_table(columns, rows)
    for arm in arms:
        for line in (*arm.trace.skipped, *arm.trace.idle) if arm.trace is not None else ():
            print_prose(f"{arm.name}: {line}", indent="  ")
        for stage in arm.trace.stages if arm.trace is not None else []:
            if stage.site.startswith("vision."):
                what = f"{stage.strategy} at {stage.site}: {stage.before} → {stage.after} {stage.note}"
                print_prose(f"{arm.name}: {what}", indent="  ")
        if not arm.finite:
            print_prose(f"{arm.name}: its logits are not finite (NaN or infinite), so that its answer means nothing")


def _refused(arm: str, error: Exception) -> None:
    voice.say(f"arm {arm} cannot run and is left out: {error}")
