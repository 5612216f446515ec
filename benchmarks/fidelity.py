"""What each difference between `framefusion_official` and `framefusion` does: python benchmarks/fidelity.py

One choice at a time is turned from the released code's to the paper's, on the model and inputs of the golden tests (random
weights: this shows mechanics, never accuracy). Prints the Markdown table of docs/fidelity.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import tokenreduce as tr

DATA = Path(__file__).parents[1] / "tests" / "data" / "framefusion" / "model"
COSTS = (0.3, 0.5, 0.7)


def variants(cost: float) -> dict[str, dict[str, Any]]:
    """Pipelines by what is changed."""
    official = tr.load_pipeline("framefusion_official").with_budget(cost).model_dump(exclude_none=True, by_alias=True)

    def change(**edits: Any) -> dict[str, Any]:
        pipeline = copy.deepcopy(official)
        merge, prune = pipeline["stages"]
        for name, value in edits.items():
            (prune if name == "importance" else merge if name in merge else pipeline)[name] = value
        return pipeline

    exact = {"tokens": cost}
    return {
        "released code": official,
        "importance: cumulative": change(importance="cumulative"),
        "weighting: size": change(weighting="size"),
        "merge_below: false": change(merge_below=False),
        "budget of all tokens, exact": change(budget=exact),
        "all four: the paper": change(importance="cumulative", weighting="size", merge_below=False, budget=exact),
    }


def main() -> None:
    model = Qwen2ForCausalLM(Qwen2Config.from_json_file(DATA / "config.json")).eval()
    weights = load_file(DATA / "weights_bf16.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    tensors = load_file(DATA / "inputs_and_dense.safetensors")
    print(
        "| input | C | choice | tokens per layer | mean / N | kept as released | logits vs released | logits vs dense |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for which in "AB":
        embeds, slot = tensors[f"{which}.inputs_embeds"].float(), tensors[f"{which}.patch_type"].long()
        vision = slot >= 0
        frame = torch.where(vision, (vision.long().cumsum(1) - 1) // (int(slot.max()) + 1), -1)
        layout = tr.TokenLayout(slot=slot, frame=frame)
        with torch.no_grad():
            dense = model(inputs_embeds=embeds).logits[0, -1]
        for cost in COSTS:
            first: tuple[set[int], torch.Tensor] | None = None
            for name, pipeline in variants(cost).items():
                with torch.no_grad(), tr.reduce(model, pipeline, layout=layout) as run:
                    logits = model(inputs_embeds=embeds).logits[0, -1]
                    trace = run.trace
                kept = set(trace.kept[0].tolist())
                first = first or (kept, logits)
                overlap = len(kept & first[0]) / len(kept | first[0])
                tokens = [int(layer.tokens) for layer in trace.layers]
                profile = ", ".join(f"{tokens.count(n)} × {n}" for n in dict.fromkeys(tokens))
                print(
                    f"| {which} | {cost} | {name} | {profile} | {trace.relative_tokens[0]:.4f} | {overlap:.2f} "
                    f"| {float((logits - first[1]).abs().max()):.3f} | {float((logits - dense).abs().max()):.3f} |"
                )


if __name__ == "__main__":
    main()
