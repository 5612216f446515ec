"""Which strategy of ours, with which options, a recorded case is replayed by.

TABLE maps a folder's name to a function of the case's parameters and tensors; it returns trials, each with a label. What is said
here of a method's parameters is general: cases that are not in this repository are tried by the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from strategies.zoo.replay import Trial
from torch import Tensor

import tokenreduce as tr

Params, Tensors = dict[str, Any], dict[str, Tensor]
Trials = list[tuple[str, Trial]]
TEXT = 3
"""Words before and after the recorded tokens, where a recording has none; they are noise."""


def words(like: Tensor, count: int = TEXT) -> Tensor:
    """(count, D) noise of the dtype of `like`."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, like.shape[-1], generator=generator, dtype=torch.float64).to(like.dtype)


def video(seen: Tensor, frames: int, grid: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    """`hidden` and `layout` of a trial: (F·P, D) vision tokens between words."""
    flat = seen.reshape(-1, seen.shape[-1])
    text = words(flat)
    layout = tr.TokenLayout.video(
        before=TEXT, frames=frames, per_frame=len(flat) // max(frames, 1), after=TEXT, grid=grid
    )
    return {"hidden": torch.cat([text, flat, text]), "layout": layout, **more}


def stage(name: str, **options: Any) -> list[dict[str, Any]]:
    return [{"strategy": name, **options}]


def places(index: Tensor | None) -> Tensor | None:
    """Places in the sequence of recorded places among the vision tokens."""
    return None if index is None else index.flatten() + TEXT


def tokens(count: int) -> dict[str, int]:
    """A count, where a bare 1 would be a share."""
    return {"tokens": int(count)}


def divprune(params: Params, t: Tensors, case: Params) -> Trials:
    features = t["in.features"]
    count = round(params["threshold_ratio"] * len(features))
    defect = "the public code chooses tokens twice" if case.get("distinct", 0) < case.get("kept_count", 0) else ""
    made = video(
        features, 1, stages=stage("divprune", keep=tokens(count)), kept=places(t.get("out.kept")), defect=defect
    )
    return [("divprune", Trial(**made, count=count))]


def vidcom2(params: Params, t: Tensors, case: Params) -> Trials:
    features, frames = t["in.features"], params["frames"]
    released = stage("vidcom2", keep=params["base_scale"], counts="released")
    out = [("vidcom2 released", Trial(**video(features, frames, stages=released), kept=places(t.get("out.kept"))))]
    if "out.vllm_kept" in t:
        # vLLM's count, by its float product.
        count = len(t["out.vllm_kept"])
        exact = stage("vidcom2", keep=tokens(count))
        defect = "vLLM rounds each frame and then adds or takes tokens"
        out.append(
            ("vidcom2", Trial(**video(features, frames, stages=exact), kept=places(t["out.vllm_kept"]), defect=defect))
        )
    return out


def evs(params: Params, t: Tensors, case: Params) -> Trials:
    features, frames = t["in.features"], params["frames"]
    count = max(len(features) // frames, int(len(features) * (1 - params["q"])))
    made = video(features, frames, stages=stage("evs", keep=tokens(count)), kept=places(t.get("out.kept")))
    return [("evs", Trial(**made))]


def v_cast(params: Params, t: Tensors, case: Params) -> Trials:
    features = t["in.features"]
    frames, size = features.shape[:2]
    count = max(frames * params["min_k"], round(frames * size * params["retain_ratio"]))
    made = video(features, frames, kept=places(t.get("out.kept")), count=count)
    options = {"keep": tokens(count), "least": params["min_k"]}
    defect = "all tokens left over by rounding go to one frame"
    return [
        ("v_cast released", Trial(**made, stages=stage("v_cast", rounding="released", **options))),
        ("v_cast", Trial(**made, stages=stage("v_cast", **options), defect=defect)),
    ]


def dtd(params: Params, t: Tensors, case: Params) -> Trials:
    if params["method"] == "pixel":
        return [("dtd", Trial(skip="pixel mode reads pixels, and a decoder's stage sees none"))]
    hidden = t["in.hidden"][0]
    frames, size = int(t["in.grid"][0]), int(t["in.grid"][1:].prod()) // 4
    # In these recordings id 1 opens the vision tokens.
    ids = t["in.input_ids"].flatten()
    start = int((ids == 1).int().argmax()) + 1
    layout = tr.TokenLayout.video(
        before=start, frames=frames, per_frame=size, after=len(hidden) - start - frames * size
    )
    option = {"threshold": params["threshold"]} if params["absolute"] else {"relative": params["threshold"]}
    kept = t.get("out.kept")
    if kept is not None:
        kept = kept[(kept >= start) & (kept < start + frames * size)]
    return [("dtd", Trial(hidden=hidden, layout=layout, stages=stage("dtd", **option), kept=kept))]


def dycoke_ttm(params: Params, t: Tensors, case: Params) -> Trials:
    features = t["in.features"]
    frames = params["frames"]
    made = video(features, frames, kept=places(t.get("out.kept")))
    ratio = params["merging_ratio"]
    defects = []
    if frames % 4 == 0 or frames % 2 or frames <= 4:
        defects.append("the last group's third frame stays whole, odd last frames are lost")
    if int((1 - ratio) * params["tpf"]) != int(round(1 - ratio, 9) * params["tpf"] + 1e-9):
        defects.append("a float product is one short")
    return [
        ("dycoke_released", Trial(**made, stages=stage("dycoke", ratio=ratio, released=True))),
        ("dycoke", Trial(**made, stages=stage("dycoke", ratio=ratio), defect="; ".join(defects))),
    ]


def pool2d(params: Params, t: Tensors, case: Params) -> Trials:
    if params["mode"] not in ("average", "bilinear"):
        return [
            ("pool", Trial(skip=f"{params['mode']} pooling is not offered; pool has mean, first, random, bilinear"))
        ]
    features, side = t["in.features"], params["side"]
    kind = {"average": "mean"}.get(params["mode"], params["mode"])
    out = t.get("out.features")
    made = video(features, len(features), (side, side), features=None if out is None else out.flatten(0, 1))
    return [("pool", Trial(**made, stages=stage("pool", stride=params["stride"], keep_of_cell=kind)))]


def aim_merge(params: Params, t: Tensors, case: Params) -> Trials:
    features = t["in.features"]
    frames, size = features.shape[:2]
    left = size - min(params["rounds"][0], size // 2)
    left -= min(params["rounds"][1], left // 2)
    out = t.get("out.features")
    made = video(features, frames, features=None if out is None else out.flatten(0, 1))
    return [("aim", Trial(**made, stages=stage("aim", keep=tokens(left * frames))))]


def cdpruner(params: Params, t: Tensors, case: Params) -> Trials:
    trials: Trials = []
    for row, features in enumerate(t["in.features"]):
        count = min(params["visual_token_num"], len(features))
        image, text = (torch.nn.functional.normalize(t[f"in.{name}_embeds"], dim=-1) for name in ("image", "text"))
        relevance = torch.nn.functional.pad(-(image[row] @ text.T).mean(-1), (TEXT, TEXT))
        kept = t["out.kept"][row] if "out.kept" in t else None
        short = case.get("kept_counts", [count])[row] < count
        defect = "beyond the kernel's rank fewer tokens come back" if short else ""
        if len(t["in.features"]) > 1:
            defect = "relevance is scaled over the whole batch"
        made = video(features, 1, stages=stage("cdpruner", keep=tokens(count)), kept=places(kept), count=count)
        made["patches"] = [
            ("tokenreduce.strategies.prune.cdpruner.CDPruner.relevance", lambda self, ctx, r=relevance: r)
        ]
        trials.append(("cdpruner", Trial(**made, defect=defect)))
    return trials


def llava_scissor(params: Params, t: Tensors, case: Params) -> Trials:
    made = video(t["in.features"], params["frames"], features=t.get("out.features"))
    defects = []
    if any(covered < nodes for covered, nodes in case.get("nodes_covered_per_call", [])):
        defects.append("the public code loses nodes")
    if case["comparison"].startswith("ties: sampled"):
        defects.append("the public code samples nodes")
    options = stage("llava_scissor", threshold=params["tau"])
    return [("llava_scissor", Trial(**made, stages=options, defect="; ".join(defects)))]


def prunevid(params: Params, t: Tensors, case: Params) -> Trials:
    out, frames = t.get("out.features"), params["num_frames"]
    options = {
        "frame_clusters": params["temporal_segment_ratio"],
        "threshold": params["tau"],
        "token_clusters": params["cluster_ratio"],
    }
    made = video(t["in.features"], frames, features=None if out is None else out[0])
    trials = [("prunevid merge", Trial(**made, stages=stage("prunevid", select_at=None, **options)))]
    if "out.kept" in t and "out.text_attn_for_selection" in t:
        recorded, merged = t["out.text_attn_for_selection"][0], t["out.features"]

        def attention(ctx: Any, queries: Any = "last", heads: str = "mean", rows: str = "sum") -> Tensor:
            # Recorded for the reduced vision tokens in the public code's order: a token is known by its state.
            assert heads == rows == "max"
            scores, vision = recorded.amax((0, 1)), (ctx.slot >= 0).nonzero().squeeze(1)
            out = torch.zeros(ctx.n, dtype=scores.dtype)
            distance = torch.cdist(ctx.hidden[vision].double(), merged[0].double()).round(decimals=4)
            for row, token in enumerate(vision.tolist()):
                # Still slots repeat from frame to frame: equal states are handed out in order.
                known = int(distance[row].argmin())
                out[token], distance[:, known] = scores[known], torch.inf
            return out

        made["features"] = out[0][t["out.kept"]] if out is not None else None
        groups = [*t["out.static_sizes"].tolist(), *t["out.dynamic_sizes"].tolist()]
        empty = any(0 < size * params["alpha"] < 1 for size in groups)
        choice = stage("prunevid", select_at=1, alpha=params["alpha"], **options)
        defect = "groups below 1/alpha lose every token" if empty else ""
        trials.append(("prunevid choice", Trial(**made, stages=choice, attention=attention, defect=defect)))
    return trials


def sttm(params: Params, t: Tensors, case: Params) -> Trials:
    if params["slow_ver"] or params["head_dim"]:
        return [("sttm", Trial(skip="an ablation of the public code: best match only, or a cosine per head"))]
    features = t["in.features"].permute(0, 2, 3, 1)
    frames, height, width = features.shape[:3]
    temporal = params["temporal_thresh"] if params["temporal_thresh"] > 0 else None
    options = {"at": 0, "spatial": params["threshold"], "temporal": temporal, "root": params["root_level"]}
    options["weighted"] = params["weighted_avg"]
    made = video(features, frames, (height, width), features=t.get("out.features"), kept=places(t.get("out.index")))
    odd = "border nodes of odd grids are compared with the first token" if height % 2 or width % 2 else ""
    # A grid that halves to an odd side has such nodes further up.
    sides = [height, width]
    while min(sides) > 2:
        sides = [(side + 1) // 2 for side in sides]
        odd = odd or (
            "border nodes of odd grids are compared with the first token" if any(s % 2 for s in sides) else ""
        )
    return [
        ("sttm released", Trial(**made, stages=stage("sttm", released=True, **options))),
        ("sttm", Trial(**made, stages=stage("sttm", **options), defect=odd)),
    ]


class Tower:
    """Recorded signals of a tower under the name that a strategy reads them by. attention: (H, n), keys: (n, C), pooled: (n,
    D)."""

    def __init__(self, attention: Tensor, keys: Tensor | None = None, pooled: Tensor | None = None) -> None:
        self._attention, self._keys, self.pooled = (
            None if x is None else torch.nn.functional.pad(x, (TEXT, TEXT) if x is attention else (0, 0, TEXT, TEXT))
            for x in (attention, keys, pooled)
        )

    def attention(self, block: int = -1, queries: str = "mean", heads: str = "mean") -> Tensor:
        assert self._attention is not None
        return self._attention if heads == "each" else getattr(self._attention, "amax" if heads == "max" else heads)(0)

    def keys(self, block: int = -1) -> Tensor:
        assert self._keys is not None
        return self._keys


def fastv(params: Params, t: Tensors, case: Params) -> Trials:
    hidden, first, size = t["in.hidden"][0], params["sys"], params["image"]
    layout = tr.TokenLayout.video(before=first, frames=1, per_frame=size, after=len(hidden) - first - size)
    kept, recorded = t.get("out.keep"), t["in.attn_last"]
    if kept is not None:
        kept = kept[(kept >= first) & (kept < first + size)]

    def attention(ctx: Any, queries: Any = "last", heads: str = "mean", rows: str = "sum") -> Tensor:
        assert (queries, heads) == ("last", "mean")
        return recorded.mean(0)[ctx.position]

    stages = stage("fastv", at=1, keep=tokens(params["rank"]))
    return [("fastv", Trial(hidden=hidden, layout=layout, stages=stages, kept=kept, attention=attention))]


def pyramiddrop(params: Params, t: Tensors, case: Params) -> Trials:
    trials: Trials = []
    for row, original in enumerate(params["image_tokens"]):
        if not original:
            continue
        now, first = int(original * params["ratios"][params["stage"]]), params["image_posi"][row]
        length = now + params["prompt_len"][row]
        hidden, q, k = t["in.features"][row, :length], t["in.q"][row, :, :length], t["in.k"][row, :, :length]
        layout = tr.TokenLayout.video(before=first, frames=1, per_frame=now, after=length - first - now)
        kept = t["out.kept"][row] if "out.kept" in t else None
        grouped = len(q) // len(k)
        scores = q[:, -1:] @ k.repeat_interleave(grouped, 0).mT / q.shape[-1] ** 0.5
        recorded = scores.float().softmax(-1)[:, 0]

        def attention(
            ctx: Any, queries: Any = "last", heads: str = "mean", rows: str = "sum", a: Tensor = recorded
        ) -> Tensor:
            assert (queries, heads) == ("last", "mean")
            return a.mean(0)[ctx.position]

        count = int(original * params["ratios"][params["stage"] + 1])
        stages = stage("pyramid_drop", at=1, keep=tokens(count))
        made = Trial(hidden=hidden, layout=layout, stages=stages, kept=None if kept is None else kept[kept >= 0])
        made.attention = attention
        if length > 2048 or (
            str(params.get("tokenizer_model_max_length", "")).isdigit()
            and length - now + count > int(params["tokenizer_model_max_length"])
        ):
            made.defect = "long sequences are cut silently, the question first"
        trials.append(("pyramid_drop", made))
    return trials or [("pyramid_drop", Trial(skip="no sample has vision tokens"))]


def sparsevlm(params: Params, t: Tensors, case: Params) -> Trials:
    if params["version"] != "1_0":
        return [("sparsevlm", Trial(skip="version 2.0 divides attention by a self-product of the rotary table"))]
    first, size, hidden = params["v_start"], params["n_visual"], t["in.hidden"][0]
    layout = tr.TokenLayout.video(before=first, frames=1, per_frame=size, after=len(hidden) - first - size)
    recorded, early = t["in.attn_text"][0], t["in.hidden_l0"][0]
    after = first + size
    out = t.get("out.hidden")

    def attention(ctx: Any, queries: Any = "last", heads: str = "mean", rows: str = "sum") -> Tensor:
        assert (heads, rows) == ("mean", "sum")
        return recorded.mean(0)[queries - after].sum(0)

    kept = min(params["budget"], size - 1)
    recycled = int(0.3 * (size - kept)) + 1
    count = kept + int(recycled / 10) + 1
    features = None if out is None else out[0, first : len(out[0]) - (len(hidden) - after)]
    stages = stage("sparsevlm", at=1, keep=tokens(count))
    trial = Trial(hidden=hidden, layout=layout, stages=stages, features=features, attention=attention)
    # Raters are chosen by the states that enter layer 0, which the recording has beside those of the layer.
    trial.patches = [
        (
            "tokenreduce.strategies.merge.sparsevlm.early_states",
            lambda ctx: early,
        )
    ]
    return [("sparsevlm", trial)]


def visionzip(params: Params, t: Tensors, case: Params) -> Trials:
    trials: Trials = []
    for row, hidden in enumerate(t["in.hidden"]):
        size, few = len(hidden) - 1, params["contextual"]
        count = params["dominant"] + few
        attention, keys = t["in.attn_cls"][row, :, 1:], t["in.metric"][row, 1:].repeat(1, t["in.attn_cls"].shape[1])
        out = t["out.features"][row, 1:] if "out.features" in t else None
        made = video(hidden[1:], 1, features=out)
        options = {"keep": tokens(min(count, size)), "contextual": few / count if count else 0.0, "rows": "cls"}
        trial = Trial(**made, stages=stage("visionzip", **options), signals={"tower": Tower(attention, keys)})
        trials.append(("visionzip", trial))
    return trials


def vispruner(params: Params, t: Tensors, case: Params) -> Trials:
    trials: Trials = []
    for row, features in enumerate(t["in.features"]):
        count = params["visual_token_num"]
        kept = t["out.kept"][row] if "out.kept" in t else None
        made = video(features, 1, kept=places(kept))
        options = {"keep": tokens(min(count, len(features))), "important": params["important_ratio"], "rows": "cls"}
        trial = Trial(**made, stages=stage("vispruner", **options), signals={"tower": Tower(t["in.attn"][row])})
        if kept is not None and len(kept.unique()) != count:
            trial.defect = "another count comes back without an error"
        trials.append(("vispruner", trial))
    return trials


def prumerge(params: Params, t: Tensors, case: Params) -> Trials:
    features, plus = t["in.features"][0], params["variant"] == "prumerge_plus"
    size = len(features)
    q, k = t["in.q"][0], t["in.k"][0]
    attention = (q[:1] @ k.T / q.shape[-1] ** 0.5).softmax(-1)[:, 1:]
    out = t.get("out.features")
    made = video(features, 1, features=None if out is None else out[0], signals={"tower": Tower(attention, k[1:])})
    options: Params = {"plus": plus, "rows": "cls", "adaptive": params["adaptive"]}
    if not params["adaptive"]:
        top = int(size * params["reduction_ratio"])
        options["keep"] = tokens(top if plus else top + 1)
    trial = Trial(**made, stages=stage("prumerge", **options))
    if plus and not params["adaptive"]:
        trial.defect = "stride tokens are kept twice, and tokens of low place are lost"
    return [("prumerge", trial)]


def fastvid(params: Params, t: Tensors, case: Params) -> Trials:
    frames, size, first = params["frames"], params["P"], params["start"]
    hidden, out = t["in.hidden"][0], t.get("out.features")
    pooled = t["in.frame_features"].repeat_interleave(size, 0)
    seen = hidden[first : first + frames * size]
    kept = t.get("out.keep")
    if kept is not None:
        kept = kept.flatten()
        inside = (kept >= first) & (kept < first + frames * size)
        out, kept = out[0][inside], kept[inside] - first
    made = video(seen, frames, kept=places(kept), features=out)
    made["signals"] = {"tower": Tower(t["in.attn"].flatten()[None], None, pooled)}
    count = int(size * params["ratio"]) * frames
    options = _fastvid(params, max(count, 1)) | {"variant": "onevision"}
    return [("fastvid onevision", Trial(**made, stages=stage("fastvid", **options)))]


def _fastvid(params: Params, count: int) -> Params:
    options = {
        "threshold": max(params["tau"], -1.0),
        "context": params["d"],
        "stride": params["p"],
        "beta": params["beta"],
    }
    return options | {"keep": tokens(count), "cuts": max(params["c"] - 1, 0)}


def fastvid_llavavideo(params: Params, t: Tensors, case: Params) -> Trials:
    frames = params["frames"]
    seen = t["in.video"]
    made = video(seen, frames, kept=places(t.get("out.keep")), features=t.get("out.features"))
    marker = torch.zeros_like(made["layout"].slot)
    newline = torch.arange(len(seen)) % 14 == 13
    marker[0, TEXT : TEXT + len(seen)] = newline.long()
    made["layout"] = replace(made["layout"], marker=marker)
    attention = torch.zeros(len(seen), dtype=t["in.attn"].dtype)
    attention[~newline] = t["in.attn"].flatten()
    pooled = t["in.frame_features"].repeat_interleave(len(seen) // frames, 0)
    made["signals"] = {"tower": Tower(attention[None], None, pooled)}
    options = _fastvid(params, int(169 * params["ratio"]) * frames) | {"row_newlines": True}
    return [("fastvid", Trial(**made, stages=stage("fastvid", **options)))]


def holitom(params: Params, t: Tensors, case: Params) -> Trials:
    features, out = t["in.features"], t.get("out.features")
    if out is not None and params["newline"] == "grid":
        out = out[(out - t["in.newline"]).abs().amax(-1) > 0]
    made = video(features, len(features), features=out, signals={"tower": Tower(t["in.attn"].flatten()[None])})
    beta = params["Beta"] if params["NO_BETA"] in ("unset", None, "0") else None
    options = {
        "threshold": params["tau"],
        "contextual": params["D"],
        "beta": beta,
        "neighbours": params["K"],
        "window": params["max_window_size"],
        "keep": params["retain_ratio"],
    }
    return [("holitom_released", Trial(**made, stages=stage("holitom", counts="released", **options)))]


def cached(q: Tensor, k: Tensor, name: str, count: int, kept: Tensor | None, **options: Any) -> Trial:
    """A trial of a stage at the cache sites: attention of recorded queries (H, L, d) and keys (G, L, d), all tokens alike."""
    length = k.shape[1]
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT / q.shape[-1] ** 0.5
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    recorded = scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def attention(ctx: Any, queries: Any = "last", heads: str = "mean", rows: str = "sum") -> Tensor:
        assert (heads, rows) == ("each", "sum")
        return recorded[:, -queries if isinstance(queries, int) else 0 :].sum(1)

    layout = tr.TokenLayout.video(before=0, frames=1, per_frame=length, after=0)
    states = words(k[0], length)
    trial = Trial(hidden=states, layout=layout, stages=stage(name, at=0, keep=tokens(count), **options))
    trial.attention, trial.signals, trial.heads = attention, {"keys": k}, len(k)
    trial.held = kept
    return trial


def snapkv(params: Params, t: Tensors, case: Params) -> Trials:
    k = t["in.k"][0]
    count = max(1, int(k.shape[1] * (1 - params["compression_ratio"])))
    kept = t["out.kept"][0] if "out.kept" in t else None
    options = {"window": params["window_size"], "kernel": params["kernel_size"]}
    trial = cached(t["in.q"][0], k, "snapkv", count, kept, **options)
    return [("snapkv", trial)]


def observed_attention(params: Params, t: Tensors, case: Params) -> Trials:
    k = t["in.k"][0]
    count = max(1, int(k.shape[1] * (1 - params["compression_ratio"])))
    kept = t["out.kept"][0] if "out.kept" in t else None
    return [("h2o", cached(t["in.q"][0], k, "h2o", count, kept, recent=0.0, normalise=True))]


def pyramidkv(params: Params, t: Tensors, case: Params) -> Trials:
    length = params["q_len"]
    layout = tr.TokenLayout.video(before=0, frames=1, per_frame=length, after=0)
    share = 1 - params["compression_ratio"]
    options = {"window": params["window_size"], "beta": params["beta"], "keep": round(share, 9), "kernel": 1}
    trial = Trial(hidden=words(torch.zeros(1, 4), length), layout=layout, stages=stage("pyramidkv", **options))
    trial.layers, trial.per_layer, trial.heads = params["layers"], t.get("out.budget"), 1
    return [("pyramidkv", trial)]


def infinipot_v(params: Params, t: Tensors, case: Params) -> Trials:
    if params["adaptive_pooling"] or params["method"] != "infinipot-v":
        return [("infinipot_v", Trial(skip="pooling of scores by layer, or one of its parts alone, is not offered"))]
    trials: Trials = []
    frames, size, first = params["frames"], params["P"], params["system"]
    for layer in range(len(t["in.keys"])):
        keys, values = t["in.keys"][layer, 0], t["in.values"][layer, 0]
        kept = t["out.kept"][layer] + first if "out.kept" in t else None
        layout = tr.TokenLayout.video(before=first, frames=frames, per_frame=size, after=0)
        options = {
            "tar": params["tar_ratio"],
            "newest": params["query_ratio"],
            "keep": tokens(params["keep_frames"] * size),
        }
        trial = Trial(hidden=words(keys[0], keys.shape[1]), layout=layout, stages=stage("infinipot_v", at=0, **options))
        trial.signals, trial.heads, trial.held = {"keys": keys, "values": values}, len(keys), kept
        trials.append((f"infinipot_v layer {layer}", trial))
    return trials


def dart(params: Params, t: Tensors, case: Params) -> Trials:
    hidden, keys, first, size = t["in.hidden"][0], t["in.keys"][0], params["start"], params["n"]
    layout = tr.TokenLayout.video(before=first, frames=1, per_frame=size, after=len(hidden) - first - size)
    pivots = params["pivot_image_token"] + params["pivot_text_token"]
    each = int(size * (1 - params["reduction_ratio"]) / pivots)
    count = min(params["pivot_image_token"] + pivots * each, size)
    options = {"vision_pivots": params["pivot_image_token"], "text_pivots": params["pivot_text_token"]}
    made: Params = {"hidden": hidden, "layout": layout, "kept": t.get("out.kept"), "signals": {"keys": keys}}
    released = stage("dart", at=1, keep=tokens(count), order="released", **options)
    placed = stage("dart", at=1, keep=tokens(count), **options)
    defect = "pivots are served in the order of a Python set"
    return [("dart released", Trial(**made, stages=released)), ("dart", Trial(**made, stages=placed, defect=defect))]


def kvpress_scorers(params: Params, t: Tensors, case: Params) -> Trials:
    if params["press"] != "StreamingLLMPress":
        return [("kvpress", Trial(skip=f"no strategy of ours scores as {params['press']} does"))]
    k, sinks = t["in.k"][0], params.get("n_sink", 4)
    count = max(1, int(k.shape[1] * (1 - params["compression_ratio"])))
    trial = cached(t["in.q"][0], k, "streaming_window", count, t["out.kept"][0] if "out.kept" in t else None)
    trial.stages = stage("streaming_window", sinks=min(sinks, count - 1), window=count - min(sinks, count - 1))
    trial.defect = "with fewer tokens than sinks, one of them is kept at random" if count <= sinks else ""
    return [("streaming_window", trial)]


def mmtok(params: Params, t: Tensors, case: Params) -> Trials:
    if len(t.get("in.exclude", [])):
        return [("mmtok", Trial(skip="padding of a picture is no token of a decoder's prompt"))]
    vision, text = t["in.vision"], t["in.text"]
    layout = tr.TokenLayout.video(before=0, frames=1, per_frame=len(vision), after=len(text))
    tower = torch.nn.functional.pad(t["in.vision_tower"], (0, 0, 0, len(text)))
    options = {"alpha": params["alpha"], "text_temperature": params["tv_temp"], "vision_temperature": params["vv_temp"]}
    stages = stage("mmtok", keep=tokens(min(params["target"], len(vision))), **options)
    trial = Trial(hidden=torch.cat([vision, text]), layout=layout, stages=stages, kept=t.get("out.kept"))
    trial.patches = [("tokenreduce.strategies.prune.mmtok.MMTok.pictured", lambda self, ctx: tower)]
    return [("mmtok", trial)]


TABLE: dict[str, Callable[[Params, Tensors, Params], Trials]] = {
    "divprune": divprune,
    "vidcom2": vidcom2,
    "evs": evs,
    "v_cast": v_cast,
    "dtd": dtd,
    "dycoke_ttm": dycoke_ttm,
    "pool2d": pool2d,
    "aim_merge": aim_merge,
    "cdpruner": cdpruner,
    "llava_scissor": llava_scissor,
    "prunevid": prunevid,
    "sttm": sttm,
    "mmtok": mmtok,
    "kvpress_scorers": kvpress_scorers,
    "dart": dart,
    "snapkv": snapkv,
    "observed_attention": observed_attention,
    "pyramidkv": pyramidkv,
    "infinipot_v": infinipot_v,
    "fastvid": fastvid,
    "fastvid_llavavideo": fastvid_llavavideo,
    "holitom": holitom,
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "prumerge": prumerge,
}
