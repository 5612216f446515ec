"""A comparison on a local Ray cluster of two workers, one of which is killed at work."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.compare_tools import FAST, read_rows, read_summary, write_clip

from tokenreduce.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = 24
"""So many that there is work left for a new worker, also where the second one of the two came late."""
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import ray
from tokenreduce.compare import Settings, compare, expand

folder, clip = Path(sys.argv[1]), sys.argv[2]
options = {"kind": "one_hop", "frames": (4,), "positions": None, "size": 1, "placement": "edit", "clips": (clip,)}
settings = Settings("needle", tuple(expand(["random"], ["0.5"], ["embedded"])), EXAMPLES, 1, "dense", options, new_tokens=2)
killed = []

def tell(done, asked):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    workers = {row["worker"] for row in rows}
    if len(workers) == 2 and not killed:
        # Not the one that has just finished: the other has an example in hand.
        victim = (workers - {rows[-1]["worker"]}).pop()
        killed.append(victim)
        os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
compare(settings, folder, ray="auto", pictures=1, tell=tell)
(folder / "killed.json").write_text(json.dumps(killed))  # Ray writes to our stdout whenever it likes.
""".replace("EXAMPLES", str(EXAMPLES))


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    if importlib.util.find_spec("ray") is None:
        assert main(["compare", "--ray", "local", "--clip", str(clip), "--output", str(tmp_path / "no"), *FAST]) == 2
        pytest.skip("Ray is not installed; without it --ray was refused")
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "out"), str(clip)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (victim,) = json.loads((tmp_path / "out" / "killed.json").read_text())
    rows = read_rows(tmp_path / "out")
    assert sorted((row["index"], row["arm"]) for row in rows) == [
        (i, arm) for i in range(EXAMPLES) for arm in ("dense", "random")
    ]
    workers = {row["worker"] for row in rows}
    assert victim in workers
    assert len(workers) == 3  # two, and the one in the place of the dead
    assert read_summary(tmp_path / "out")["complete"]
