"""The published numbers (Fu et al., FrameFusion, 2025), and the orderings that they claim.

Accuracies are percentages of LLaVA-Video-7B as printed: 64 frames, 210 tokens each, VideoNIAH unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lab.reproduce.plan import CONTROLS, LATE, LENGTHS, METHODS, ONE_HOP, SHARES, TABLES, Condition

FRAMEFUSION, FASTV, STREAMING = "framefusion@0.3", "fastv@0.3", "streaming_llm@0.3"
DENSE = "dense"


@dataclass(frozen=True)
class Claim:
    """That arm `better` is more accurate than `worse`; or, with `within`, that it loses at most that share of `worse`.

    source: `paper`, or `control` for comparisons with our controls, which the paper does not make in this table.
    """

    better: str
    worse: str
    condition: Condition
    within: float | None = None
    source: Literal["paper", "control"] = "paper"


PAPER: dict[str, tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "table1": (
        ("method", "Edit", "Insert1", "Insert2"),
        (
            ("Original (dense)", "90.7", "50.7", "88.0"),
            ("StreamingLLM", "26.0", "15.3", "28.7"),
            ("FastV", "69.3", "28.7", "76.7"),
            ("FrameFusion", "90.0", "48.7", "87.3"),
        ),
    ),
    "table2": (
        ("merging layer (of 28)", "merging rate", "retrieval accuracy"),
        (
            ("Original (dense)", "0 %", "76.4"),
            ("0", "50.0 %", "76.2"),
            ("1", "52.0 %", "76.8"),
            ("2", "53.8 %", "76.4"),
            ("12", "87.5 %", "74.4"),
            ("13", "93.3 %", "64.2"),
            ("14", "100.0 %", "48.9"),
        ),
    ),
    "table3": (
        ("method", "VideoMME", "VideoNIAH"),
        (
            ("Original (dense)", "63.2", "76.4"),
            ("prune then merge", "59.9", "73.1"),
            ("merge then prune", "60.9", "73.3"),
        ),
    ),
    "table4": (
        ("frames", "token budget at equal FLOPs", "Original (dense)", "FrameFusion (cascaded)"),
        (
            ("8", "92.8 %", "20.0", "20.7"),
            ("16", "90.0 %", "29.1", "28.0"),
            ("32", "81.5 %", "43.8", "42.9"),
            ("64", "72.2 %", "76.4", "75.6"),
        ),
    ),
    "table5": (
        ("budget", "VideoMME", "NExT-QA-MC", "NExT-QA-OE", "largest relative drop"),
        (
            ("1.0", "63.2", "83.2", "32.1", "–"),
            ("0.3", "61.3", "81.8", "31.7", "3.0 %"),
            ("0.5", "62.6", "82.7", "32.1", "0.9 %"),
            ("0.7", "63.0", "82.8", "32.1", "0.5 %"),
        ),
    ),
    "table7": (
        ("method", "64 frames", "85", "107", "128", "largest relative drop"),
        (
            ("Original (dense)", "76.4", "78.4", "80.7", "82.9", "–"),
            ("StreamingLLM", "23.3", "25.8", "27.6", "27.6", "70 %"),
            ("FastV", "58.2", "63.6", "65.8", "69.3", "24 %"),
            ("FrameFusion", "75.3", "78.2", "80.0", "83.6", "1 %"),
        ),
    ),
}

SAYS = {
    "table1": "FrameFusion loses less than 3 % of dense; it is above FastV, and FastV above StreamingLLM, on every needle type.",
    "table2": "At the same budget, merging in the first layers costs nothing, and merging near the middle costs much.",
    "table3": "Merging first is better, by 0.2 points on VideoNIAH and 1.0 on VideoMME.",
    "table4": "At the fewest FLOPs that a non-cascaded method could reach, cascaded FrameFusion is about as good as dense, "
    "where the non-cascaded one has no KV cache left.",
    "table5": "The largest relative drop is 3.0 %, 0.9 % and 0.5 % at C = 0.3, 0.5 and 0.7.",
    "table7": "At every length FrameFusion is above FastV and FastV above StreamingLLM; FrameFusion loses at most 1 %.",
    "fig7": "FrameFusion lies on the Pareto front over all budgets; the curves are not printed as numbers. Original* (fewer "
    "frames) is our uniform_frames.",
    "fig12": "FrameFusion is even over positions and lengths; StreamingLLM hardly finds needles in the first frames; FastV loses "
    "evenly. The grid is not printed as numbers.",
}


def _first() -> tuple[Claim, ...]:
    claims: list[Claim] = []
    for panel in next(table for table in TABLES if table.key == "table1").panels:
        condition = panel.condition
        claims += [
            Claim(FRAMEFUSION, DENSE, condition, within=0.03),
            Claim(FRAMEFUSION, FASTV, condition),
            Claim(FASTV, STREAMING, condition),
        ]
        claims += [Claim(FRAMEFUSION, f"{control}@0.3", condition, source="control") for control in CONTROLS]
        claims.append(Claim(FASTV, f"{LATE}@0.3", condition, source="control"))
    return tuple(claims)


def _lengths() -> tuple[Claim, ...]:
    claims: list[Claim] = []
    for panel in next(table for table in TABLES if table.key == "table7").panels:
        claims += [
            Claim(FRAMEFUSION, DENSE, panel.condition, within=0.014),  # 75.3 of 76.4, its largest relative drop
            Claim(FRAMEFUSION, FASTV, panel.condition),
            Claim(FASTV, STREAMING, panel.condition),
        ]
    return tuple(claims)


def _sweep() -> tuple[Claim, ...]:
    others = (*METHODS[:2], "uniform_frames")
    return tuple(
        Claim(f"framefusion@{share}", f"{other}@{share}", panel.condition)
        for panel in next(table for table in TABLES if table.key == "fig7").panels
        for share in SHARES
        for other in others
    )


def _budgets() -> tuple[Claim, ...]:
    drops = {"0.3": 0.03, "0.5": 0.009, "0.7": 0.005}
    panels = next(table for table in TABLES if table.key == "table5").panels
    return tuple(Claim(f"framefusion@{s}", DENSE, p.condition, within=d) for p in panels for s, d in drops.items())


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "table1": _first(),
    "table2": (
        *(Claim(f"merge_at_{layer}@0.5", DENSE, ONE_HOP, within=0.003) for layer in (0, 1, 2)),
        *(Claim("merge_at_0@0.5", f"merge_at_{layer}@0.5", ONE_HOP) for layer in (3, 4, 5)),
    ),
    "table3": tuple(Claim("merge_then_prune@0.3", "prune_then_merge@0.3", c) for c in (ONE_HOP, Condition("chain"))),
    "table4": tuple(
        claim
        for frames in LENGTHS
        for claim in (
            Claim("cascaded@equal_flops", DENSE, Condition(frames=frames), within=0.04),  # 28.0 of 29.1
            Claim("cascaded@equal_flops", "noncascaded_merge@0.2", Condition(frames=frames)),
        )
    ),
    "table5": _budgets(),
    "table7": _lengths(),
    "fig7": _sweep(),
    "fig12": (),
    "depth": tuple(
        Claim(better, worse, panel.condition, source="control")
        for panel in next(table for table in TABLES if table.key == "depth").panels
        for better, worse in (
            (FRAMEFUSION, "fastv_after_one@0.3"),
            ("fastv_after_one@0.3", "random_after_one@0.3"),
            (f"{LATE}@0.3", "random_after_one@0.3"),
            ("random_after_one@0.3", "random@0.3"),
        )
    ),
}
