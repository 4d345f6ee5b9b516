"""What each of several processes does: ``python -m tests.distributed_training FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from s2d_compiler import fit
from s2d_compiler.training import feeding
from s2d_compiler.training.distributed import Processes, joined
from tests.training import SHORT, network, samples, weights


def main(folder: Path) -> None:
    """Train, and write weights and the images that were seen."""
    torch.set_num_threads(1)
    seen: list[torch.Tensor] = []
    together = feeding.Feed._together

    def looking(self: feeding.Feed, indices: list[int]) -> torch.Tensor:
        seen.append(torch.tensor(indices))
        return together(self, indices)

    feeding.Feed._together = looking  # type: ignore[method-assign, assignment]
    with joined(None):
        processes = Processes()
        model = network(norms=False).double()
        if processes.rank:  # the first process's weights count
            torch.nn.init.zeros_(next(model.parameters()))
        recipe = SHORT.changed(
            batch_size=16 // processes.count, stage_weights="adaptive", clip_norm=0.5
        )
        history = fit(
            model, samples(), recipe, validation=samples(21, seed=5),
            checkpoint=folder / f"c{processes.count}",
        )  # fmt: skip
        with_norms = network()
        fit(with_norms, samples(), recipe)
        result = {
            "weights": weights(model),
            "norms": weights(with_norms),
            "seen": torch.stack(seen),
            "validation": [list(epoch.validation) for epoch in history.epochs],
            "accuracies": [list(epoch.accuracies) for epoch in history.epochs],
        }
        torch.save(result, folder / f"{processes.count}-{processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
