"""Labelled images: what is read, what is made of them, and what is refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from s2d_compiler import _torchvision as _torchvision  # isort: split

from torchvision import datasets, transforms

from s2d_compiler.commands.data_options import DataSource
from s2d_compiler.data import Preprocessing, batches, open_data, require_fit
from s2d_compiler.data.loading import require_classes
from s2d_compiler.data.sources import Arrays, Data
from s2d_compiler.errors import DataError, OutOfMemoryError
from s2d_compiler.runtime import RunSettings

PLAIN = Preprocessing()
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pixels(*shape: int, seed: int = 0) -> numpy.ndarray[Any, Any]:
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def write_npz(path: Path, **arrays: Any) -> str:
    numpy.savez(path, **arrays)
    return str(path)


def write_folder(root: Path, count: int = 3, size: tuple[int, int] = (8, 6)) -> str:
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(pixels(*size, 3, seed=10 * number + index))
            image.save(root / name / f"{index}.png")
    return str(root)


def all_of(data: Data, preprocessing: Preprocessing = PLAIN, size: int = 2) -> Any:
    inputs, labels = zip(*batches(data, preprocessing, size), strict=True)
    return torch.cat(inputs), torch.cat(labels)


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_npz(tmp_path: Path, layout: str) -> None:
    images = pixels(5, 8, 7, 3)
    stored = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    spec = write_npz(
        tmp_path / "a.npz", images=stored, labels=numpy.array([[2], [0], [1], [1], [9]])
    )
    data = open_data(spec)
    inputs, labels = all_of(data)
    expected = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255
    torch.testing.assert_close(inputs, expected[:, :1] if layout == "NHW" else expected)
    assert labels.tolist() == data.labels.tolist() == [2, 0, 1, 1, 9]
    assert labels.dtype == data.labels.dtype == torch.int64
    assert data.classes is None


def test_npz_of_floats_keeps_their_values(tmp_path: Path) -> None:
    images = numpy.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(">f8")
    spec = write_npz(tmp_path / "a.npz", images=images, labels=numpy.zeros(4, numpy.uint8))
    inputs, _ = all_of(open_data(spec), Preprocessing(dtype="float64"))
    assert numpy.array_equal(inputs.numpy(), images)


def test_npz_with_splits_and_class_names(tmp_path: Path) -> None:
    spec = write_npz(
        tmp_path / "a.npz",
        train_images=pixels(4, 5, 5, 3),
        train_labels=numpy.arange(4),
        test_images=pixels(2, 5, 5, 3),
        test_labels=numpy.array([3, 1]),
        classes=["a", "b", "c", "d"],
    )
    assert open_data(spec, "test").labels.tolist() == [3, 1]
    data = open_data(spec, "train")
    assert (len(data), data.classes) == (4, ("a", "b", "c", "d"))


def test_slices_of_a_split(tmp_path: Path) -> None:
    spec = write_npz(tmp_path / "a.npz", images=pixels(6, 5, 5, 3), labels=numpy.arange(6))
    assert open_data(spec, "[4:]").name == f"{spec}[4:]"
    for text, expected in {"[2:]": [2, 3, 4, 5], "[:-4]": [0, 1], "[1::2]": [1, 3, 5]}.items():
        part = open_data(spec, text)
        assert part.labels.tolist() == expected
        inputs, labels = all_of(part)
        assert labels.tolist() == expected
        torch.testing.assert_close(inputs, all_of(open_data(spec))[0][expected])


def test_a_limit_keeps_all_classes_of_sorted_data() -> None:
    data = Arrays("x", torch.zeros(100, 1, 2, 2), torch.arange(100) // 10)
    assert data.limited(10).labels.tolist() == list(range(10))
    assert data.limited(7).labels.tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert data.limited(10).name == "x (10 of 100)"
    assert data.limited(10).place(3) == "x: image 30"
    assert data.limited(None) is data
    assert data.limited(100) is data


def test_a_folder_is_read_as_torchvision_does(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", count=5)
    Image.fromarray(pixels(8, 6)).save(tmp_path / "data" / "cat" / "gray.png")
    reference = datasets.ImageFolder(
        root, transforms.Compose([transforms.ToTensor(), transforms.Normalize(**IMAGENET)])
    )
    expected = torch.stack([image for image, _ in reference])
    for spec in (root, f"folder:{root}"):
        data = open_data(spec)
        inputs, labels = all_of(data, Preprocessing(**IMAGENET), 4)
        torch.testing.assert_close(inputs, expected)
        assert labels.tolist() == data.labels.tolist() == reference.targets
        assert data.classes == ("cat", "dog")
    assert open_data(f"folder:{tmp_path}", "data").labels.tolist() == reference.targets
    assert open_data(root, "[::3]").labels.tolist() == reference.targets[::3]


def test_files_that_are_no_images_by_name_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "data")
    (tmp_path / "data" / "cat" / "Thumbs.db").write_text("x")
    assert len(open_data(root)) == 6
    assert "1 files are no images by their names" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named_and_refused(tmp_path: Path, content: bytes | None) -> None:
    root = write_folder(tmp_path / "data", count=9)
    bad = tmp_path / "data" / "dog" / "4.png"
    bad.write_bytes(bad.read_bytes()[:-40] if content is None else content)
    found = batches(open_data(root), PLAIN, 4)
    assert [len(next(found)[1]) for _ in range(3)] == [4, 4, 4]  # those before the one with it
    with pytest.raises(DataError, match=r"dog/4\.png: this image cannot be read"):
        next(found)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "dog" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: this image cannot be read .*no regular file"):
        list(batches(open_data(root), PLAIN, 4))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, per_file: int = 4) -> Any:
    """Files of the form of CIFAR-10's, whose checksums torchvision is told."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    written: dict[str, Any] = {}
    known = datasets.CIFAR10
    for number, (name, _) in enumerate((*known.train_list, *known.test_list)):
        images = pixels(per_file, 3 * 32 * 32, seed=number)
        content = {"data": images, "labels": [number] * per_file}
        (folder / name).write_bytes(pickle.dumps(content))
        written[name] = images.reshape(-1, 3, 32, 32)
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return written


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = open_data(f"cifar10:{root}")
        inputs, labels = all_of(data, size=3)
        torch.testing.assert_close(inputs, torch.from_numpy(written["test_batch"]) / 255)
        assert labels.tolist() == [5] * 4
    data = open_data(f"cifar10:{tmp_path}", "train")
    assert data.name == f"cifar10:{tmp_path} train"
    assert len(data) == 20
    assert data.classes is not None
    assert data.classes[3] == "class 3"
    assert open_data(f"cifar10:{tmp_path}", "train[18:]").labels.tolist() == [4, 4]


def test_cifar_with_other_content_is_not_unpickled(tmp_path: Path) -> None:
    """torchvision compares checksums before it unpickles; a file that is not the official one
    never runs."""

    class Harm:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "harm").touch, ())

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps(Harm()))
    (folder / "batches.meta").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match="checksums differ"):
        open_data(f"cifar10:{tmp_path}")
    assert not (tmp_path / "harm").exists()


SOURCE = """
import torch
from PIL import Image
from torch.utils.data import TensorDataset


def tensors(split="all"):
    images = torch.arange(5 * 3 * 4 * 4).reshape(5, 3, 4, 4).to(torch.uint8)
    return TensorDataset(images[:2] if split == "few" else images, torch.tensor([4, 3, 2, 1, 0])
                         [:2 if split == "few" else 5])


class Pictures:
    classes = ["a", "b"]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Image.new("RGBA", (4, 6), (index, 10, 20, 255)), index % 2
"""


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_pictures.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    data = open_data("my_own_pictures:tensors")
    inputs, labels = all_of(data)
    torch.testing.assert_close(inputs[0], torch.arange(48).reshape(3, 4, 4) / 255)
    assert labels.tolist() == data.labels.tolist() == [4, 3, 2, 1, 0]
    assert len(open_data("my_own_pictures:tensors", "few")) == 2
    pictures = open_data("my_own_pictures:Pictures")
    inputs, labels = all_of(pictures, Preprocessing(scale=1.0))
    assert inputs.shape == (3, 3, 6, 4)
    assert inputs[2, :, 0, 0].tolist() == [2, 10, 20]
    assert (labels.tolist(), pictures.classes) == ([0, 1, 0], ("a", "b"))


def test_the_example_of_a_function() -> None:
    pytest.importorskip("sklearn")
    data = open_data("examples.digits:dataset")
    assert (len(data), data.labels.unique().tolist()) == (450, list(range(10)))
    inputs, _ = next(batches(data, PLAIN, 3))
    assert inputs.shape == (3, 1, 8, 8)
    assert 0.9 < float(inputs.max()) <= 1
    assert len(open_data("examples.digits:dataset", "train[:100]")) == 100


def test_batches_are_those_of_one_image_at_a_time(tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path / "data", size=(20, 14)))
    how = Preprocessing(resize=12, crop=(10, 8), **IMAGENET)
    alone, labels = all_of(data, how, 1)
    for size in (2, 4, 6, 100):
        torch.testing.assert_close(all_of(data, how, size)[0], alone, rtol=0, atol=0)
        assert all_of(data, how, size)[1].tolist() == labels.tolist()


def test_reading_stays_at_most_two_batches_ahead(tmp_path: Path) -> None:
    read: list[int] = []

    class Watched(Arrays):
        concurrent = True

        def images(self, indices: Any) -> None:
            return None

        def image(self, index: int) -> torch.Tensor:
            read.append(index)
            return super().image(index)

    data = Watched("x", torch.zeros(40, 1, 2, 2), torch.zeros(40, dtype=torch.long))
    for number, _ in enumerate(batches(data, PLAIN, 4), start=1):
        assert len(read) <= 4 * (number + 1)
    assert sorted(read) == list(range(40))


# -- what does not fit ---------------------------------------------------------------------------


def test_data_and_network_must_fit() -> None:
    color = Arrays("x", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
    assert require_fit(color, PLAIN, [(3, 8, 8)]) == (3, 8, 8)
    for how, shape, text in (
        (
            PLAIN,
            (3, 4, 4),
            "3x8x8 after preprocessing .none., and the network takes 3x4x4; .*crop 4x4",
        ),
        (PLAIN, (1, 8, 8), "--channels gray"),
        (PLAIN, (5, 8, 8), "as many channels"),
        (PLAIN, (17,), "which are no images"),
        (Preprocessing(crop=9), (3, 9, 9), "8x8 pixels are left"),
        (Preprocessing(mean=(1, 2)), (3, 8, 8), "mean has 2 numbers"),
    ):
        with pytest.raises(DataError, match=text):
            require_fit(color, how, [shape])
    with pytest.raises(DataError, match="takes 2 inputs"):
        require_fit(color, PLAIN, [(3, 8, 8), (3, 8, 8)])


def test_images_of_several_sizes_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data")
    Image.fromarray(pixels(9, 9, 3)).save(tmp_path / "data" / "cat" / "z.png")
    with pytest.raises(
        DataError, match=r"cat/z\.png: 3x9x9 after preprocessing, and the images before"
    ):
        all_of(open_data(root), size=4)
    inputs, _ = all_of(open_data(root), Preprocessing(resize=8, crop=(6, 6)), size=4)
    assert inputs.shape == (7, 3, 6, 6)


def test_classes_must_fit() -> None:
    named = Arrays("x", torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), ["a", "b"])
    require_classes(named, named.labels, 2)
    with pytest.raises(DataError, match=r"2 classes \(a, b\), and the network tells 10 apart"):
        require_classes(named, named.labels, 10)
    unnamed = Arrays("x", torch.zeros(2, 1, 2, 2), torch.tensor([0, 7]))
    require_classes(unnamed, unnamed.labels, 8)
    with pytest.raises(
        DataError, match="the label 7, and the network tells 7 classes apart, 0 to 6"
    ):
        require_classes(unnamed, unnamed.labels, 7)


# -- damaged files -------------------------------------------------------------------------------


def test_a_damaged_npz_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    numpy.savez_compressed(path, images=pixels(3, 6, 6, 3), labels=numpy.arange(3))
    whole = path.read_bytes()
    for length in range(0, len(whole), 29):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            open_data(str(path))


def test_an_npz_with_flipped_bytes_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, images=pixels(3, 6, 6, 3), labels=numpy.arange(3))
    whole = path.read_bytes()
    rng = numpy.random.default_rng(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[int(rng.integers(len(whole)))] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(changed))
        try:
            all_of(open_data(str(path)))
        except DataError:
            refused += 1
    assert refused > 75


def test_pickles_in_npz_do_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "harm").touch, ())

    path = tmp_path / "a.npz"
    write_npz(path, images=numpy.array([Harm()], dtype=object), labels=numpy.arange(1))
    with pytest.raises(DataError, match="refused: an array in it is pickled"):
        open_data(str(path))
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(DataError, match=r"no \.npz archive"):
        open_data(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Harm()))
        archive.writestr("labels.npy", pickle.dumps(Harm()))
    with pytest.raises(DataError):
        open_data(str(path))
    assert not (tmp_path / "harm").exists()


def test_an_archive_that_promises_more_than_it_has(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 64, 64, 3), }" % 10**12
    header = header.ljust(117) + b"\n"
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        )
        archive.writestr("labels.npy", b"")
    with pytest.raises((DataError, OutOfMemoryError), match=r"a\.npz"):
        open_data(str(path))


# -- options -------------------------------------------------------------------------------------


def test_options_go_before_what_is_stored() -> None:
    stored = Preprocessing(resize=256, crop=224, mean=(0.5,))
    assert DataSource().preprocessing(stored) is not None
    assert DataSource().preprocessing(stored) == stored
    given = DataSource(crop="32x16", std="1,2.5,3", scale=1.0).preprocessing(stored)
    assert given == Preprocessing(
        resize=256, crop=(32, 16), mean=(0.5,), std=(1, 2.5, 3), scale=1.0
    )


def test_bytes_without_any_preprocessing_give_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = SimpleNamespace(
        settings=RunSettings(),
        parts=SimpleNamespace(input_shapes=((3, 8, 8),), batch=None),
        parameters=lambda: iter([torch.zeros(1, dtype=torch.float64)]),
    )
    images = pixels(3, 8, 8, 3)
    as_bytes = write_npz(tmp_path / "a.npz", images=images, labels=numpy.arange(3))
    as_floats = write_npz(tmp_path / "b.npz", images=images / 255, labels=numpy.arange(3))
    samples = DataSource(as_bytes).samples(network)
    assert samples.preprocessing == Preprocessing(dtype="float64")
    assert "pixels are only scaled to 0 to 1" in caplog.text
    caplog.clear()
    floats = DataSource(as_floats).samples(network)
    torch.testing.assert_close(next(samples.batches())[0], next(floats.batches())[0])
    DataSource(as_bytes, resize="8").samples(network)
    network.settings = RunSettings(preprocessing=PLAIN)
    DataSource(as_bytes).samples(network)
    assert not caplog.text


def test_subsets_and_tensor_datasets_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s2d_compiler.data.functions import MapStyle

    whole = TensorDataset(torch.rand(6, 1, 2, 2), torch.arange(6))
    data = MapStyle("x", Subset(whole, [5, 1, 3]))
    assert data.labels.tolist() == [5, 1, 3]
    assert data.limited(2).labels.tolist() == [5, 1]
