"""s2d-compiler: rewrite a static PyTorch network as a dynamic one of several stages."""

from s2d_compiler import _torchvision as _torchvision  # first: makes torchvision importable
from s2d_compiler._version import __version__ as __version__
from s2d_compiler.compiler import transform
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import S2DError
from s2d_compiler.format import load
from s2d_compiler.inspecting import inspect_model
from s2d_compiler.masking.model import MaskedModel, masked
from s2d_compiler.monitoring import Monitor
from s2d_compiler.plan import Plan, Setting
from s2d_compiler.runtime import Deadline, MacsBudget, Predictions, Thresholds
from s2d_compiler.training import History, Recipe, fit
from s2d_compiler.verification import Verification, verify

__all__ = [
    "Deadline",
    "DepthPlan",
    "DynamicModel",
    "History",
    "MacsBudget",
    "MaskedModel",
    "Monitor",
    "Plan",
    "Predictions",
    "Recipe",
    "S2DError",
    "Setting",
    "Thresholds",
    "Verification",
    "fit",
    "inspect_model",
    "load",
    "masked",
    "transform",
    "verify",
]
