"""What every operator family does to channels and what it costs: one table."""

from s2d_compiler.rules import channelwise as channelwise
from s2d_compiler.rules import contraction as contraction
from s2d_compiler.rules import elementwise as elementwise
from s2d_compiler.rules import layers as layers
from s2d_compiler.rules import movement as movement
from s2d_compiler.rules import norms as norms
from s2d_compiler.rules import unfold as unfold
from s2d_compiler.rules.base import NoRule, OperatorRule, find_rule, register, rule_key, table
from s2d_compiler.rules.unknown import UNKNOWN

__all__ = ["UNKNOWN", "NoRule", "OperatorRule", "find_rule", "register", "rule_key", "table"]
