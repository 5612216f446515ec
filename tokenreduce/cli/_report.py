"""The folder that `run` writes: a trace per arm, a summary, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenreduce import plugins
from tokenreduce.adapter import Prompt
from tokenreduce.cli._media import Asking
from tokenreduce.compare.side_by_side import MeasuredArm
from tokenreduce.layout import TokenLayout
from tokenreduce.media.pictures import comparison_sheet, frame_grid, kept_patches, tokens_per_layer


def write_folder(
    folder: Path, model: Any, inputs: Mapping[str, Any], arms: Sequence[MeasuredArm], asking: Asking
) -> list[str]:
    """Write everything and return lines that say what is where."""
    summary = [_summary(arm) for arm in arms]
    (folder / "summary.json").write_text(
        json.dumps(
            {"question": asking.question, "expected": asking.expected, **_seen(asking), "arms": summary}, indent=2
        ),
        encoding="utf-8",
    )
    for arm in arms:
        (folder / arm.name).mkdir(exist_ok=True)
        trace = {"pipeline": "dense", "layers": [{"layer": i, "tokens": [n]} for i, n in enumerate(arm.counts.tokens)]}
        data = trace if arm.trace is None else arm.trace.to_dict()
        (folder / arm.name / "trace.json").write_text(json.dumps(data), encoding="utf-8")
    tokens_per_layer({arm.name: arm.counts.tokens for arm in arms}, folder / "tokens_per_layer.png")
    lines = [f"wrote {folder}/summary.json, {folder}/ARM/trace.json, {folder}/tokens_per_layer.png"]
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
            asking.shown, slot, frame, source, grid, marker, folder / name / "kept.png",
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
    return [*lines, f"wrote {folder}/comparison.png and {folder}/ARM/kept.png: what became of each patch"]


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


def _summary(arm: MeasuredArm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "answer": arm.answer,
        "tokens_per_layer": arm.counts.tokens,
        "flops": arm.counts.flops,
        "relative_flops": arm.counts.flops / arm.counts.dense_flops,
        "kv_cache_bytes": arm.counts.kv_bytes,
        "llm_prefill_seconds": arm.llm_seconds,
        "prefill_seconds": arm.total_seconds,
        "decode_seconds_per_token": arm.decode_seconds,
    }
