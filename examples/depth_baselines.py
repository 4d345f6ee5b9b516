"""The baselines of S2DNAS, Table 1, and DDI's branch classifiers: what each exit costs.

Run ``python -m examples.depth_baselines`` from the root of the repository. Exits of the Naive and
BranchyNet baselines stand at a third and two thirds of the depth; the paper does not say where
its own stand.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from torch import nn

from examples.cifar_models import mobilenet_v2, resnet20, resnet56, vgg16_bn
from s2d_compiler import DynamicModel, transform
from s2d_compiler.depth_plan import DepthPlan

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": resnet20,
    "ResNet-56": resnet56,
    "VGG16-BN": vgg16_bn,
    "MobileNetV2": mobilenet_v2,
}
PLANS = {
    "Naive": DepthPlan((1 / 3, 2 / 3), "linear", input_shape=(3, 32, 32)),
    "BranchyNet": DepthPlan((1 / 3, 2 / 3), "branchynet", input_shape=(3, 32, 32)),
    "DDI": DepthPlan(preset="ddi", input_shape=(3, 32, 32)),
}


def compiled(network: str, method: str) -> DynamicModel:
    """One of the networks with exits along its depth."""
    return transform(NETWORKS[network](), PLANS[method])


def table() -> Table:
    """Millions of MACs up to every exit, earlier heads included, beside the original's."""
    result = Table(title="MACs per sample up to each exit, in millions, at 3x32x32")
    result.add_column("network")
    result.add_column("heads")
    result.add_column("up to each exit; the last is the original's own", overflow="fold")
    result.add_column("original", justify="right")
    for network in NETWORKS:
        for method in PLANS:
            cost = compiled(network, method).cost
            millions = ", ".join(f"{s.cumulative_macs / 1e6:.1f}" for s in cost.stages)
            result.add_row(network, method, millions, f"{cost.original_macs / 1e6:.1f}")
        result.add_section()
    return result


if __name__ == "__main__":
    Console(width=100).print(table())
