"""What the vision tower tells a stage in the decoder, against the family's own eager attention carried by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.double import Double, plugin  # noqa: F401
from support.families import FAMILIES, Image, Text, Video
from support.tiny import prompt, tiny_model
from tokenreduce_adapters import ADAPTERS
from torch import Tensor

import tokenreduce as tr
from tokenreduce.adapter import TowerCall
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.strategy import Capabilities, StageContext

PIPELINE: dict[str, Any] = {"name": "reader", "stages": [{"strategy": "double", "at": 1}]}
ROWS = {
    "llava": [[Text(3), Image((24, 24)), Text(2)], [Text(1), Image((24, 24)), Text(1), Image((24, 24)), Text(4)]],
    "llava_next_video": [[Text(5), Video(3), Text(7), Video(3), Text(2)], [Text(2), Video(3), Text(9)]],
    "llava_onevision": [[Text(5), Video(3), Text(7), Video(3), Text(2)], [Text(2), Video(3), Text(9)]],
    "internvl": [[Text(5), Video(3), Text(7), Image((48, 24)), Text(2)], [Text(2), Video(2), Text(9)]],
    "qwen2_vl": [[Text(5), Video(3, (3, 5)), Text(7), Image((48, 24)), Text(2)], [Text(2), Video(2, (2, 3)), Text(9)]],
    "qwen2_5_vl": [
        [Text(5), Video(3, (6, 10)), Text(7), Image((48, 24)), Text(2)],
        [Text(2), Video(2, (2, 3)), Text(9)],
    ],
    "qwen3_vl": [[Text(5), Video(3, (3, 5)), Text(7), Image((48, 24)), Text(2)], [Text(2), Video(2, (2, 3)), Text(9)]],
}
CLS = {"llava", "llava_next_video", "internvl"}


def reading(monkeypatch: pytest.MonkeyPatch, *needs: str, blocks: tuple[int, ...] = (-1,)) -> list[dict[str, Tensor]]:
    """Makes the double read `needs`; what it has read, one entry a look."""
    found: list[dict[str, Tensor]] = []

    def act(ctx: StageContext) -> None:
        seen = {"medium": ctx.medium.clone(), "marker": ctx.marker}
        for need in needs:
            kind = need.removeprefix("tower.")
            for block in blocks if kind != "pooled" else (-1,):
                read = {"pooled": lambda: ctx.tower.pooled, "keys": lambda: ctx.tower.keys(block)}.get(  # noqa: B023
                    kind,
                    lambda: ctx.tower.attention(block, kind, "each").T,  # type: ignore[arg-type]  # noqa: B023
                )
                seen[f"{need}{block}"] = read()
        found.append(seen)

    declared = Capabilities(sites=("pre_attention",), content_dependent=True, needs=needs)  # type: ignore[arg-type]
    monkeypatch.setattr(Double, "capabilities", declared)
    monkeypatch.setattr(Double, "tower_blocks", lambda self, depth: blocks)
    Double.act = staticmethod(act)  # type: ignore[assignment]
    return found


def same(a: Tensor, b: Tensor, atol: float = 1e-6) -> bool:
    return (
        a.shape == b.shape
        and bool(torch.equal(a.isnan(), b.isnan()))
        and bool(torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=0, atol=atol))
    )


def needs_of(name: str) -> list[str]:
    return ["tower.mean", "tower.keys", *(["tower.cls"] if name in CLS else [])]


@pytest.mark.parametrize("name", list(ROWS))
def test_each_row_of_a_batch_alone_and_under_beams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row hears of another's pictures; logits are those of a tower that nobody listens to, bit for bit."""
    family = FAMILIES[name]
    model, sample = family.model(), family.sample(ROWS[name])
    found = reading(monkeypatch, *needs_of(name))
    with torch.no_grad():
        dense = model(**sample.inputs).logits
        with tr.reduce(model, PIPELINE):
            assert torch.equal(model(**sample.inputs).logits, dense)
            whole, found[:] = list(found), []
            model.generate(**sample.inputs, max_new_tokens=2, do_sample=False, num_beams=2)
            beams, found[:] = list(found), []
            alone = []
            for number, row in enumerate(ROWS[name]):
                model(**family.sample([row], seed=number).inputs)
                alone.append(found.pop())
        for number, row in enumerate(whole):
            vision = (row["medium"] >= 0) & (row["marker"] == 0)
            for key in (key for key in row if key.startswith("tower")):
                assert torch.equal(row[key][:, 0].isnan(), ~vision)
                assert float(row[key][vision].std()) > 0
                for beam in beams[2 * number : 2 * number + 2]:
                    assert same(beam[key], row[key])
        again = family.sample([ROWS[name][0]], seed=0)
        assert torch.equal(torch.as_tensor(model(**again.inputs).logits), model(**again.inputs).logits)
    assert len(alone) == 2
    assert model.config.vision_config._attn_implementation == "sdpa"


def eager(model: Any, blocks: list[Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """The weights (…, H, q, k) of the last of `blocks`, by the family's own eager attention."""
    seen: list[Tensor] = []
    tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
    tower.set_attn_implementation("eager")
    attention = next(m for n, m in blocks[-1].named_modules() if n.split(".")[-1] in ("self_attn", "attention", "attn"))
    handle = attention.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    tower.set_attn_implementation("sdpa")
    return seen


def test_internvl_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 0 of a tile is the mean of patches 0, 1, 6 and 7 of a grid of 6 × 6, behind the class token."""
    family = FAMILIES["internvl"]
    model, sample = family.model(), family.sample([[Video(2), Text(1)]])
    found = reading(monkeypatch, "tower.cls", "tower.mean")
    with torch.no_grad(), tr.reduce(model, PIPELINE):
        model(**sample.inputs)
    (weights,) = eager(model, list(model.model.vision_tower.encoder.layer), sample.inputs)
    vision = found[0]["medium"] >= 0
    for need, patches in (("tower.cls", weights[:, :, 0, 1:]), ("tower.mean", weights.mean(2)[..., 1:])):
        grid = patches.reshape(2, -1, 3, 2, 3, 2).mean((3, 5)).flatten(2)
        assert same(found[0][f"{need}-1"][vision], grid.transpose(1, 2).flatten(0, 1))


def test_onevision_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bilinear pooling of the attention that each patch receives; the newline after the video stands for no patch."""
    family = FAMILIES["llava_onevision"]
    model, sample = family.model(), family.sample([[Text(1), Video(2), Text(1)]])
    found = reading(monkeypatch, "tower.mean")
    with torch.no_grad(), tr.reduce(model, PIPELINE):
        model(**sample.inputs)
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    depth = len(layers) + 1 + model.config.vision_feature_layer if model.config.vision_feature_layer < 0 else None
    (weights,) = eager(model, list(layers)[:depth], sample.inputs)
    mean = weights.mean(2)
    side = int(mean.shape[-1] ** 0.5)
    grid = torch.nn.functional.interpolate(
        mean.view(2, -1, side, side), size=(-(-side // 2),) * 2, mode="bilinear"
    ).flatten(2)
    got = found[0]["tower.mean-1"]
    patches = (found[0]["medium"] >= 0) & (found[0]["marker"] == 0)
    assert same(got[patches], grid.transpose(1, 2).flatten(0, 1))
    assert got[~patches].isnan().all()


def test_qwen2_5_by_hand() -> None:
    """The order in the tower is by windows: patches that say their own number come out as the tokens of the picture."""
    family = FAMILIES["qwen2_5_vl"]
    model, sample = family.model(), family.sample([[Video(2, (6, 10)), Text(1)]])
    tower, rows, embedded = model.model.visual, [], []
    handles = [
        tower.blocks[0].register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        tower.patch_embed.register_forward_hook(lambda module, args, out: embedded.append(out)),
    ]
    with torch.no_grad():
        model(**sample.inputs)
    for handle in handles:
        handle.remove()
    names = torch.tensor([int((embedded[0] - row).abs().sum(1).argmin()) for row in rows[0]])
    assert names.tolist() != sorted(names.tolist())
    call = TowerCall(names[:, None].float(), sample.inputs["video_grid_thw"])
    (adapter,) = [cls() for cls in ADAPTERS if cls().matches(model)]
    tokens = adapter.tokens_of(model, "video", call)[:, 0]
    assert torch.equal(tokens, torch.arange(len(tokens)) * 4 + 1.5)


@pytest.mark.parametrize(
    ("name", "need", "why"),
    [
        ("llava_onevision", "tower.cls", "no class token"),
        ("qwen2_vl", "tower.cls", "no class token"),
        ("qwen2_vl", "tower.pooled", "no output of a whole frame"),
        ("internvl", "tower.pooled", "no pooled output"),
        ("smolvlm", "tower.mean", "does not say how"),
    ],
)
def test_what_a_family_cannot_give_is_refused_when_attached(
    name: str, need: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(monkeypatch, need)
    with pytest.raises(UnsupportedError, match=f"reader: double needs {need}, which {name} cannot give: .*{why}"):
        tr.reduce(FAMILIES[name].model(), PIPELINE)


def test_blocks_that_are_none_and_stages_inside_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch, "tower.mean", blocks=(99,))
    with pytest.raises(PipelineError, match="double reads block 99 of the vision tower"):
        tr.reduce(FAMILIES["internvl"].model(), PIPELINE)
    reading(monkeypatch, "tower.mean")
    both = {"stages": [{"strategy": "frame_reuse"}, *PIPELINE["stages"]]}
    with pytest.raises(PipelineError, match="double reads the vision tower, in which frame_reuse merges"):
        tr.reduce(FAMILIES["internvl"].model(), both)


def test_signals_that_the_caller_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reading(monkeypatch, "tower.mean", "tower.pooled")
    layout = tr.TokenLayout.video(before=3, frames=4, per_frame=6, after=5)
    model, mean, pooled = tiny_model(), torch.rand(1, 32, 2), torch.rand(1, 32, 7)
    with torch.no_grad(), tr.reduce(model, PIPELINE, layout=layout) as run:
        run.signals = {"tower.mean": mean, "tower.pooled": pooled}
        model(input_ids=prompt())
        assert torch.equal(found[0]["tower.mean-1"], mean[0])
        assert torch.equal(found[0]["tower.pooled-1"], pooled[0])
        run.signals, run.layout = None, layout
        with pytest.raises(UnsupportedError, match=r"has told nothing of tower\.mean"):
            model(input_ids=prompt())
