"""What people meet first: volumes, half precision, several inputs, models without a free batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d_compiler import Plan, inspect_model, transform, verify
from s2d_compiler.cli import compile_main, main
from s2d_compiler.errors import InputShapeError

PLAN = Plan.from_dict(
    {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}, "order": "l1"}
)


class Video(nn.Sequential):
    """A small network on volumes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(16, 4),
        )  # fmt: skip


class Casting(nn.Module):
    """A half-precision model that takes any floating-point image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.to(self.stem.weight.dtype)).relu().mean((2, 3))
        return self.head(y).float()  # type: ignore[no-any-return]


class Two(nn.Module):
    """An image and some numbers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.beside = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        both = self.stem(image).relu().mean((2, 3)) + self.beside(meta)
        return self.head(both)  # type: ignore[no-any-return]


def test_volumes_are_inspected_and_planned(tmp_path: Path) -> None:
    torch.save(Video(), tmp_path / "video.pt")
    words = [str(tmp_path / "video.pt"), "--trust", "--input-shape", "3x4x8x8"]
    spec = tmp_path / "spec.json"
    assert main(["inspect", *words, "--write-plan", str(spec)]) == 0
    assert set(json.loads(spec.read_text())["resolutions"]) == {"4x8x8", "2x4x4"}
    assert compile_main([*words, "--splits", str(spec), "-o", str(tmp_path / "dyn.pt")]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_that_casts_its_input_goes_on_doing_so(dtype: torch.dtype) -> None:
    model = Casting().to(dtype).eval()
    plan = Plan.from_dict({"stages": 1, "groups": 8, "default": {"split": [], "concat": "none"},
                           "input_shape": [3, 8, 8]})  # fmt: skip
    dyn = transform(model, plan)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for given in (x, x.to(dtype)):
            assert torch.equal(dyn(given)[0], model(given))


def test_a_half_model_that_does_not_cast_is_captured_in_its_own_type() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).bfloat16()
    dyn = transform(model, Plan.from_dict({**PLAN.to_dict(), "input_shape": [3, 8, 8]}))
    assert dyn(torch.randn(2, 3, 8, 8).bfloat16())[0].dtype == torch.bfloat16


def test_several_inputs_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Two(), tmp_path / "two.pt")
    words = [str(tmp_path / "two.pt"), "--trust", "--input-shape", "3x8x8"]
    assert main(["inspect", *words]) == 2
    said = capsys.readouterr().err
    assert "Two.forward does not take 1 input(s) like these: missing a required argument" in said
    assert "transform(model, plan, (image, other)" in said


def test_several_inputs_in_python() -> None:
    examples = (torch.randn(2, 3, 8, 8), torch.randn(2, 5))
    space = inspect_model(Two(), example_inputs=examples)
    assert len(transform(Two(), space.starter_plan(), examples)(*examples)) == 3


def test_examples_of_different_batches_are_refused() -> None:
    examples = (torch.randn(4, 3, 8, 8), torch.randn(2, 5))
    with pytest.raises(InputShapeError, match=r"have 2 and 4 in dimension 0.* give them one batch"):
        transform(Two(), PLAN, examples)


class Selecting(nn.Module):
    """Channels that a constant mask selects; export leaves their number open."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(8, 4)
        self.register_buffer("mask", torch.arange(16) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        selected = self.stem(x)[:, self.mask] * 2  # type: ignore[index]
        return self.head(selected.relu().amax((2, 3))[:, :8])  # type: ignore[no-any-return]


def test_channels_selected_by_a_mask() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Selecting()
    assert verify(model, transform(model, PLAN, (x,)), (x,)).stages == 3


def test_the_package_runs_as_a_module() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "s2d_compiler", "--help"], capture_output=True, text=True, check=True
    )
    assert "inspect" in said.stdout
