"""Graph rewrites, one per file; ``s2d_compiler.compiler`` runs them."""

import s2d_compiler as s2d_compiler  # first: its driver imports the passes below
from passes.base import Pass, PassResult, Pipeline
from passes.concat import ConcatFeatures
from passes.depth_exits import AddDepthExits
from passes.exits import AddExits
from passes.extract import ExtractStages
from passes.split import SplitChannels

__all__ = [
    "AddDepthExits",
    "AddExits",
    "ConcatFeatures",
    "ExtractStages",
    "Pass",
    "PassResult",
    "Pipeline",
    "SplitChannels",
]
