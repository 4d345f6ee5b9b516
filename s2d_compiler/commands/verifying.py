"""``s2d verify``: a compiled network is what its plan makes of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from s2d_compiler.commands.options import REPORTING, SOURCE, ModelSource, Reporting, Result


def verify_network(
    model: Path,
    dyn: Path,
    /,
    *,
    source: ModelSource = SOURCE,
    trained: bool = False,
    reporting: Reporting = REPORTING,
) -> Result:
    """Show that a compiled network is what its plan makes of a model.

    What every stage computes is derived from the model and the plan, and from the compiled
    network, down to single elements of weights; both must agree.

    Args:
        model: The original, a file of torch.save, or .safetensors.
        dyn: The compiled network, dyn.pt.
        trained: Let weights and batch-norm statistics differ, of a network that was trained
            since it was compiled.
    """
    from s2d_compiler.format import load
    from s2d_compiler.verification import verify

    staged = load(dyn)
    submodule = source.submodule
    if submodule is None and isinstance(staged.parts.made_by.get("submodule"), str):
        submodule = str(staged.parts.made_by["submodule"])
    source.require_shape_of(dyn, staged.parts.input_shapes)
    found = verify(replace(source, submodule=None).read(model), staged, submodule=submodule,
                   trained=trained)  # fmt: skip
    document = {
        "submodule": submodule,
        "stages": found.stages,
        "nodes": found.nodes,
        "terms": found.terms,
        "equal": found.weights.equal,
        "changed": list(found.weights.changed),
    }
    tensors = found.weights.equal + len(found.weights.changed)
    weights = f"all {tensors} tensors hold the original's numbers"
    if found.weights.changed:
        weights = f"{len(found.weights.changed)} of {tensors} tensors hold other numbers (trained)"
    part = "" if submodule is None else f"the part {submodule} of "
    text = (
        f"verified: {found.stages} stages compute what the plan in {dyn} makes of {part}{model}\n"
        f"{found.nodes:,} nodes with {found.terms:,} values, each derived twice; {weights}; the "
        "costs are what runs"
    )
    return Result(document, [text])
