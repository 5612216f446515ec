"""The folder that `run` writes: a trace per arm, a summary, and pictures."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenreduce import plugins
from tokenreduce.adapter import Prompt
from tokenreduce.cli._media import Asking
from tokenreduce.compare.side_by_side import MeasuredArm
from tokenreduce.config.json_source import shown
from tokenreduce.config.outputs import PART, file_names
from tokenreduce.config.versions import FOLDER
from tokenreduce.errors import TokenReduceError
from tokenreduce.layout import TokenLayout
from tokenreduce.media.pictures import comparison_sheet, frame_grid, kept_patches, tokens_per_layer
from tokenreduce.trace import VERSION

FILES = {"summary.json", "tokens_per_layer.png", "comparison.png"}
"""What the folder holds beside a folder per arm."""


def save_folder(
    folder: Path, model: Any, inputs: Mapping[str, Any], arms: Sequence[MeasuredArm], asking: Asking
) -> list[str]:
    """Write everything into `folder`, whole or not at all, and return lines that say what is where.

    Where that fails, a temporary folder takes it, and the TokenReduceError names it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=PART, dir=folder) as staged:
            lines = write_folder(Path(staged), model, inputs, arms, asking, folder)
            for file in sorted(Path(staged).rglob("*")):
                target = folder / file.relative_to(staged)
                target.mkdir(exist_ok=True) if file.is_dir() else file.replace(target)
            return lines
    except OSError as error:
        reason = f"{shown(folder)} cannot be written: {error.strerror or error}"
    elsewhere = Path(tempfile.mkdtemp(prefix="tokenreduce-run-"))
    try:
        write_folder(elsewhere, model, inputs, arms, asking, elsewhere)
    except OSError:
        shutil.rmtree(elsewhere, ignore_errors=True)
        raise TokenReduceError(f"{reason}; nor can {elsewhere.parent}: what is printed above is all there is") from None
    raise TokenReduceError(f"{reason}; everything is in {elsewhere} instead")


def write_folder(
    folder: Path, model: Any, inputs: Mapping[str, Any], arms: Sequence[MeasuredArm], asking: Asking, named: Path
) -> list[str]:
    """Write everything and return lines that say what is where. named: what they call the folder."""
    places = file_names([arm.name for arm in arms], FILES)
    summary = [_summary(arm, places[arm.name]) for arm in arms]
    asked = {"question": asking.question, "expected": asking.expected}
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "version": FOLDER,
                **asked,
                **_seen(asking),
                "arms": summary,
            },
            indent=2,
        ),
        encoding="utf-8",
    )
    for arm in arms:
        (folder / places[arm.name]).mkdir()
        layers = [{"layer": i, "tokens": [n]} for i, n in enumerate(arm.counts.tokens)]
        trace = {"version": VERSION, "pipeline": "dense", "layers": layers}
        data = trace if arm.trace is None else arm.trace.to_dict()
        (folder / places[arm.name] / "trace.json").write_text(json.dumps(data), encoding="utf-8")
    tokens_per_layer({arm.name: arm.counts.tokens for arm in arms}, folder / "tokens_per_layer.png")
    lines = [f"wrote {named}/summary.json, {named}/ARM/trace.json, {named}/tokens_per_layer.png"]
    reduced = [arm for arm in arms if arm.pipeline is not None]
    layout = _layout(model, inputs, reduced)
    if layout is None:
        return lines
    grid = frame_grid(layout, asking.shown.shape[1] / asking.shown.shape[2])
    if grid is None:
        return [*lines, "no pictures of patches: the frames' tokens do not form one grid"]
    slot, frame = layout.slot[0].numpy(), layout.frame[0].numpy()
    marker = None if layout.marker is None else layout.marker[0].numpy()
    times = _seen(asking)["frame_times"]
    sources = {arm.name: arm.counts.source.numpy() for arm in reduced}
    title = f"{asking.question} ({asking.name})"
    for name, source in sources.items():
        kept_patches(
            asking.shown, slot, frame, source, grid, marker, folder / places[name] / "kept.png",
            title=f"{name}: {title}", times=times,
        )  # fmt: skip
    comparison_sheet(
        asking.shown,
        slot,
        frame,
        sources,
        grid,
        marker,
        folder / "comparison.png",
        title=title,
        times=times,
    )
    return [*lines, f"wrote {named}/comparison.png and {named}/ARM/kept.png: what became of each patch"]


def _seen(asking: Asking) -> dict[str, Any]:
    """Seconds of the video, and of each frame that was looked at."""
    clip = asking.clip
    assert clip is not None, "written after `prepare`"
    times = {"duration": round(clip.duration, 6), "frame_times": [round(time, 6) for time in clip.times]}
    return times if clip.info is None or not clip.info.missing else times | {"missing": clip.info.missing}


def _layout(model: Any, inputs: Mapping[str, Any], reduced: Sequence[MeasuredArm]) -> TokenLayout | None:
    adapter = plugins.adapter_of(model)
    if adapter is None or not reduced:
        return None
    prompt = Prompt.read(inputs["input_ids"], inputs)
    layout = adapter.layout(model, prompt)
    return None if layout is None else layout.to(torch.device("cpu"))


def _summary(arm: MeasuredArm, place: str) -> dict[str, Any]:
    return {
        "name": arm.name,
        "folder": place,
        "finite": arm.finite,
        "answer": arm.answer,
        "tokens_per_layer": arm.counts.tokens,
        "flops": arm.counts.flops,
        "relative_flops": arm.counts.flops / arm.counts.dense_flops,
        "kv_cache_bytes": arm.counts.kv_bytes,
        "llm_prefill_seconds": arm.llm_seconds,
        "prefill_seconds": arm.total_seconds,
        "decode_seconds_per_token": arm.decode_seconds,
    }
