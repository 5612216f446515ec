"""One rank of tests/engine/test_tensor_parallel.py: run under torch.distributed's environment variables, or alone.

Usage: tensor_parallel_worker.py CHECKPOINT OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from support.tiny import generate, layout, prompt
from transformers import Qwen2ForCausalLM

import tokenreduce as tr

PIPELINES: dict[str, Any] = {
    "framefusion": tr.load_pipeline("framefusion"),
    "fastv": tr.load_pipeline("fastv"),
    "random": tr.load_pipeline("random"),
    "heads_max": tr.load_pipeline(
        {"name": "heads_max", "stages": [{"strategy": "importance_prune", "at": 1, "heads": "max", "keep": 0.5}]}
    ),
    "cascade": tr.load_pipeline(
        {"name": "cascade", "stages": [{"strategy": "fastv", "at": [1, 2, 3], "keep": [0.75, 0.5, 0.25]}]}
    ),
}
BUDGETS = {"framefusion": 0.6}
"""Low enough that its second stage, which reads attention, has something to prune; 0.8 for the others."""


def outcome(model: Any, pipeline: Any, ids: torch.Tensor) -> dict[str, Any]:
    budget = (
        None if any(stage.model_dump().get("keep") for stage in pipeline.stages) else BUDGETS.get(pipeline.name, 0.8)
    )
    with torch.no_grad(), tr.reduce(model, pipeline, budget=budget, layout=layout()) as run:
        heads = model.config.num_attention_heads
        seen = []
        watch = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape))
        prefill = model(input_ids=ids, use_cache=False).logits
        watch.remove()
        generated = generate(model, ids)
        trace = run.trace
    return {
        "kept": trace.kept[0],
        "source": trace.source,
        "tokens": torch.stack([layer.tokens for layer in trace.layers]),
        "selector_flops": trace.selector_flops,
        "flops": trace.flops,
        "prefill": prefill,
        "sequence": generated.sequences,
        "logits": torch.stack(generated.logits),
        "local_heads": seen[0][-1] * heads // model.config.hidden_size,
    }


def main(checkpoint: Path, output: Path) -> None:
    torch.set_num_threads(1)
    parallel = "RANK" in os.environ
    options = {"tp_plan": "auto"} if parallel else {}
    model: Any = Qwen2ForCausalLM.from_pretrained(checkpoint, **options).eval()
    results = {
        f"{name}.{seed}": outcome(model, pipeline, prompt(seed))
        for name, pipeline in PIPELINES.items()
        for seed in range(3)
    }
    torch.save(results, output)
    if parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
