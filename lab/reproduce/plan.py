"""What is run: conditions, arms, and which of them each table or figure of the paper needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenreduce.compare.arms import BASELINE
from tokenreduce.compare.needles import Needles, needles
from tokenreduce.pipeline import Pipeline, load_pipeline
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.testbed.embedded import GRID, build_config, build_tokenizer
from tokenreduce.testbed.needle import Placement
from tokenreduce.testbed.questions import Kind

PER_FRAME = GRID * (GRID + 1)
"""Vision tokens of a frame, row newlines included."""
PROMPT = 22
"""Text tokens around the video in a one-hop prompt."""
METHODS = ("streaming_llm", "fastv", "framefusion")
CONTROLS = ("random", "uniform_frames")
LATE = "random_after_two"
"""Random tokens from layer 2 on, as many as FastV leaves there: what FastV must beat to have chosen anything."""
EARLIER = ("fastv_after_one", "random_after_one")
"""FastV with K = 1, and random tokens from layer 1 on."""
MERGING_LAYERS = (0, 1, 2, 3, 4, 5)
"""Of 12. Table 2 has 0, 1, 2, 12, 13, 14 of 28; here merging at layer 6 would have to merge more than there is."""
SHARES = ("0.1", "0.2", "0.3", "0.5", "0.7")
LENGTHS = (8, 16, 32)
PLACES = 5


@dataclass(frozen=True)
class Condition:
    """A stream of examples. positions: places of the needle that examples take in turns; None leaves them to chance."""

    kind: Kind = "one_hop"
    placement: Placement = "edit"
    frames: int = 16
    positions: int | None = None

    @property
    def key(self) -> str:
        """A name for files."""
        grid = "" if self.positions is None else f"-places-{self.positions}"
        return f"{self.kind}-{self.placement}-{self.frames}{grid}"

    @property
    def label(self) -> str:
        """A name for readers."""
        kind = {"one_hop": "one hop", "second_turn": "second turn"}.get(self.kind, self.kind)
        return f"{kind}, {self.placement}, {self.frames} frames"

    def task(self, seed: int) -> Needles:
        """Its examples; needles of one token in held-out clips."""
        return needles(
            kind=self.kind,
            frames=[self.frames],
            positions=self.positions,
            size=1,
            placement=self.placement,
            seed=seed,
        )


@dataclass(frozen=True)
class Panel:
    """Arms on `examples` examples of one condition; the first arm is dense."""

    condition: Condition
    arms: tuple[str, ...]
    examples: int


@dataclass(frozen=True)
class Table:
    """One table or figure of the paper. examples: of each panel, told in the report."""

    key: str
    title: str
    panels: tuple[Panel, ...]


def at(methods: tuple[str, ...], share: str = "0.3") -> tuple[str, ...]:
    """Names of arms: `method@share`."""
    return tuple(f"{method}@{share}" for method in methods)


ONE_HOP, INSERT = Condition(), Condition(placement="insert")
SECOND, CHAIN = Condition("second_turn"), Condition("chain")
FIRST = (BASELINE, *at((*METHODS, "framefusion_official", *CONTROLS, LATE)))
SWEEP = (BASELINE, *(f"{method}@{share}" for method in (*METHODS, *CONTROLS) for share in SHARES))
GRIDS = tuple(
    Panel(Condition(frames=f, positions=PLACES), (BASELINE, *at((*METHODS, *CONTROLS))), 200) for f in LENGTHS
)

TABLES = (
    Table(
        "table1",
        "Table 1: all methods at C = 0.3",
        tuple(Panel(c, FIRST, 500) for c in (ONE_HOP, INSERT, SECOND, CHAIN)),
    ),
    Table(
        "table2",
        "Table 2: the merging layer at C = 0.5",
        (Panel(ONE_HOP, (BASELINE, *(f"merge_at_{layer}@0.5" for layer in MERGING_LAYERS)), 200),),
    ),
    Table(
        "table3",
        "Table 3: the order of merging and pruning at C = 0.3",
        tuple(Panel(c, (BASELINE, "prune_then_merge@0.3", "merge_then_prune@0.3"), 200) for c in (ONE_HOP, CHAIN)),
    ),
    Table(
        "table4",
        "Table 4: cascaded or not, at equal FLOPs",
        tuple(
            Panel(Condition(frames=f), (BASELINE, "cascaded@equal_flops", *at(("noncascaded_merge",), "0.2")), 200)
            for f in LENGTHS
        ),
    ),
    Table(
        "table5",
        "Table 5: FrameFusion at C = 0.3, 0.5, 0.7",
        tuple(Panel(c, (BASELINE, *(f"framefusion@{s}" for s in SHARES[2:])), 200) for c in (ONE_HOP, SECOND, CHAIN)),
    ),
    Table("table7", "Table 7 and Fig. 10: length of the video at C = 0.3", GRIDS),
    Table("fig7", "Fig. 7: accuracy against FLOPs", (Panel(ONE_HOP, SWEEP, 200),)),
    Table("fig12", "Fig. 12: position of the needle and length of the video at C = 0.3", GRIDS),
    Table(
        "depth",
        "Not in the paper: how early this model reads, at C = 0.3",
        tuple(
            Panel(c, (BASELINE, *at(("framefusion", "fastv", *EARLIER, LATE, "random"))), 200)
            for c in (ONE_HOP, SECOND, CHAIN)
        ),
    ),
)


@lru_cache(maxsize=256)
def pipeline(arm: str, frames: int) -> Pipeline | None:
    """The pipeline that an arm's name stands for in videos of so many frames; None is dense."""
    if arm == BASELINE:
        return None
    method, _, share = arm.partition("@")
    if share == "equal_flops":
        return load_pipeline("framefusion").with_budget({"flops": round(cacheless_flops(frames), 4)})
    if method.startswith("merge_at_"):
        stage = {"strategy": "similarity_merge", "at": int(method.removeprefix("merge_at_")), "site": "pre_attention"}
        return load_pipeline({"name": method, "budget": {"tokens": float(share)}, "stages": [stage]})
    if method in (LATE, *EARLIER):
        stage = {"strategy": method.partition("_")[0], "at": 2 if method == LATE else 1}
        return load_pipeline({"name": method, "budget": {"tokens": float(share)}, "stages": [stage]})
    if method == "merge_then_prune":
        return load_pipeline(_turned(method, float(share)))
    return load_pipeline(method).with_budget(float(share))


def _turned(name: str, share: float) -> dict[str, Any]:
    """The preset prune_then_merge with its stages the other way round: the same counts at the same layers."""
    merge = {"strategy": "similarity_merge", "at": 1, "site": "pre_ffn", "keep": 0.5}
    prune = {"strategy": "importance_prune", "at": 2, "importance": "cumulative"}
    return {"name": name, "budget": {"tokens": share}, "stages": [merge, prune]}


def cacheless_flops(frames: int) -> float:
    """FLOPs of a prefill whose caches are empty and whose FFNs are not, over dense: what no non-cascaded method goes below."""
    shape, n = DecoderShape.from_config(build_config(build_tokenizer())), PROMPT + PER_FRAME * frames
    tokens = [n] * shape.layers
    return prefill_flops(shape, tokens, tokens, pairs=[0] * shape.layers) / prefill_flops(shape, tokens, tokens)


@lru_cache(maxsize=256)
def digest(arm: str, frames: int) -> str:
    """Eight digits that change with what the arm does."""
    made = pipeline(arm, frames)
    return hashlib.sha256((BASELINE if made is None else made.to_yaml()).encode()).hexdigest()[:8]


def wanted(tables: tuple[Table, ...], most: int | None) -> dict[Condition, dict[str, int]]:
    """Examples to run per condition and arm: what the most demanding of `tables` needs, at most `most`."""
    needs: dict[Condition, dict[str, int]] = {}
    for table in tables:
        for panel in table.panels:
            arms = needs.setdefault(panel.condition, {})
            for arm in panel.arms:
                arms[arm] = max(arms.get(arm, 0), limited(panel.examples, most))
    return needs


def limited(examples: int, most: int | None) -> int:
    """`examples`, at most `most`."""
    return examples if most is None else min(examples, most)
