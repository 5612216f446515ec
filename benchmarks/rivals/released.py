"""The worker of the case `rivals` for the released FrameFusion code: `python released.py FOLDER DESCRIPTOR CHECKOUT`.

Of the checkout it imports the module and the forwards of Qwen2, and puts them onto a decoder as the checkout's interface.py
does; that file itself does not import without the models that it has adapters for.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from transformers import Qwen2ForCausalLM
from worker import Arm, Facts, Video, serve

SIMILARITY, RATIO = 0.6, 0.1
"""similarity_lower_bound and ratio_lower_bound, as its example has them."""


def arms(model: Any, facts: Facts) -> dict[str, Arm]:
    """FrameFusion on a second decoder that shares the weights: there is no way to take it off."""
    sys.path.insert(0, sys.argv[3])
    _stand_in()
    from framefusion.main import FrameFusion
    from framefusion.models.qwen2 import modeling_qwen2 as forwards

    with torch.device("meta"):
        fused = Qwen2ForCausalLM(model.config).eval()
    fused.load_state_dict(model.state_dict(), assign=True)
    fused.model.rotary_emb = model.model.rotary_emb
    state = FrameFusion(facts["budget"], SIMILARITY, RATIO)
    fused.framefusion = state
    _replace(fused.model, state, forwards.Qwen2Model_merge_then_fastv_cost_given_forward)
    for layer in fused.model.layers:
        _replace(layer, state, forwards.Qwen2DecoderLayer_merge_then_prune_by_cost_forward)
        _replace(layer.self_attn, state, forwards.Qwen2SdpaAttention_merge_then_prune_by_cost_forward)

    def attach(video: Video) -> AbstractContextManager[Any]:
        """The facts of a video that its adapters give before a prefill."""
        vision = video.frames * video.per_frame
        kinds = torch.full((1, video.embeds.shape[1]), -1)
        kinds[0, video.before : video.before + vision] = torch.arange(video.per_frame).repeat(video.frames)
        # Some versions call .item() on these, some count with them: NumPy's integers do for both.
        first, last, count = (np.int64(number) for number in (video.before, video.before + vision - 1, vision))
        state.prepare(kinds, video.per_frame, first, last, count, kinds.shape[1])
        return nullcontext()

    return {"framefusion": Arm(fused, attach)}


def _replace(module: Any, state: Any, forward: Any) -> None:
    module.framefusion = state
    module.forward = MethodType(forward, module)


def revision(checkout: Path) -> str:
    """The commit; of files without Git, the beginning of main.py's SHA-256."""
    git = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    if (checkout / ".git").exists():
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    file = checkout / "framefusion" / "main.py"
    return f"main.py {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" if file.is_file() else "not found"


def _stand_in() -> None:
    """Empty modules for what some versions import only to save pictures."""
    for name in ("torchvision", "torchvision.transforms", "matplotlib", "matplotlib.pyplot"):
        try:
            __import__(name)
        except ImportError:
            module = ModuleType(name)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)


if __name__ == "__main__":
    serve(arms, FrameFusion=revision(Path(sys.argv[3])))
