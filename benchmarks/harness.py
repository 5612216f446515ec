"""What the cases share: a decoder, video-like embeddings, arms that take turns, and how numbers are written."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tokenreduce as tr

SLOTS, TEXT = 210, 34
"""Vision tokens of a frame (LLaVA-Video's 14 × 15), and text tokens around the video."""
HIDDEN = 896

Arms = Mapping[str, Callable[[], Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """quick: smaller settings, for a look. threads: of torch. layers, hidden, frames: other sizes than a case's own."""

    quick: bool = False
    threads: int = 1
    layers: int | None = None
    hidden: int | None = None
    frames: tuple[int, ...] = ()

    @property
    def sized(self) -> bool:
        """Whether sizes were asked for."""
        return bool(self.layers or self.hidden or self.frames)


def decoder(layers: int, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Qwen2-0.5B's widths, or in their proportions; random weights, a small vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=4864 * hidden // HIDDEN, num_attention_heads=hidden // 64,
        num_key_value_heads=2, num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=1 << 21,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().to(dtype)


def video(
    frames: int, seed: int = 1, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN
) -> tuple[torch.Tensor, tr.TokenLayout]:
    """Video-like embeddings (1, N, hidden): each slot is an AR(1) process over frames, median similarity of neighbours 0.65."""
    generator = torch.Generator().manual_seed(seed)
    slot_share = torch.rand(SLOTS, 1, generator=generator) * 0.7 + 0.3
    states = [torch.randn(SLOTS, hidden, generator=generator)]
    for _ in range(frames - 1):
        fresh = torch.randn(SLOTS, hidden, generator=generator)
        states.append(slot_share * states[-1] + (1 - slot_share**2).sqrt() * fresh)
    text = torch.randn(TEXT, hidden, generator=generator)
    embeds = torch.cat([text[:14], *states, text[14:]])[None].to(dtype)
    return embeds, tr.TokenLayout.video(before=14, frames=frames, per_frame=SLOTS, after=TEXT - 14)


def take_turns(
    arms: Arms, repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each repetition of each arm; the order is turned round every time, so that none is always first."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-warmup, repeats):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            started = clock()
            arms[name]()
            if turn >= 0:
                seconds[name].append(clock() - started)
    return seconds


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of runs."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of as many independent values as theirs, by ranks: no distribution is assumed."""
    ranked, reach = sorted(values), 0.98 * len(values) ** 0.5
    middle = len(ranked) / 2
    return ranked[max(0, int(middle - reach))], ranked[min(len(ranked) - 1, int(middle + reach))]


def paired_ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, float]:
    """Ratio of each turn's times: median and extremes. Turns lie side by side in time, so drift of the machine cancels."""
    return summary([a / b for a, b in zip(top, bottom, strict=True)])


def spread(values: Mapping[str, float], digits: int = 2, unit: str = "") -> str:
    """`median (min–max)`."""
    return f"{values['median']:.{digits}f}{unit} ({values['min']:.{digits}f}–{values['max']:.{digits}f})"


def in_fresh_process(module: str, *arguments: str, **environment: str) -> tuple[str, int]:
    """Run `python -m module arguments` for its output and its peak resident memory in bytes (of this child alone)."""
    code = (
        "import runpy, sys; from harness import peak_memory; sys.argv = sys.argv[1:]; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True); "
        "print('peak', peak_memory(), file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, module, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if child.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{child.stderr}")
    return child.stdout, int(child.stderr.rsplit("peak ", 1)[1])


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes.

    What getrusage says begins, on Linux, with the size of the process that started this one.
    """
    return status("VmHWM")


def machine(options: Options) -> Row:
    """Where and when a case was measured."""
    model = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "date": date.today().isoformat(), "cpu": model, "cores": os.cpu_count(), "threads": options.threads,
        "vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "python": platform.python_version(), "quick": options.quick,
    }  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
