"""`tokenreduce compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.cli._loading import Attention, Device, DeviceMap, Dtype, loading_of
from tokenreduce.cli._output import BUDGET_HELP

if TYPE_CHECKING:
    from tokenreduce.compare.settings import Settings

MOST_EXAMPLES = 1_000_000
"""A report reads all rows at once."""
NEEDLES = 200
"""Examples of the needle task, where no number is given."""


def compare_command(
    output: Annotated[Path, typer.Option(help="Folder of the comparison: a new one, or one to go on with.")],
    task: Annotated[
        str,
        typer.Option(help="`needle`, a folder of videos with questions.jsonl, or a data set saved by `datasets`."),
    ] = "needle",
    arm: Annotated[
        list[str] | None,
        typer.Option(help="`dense`, preset or YAML file; several times. Default: dense and framefusion."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help=f"{BUDGET_HELP} Several times: each pipeline with each.")
    ] = None,
    on_infeasible: Annotated[
        str | None,
        typer.Option(help="Where an example cannot meet the budget: refuse it, or go as low as possible (least)."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Checkpoint folder or hub name; several times.")] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_EXAMPLES,
            help="Examples, the same ones for every arm. Default: 200 needles, or every question.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Chooses the examples, and the bootstrap's draws.")
    ] = 1,
    baseline: Annotated[str | None, typer.Option(help="Arm to test the others against. Default: dense.")] = None,
    kind: Annotated[
        str, typer.Option(help="Needle: one_hop, second_turn, chain, two_hop, spot, count, order, list.")
    ] = "one_hop",
    frames: Annotated[
        list[int] | None, typer.Option(min=1, max=10_000, help="Needle: frames; several times: in turns. Default: 16.")
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(min=2, max=10_000, help="Needle: so many places in the video, in turns. Default: anywhere."),
    ] = None,
    size: Annotated[
        int, typer.Option(min=1, max=1_000, help="Needle: its side in cells; a cell is a token of the embedded model.")
    ] = 1,
    placement: Annotated[
        str, typer.Option(help="Needle: edit (drawn over a frame), insert (a frame of its own) or mixed.")
    ] = "edit",
    clip: Annotated[
        list[str] | None, typer.Option(help="Needle: video to hide needles in; several times. Default: held-out clips.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, max=10_000, help="Needle: pixels per side of a frame. Default: 48.")
    ] = None,
    grid: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Needle: cells per side of a frame. Default: 6.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Questions file (JSONL) of a folder of videos. Default: its questions.jsonl.")
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Questions may name videos outside of their folder.")
    ] = False,
    max_frames: Annotated[int | None, typer.Option(min=1, max=100_000, help="Frames of a video file, at most.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Frames per second to sample from video files.")
    ] = None,
    allow_truncated: Annotated[
        bool, typer.Option("--allow-truncated", help="Go on with what is there of video files that broke off.")
    ] = False,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Length of an answer, at most. Default: 8 for needles, else 32."),
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, max=10_000, help="Examples whose kept patches the report shows.")] = 2,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, or `local` to start one on this machine.")
    ] = None,
    gpus_per_worker: Annotated[int, typer.Option(min=1, help="With --ray: GPUs that each worker reserves.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    attn: Attention = None,
    device_map: DeviceMap = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of what the folder holds; run nothing.")
    ] = False,
) -> None:
    """Compare arms (pipelines, budgets and models in all combinations) on a task, with paired statistics and a report.

    Every finished example is on disk at once. The same command again goes on where a killed one stopped; its report is
    valid for what there is.

    \b
    Questions file, a JSON object per line: {"video": "a.mp4", "question": "…", "answer": "…", "options": ["…", "…"]};
    options may be missing, and the answer may then be any words.

    \b
    Examples:
      tokenreduce compare --arm dense --arm framefusion --arm fastv --budget 0.3 --output runs/needle
      tokenreduce compare --kind second_turn --arm framefusion --budget 0.3 --budget 0.5 --output runs/turns
      tokenreduce compare --task my_videos --model PATH --arm my.yaml --examples 50 --output runs/mine
    """
    from tokenreduce.cli._output import print_prose
    from tokenreduce.compare.report import MARKDOWN, PAGE, SUMMARY
    from tokenreduce.errors import TokenReduceError

    if report_only:
        from tokenreduce.compare.run import report_only as write

        summary = write(output)
    else:
        needle = {
            "kind": kind, "frames": tuple(frames or [16]), "positions": positions, "size": size, "placement": placement,
            "clips": tuple(clip or ()), "resolution": resolution, "grid": grid, "allow_outside": allow_outside,
        }  # fmt: skip
        from tokenreduce.cli._progress import progress

        with progress("compare") as state:
            state.step("starting")
            settings = _settings(
                task,
                arm,
                budget,
                on_infeasible,
                model,
                examples,
                seed,
                baseline,
                needle,
                questions,
                (max_frames, fps, allow_truncated),
                new_tokens,
                loading_of(device, dtype, attn, device_map),
            )
        summary = _run(settings, output, pictures, ray, gpus_per_worker)
    _print(summary)
    folder = Path(summary["report"])
    print_prose(f"wrote {folder / PAGE}, {folder / MARKDOWN}, {folder / SUMMARY}")
    if folder != output:
        raise TokenReduceError(f"{output} cannot be written; the report is in {folder} instead")


def _settings(
    task: str,
    arms: list[str] | None,
    budgets: list[str] | None,
    on_infeasible: str | None,
    models: list[str] | None,
    examples: int | None,
    seed: int,
    baseline: str | None,
    needle: dict[str, Any],
    questions: Path | None,
    sampling: tuple[int | None, float | None, bool],
    new_tokens: int | None,
    loading: dict[str, Any],
) -> Settings:
    from tokenreduce.compare.arms import expand
    from tokenreduce.compare.measure import Sampling
    from tokenreduce.compare.settings import Settings, baseline_name, open_task
    from tokenreduce.testbed.embedded import EMBEDDED

    expanded = tuple(expand(arms or ["framefusion"], budgets or [], models or [EMBEDDED], on_infeasible))
    options = {"questions": None if questions is None else str(questions), **needle}
    return Settings(
        task=task,
        arms=expanded,
        examples=examples or open_task(task, seed, **options).size or NEEDLES,
        seed=seed,
        baseline=baseline_name(expanded, baseline),
        task_options=options,
        sampling=Sampling(*sampling),
        loading=loading,
        new_tokens=new_tokens,
    )


def _run(settings: Settings, output: Path, pictures: int, ray: str | None, gpus_per_worker: int) -> dict[str, Any]:
    from tokenreduce.cli._progress import progress
    from tokenreduce.cli._voice import voice
    from tokenreduce.compare.answer import forewarning
    from tokenreduce.compare.run import compare

    with progress("compare") as state:

        def say(line: str) -> None:
            state.doing = line

        def tell(done: int, asked: int) -> None:
            state.doing = ""
            if not (state.total or voice.quiet):  # When nothing was refused, and before the first example.
                voice.say(forewarning(settings.examples, len(settings.arms) - 1))
            state.reach(done, asked, "examples")

        return compare(
            settings,
            output,
            pictures=pictures,
            ray=ray,
            gpus_per_worker=gpus_per_worker,
            tell=tell,
            say=say,
            warn=voice.say,
        )


def _print(summary: dict[str, Any]) -> None:
    from tokenreduce.cli._output import print_prose, print_table
    from tokenreduce.compare.answer import answer
    from tokenreduce.compare.report import facts, tables

    for sentence in answer(summary):
        print_prose(sentence)
    print()
    for fact in facts(summary)[:4]:
        print_prose(fact)
    main, costs, _, checks = tables(summary)
    for table in (main, costs, checks):
        print(f"\n{table.title}")
        print_table(table.columns, table.rows)
