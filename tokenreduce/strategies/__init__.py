"""The strategies that come with tokenreduce, one per file, registered like a third party's.

Folders say what a method does to tokens: `prune` drops, `merge` averages, `cache` shortens what attention sees, `tower` acts in
the vision tower, `controls` are what a method must beat.
"""

from __future__ import annotations

from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategies.cache.h2o import H2O
from tokenreduce.strategies.cache.infinipot_v import InfiniPotV
from tokenreduce.strategies.cache.pyramidkv import PyramidKV
from tokenreduce.strategies.cache.snapkv import SnapKV
from tokenreduce.strategies.cache.streaming_window import StreamingWindow
from tokenreduce.strategies.controls.pool import Pool
from tokenreduce.strategies.controls.random import RandomPrune
from tokenreduce.strategies.controls.text_only import TextOnly
from tokenreduce.strategies.controls.uniform_frames import UniformFrames
from tokenreduce.strategies.merge.aim import Aim
from tokenreduce.strategies.merge.fastvid import FastVID
from tokenreduce.strategies.merge.holitom import HoliTom
from tokenreduce.strategies.merge.llava_scissor import LlavaScissor
from tokenreduce.strategies.merge.prumerge import PruMerge
from tokenreduce.strategies.merge.prunevid import PruneVid
from tokenreduce.strategies.merge.similarity_merge import SimilarityMerge
from tokenreduce.strategies.merge.sparsevlm import SparseVLM
from tokenreduce.strategies.merge.sttm import Sttm
from tokenreduce.strategies.merge.visionzip import VisionZip
from tokenreduce.strategies.prune.cdpruner import CDPruner
from tokenreduce.strategies.prune.dart import Dart
from tokenreduce.strategies.prune.divprune import DivPrune
from tokenreduce.strategies.prune.dtd import Dtd
from tokenreduce.strategies.prune.dycoke import DyCoke
from tokenreduce.strategies.prune.evs import Evs
from tokenreduce.strategies.prune.fastervlm import FasterVLM
from tokenreduce.strategies.prune.fastv import FastV
from tokenreduce.strategies.prune.importance_prune import ImportancePrune
from tokenreduce.strategies.prune.mmtok import MMTok
from tokenreduce.strategies.prune.pyramid_drop import PyramidDrop
from tokenreduce.strategies.prune.v_cast import VCast
from tokenreduce.strategies.prune.vidcom2 import VidCom2
from tokenreduce.strategies.prune.vispruner import VisPruner
from tokenreduce.strategies.tower.frame_reuse import FrameReuse
from tokenreduce.strategies.tower.patch_merge import PatchMerge
from tokenreduce.strategy import Strategy
from tokenreduce.vision import VisionStrategy


@hookimpl
def tokenreduce_strategies() -> list[type[Strategy] | type[VisionStrategy]]:
    """Our strategies, as a plugin names them."""
    return [
        *(SimilarityMerge, ImportancePrune, FastV, StreamingWindow, RandomPrune, UniformFrames),
        *(DivPrune, Dart, CDPruner, MMTok, VidCom2, VCast, Evs, Dtd, DyCoke, PyramidDrop, FasterVLM, VisPruner),
        *(Aim, LlavaScissor, PruneVid, Sttm, SparseVLM, VisionZip, PruMerge, FastVID, HoliTom),
        *(FrameReuse, PatchMerge),
        *(SnapKV, PyramidKV, H2O, InfiniPotV),
        *(Pool, TextOnly),
    ]
