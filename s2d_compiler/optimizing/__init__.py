"""Forms of networks that only run, and run fast."""

from s2d_compiler.optimizing.backends import BACKENDS, available_backends
from s2d_compiler.optimizing.model import OptimizedModel
from s2d_compiler.optimizing.pipeline import optimize, optimize_static

__all__ = ["BACKENDS", "OptimizedModel", "available_backends", "optimize", "optimize_static"]
