"""End to end on real clips: decoding, vision tower, prefill and answer, with stages in the decoder and in the tower."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Options, Row, paired_ratio, spread, summary, table
from transformers import Qwen2Config, SiglipVisionConfig

import tokenreduce as tr
from tokenreduce.compare.statistics import score_interval
from tokenreduce.models import prepare
from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.testbed.clips import clip_paths
from tokenreduce.testbed.embedded import IMAGE, VIDEO, WEIGHTS, load_embedded, read_saved_tokenizer
from tokenreduce.testbed.needle import NeedleSpec, NeedleTask

TITLE = "End to end, with the vision tower reduced too"
CLIPS = {"static": "a.mp4", "normal": "carphone_pristine.mp4", "fast": "bikes.mp4"}
"""Real clips of the held-out split, by their measured differences between frames."""
BUDGET, NEW_TOKENS, SEED = 0.3, 16, 2026
PARTS = ("decode", "vision", "prefill", "answer")
KINDS = ("one_hop", "chain")
# LLaVA-Video-7B at 64 frames: 26 SigLIP blocks of 729 patches, and a 28-layer Qwen2-7B on 64 × 210 + 34 tokens.
REAL_TOWER = {"frames": 64, "patches": 729, "width": 1152, "inner": 4304, "blocks": 26}
REAL_DECODER = DecoderShape.from_config(
    Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )
)


def arms() -> dict[str, Any]:
    """Pipelines by name; None is dense. The tower's stages are those of the preset framefusion_end_to_end."""
    whole = tr.load_pipeline("framefusion_end_to_end").with_budget(BUDGET)
    reuse, merge, *decoder = whole.stages

    def with_stages(*stages: Any) -> tr.Pipeline:
        return whole.model_copy(update={"stages": [*stages, *decoder]})

    return {
        "dense": None,
        "framefusion": with_stages(),
        "+ frame_reuse": with_stages(reuse),
        "+ patch_merge": with_stages(merge),
        "+ both": whole,
    }


def tower_flops(frames: int, patches: int, width: int, inner: int, blocks: int) -> float:
    """Of the blocks: 2 per multiply-add, attention over all pairs of a frame."""
    return 2.0 * frames * patches * blocks * (4 * width**2 + 2 * width * inner + 2 * patches * width)


def shaped_model() -> Any:
    """LLaVA-Video's shape with random weights: SigLIP of 6 blocks, width 216, at 384 px; Qwen2 of 14 layers, width 512."""
    tokenizer = read_saved_tokenizer(WEIGHTS)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("image", IMAGE), ("video", VIDEO))}
    config = LlavaVideoConfig(
        text_config=Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2706, num_hidden_layers=14,
            num_attention_heads=8, num_key_value_heads=1, eos_token_id=None, pad_token_id=0, bos_token_id=None,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=216, intermediate_size=807, num_hidden_layers=6, num_attention_heads=3, image_size=384,
            patch_size=14, vision_use_head=False,
        ),
        image_token_index=ids["image"], video_token_index=ids["video"], vision_feature_layer=-1,
        image_grid_pinpoints=[[384, 384]],
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaVideoForConditionalGeneration(config).eval()


@contextlib.contextmanager
def decoder_times(model: Any) -> Iterator[list[float]]:
    """Begin and end of each forward of the decoder, one after the other."""
    text, times = model.get_decoder(), []
    handles = [
        text.register_forward_pre_hook(lambda *_: times.append(time.perf_counter())),
        text.register_forward_hook(lambda *_: times.append(time.perf_counter())),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def once(model: Any, pipeline: Any, clip: Path, frames: int) -> tuple[dict[str, float], Any]:
    """Seconds of each part, and the trace. vision: tower, projector and pooling. answer: every token after the first."""
    started = time.perf_counter()
    inputs = prepare(
        model, clip, "What happens?", max_frames=frames, force_sample=True, time_instruction=False,
        processor=read_saved_tokenizer(WEIGHTS),
    )  # fmt: skip
    attached = contextlib.nullcontext() if pipeline is None else tr.reduce(model, pipeline)
    with torch.inference_mode(), attached as run, decoder_times(model) as times:
        asked = time.perf_counter()
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        ended = time.perf_counter()
    parts = {
        "decode": asked - started,
        "vision": times[0] - asked,
        "prefill": times[1] - times[0],
        "answer": ended - times[1],
    }
    return parts, None if run is None else run.trace


def clip_times(model: Any, clip: Path, frames: int, repeats: int) -> Row:
    """Medians per arm and part, and the ratio to dense within each turn; the arms take turns, after a warm-up."""
    pipelines, seen, traces = arms(), {name: [] for name in arms()}, {}
    for turn in range(-1, repeats):
        for name in list(pipelines)[:: 1 if turn % 2 == 0 else -1]:
            parts, traces[name] = once(model, pipelines[name], clip, frames)
            if turn >= 0:
                seen[name].append(parts)
    totals = {name: [sum(parts.values()) for parts in runs] for name, runs in seen.items()}
    found = {}
    for name, runs in seen.items():
        stages = traces[name].stages if traces[name] is not None else []
        found[name] = {part: summary([run[part] for run in runs]) for part in PARTS} | {
            "total": summary(totals[name]),
            "speedup": paired_ratio(totals["dense"], totals[name]),
            "tower": {s.strategy: [s.before, s.after] for s in stages if s.site.startswith("vision.")},
        }
    return found


def difference(clip: Path, frames: int, model: Any) -> dict[str, float]:
    """Between sampled frames, in normalised pixels: mean of all, and median of the patch that changes most."""
    pixels = prepare(
        model, clip, "", max_frames=frames, force_sample=True, time_instruction=False,
        processor=read_saved_tokenizer(WEIGHTS),
    )["pixel_values_videos"].flatten(0, -4)  # fmt: skip
    change = (pixels[1:] - pixels[:-1]).abs().mean(1)
    patch = model.config.vision_config.patch_size
    worst = torch.nn.functional.avg_pool2d(change, patch).flatten(1).amax(1)
    return {"mean": float(change.mean()), "worst_patch": float(worst.median())}


def accuracy(model: Any, questions: int) -> Row:
    """Right answers to held-out questions at 16 frames, per arm, and the paired difference to dense."""
    tokenizer, right = read_saved_tokenizer(WEIGHTS), {name: [] for name in arms()}
    made = []
    for kind in KINDS:
        task = NeedleTask(NeedleSpec(kind=kind, frames=16, clips="heldout"))
        made += [task.example(SEED, index) for index in range(questions)]
    inputs = [prepare(model, e.frames, e.question, time_instruction=False) for e in made]
    for name, pipeline in arms().items():
        attached = contextlib.nullcontext() if pipeline is None else tr.reduce(model, pipeline)
        with torch.inference_mode(), attached:
            for example, given in zip(made, inputs, strict=True):
                out = model.generate(**given, max_new_tokens=6, do_sample=False)
                text = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
                right[name].append(example.scored.read(text) == example.scored.expected)
    found = {}
    for name, own in right.items():
        gaps = [int(a) - int(b) for a, b in zip(own, right["dense"], strict=True)]
        found[name] = {
            "accuracy": statistics.mean(own), "difference": statistics.mean(gaps),
            "interval": list(score_interval(gaps.count(1), gaps.count(-1), len(gaps))), "examples": len(own),
        }  # fmt: skip
    return found


def measure(options: Options) -> Row:
    """Times on three clips of the embedded model and of a LLaVA-Video-shaped one; accuracy of the embedded model."""
    held = {path.name: path for path in clip_paths("heldout")}
    shaped, embedded = shaped_model(), load_embedded()
    frames = 4 if options.quick else 12
    tokens = frames * shaped.config.tokens_per_frame
    vision = shaped.config.vision_config
    dense = [tokens + 34] * shaped.config.text_config.num_hidden_layers
    real = [64 * 210 + 34] * 28
    share = {
        "shaped": tower_flops(frames, 729, vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers)
        / prefill_flops(DecoderShape.from_config(shaped.config), dense, dense, form="causal"),
        "llava_video_7b": tower_flops(**REAL_TOWER) / prefill_flops(REAL_DECODER, real, real, form="causal"),
    }
    return {
        "frames": {"embedded": 32, "shaped": frames},
        "tower_to_decoder_flops": share,
        "new_tokens": NEW_TOKENS,
        "difference": {name: difference(held[file], 32, embedded) for name, file in CLIPS.items()},
        "embedded": {
            name: clip_times(embedded, held[file], 32, 1 if options.quick else 5) for name, file in CLIPS.items()
        },
        "shaped": {
            name: clip_times(shaped, held[file], frames, 1 if options.quick else 2) for name, file in CLIPS.items()
        },
        "accuracy": accuracy(embedded, 8 if options.quick else 100),
    }


def section(data: Row, docs: Path) -> list[str]:
    """Tables, a plot, and the sentence with what was aimed at and reached."""
    share = data["tower_to_decoder_flops"]
    lines = [
        f"C = {BUDGET}; real clips, the frames spread over each: {', '.join(f'{n} ({file})' for n, file in CLIPS.items())}, told "
        "apart by the difference of successive frames (black −1, white 1; mean, and median of the patch that changes most): "
        + ", ".join(f"{n} {d['mean']:.3f} and {d['worst_patch']:.3f}" for n, d in data["difference"].items())
        + ". The tower's stages have the preset's settings, chosen on training clips. decode: reading, sampling and preparing "
        f"frames; vision: tower, projector, pooling; answer: {data['new_tokens'] - 1} tokens after the first.",
    ]
    names = {
        "embedded": f"The embedded model, {data['frames']['embedded']} frames (two blocks in its tower, the first keeps all)",
        "shaped": f"LLaVA-Video's shape, {data['frames']['shaped']} frames at 384 px, random weights: tower to decoder FLOPs "
        f"{share['shaped']:.3f}, LLaVA-Video-7B at 64 frames {share['llava_video_7b']:.3f}",
    }
    for model, title in names.items():
        rows = []
        for clip, found in data[model].items():
            for arm, own in found.items():
                left = ", ".join(f"{after}/{before}" for before, after in own["tower"].values()) or "-"
                times = [f"{1e3 * own[part]['median']:.0f}" for part in PARTS]
                rows.append([clip, arm, left, *times, spread(own["total"], 2, " s"), spread(own["speedup"], 2, "×")])
        lines += ["", f"**{title}**", ""]
        lines += table(["clip", "arm", "tower: left", *(f"{part} ms" for part in PARTS), "total", "faster"], rows)
    _plot(data, docs / "benchmarks_end_to_end.png")
    lines += ["", "![Seconds of each part](benchmarks_end_to_end.png)", ""]
    lines += [f"Accuracy of the embedded model on held-out questions ({' and '.join(KINDS)}, 16 frames):", ""]
    rows = []
    for arm, own in data["accuracy"].items():
        low, high = own["interval"]
        gap = f"{own['difference']:+.4f} ({low:+.4f} … {high:+.4f})"
        rows.append([arm, f"{own['accuracy']:.3f}", gap, own["examples"]])
    lines += table(["arm", "accuracy", "paired difference to dense (95 % interval)", "questions"], rows)
    both = data["shaped"]["normal"]["+ both"]["speedup"]["median"]
    loss = -data["accuracy"]["+ both"]["difference"]
    reached = f"Reached with LLaVA-Video's shape: {both:.2f}×; with the embedded model {loss:.1%} lost."
    lines += ["", f"Aim: at least 2.5× on the normal clip with at most 3 % of the accuracy lost. {reached}"]
    return lines


def _plot(data: Row, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, model in zip(axes, ("embedded", "shaped"), strict=True):
        found = data[model]["normal"]
        before = [0.0] * len(found)
        for part in PARTS:
            seconds = [own[part]["median"] for own in found.values()]
            axis.barh(list(found), seconds, left=before, label=part)
            before = [a + b for a, b in zip(before, seconds, strict=True)]
        axis.invert_yaxis()
        axis.set_title(f"{model}, normal clip")
        axis.set_xlabel("seconds")
    axes[1].legend()
    figure.savefig(target, dpi=130)
