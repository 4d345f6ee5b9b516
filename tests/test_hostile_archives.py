"""dyn.pt from a stranger: archives and pickles that lie, damage, and the memory taken."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from s2d_compiler import load
from s2d_compiler.errors import FormatError
from tests import fuzzing
from tests.data_mutations import archive_of
from tests.hostile import (
    Change,
    Data,
    argument,
    huge_step,
    laughs,
    module_of,
    network,
    put,
    refusal_of,
    tensor,
)


@pytest.fixture
def data() -> Data:
    return network(0)


# -- archives ----------------------------------------------------------------------------------


def members(path: Path) -> list[tuple[str, bytes, int]]:
    with zipfile.ZipFile(path) as archive:
        return [(e.filename, archive.read(e), zipfile.ZIP_STORED) for e in archive.infolist()]


def with_member(path: Path, name: str, content: bytes, kind: int = zipfile.ZIP_STORED) -> None:
    found = [m for m in members(path) if not m[0].endswith(f"/{name}")]
    folder = found[0][0].partition("/")[0]
    path.write_bytes(archive_of([*found, (f"{folder}/{name}", content, kind)]))


@pytest.mark.parametrize("instruction", [b"F", b"S"])
def test_damage_is_told_without_quoting_the_pickle(
    data: Data, tmp_path: Path, instruction: bytes
) -> None:
    """An instruction that takes a line of text, before much that is none."""
    path = tmp_path / "dyn.pt"
    torch.save(data, path)
    with_member(path, "data.pkl", b"\x80\x02" + instruction + b"]\x90" * 1000 + b"\n.")
    said = refusal_of(path)
    assert "its pickle is damaged" in said
    assert len(said) < 400


def test_archives_that_lie(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "dyn.pt"
    torch.save(data, path)
    whole = path.read_bytes()
    first = next(content for name, content, _ in members(path) if name.endswith("data/0"))
    with_member(path, "data/0", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    assert "claim to be larger than the file" in refusal_of(path)
    path.write_bytes(whole)
    for content in (first[:-1], first + b"x", b""):
        with_member(path, "data/0", content)
        assert "loader refuses it" in refusal_of(path)
    found = members(path)
    path.write_bytes(archive_of([*found, found[-1]]))
    assert "two of its parts have one name" in refusal_of(path)
    path.write_bytes(archive_of([*found, ("dyn/../../x", b"", zipfile.ZIP_STORED)]))
    assert "leads out of it" in refusal_of(path)
    path.write_bytes(archive_of([*found, ("elsewhere/x", b"", zipfile.ZIP_STORED)]))
    assert "loader refuses it" in refusal_of(path)
    path.write_bytes(whole.replace(first, first[:-1] + bytes([first[-1] ^ 1])))
    assert "checksum" in refusal_of(path)


def test_plain_pickles_and_pipes(tmp_path: Path) -> None:
    path = tmp_path / "dyn.pt"
    path.write_bytes(pickle.dumps({"format": "x"}))
    assert "loader refuses it" in refusal_of(path)
    torch.save({"format": "x"}, path, _use_new_zipfile_serialization=False)
    assert "loader refuses it" in refusal_of(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="a device or a pipe"):
        load(tmp_path / "pipe")
    with pytest.raises(FormatError, match="a device or a pipe"):
        load("/dev/zero")


PICKLES = {
    "global": (b"\x80\x02cos\nsystem\n.", "os.system"),
    "allowed elsewhere": (b"\x80\x02ctorch.nn.parameter\nParameter\n.", "Parameter"),
    "dotted": (b"\x80\x02ctorch\nnn.modules.os.system\n.", "torch.nn.modules.os.system"),
    "room": (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "builtins.bytearray"),
    "dtype called": (b"\x80\x02ctorch\nfloat32\n)R.", "builds no tensor"),
    "storage called": (b"\x80\x02ctorch\nFloatStorage\n)R.", "builds no tensor"),
    "dict with items": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "other than 0 arguments"),
    "tensor of nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "other than 6 arguments",
    ),
    "instance": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "fill": (b"\x80\x02ccollections\nOrderedDict\n)R}b.", "BUILD"),
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "damaged"),
    "extension": (b"\x80\x02\x82\x01.", "damaged|EXT1"),
    "persistent": (b"\x80\x02Pabc\n.", "PERSID|damaged"),
    "memo": (b"\x80\x02h\x05.", "damaged"),
    "endless memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "is not a dyn"),
    "number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged|LONG4"),
    "empty": (b"", "damaged"),
    "marks": (b"\x80\x02" + b"(" * 20_000 + b".", "damaged"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_by_hand(data: Data, tmp_path: Path, name: str) -> None:
    path = tmp_path / "dyn.pt"
    torch.save(data, path)
    content, message = PICKLES[name]
    with_member(path, "data.pkl", content)
    text = refusal_of(path)
    assert re.search(message, text), text


def test_classes_that_the_program_allows_torch_are_refused_still(tmp_path: Path) -> None:
    path = tmp_path / "dyn.pt"
    torch.save({"format": torch.nn.ReLU()}, path)
    with torch.serialization.safe_globals([torch.nn.ReLU]):
        assert "torch.nn.modules.activation.ReLU" in refusal_of(path)


# -- damage ------------------------------------------------------------------------------------


def test_truncated_files(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "dyn.pt"
    torch.save(data, path)
    whole = path.read_bytes()
    for kept in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:kept])
        with pytest.raises(FormatError, match="its end is missing" if kept > 3 else "damaged"):
            load(path)


def test_flipped_bits(data: Data, tmp_path: Path) -> None:
    """No flip in any member goes by unseen: those that load hit what no member holds."""
    path = tmp_path / "dyn.pt"
    torch.save(data, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spans = [range(e.header_offset, e.header_offset + 30) for e in archive.infolist()]
        contents = [archive.read(e) for e in archive.infolist()]
    starts = [whole.index(content) for content in contents if len(content) > 64]
    held = [range(at, at + len(c)) for at, c in zip(starts, filter(_long, contents), strict=True)]
    pick = random.Random(0)
    loaded = 0
    for _ in range(int(os.environ.get("S2D_FLIPS", "300"))):
        position = pick.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[position] ^= 1 << pick.randrange(8)
        path.write_bytes(flipped)
        try:
            load(path)
        except FormatError as error:
            fuzzing.sentence(error)
        else:
            loaded += 1
            assert not any(position in span for span in held), position
    assert spans
    assert loaded


def _long(content: bytes) -> bool:
    return len(content) > 64


# -- memory ------------------------------------------------------------------------------------

SCRIPT = """
import resource, sys
import torch
from pathlib import Path
from s2d_compiler import load
from s2d_compiler.errors import FormatError
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28,) * 2)
for path in sys.argv[1:]:
    try:
        load(path)
    except FormatError as error:
        assert "allocate" not in str(error), error
    else:
        sys.exit(f"{path} was read")
"""

LARGE: list[Change] = [
    argument("Linear", "in_features", 10**9),
    lambda d: module_of(d, "Linear")["arguments"].update(in_features=10**9, out_features=10**9),
    argument("PReLU", "num_parameters", 2**31 - 1),
    argument("Conv2d", "kernel_size", [10**9, 10**9]),
    put("input_shapes", [[2**31 - 1] * 70]),
    put("interfaces", 0, "features", 10**15),
    put("owners", torch.zeros(1, dtype=torch.int16).expand(10**12)),
    put("provenance", "indices", [torch.zeros(1, dtype=torch.int32).expand(10**12)]),
    tensor(lambda t: torch.zeros(1).expand(10**6, 10**6)),
    laughs,
]


def test_files_that_claim_to_be_large(tmp_path: Path) -> None:
    """Each is refused by a process that may take 256 MiB."""
    for number, change in enumerate(LARGE):
        data = network(0)
        change(data)
        torch.save(data, tmp_path / f"{number}.pt")
    data = network(1)
    huge_step(data)
    torch.save(data, tmp_path / "computed.pt")
    paths = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- chance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["plans", "files"])
def test_random_damage(what: str, tmp_path: Path) -> None:
    """A few hundred cases of ``python -m tests.fuzzing``; more with S2D_FUZZ."""
    case = fuzzing.make_case(what, tmp_path)
    few = 1000 if what == "plans" else 150
    count = int(os.environ.get("S2D_FUZZ", "0")) or few
    outcomes = [fuzzing.run_case(case, 0, number) for number in range(count)]
    assert {"refused", "read"} <= set(outcomes)


def test_nothing_is_written_into_the_file(data: Data, tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(data, stream)
    (tmp_path / "dyn.pt").write_bytes(stream.getvalue())
    load(tmp_path / "dyn.pt")
    assert (tmp_path / "dyn.pt").read_bytes() == stream.getvalue()
