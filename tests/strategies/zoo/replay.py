"""Replays recorded cases of public implementations through our strategies in the real engine.

    python tests/strategies/zoo/replay.py FOLDER

Below FOLDER lie `<method>/cases.json` and `<method>/case_NN.safetensors`. Each case becomes a prompt of a tiny decoder: the
recorded features are its `inputs_embeds`, with a `TokenLayout`; the recorded attention stands in for what the strategy reads
through `ctx.attention` or `ctx.tower`. A line per case says

    equal           the same tokens stay and merged features agree to 1e-5
    tie             the recording depends on the order of equal scores; counts (and scores, where they are kept) agree
    defect          the case differs where our documentation names a defect of the public code
    not applicable  no strategy of ours, or a mode that the decoder cannot see
    differs         none of these; then the exit status is 1

A case in which the public code raised is equal if ours refuses by name, or answers and `docs/methods.md` says so.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import tokenreduce as tr
from tokenreduce.errors import TokenReduceError
from tokenreduce.strategy import StageContext

TOLERANCE = 1e-5


@dataclass
class Trial:
    """A recorded case as a prompt for our engine, and what is expected of it.

    hidden: (L, D), the whole sequence, text and vision. stages: of the pipeline. kept: places in the sequence that stay among the
    vision tokens, in any order. features: (m, D) states of the vision tokens that are left, in any order. count: how many.
    attention, signals: stand-ins for what the strategy reads under those names of its context; patches: for a public method of
    the strategy that reads what no decoder has. defect: the defect of the public code that our
    documentation names, where the recording shows it. skip: why the case does not apply.
    """

    hidden: Tensor | None = None
    layout: tr.TokenLayout | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    kept: Tensor | None = None
    features: Tensor | None = None
    count: int | None = None
    attention: Callable[..., Tensor] | None = None
    signals: dict[str, Any] = field(default_factory=dict)
    patches: list[tuple[str, Any]] = field(default_factory=list)
    held: Tensor | None = None
    """At cache sites: (G, m) places that each KV head of layer 0 holds, in any order."""
    per_layer: Tensor | None = None
    """At cache sites: (layers,) tokens that a KV head holds."""
    heads: int = 1
    layers: int = 2
    budget: Any = None
    defect: str = ""
    skip: str = ""


@dataclass
class Left:
    """What our engine left: places (m,) long of the vision tokens, their states (m, D)."""

    kept: Tensor
    features: Tensor
    held: Tensor
    """(G, m) places that each KV head of layer 0 holds."""
    per_layer: list[int]


def decoder(width: int, layers: int, dtype: torch.dtype, heads: int = 1) -> Any:
    """A decoder whose layers hand on what they get: recorded states reach any layer as they are."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=2,
        max_position_embeddings=65536,
    )
    model = Qwen2ForCausalLM(config).eval().to(dtype)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def run(trial: Trial) -> Left:
    """The trial's prompt through our engine."""
    assert trial.hidden is not None
    assert trial.layout is not None
    hidden = trial.hidden
    model = decoder(hidden.shape[-1], trial.layers, hidden.dtype, trial.heads)
    seen: list[Tensor] = []
    probe = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with ExitStack() as stack:
        # Some recordings keep every token, of which the engine warns.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)
        if trial.attention is not None:
            stack.enter_context(patch.object(StageContext, "attention", trial.attention))
        for name, value in trial.signals.items():
            # Some signals look at the context: those are functions of it.
            stand_in = property(value) if callable(value) else PropertyMock(return_value=value)
            stack.enter_context(patch.object(StageContext, name, stand_in, create=True))
        for name, value in trial.patches:
            stack.enter_context(patch(name, value))
        pipeline = {"name": "replay", "stages": trial.stages}
        attached = stack.enter_context(tr.reduce(model, pipeline, budget=trial.budget, layout=trial.layout))
        seen.clear()
        with torch.no_grad():
            cache = model(inputs_embeds=hidden[None]).past_key_values
        kept = attached.trace.kept[0]
    probe.remove()
    with torch.no_grad():
        dense = model(inputs_embeds=hidden[None]).past_key_values.layers[0].keys[0]
    # A key is known by its bits: those of other places are other keys.
    held = torch.cdist(cache.layers[0].keys[0].double(), dense.double()).argmin(-1).sort(-1).values
    per_layer = [layer.keys.shape[2] for layer in cache.layers]
    vision = trial.layout.vision[0][kept]
    return Left(kept[vision], seen[-1][0, vision], held, per_layer)


def same_rows(ours: Tensor, recorded: Tensor) -> bool:
    """Whether the rows of both are the same to 1e-5 of the largest entry, whatever their order."""
    if ours.shape != recorded.shape:
        return False
    if not len(ours):
        return True
    a, b = ours.double(), recorded.double()
    distance = torch.cdist(a, b, p=torch.inf, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, whom = distance.min(1)
    scale = max(float(b.abs().max()), 1.0)
    # Equal rows may choose the same partner: then either is as good, and the sums agree too.
    distinct = len(whom.unique()) == len(whom) or torch.allclose(a.sum(0), b.sum(0), atol=len(a) * TOLERANCE * scale)
    return bool(nearest.max() <= TOLERANCE * scale) and distinct


def compare(trial: Trial, case: dict[str, Any]) -> tuple[str, str]:
    """The verdict on a case and a clause about it."""
    if trial.skip:
        return "not applicable", trial.skip
    try:
        left = run(trial)
    except TokenReduceError as error:
        if case["raises"]:
            return "equal", f"both refuse; ours: {error}"
        return (
            ("defect", f"{trial.defect}; ours refuses: {error}") if trial.defect else ("differs", f"refused: {error}")
        )
    except Exception as error:  # One broken case must not hide the others.
        return "differs", f"{type(error).__name__}: {error}"
    if case["raises"]:
        return "equal", f"the public code raises, ours leaves {len(left.kept)} tokens"
    if trial.held is not None or trial.per_layer is not None:
        return compare_held(trial, left, case)
    count = trial.count
    if trial.kept is not None:
        count = len(trial.kept.unique()) if count is None else count
    elif trial.features is not None:
        count = len(trial.features) if count is None else count
    if case["comparison"].startswith("ties"):
        if len(left.kept) == count:
            return "tie", f"{count} tokens; {case['comparison'][6:]}"
        return ("defect" if trial.defect else "differs"), trial.defect or f"{len(left.kept)} tokens, recorded {count}"
    problem = ""
    if trial.kept is not None and left.kept.tolist() != (recorded := trial.kept.unique().tolist()):
        wrong = len(set(left.kept.tolist()) ^ set(recorded))
        problem = f"{len(left.kept)} tokens, recorded {len(recorded)}; {wrong} are in one set only"
    elif trial.features is not None and not same_rows(left.features, trial.features):
        problem = f"features differ ({len(left.features)} rows, recorded {len(trial.features)})"
    elif count is not None and len(left.kept) != count:
        problem = f"{len(left.kept)} tokens, recorded {count}"
    if not problem:
        return "equal", f"{len(left.kept)} tokens"
    return ("defect", f"{trial.defect}: {problem}") if trial.defect else ("differs", problem)


def compare_held(trial: Trial, left: Left, case: dict[str, Any]) -> tuple[str, str]:
    """The verdict on what KV heads hold."""
    if trial.per_layer is not None:
        same = left.per_layer == trial.per_layer.tolist()
        return ("equal" if same else "differs"), f"layers hold {left.per_layer[0]} … {left.per_layer[-1]} tokens"
    assert trial.held is not None
    assert trial.layout is not None
    text = (~trial.layout.vision[0]).nonzero().squeeze(1).expand(len(trial.held), -1)
    recorded = torch.cat([text, trial.held], 1).sort(-1).values
    if recorded.shape == left.held.shape and torch.equal(recorded, left.held):
        return "equal", f"{recorded.shape[1]} keys per head"
    if recorded.shape == left.held.shape and case["comparison"].startswith("ties"):
        return "tie", f"{recorded.shape[1]} keys per head"
    problem = f"{list(left.held.shape)} keys, recorded {list(recorded.shape)}"
    return ("defect", f"{trial.defect}: {problem}") if trial.defect else ("differs", problem)


def cases(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Method, case and tensors of each recorded case below `folder`."""
    for index in sorted(folder.rglob("cases.json")):
        for case in json.loads(index.read_text())["cases"]:
            path = index.parent / case["file"]
            if path.exists():
                yield index.parent.name, case, load_file(path)


def replay(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """(method, file, verdict, clause) of each recorded case and way of ours to run it."""
    from strategies.zoo.table import TABLE

    for method, case, tensors in cases(folder):
        if method not in TABLE:
            yield method, case["file"], "not applicable", "no strategy of ours"
            continue
        verdicts = [(label, *compare(trial, case)) for label, trial in TABLE[method](case["params"], tensors, case)]
        yield method, case["file"], *together(verdicts)


def together(verdicts: list[tuple[str, str, str]]) -> tuple[str, str]:
    """One line for a case that several strategies or options of ours replay: what differs, else the best of them."""
    found = [verdict for _, verdict, _ in verdicts]
    order = ("differs", "equal", "tie", "defect", "not applicable")
    best = next(verdict for verdict in order if verdict in found)
    clauses = [
        f"{label}: {clause}" if verdict == best else f"{label}: {verdict}, {clause}"
        for label, verdict, clause in verdicts
    ]
    return best, "; ".join(clauses)


def main(arguments: list[str]) -> int:
    """A line per case; 1 if any differs, 2 if there is none."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python tests/strategies/zoo/replay.py FOLDER, a folder with <method>/cases.json below it")
        return 2
    total: Counter[str] = Counter()
    for method, file, verdict, clause in replay(Path(arguments[0])):
        total[verdict] += 1
        print(f"{method}/{file.removesuffix('.safetensors')}: {verdict}: {' '.join(clause.split())}")
    if not total:
        print(f"{arguments[0]}: no case below it; expected <method>/cases.json with .safetensors beside it")
        return 2
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(total.items())))
    return 1 if total["differs"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
