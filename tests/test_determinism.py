"""The same model, plan and seed give the same file, byte for byte."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import cli, load
from s2d_compiler.analysis.assignment import row_weights
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.format import _without_identity
from s2d_compiler.tracing import capture
from tests.compiled import compile_all, digests, file_of, models
from tests.faults import many

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compiled() -> dict[str, DynamicModel]:
    return compile_all()


@pytest.fixture(scope="module")
def here(compiled: dict[str, DynamicModel]) -> dict[str, str]:
    found = digests(compiled)
    assert len(set(found.values())) == len(models())
    return found


def test_the_same_process_writes_the_same_bytes_with_more_threads(here: dict[str, str]):
    names = list(here) if many() else ["wide residual", "wide standardised", "heads"]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert digests(compile_all(names)) == {name: here[name] for name in names}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", ["1", "2", "3", "4"] if many() else ["1"])
def test_other_processes_write_the_same_bytes(here: dict[str, str], seed: str):
    """Another hash seed gives another order of sets; other threads another order of additions."""
    threads = "12"[int(seed) % 2]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": seed,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",  # do not spin where other tests want the core
    }
    environment.pop("S2D_VERIFY_ALWAYS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compiled", threads],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_a_network_that_was_read_or_copied_is_written_as_before(
    compiled: dict[str, DynamicModel], tmp_path: Path
):
    for name, dyn in compiled.items():
        content = file_of(dyn)
        (tmp_path / "dyn.pt").write_bytes(content)
        assert file_of(load(tmp_path / "dyn.pt")) == content, name
        assert file_of(copy.deepcopy(dyn)) == content, name


def test_texts_that_are_equal_are_one_and_containers_are_not_shared():
    inner = ["".join(["a", "b"]), "ab"]
    given: dict[str, Any] = {"x": inner, "y": (inner, 1.5, None, torch.ones(1))}
    found = _without_identity(given)
    assert found["x"] == found["y"][0] == ["ab", "ab"]
    assert found["x"] is not found["y"][0]
    assert found["x"][0] is found["x"][1] is found["y"][0][1]
    assert found["y"][3] is given["y"][3]


def test_weights_that_order_channels_do_not_depend_on_the_threads():
    """Sums decide which channels come first; the order of additions decides their last digit."""
    torch.manual_seed(0)
    pixels = 3 * 256 * 256
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 4), nn.ReLU(), nn.Linear(4, 4))
    program = capture(model.eval(), None, (3, 256, 256))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(row_weights(program, "1").tobytes())
    torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_the_random_numbers_of_the_check_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither in the file, beyond the seed itself, nor in the random numbers of the caller."""
    monkeypatch.chdir(tmp_path)
    model, shape = models()["by number"]
    torch.save(model, "model.pt")
    plan = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
    Path("spec.json").write_text(json.dumps(plan | {"input_shape": list(shape)}))
    words = ["model.pt", "--splits", "spec.json", "--quiet", "-o"]
    state = torch.get_rng_state()
    contents = []
    for seed in ("0", "1"):
        assert cli.compile_main([*words, "dyn.pt", "--seed", seed]) == 0
        data = torch.load("dyn.pt", weights_only=True)
        assert str(data["made_by"].pop("seed")) == seed
        data["made_by"].pop("command")
        torch.save(data, "data.pt")
        contents.append(Path("data.pt").read_bytes())
    assert contents[0] == contents[1]
    assert torch.equal(torch.get_rng_state(), state)
