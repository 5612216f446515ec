"""What only a GPU can show, in one command and one file to send back: `make gpu-check`, within 20 minutes.

First the tests that are marked `gpu` (kernels against their oracles, the CPU's tokens and logits, streams, several GPUs if
there are), then prefill, decoding, memory and end to end on random weights of real shapes. `SMALL=1` rehearses every line on
tiny shapes on whatever there is; a rehearsal says so, and its times are left out of the file: no number of a CPU passes for a
GPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, SiglipVisionConfig

import tokenreduce as tr
from tokenreduce.compare.memory import PeakMemory
from tokenreduce.compare.side_by_side import MeasuredArm, measure
from tokenreduce.errors import TokenReduceError
from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tokenreduce.models.placement import best_device, device_name

ROOT = Path(__file__).parents[1]
PRESETS = ("framefusion", "fastv", "streaming_llm", "framefusion_end_to_end")
BUDGET, SMALL_BUDGET, TEXT = 0.3, 0.7, 34
"""What remains, also of a rehearsal's few layers, and text tokens around the video."""
MINUTES = 20.0
"""After so long no further case begins; the file names those that were left out."""


@dataclass(frozen=True)
class Case:
    """A model with random weights, and an input of it."""

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]


def llava_video(small: bool, device: torch.device, dtype: torch.dtype) -> Case:
    """LLaVA-Video-7B (Qwen2-7B, SigLIP so400m at 384 px), 64 frames, 13,474 tokens; small: 24 frames through four layers."""
    if small:
        text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        vision = {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
        }
    else:
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        vision = {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384
        }  # fmt: skip
    vocabulary, side = 1000 if small else 152_064, vision["image_size"]
    config = LlavaVideoConfig(
        text_config=Qwen2Config(
            **text, num_key_value_heads=2 if small else 4, vocab_size=vocabulary, eos_token_id=None, pad_token_id=0,
            bos_token_id=None, max_position_embeddings=32_768,
        ),
        vision_config=SiglipVisionConfig(**vision, patch_size=14, vision_use_head=False),
        image_token_index=2, video_token_index=3, vision_feature_layer=-1, image_grid_pinpoints=[[side, side]],
    )  # fmt: skip
    model = _random(LlavaVideoForConditionalGeneration, config, device, dtype)
    frames = 24 if small else 64
    pixels = _video(frames, side, device, dtype)[None]
    ids = _ids(3, frames * config.tokens_per_frame, vocabulary, device)
    return Case("llava_video_7b", model, {**ids, "pixel_values_videos": pixels})


def qwen2_5_vl(small: bool, device: torch.device, dtype: torch.dtype) -> Case:
    """Qwen2.5-VL-7B, 64 frames of 336 × 448 px: 6,144 vision tokens; small: two blocks and four layers, 16 frames of 112 px."""
    vision: dict[str, Any] = {}
    text: dict[str, Any] = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064,
    }  # fmt: skip
    if small:
        text = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1000,
        }  # fmt: skip
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
                  "window_size": 56, "fullatt_block_indexes": [1]}  # fmt: skip
    head = text["hidden_size"] // text["num_attention_heads"]
    sections = [head // 8, 3 * head // 16, 3 * head // 16]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config={**text, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None},
        vision_config={"out_hidden_size": 3584, **vision}, video_token_id=3, image_token_id=2, vision_start_token_id=4,
        vision_end_token_id=5,
    )  # fmt: skip
    model = _random(Qwen2_5_VLForConditionalGeneration, config, device, dtype)
    frames, height, width = (16, 112, 112) if small else (64, 336, 448)
    grid = torch.tensor([[frames // 2, height // 14, width // 14]])
    patches = int(grid.prod())
    # A still picture with a little noise: what a patch holds hardly changes from frame to frame.
    per_frame = patches // (frames // 2)
    still = torch.randn(per_frame, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    pixels = still.repeat(frames // 2, 1) + 0.1 * torch.randn(
        patches, still.shape[1], generator=torch.Generator().manual_seed(2)
    )
    ids = _ids(3, patches // 4, text["vocab_size"], device, before=[4], after=[5])
    ids |= {"pixel_values_videos": pixels.to(device, dtype), "video_grid_thw": grid.to(device)}
    kinds = torch.where(ids["input_ids"] == 3, 2, 0)
    return Case("qwen2_5_vl_7b", model, {**ids, "mm_token_type_ids": kinds})


def _random(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = 0
    return model.eval()


def _video(frames: int, side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(F, 3, side, side): a still picture that drifts a little."""
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(3, side, side, generator=generator) * 2 - 1
    moving = [still + 0.02 * step * torch.rand(3, side, side, generator=generator) for step in range(frames)]
    return torch.stack(moving).to(device, dtype)


def _ids(
    token: int,
    count: int,
    vocabulary: int,
    device: torch.device,
    before: list[int] | None = None,
    after: list[int] | None = None,
) -> dict[str, torch.Tensor]:
    text = torch.randint(10, vocabulary, (TEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([text[:14] + (before or []) + [token] * count + (after or []) + text[14:]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bench(case: Case, budget: float, repeats: int, new_tokens: int, timed: bool) -> dict[str, Any]:
    """Prefill, decoding, end to end and peak memory of every arm, in turns within one run."""
    device = case.inputs["input_ids"].device
    pipelines, refused = [], {}
    for name in PRESETS:
        pipeline = tr.load_pipeline(name).with_budget(budget)
        try:
            with tr.reduce(case.model, pipeline), torch.inference_mode():
                case.model(**case.inputs, use_cache=True, logits_to_keep=1)
            pipelines.append(pipeline)
        except TokenReduceError as error:
            refused[name] = str(error)
    arms = measure(case.model, case.inputs, pipelines, repeats=repeats, new_tokens=new_tokens)
    rows = [_row(arm, arms[0], timed) for arm in arms]
    for arm, row in zip(arms, rows, strict=True):
        attached = tr.reduce(case.model, arm.pipeline) if arm.pipeline is not None else None
        try:
            with PeakMemory(device) as peak, torch.inference_mode():
                case.model(**case.inputs, use_cache=True, logits_to_keep=1)
        finally:
            if attached is not None:
                attached.detach()
        if timed:
            row["peak_bytes"], row["growth_bytes"] = peak.peak, peak.growth
    return {"input_tokens": int(case.inputs["input_ids"].shape[1]), "arms": rows, "refused": refused}


def _row(arm: MeasuredArm, dense: MeasuredArm, timed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": arm.name,
        "relative_tokens": sum(arm.counts.tokens) / sum(dense.counts.tokens),
        "relative_flops": arm.counts.flops / arm.counts.dense_flops,
        "kv_bytes": arm.counts.kv_bytes,
    }
    if timed:
        row |= {
            "prefill_seconds": arm.llm_seconds,
            "prefill_speedup": dense.llm_median / arm.llm_median,
            "with_vision_seconds": arm.total_seconds,
            "with_vision_speedup": dense.total_median / arm.total_median,
            "decode_seconds_per_token": arm.decode_seconds,
        }
    return row


def gpu_tests(device: torch.device, small: bool) -> dict[str, Any]:
    """The tests that are marked `gpu`, in a process of their own."""
    environment = {**os.environ, "TOKENREDUCE_GPU_TESTS": str(device), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    tail = done.stdout.splitlines()[-40:] + done.stderr.splitlines()[-10:]
    return {"exit_code": done.returncode, "seconds": round(time.monotonic() - started, 1), "output": tail}


def environment(device: torch.device) -> dict[str, Any]:
    """What is needed to read the numbers."""
    packages = ("torch", "transformers", "accelerate", "triton", "tokenreduce", "flash-attn")
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = "not installed"
    hardware = [device_name(device)]
    if device.type == "cuda":
        hardware = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": str(device), "hardware": hardware, "packages": found, "python": platform.python_version(),
        "system": platform.platform(), "cuda": torch.version.cuda, "commit": commit,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--small", action="store_true", help="rehearse on tiny shapes, on whatever there is")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="the file to send back")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills per arm")
    asked = parser.parse_args()
    device = best_device()
    if device.type == "cpu" and not asked.small:
        print(
            "gpu-check: no accelerator on this machine; `make gpu-check SMALL=1` rehearses on tiny shapes",
            file=sys.stderr,
        )
        return 2
    timed, started = not asked.small and device.type != "cpu", time.monotonic()
    dtype = torch.float32 if asked.small else torch.bfloat16
    result: dict[str, Any] = {"rehearsal": asked.small, "environment": environment(device), "cases": {}, "left_out": []}
    print(f"gpu-check on {device} ({', '.join(result['environment']['hardware'])}), {dtype}")
    if asked.small:
        print("a rehearsal on tiny shapes: counts are shown, times are not; none of it says anything about a GPU")
    print("tests marked gpu …", flush=True)
    result["tests"] = gpu_tests(device, asked.small)
    print("\n".join(result["tests"]["output"][-3:]))
    for build in (llava_video, qwen2_5_vl):
        if (time.monotonic() - started) / 60 > MINUTES * 0.6:
            result["left_out"].append(build.__name__)
            continue
        print(f"{build.__name__}: building random weights …", flush=True)
        case = build(asked.small, device, dtype)
        result["cases"][case.name] = found = bench(
            case,
            SMALL_BUDGET if asked.small else BUDGET,
            1 if asked.small else asked.repeats,
            4 if asked.small else 64,
            timed,
        )
        for row in found["arms"]:
            times = (
                f", prefill {row['prefill_speedup']:.2f}×, with vision {row['with_vision_speedup']:.2f}×"
                if timed
                else ""
            )
            print(f"  {row['arm']}: tokens {row['relative_tokens']:.3f}, FLOPs {row['relative_flops']:.3f}{times}")
        for name, why in found["refused"].items():
            print(f"  {name} refused: {why}")
        del case
    result["minutes"] = round((time.monotonic() - started) / 60, 1)
    asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {asked.output}: please send it back, whatever it says")
    return 1 if result["tests"]["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
