"""The released FrameFusion code and kvpress beside tokenreduce, on one decoder.

None of the three goes with the transformers of another: each has a worker process with an interpreter of its own. All are alive
in a run, and the arms of all take turns. These environment variables say where the others are; what is not named is left out:

    TOKENREDUCE_KVPRESS_PYTHON      a Python that has kvpress
    TOKENREDUCE_FRAMEFUSION_PYTHON  a Python that has transformers 4.45.2
    TOKENREDUCE_FRAMEFUSION_CODE    a checkout of github.com/thu-nics/FrameFusion
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, SLOTS, TEXT, Options, Row, decoder, paired_ratio, spread, summary, table, video
from rivals.client import HELP, Worker, WorkerError, environments, fail
from safetensors.torch import save_file

TITLE = "Side by side: the released FrameFusion code and kvpress, on the same decoder in one run"
LAYERS, BUDGET = 28, 0.3
SETTINGS = ((20, 3),)
"""Frames, turns."""
SHORT = 2
"""Frames of the warm-up, and of the comparison of logits."""
STEPS = 16
"""Decode steps after each prefill that count, besides a first one that does not."""
TOLERANCE = 1e-3
OURS, ITS_LAYERS = "tokenreduce", 28
"""The name of this environment; the depth that the released FrameFusion reckons with."""
SCRIPTS = {"kvpress": "presses.py", "FrameFusion": "released.py"}
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc returns each freed tensor to the system at once. That takes time, so it is for the peaks only."""
Workers = dict[str, Worker]
CONFIG = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def measure(options: Options) -> Row:
    """Each arm of each environment in turns, at each length."""
    layers, hidden = options.layers or (8 if options.quick else LAYERS), options.hidden or HIDDEN
    settings = ((6, 1),) if options.quick else SETTINGS
    if options.frames:
        settings = tuple((frames, settings[0][1]) for frames in options.frames)
    named, left_out = environments(os.environ)
    if not named:
        fail(HELP)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = [frames for frames, _ in settings]
        write(folder, layers, hidden, {SHORT, *lengths}, options.threads)
        with at_work(named, folder, **EXACT) as (workers, hello):
            apart = worst_difference({who: torch.tensor(said["logits"]) for who, said in hello.items()})
            peaks = {frames: in_turns(asked(workers, hello, frames), 1) for frames in lengths}
        with at_work(named, folder) as (workers, hello):
            rows = [row for setting in settings for row in setting_rows(asked(workers, hello, setting[0]), *setting)]
    for row in rows:
        row["peak"] = peaks[row["frames"]][row["environment"], row["arm"]][0].get("peak")
    refused = [row for row in rows if "refused" in row]
    return {
        "layers": layers, "hidden": hidden, "budget": BUDGET, "steps": STEPS, "logits_apart": apart, "short": SHORT,
        "environments": {who: said["versions"] for who, said in hello.items()}, "left_out": left_out, "refused": refused,
        "rows": [row for row in rows if row not in refused],
    }  # fmt: skip


@contextmanager
def at_work(named: Mapping[str, Sequence[str]], folder: Path, **environment: str) -> Iterator[tuple[Workers, Row]]:
    """A worker in each environment, and what each says when it is ready."""
    calls = {OURS: (sys.executable, "ours.py", folder)}
    calls |= {rival: (python, SCRIPTS[rival], folder, *rest) for rival, (python, *rest) in named.items()}
    with ExitStack() as stack:
        try:
            workers = {who: stack.enter_context(Worker(who, *call, **environment)) for who, call in calls.items()}
            hello = {who: worker.hello() for who, worker in workers.items()}
        except WorkerError as error:
            fail(f"rivals: {error}")
        yield workers, hello


def asked(workers: Workers, hello: Mapping[str, Row], frames: int) -> dict[tuple[str, str], Callable[[], Row]]:
    """The arms of all environments, to be called for their facts."""
    return {
        (who, arm): (lambda who=who, arm=arm: workers[who].ask(arm=arm, video=str(frames)))
        for who, said in hello.items()
        for arm in said["arms"]
    }


def write(folder: Path, layers: int, hidden: int, lengths: set[int], threads: int) -> None:
    """Weights, embeddings and plain facts, for workers that know neither harness nor this transformers."""
    model = decoder(layers, hidden)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "weights.safetensors"
    )
    videos = {str(frames): video(frames, hidden=hidden)[0] for frames in lengths}
    tokens = torch.randn(STEPS + 1, hidden, generator=torch.Generator().manual_seed(2))
    save_file(videos | {"tokens": tokens}, folder / "videos.safetensors")
    facts = {
        "config": {key: getattr(model.config, key) for key in CONFIG}, "budget": BUDGET, "threads": threads,
        "layout": {"before": 14, "per_frame": SLOTS, "after": TEXT - 14},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")


def worst_difference(logits: Mapping[str, torch.Tensor]) -> float:
    """By how much the dense logits of two environments differ at most. Refuses what is not the same decoder."""
    apart = {pair: float((logits[pair[0]] - logits[pair[1]]).abs().max()) for pair in combinations(logits, 2)}
    for (one, other), difference in apart.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"dense logits of {one} and {other} differ by {difference:.1e}: not the same decoder")
    return max(apart.values())


def in_turns(arms: Mapping[Any, Callable[[], Row]], repeats: int) -> dict[Any, list[Row]]:
    """What each arm says in each turn, by its own clock; the order is turned round every time, as in `take_turns`."""
    said: dict[Any, list[Row]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            said[name].append(arms[name]())
    return said


def setting_rows(arms: Mapping[tuple[str, str], Callable[[], Row]], frames: int, repeats: int) -> list[Row]:
    """A row for each arm of each environment, against the dense arm of the same environment; or why it has refused."""
    said = in_turns(arms, repeats)
    rows: list[Row] = []
    for (who, arm), turns in said.items():
        dense = said[who, "dense"]
        if "refused" in turns[0]:
            rows.append({"environment": who, "arm": arm, "frames": frames, **turns[0]})
            print(f"  {frames} frames, {who} {arm} left out: {turns[0]['refused']}", flush=True)
            continue
        times = {key: [turn[key] for turn in turns] for key in ("seconds", "step_ms")}
        faster = {key: paired_ratio([turn[key] for turn in dense], own) for key, own in times.items()}
        rows.append(
            {
                "environment": who, "arm": arm, "frames": frames, "tokens": turns[0]["tokens"],
                "seconds": summary(times["seconds"]), "speedup": faster["seconds"],
                "predicted": turns[0].get("predicted"), "step_ms": summary(times["step_ms"]),
                "step_speedup": faster["step_ms"], "kv_tokens": turns[0]["kv_tokens"], "kv_bytes": turns[0]["kv_bytes"],
                "kv_share": turns[0]["kv_bytes"] / dense[0]["kv_bytes"],
            }
        )  # fmt: skip
        print(
            f"  N={turns[0]['tokens']} {who} {arm}: prefill {spread(faster['seconds'])}×, step {spread(faster['step_ms'])}×",
            flush=True,
        )
    return rows


def section(data: Row, docs: Path) -> list[str]:
    """The table, and what each of them does."""
    columns = ("N", "environment", "arm", "prefill s", "dense ÷ it", "FLOPs predict", "decode step ms", "dense ÷ it")
    cells = [
        (
            f"{row['tokens']:,}", row["environment"], row["arm"], spread(row["seconds"]), faster(row, "speedup"),
            f"{row['predicted']:.2f}×" if row["predicted"] else "–", spread(row["step_ms"], 1),
            faster(row, "step_speedup"), f"{statistics.mean(row['kv_tokens']):,.0f}", f"{row['kv_share']:.1%}",
            f"{row['peak'] / 2**20:,.0f}", row["seconds"]["runs"],
        )
        for row in data["rows"]
    ]  # fmt: skip
    where = [
        f"{who} ({', '.join(f'{name} {number}' for name, number in versions.items())})"
        for who, versions in data["environments"].items()
    ]
    gone = [f"{who} is left out: {why}." for who, why in data["left_out"].items()]
    gone += ["{environment}, {arm}, {frames} frames, is left out: {refused}.".format(**row) for row in data["refused"]]
    return [
        f"A decoder of {data['layers']} layers, {data['hidden']} wide, float32, sdpa, C = {data['budget']:g}. No two of these go",
        "with one transformers, so each has a process with an interpreter of its own, and builds the decoder from the same file",
        f"of weights: {'; '.join(where)}. Their dense logits after {data['short']} frames differ by at most",
        f"{data['logits_apart']:.1g}. `dense ÷ it` is against the dense arm of the same environment in the same turn, by the",
        f"worker's own clock. A decode step is the median of {data['steps']} after the prefill. KV tokens are the mean over",
        "layers, KV share is of bytes. The peak is the resident memory beyond what there was before the prefill, its cache",
        "included, in a run of its own with MALLOC_MMAP_THRESHOLD_=65536, under which glibc returns each freed tensor.",
        *gone,
        "",
        *table((*columns, "KV tokens", "KV share", "peak MiB", "turns"), cells),
        "",
        *rivals_told(data),
    ]


def faster(row: Row, key: str) -> str:
    """The speed-up over dense, of what is not dense."""
    return "–" if row["arm"] == "dense" else f"{spread(row[key])}×"


def rivals_told(data: Row) -> list[str]:
    """What each of them does, in a sentence or two."""
    kept, lines = f"{data['budget']:.0%}", []
    if "kvpress" in data["environments"]:
        lines += [
            f"kvpress removes all but {kept} of a layer's cache after that layer's attention has run over all tokens, and every",
            "token goes on to the next layer: its prefill cannot be faster than dense. What it can save is the cache and, as far",
            "as attention counts in them, time of decode steps.",
        ]
    if "FrameFusion" in data["environments"]:
        uneven = ", so that here the two keep not quite the same number of tokens" * (data["layers"] != ITS_LAYERS)
        lines += [
            "The released FrameFusion code merges and prunes hidden states in the prefill, as `framefusion_official` does; its",
            f"arithmetic is for {ITS_LAYERS} layers, however many there are{uneven}. It is on its decoder for good; the others",
            "are attached within the time of a prefill.",
        ]
    return [
        *lines,
        f"tokenreduce's `streaming_llm` is a span of {kept}: all tokens go through all layers; attention and cache are short.",
    ]
