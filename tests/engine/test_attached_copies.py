"""Copies of a model that has a pipeline attached are dense."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from support.tiny import SHARE, layout, logits, prompt, tiny_model

import tokenreduce as tr


def test_deepcopy_while_attached() -> None:
    model = tiny_model()
    dense = logits(model)
    with tr.reduce(model, "framefusion", budget=SHARE, layout=layout()) as run:
        reduced = logits(model)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), dense)
        with tr.reduce(copied, "random", budget=SHARE, layout=layout()) as other:
            random = logits(copied)
            assert {stage.strategy for stage in other.trace.stages} == {"random"}
        assert torch.equal(logits(model), reduced)
        assert "random" not in {stage.strategy for stage in run.trace.stages}
    assert torch.equal(logits(copied), dense)
    assert not torch.equal(random, reduced)
    assert copied.config._attn_implementation == "sdpa"


def test_pickle_while_attached(tmp_path: Path) -> None:
    """The copy is dense, in this process and in one that has never seen an attachment."""
    model = tiny_model()
    dense = logits(model)
    with tr.reduce(model, "framefusion", budget=SHARE, layout=layout()):
        reduced = logits(model)
        data = pickle.dumps(model)
        loaded = pickle.loads(data)
        again = pickle.loads(pickle.dumps(loaded))
        assert torch.equal(logits(loaded), dense)
        assert torch.equal(logits(again), dense)
        assert torch.equal(logits(model), reduced)
    (tmp_path / "model.pickle").write_bytes(data)
    torch.save({"ids": prompt(), "dense": dense}, tmp_path / "expected.pt")
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "model = pickle.load(open(sys.argv[1], 'rb')); expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): logits = model(input_ids=expected['ids'], use_cache=False).logits\n"
        "assert torch.equal(logits, expected['dense'])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pickle", tmp_path / "expected.pt"], check=True, cwd=tmp_path
    )


def test_save_pretrained_while_attached(tmp_path: Path) -> None:
    model = tiny_model()
    dense = logits(model)
    model.save_pretrained(tmp_path / "dense")
    with tr.reduce(model, "framefusion", budget=SHARE, layout=layout()):
        logits(model)
        model.save_pretrained(tmp_path / "attached")
    files = sorted(path.name for path in (tmp_path / "dense").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in files:
        assert (tmp_path / "dense" / name).read_bytes() == (tmp_path / "attached" / name).read_bytes(), name
    loaded = type(model).from_pretrained(tmp_path / "attached").eval()
    assert torch.equal(logits(loaded), dense)
