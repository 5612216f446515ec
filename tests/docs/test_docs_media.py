"""docs/media.md: its code runs as printed, and its words on sampling hold."""

from __future__ import annotations

import re
from pathlib import Path

from support.videos import write_timed

import tokenreduce as tr


def test_the_recipe_counts_frames(tmp_path: Path) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "media.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = write_timed(tmp_path / "a.mkv", "libx264", [*range(0, 1000, 40), 4000, 9000])
    names = {"tr": tr, "path": path, "model": tr.load_model("embedded", device="cpu")}
    exec(block, names)
    rate = names["info"].fps
    assert names["clip"].indices == list(range(0, 27, max(1, round(rate))))
    assert names["inputs"]["pixel_values_videos"].shape[1] == len(names["clip"].indices)
