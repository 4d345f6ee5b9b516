"""How accurate a staged network is, and at what cost.

- ``evaluating``: ``evaluate``: exits and accuracy per stage under a policy.
- ``recorded``: the same from records, without running the network.
- ``trade_off``: accuracy against MACs over all thresholds.
- ``drawing``: both as a plot.
"""

from s2d_compiler.evaluation.evaluating import Evaluation, StageResult, evaluate
from s2d_compiler.evaluation.recorded import evaluate_records
from s2d_compiler.evaluation.trade_off import Point, TradeOff, trade_off

__all__ = [
    "Evaluation",
    "Point",
    "StageResult",
    "TradeOff",
    "evaluate",
    "evaluate_records",
    "trade_off",
]
