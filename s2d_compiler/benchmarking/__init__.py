"""Measuring what dynamic networks save, against the fastest static form."""

from s2d_compiler.benchmarking.measuring import Benchmark, benchmark
from s2d_compiler.benchmarking.results import BatchResult, DynamicResult, StaticResult

__all__ = ["BatchResult", "Benchmark", "DynamicResult", "StaticResult", "benchmark"]
