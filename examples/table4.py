"""The multi-stage ResNet-56 of S2DNAS, Table 4, and what its stages cost.

Run ``python -m examples.table4`` from the root of the repository.

The paper prints accumulated costs of 21M, 30M and 90M for this network. They do not follow from
the channel counts of the same table: the convolutions of stage 1 alone come to more. This example
prints both, the paper's figures and those of the cost pass.

The network has projection shortcuts. Padded ones tie the channels of one resolution to those of
the next, and then the channel counts of the table cannot all be had at once.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table

from examples.cifar_models import resnet56
from s2d_compiler import DynamicModel, Plan, transform

PLAN = Path(__file__).with_name("resnet56_table4.json")
PRINTED = ("21M", "30M", "90M")  # S2DNAS, Table 4, "accumulated FLOPs"
STAGE_1 = ((32, 6), (16, 16), (8, 48))  # S2DNAS, Table 4: output size, channels of stage 1


def compile_table4() -> DynamicModel:
    """Transform ResNet-56 by the plan of Table 4."""
    return transform(resnet56(), Plan.load(PLAN))


def stage_1_by_hand() -> int:
    """Count the MACs per sample of stage 1's 3x3 convolutions from Table 4's channel counts."""
    macs, inputs = 0, 3
    for layers, (size, channels) in zip((19, 18, 18), STAGE_1, strict=True):
        macs += size * size * 9 * (inputs * channels + (layers - 1) * channels * channels)
        inputs = channels
    return macs


def report(dyn: DynamicModel) -> Group:
    """Lay out the cost of each stage beside the figure that the paper prints."""
    cost = dyn.cost
    table = Table(title="ResNet-56 by the plan of S2DNAS, Table 4, at 3x32x32")
    table.add_column("stage")
    for header in ("MACs", "cumulative MACs", "share", "in the paper"):
        table.add_column(header, justify="right")
    for number, (stage, printed) in enumerate(zip(cost.stages, PRINTED, strict=True), start=1):
        share = stage.cumulative_macs / cost.original_macs
        costs = (f"{stage.macs:,}", f"{stage.cumulative_macs:,}", f"{share:.0%}")
        table.add_row(str(number), *costs, printed)
    table.add_section()
    macs = f"{cost.original_macs:,}"
    table.add_row("original", macs, macs, "100%", "126M")
    by_hand = (
        f"The paper's figures do not follow from its channel counts: the 3x3 convolutions of stage "
        f"1 alone, with 6, 16 and 48 channels, come to {stage_1_by_hand():,} MACs, "
        f"not to {PRINTED[0]}."
    )
    return Group(table, by_hand)


if __name__ == "__main__":
    Console().print(report(compile_table4()))
