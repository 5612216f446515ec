"""What the workers of the case `rivals` share: the decoder in the transformers at hand, and answers to JSON lines.

A worker is `python WORKER FOLDER DESCRIPTOR [...]`: requests come by its standard input, answers go to the file descriptor, so
that whatever libraries print cannot break them. This module imports neither tokenreduce nor harness: it runs where neither can
be imported.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

Facts = dict[str, Any]
SHORT = "2"
"""The video of the warm-up, by its number of frames."""
LAST_ONLY = next(name for name in signature(Qwen2ForCausalLM.forward).parameters if name.endswith("logits_to_keep"))
"""Its name has changed over time."""


@dataclass(frozen=True)
class Video:
    """Embeddings (1, N, hidden), and where in them the frames are."""

    embeds: torch.Tensor
    before: int
    frames: int
    per_frame: int
    after: int


@dataclass(frozen=True)
class Arm:
    """One way to run a prefill.

    model: the decoder. attach: what is in force during a prefill; its time is part of the prefill's. stays: whether it is so in
    the decode steps too. facts: what else to say of a prefill, out of what `attach` gave.
    """

    model: Any
    attach: Callable[[Video], AbstractContextManager[Any]] = lambda video: nullcontext()
    stays: bool = False
    facts: Callable[[Any], Facts] = lambda attached: {}


class Prefilled:
    """A prefill that was run: its facts, and the cache that decode steps go on with."""

    def __init__(self, arm: Arm, video: Video) -> None:
        self.arm, self.place = arm, video.embeds.shape[1]
        self.cache, self.stack = DynamicCache(), ExitStack()
        # The released FrameFusion writes into the embeddings that it is given.
        embeds = video.embeds.clone()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, started = _status("VmRSS"), time.perf_counter()
        with ExitStack() as stack:
            attached = stack.enter_context(arm.attach(video))
            self.logits = self.forward(embeds)
            if arm.stays:
                self.stack = stack.pop_all()
        seconds, peak = time.perf_counter() - started, _status("VmHWM") - before
        held = _held(self.cache)
        self.facts: Facts = {
            "tokens": self.place, "seconds": seconds, "peak": peak, "kv_tokens": [keys.shape[-2] for keys, _ in held],
            "kv_bytes": sum(each.untyped_storage().nbytes() for pair in held for each in pair), **arm.facts(attached),
        }  # fmt: skip

    def forward(self, embeds: torch.Tensor, **more: Any) -> torch.Tensor:
        """Logits of the last token."""
        arguments = {"inputs_embeds": embeds, "past_key_values": self.cache, "use_cache": True, LAST_ONLY: 1, **more}
        with torch.inference_mode():
            logits: torch.Tensor = self.arm.model(**arguments).logits
        return logits[0, -1]

    def step_ms(self, tokens: torch.Tensor) -> float:
        """Milliseconds of a decode step: the median over tokens but the first. Positions go on after the last of the input."""
        times = []
        for number, token in enumerate(tokens):
            started = time.perf_counter()
            self.forward(token[None, None], position_ids=torch.tensor([[self.place + number]]))
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times[1:])


def serve(arms: Callable[[Any, Facts], dict[str, Arm]], **versions: str) -> None:
    """Load the decoder, run each arm on the short video, say hello, and then answer.

    arms: of the decoder and of the facts in config.json, the arms besides `dense`, by name. versions: of what is neither torch
    nor transformers.
    """
    folder = Path(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as answers:
        try:
            for answer in _answers(folder, arms, versions):
                print(json.dumps(answer), file=answers, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            sys.exit(1)


def _answers(folder: Path, make: Callable[[Any, Facts], dict[str, Arm]], versions: dict[str, str]) -> Any:
    facts: Facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    torch.set_num_threads(facts["threads"])
    torch.manual_seed(0)
    tensors = load_file(folder / "videos.safetensors")
    tokens = tensors.pop("tokens")
    videos = {name: Video(embeds, frames=int(name), **facts["layout"]) for name, embeds in tensors.items()}
    model = load(folder, facts)
    arms = {"dense": Arm(model), **make(model, facts)}
    for name, arm in arms.items():
        _told(name, arm, videos[SHORT], tokens[:2])
    told = {name: version(name) for name in ("torch", "transformers")} | versions
    yield {
        "arms": list(arms), "logits": Prefilled(arms["dense"], videos[SHORT]).logits.tolist(),
        "versions": told | {"python": platform.python_version()},
    }  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        yield _told(request["arm"], arms[request["arm"]], videos[request["video"]], tokens)


def _told(name: str, arm: Arm, video: Video, tokens: torch.Tensor) -> Facts:
    """The facts of a prefill and of decode steps after it, or why there are none: not every arm can do every video."""
    try:
        run = Prefilled(arm, video)
        with run.stack:
            return run.facts | {"step_ms": run.step_ms(tokens)}
    except Exception as error:
        if name == "dense":
            raise
        traceback.print_exc()
        return {"refused": f"{type(error).__name__}: {error}"}


def load(folder: Path, facts: Facts) -> Any:
    """The decoder, with the weights of the folder."""
    config = Qwen2Config(**facts["config"], attn_implementation="sdpa")
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model


def _held(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
