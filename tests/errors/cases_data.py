"""Labelled images: files, folders, functions, preprocessing, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from s2d_compiler.commands.data_options import DataSource, read_device
from s2d_compiler.data import Preprocessing, batches, open_data, require_fit
from s2d_compiler.data.functions import MapStyle
from s2d_compiler.data.loading import require_classes
from s2d_compiler.data.sources import Arrays, as_image, as_label
from s2d_compiler.errors import DataError, FormatError, UsageError
from s2d_compiler.runtime import RunSettings
from tests.errors.case import Case

FORMS = "cifar10:DIR, cifar100:DIR, folder:DIR, FILE.npz or package.module:function"
BYTES = numpy.zeros((2, 8, 8, 3), numpy.uint8)
LABELS = numpy.arange(2)
FUNCTIONS = """
def number(split=None):
    return 3

def failing(split=None):
    raise ValueError("no such part")
"""


def npz(*parts: str, content: bytes | None = None, error: Any = DataError, **arrays: Any) -> Case:
    """Reading a file of these arrays, or of this content."""

    def trigger(folder: Path) -> object:
        numpy.savez("a.npz", **arrays)
        if content is not None:
            Path("a.npz").write_bytes(content)
        return open_data("a.npz")

    return Case(trigger, error, *parts)


def opening(
    spec: str,
    *parts: str,
    split: str | None = None,
    error: Any = DataError,
    make: Callable[[], object] = lambda: None,
) -> Case:
    def trigger(folder: Path) -> object:
        make()
        return open_data(spec, split)

    return Case(trigger, error, *parts)


def data(count: int = 2, classes: list[str] | None = None) -> Arrays:
    return Arrays("a.npz", torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count),
                  classes)  # fmt: skip


def fitting(how: Preprocessing, shapes: list[tuple[int, ...]], *parts: str) -> Case:
    return Case(lambda folder: require_fit(data(), how, shapes), DataError, *parts)


def item(value: Any, *parts: str) -> Case:
    return Case(lambda folder: MapStyle("my:data", [value]).item(0), DataError, *parts)


def option(*parts: str, network: Any = None, **given: Any) -> Case:
    def trigger(folder: Path) -> object:
        numpy.savez("a.npz", images=BYTES, labels=LABELS)
        source = DataSource(**given)
        return source.preprocessing(None) if network is None else source.samples(network)

    return Case(trigger, UsageError, *parts)


def network(batch: int | None = None) -> Any:
    """What options look at in a network that takes images of 8x8."""
    parts = SimpleNamespace(input_shapes=((3, 8, 8),), batch=batch)
    return SimpleNamespace(settings=RunSettings(), parts=parts, parameters=lambda: iter(()))


def several_sizes(folder: Path) -> object:
    images = [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 8), 0)]
    return list(batches(MapStyle("my:data", images), Preprocessing(), 2))


def unreadable(folder: Path) -> object:
    Path("pictures/cat").mkdir(parents=True)
    Path("pictures/cat/1.png").write_bytes(b"")
    return open_data("pictures").image(0)


def odd_member() -> bytes:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", b"text")
        archive.writestr("labels.npy", b"text")
    return buffer.getvalue()


def damaged_file(folder: Path) -> object:
    numpy.savez("a.npz", images=BYTES, labels=LABELS)
    content = bytearray(Path("a.npz").read_bytes())
    content[300] ^= 255
    Path("a.npz").write_bytes(bytes(content))
    return open_data("a.npz")


def stored(**changed: Any) -> Callable[[Path], object]:
    settings = Preprocessing().to_dict() | changed
    return lambda folder: Preprocessing.from_dict(settings)


CASES: dict[str, Any] = {
    # what is named
    "no form": opening(
        "cifar:/x", "the data", "'cifar:/x'", "nor of a form that is known", FORMS, error=UsageError
    ),
    "a slice from nowhere": opening(
        "a.npz", "the split", "'[-:5]'", "is no name", "write train[45000:]", split="[-:5]",
        error=UsageError,
    ),
    "split": opening(
        "a.npz", "the split", "'train['", "is no name", "write train[45000:]", split="train[",
        error=UsageError,
    ),
    "step": opening(
        "a.npz", "the split", "'[::0]'", "a step of 0", "write another step, or none",
        split="[::0]", error=UsageError,
        make=lambda: numpy.savez("a.npz", images=BYTES, labels=LABELS),
    ),
    "empty": npz(
        "a.npz", "0 images", "at least 1 is needed", "name other data",
        images=BYTES[:0], labels=LABELS[:0],
    ),
    "empty slice": opening(
        "a.npz", "a.npz[5:]", "0 images", "at least 1 is needed", "name other data",
        split="[5:]", make=lambda: numpy.savez("a.npz", images=BYTES, labels=LABELS),
    ),
    "no data": option(
        "--data", "nothing is named", "this command needs images", f"give {FORMS}",
        network=network(),
    ),
    "batch size": option(
        "--batch-size", "0", "is below 1", "give a number of images", data="a.npz", batch_size=0,
        network=network(),
    ),
    "limit": option(
        "--limit", "-3", "is below 1", "give a number of images", data="a.npz", limit=-3,
        network=network(),
    ),
    "fixed batch": option(
        "--data", "2 images", "the network takes batches of 3 only", "give at least 3 images",
        data="a.npz", network=network(batch=3),
    ),
    "size": option(
        "--crop", '"8:8"', "is no size", "write a number of pixels, such as 224", crop="8:8"
    ),
    "numbers": option(
        "--mean", '"0.5;0.5"', "is no list of numbers", "with commas between them", mean="0.5;0.5"
    ),
    "device": Case(
        lambda folder: read_device("gpu7"), UsageError, "--device", "'gpu7'",
        "cannot be used here", "write cpu, or cuda",
    ),
    # CIFAR
    "cifar missing": opening(
        "cifar10:.", "cifar10:.", "data_batch_1 is missing",
        "are not all in cifar-10-batches-py", "unpack cifar-10-python.tar.gz so",
    ),
    "cifar split": opening(
        "cifar100:.", "cifar100:.", "'val'", "there is no split",
        "it has the splits train and test", split="val",
    ),
    # .npz
    "example": npz(
        "a.npz", "it holds x, y", "images is missing",
        "store it under that name", x=BYTES, y=LABELS,
    ),
    "no labels": npz(
        "a.npz", "it holds images", "labels is missing",
        "train by a teacher alone (s2d train --no-labels)", images=BYTES,
    ),
    "no archive": npz(
        "a.npz", "this is no .npz archive", "no .npz archive", "write it with numpy.savez",
        content=b"text",
    ),
    "no file": opening(
        "absent.npz", "absent.npz", "No such file", "cannot be read", "check the path"
    ),
    "no array": npz(
        "a.npz", "images", "is no array of numpy's", "write the file with numpy.savez",
        content=odd_member(),
    ),
    "pickled": npz(
        "a.npz", "an array in it is pickled", "reading that runs code", "store arrays of numbers",
        images=numpy.array([{}]), labels=LABELS,
    ),
    "damaged": Case(
        damaged_file, DataError, "a.npz", "Bad CRC-32", "the file is damaged",
        "copy or write it again",
    ),
    "as many labels": npz(
        "a.npz", "2 images and 1 labels", "each image has one", "store as many",
        images=BYTES, labels=LABELS[:1],
    ),
    "whole numbers as images": npz(
        "a.npz: images", "int64", "images are bytes (uint8)", "convert them with astype",
        images=BYTES.astype(numpy.int64), labels=LABELS,
    ),
    "shape of images": npz(
        "a.npz: images", "(2, 3)", "it must be (N, H, W, C)", "store them so",
        images=BYTES[:, 0, 0], labels=LABELS,
    ),
    "which are the channels": npz(
        "a.npz: images", "(2, 3, 8, 3)", "both its second and its last number could be",
        "store images larger than 3 pixels", images=BYTES[:, :3], labels=LABELS,
    ),
    "labels of floats": npz(
        "a.npz: labels", "float64", "labels are whole numbers", "store one class number per image",
        images=BYTES, labels=LABELS / 2,
    ),
    "negative label": npz(
        "a.npz: labels[0]", "-1", "is no class", "number the classes from 0",
        images=BYTES, labels=LABELS - 1,
    ),
    # folders
    "no folder": opening(
        "folder:absent", "absent", "it does not exist", "one folder of images for each class",
        "check the path",
    ),
    "no classes": opening(
        ".", ".", "Couldn't find any class folder", "class folder",
        "put the images of each class in a folder",
    ),
    "unreadable image": Case(
        unreadable, DataError, "pictures/cat/1.png", "UnidentifiedImageError", "cannot be read",
        "copy it again, or remove it",
    ),
    # functions
    "no function": opening(
        "absent_module:data", "absent_module:data", "No module named 'absent_module'",
        "cannot be imported", "name a function as package.module:function",
    ),
    "failing function": opening(
        "functions_of_mine:failing", "functions_of_mine:failing", "ValueError: no such part",
        "failing(split='val') raised", "correct the function, or the split", split="val",
        make=lambda: Path("functions_of_mine.py").write_text(FUNCTIONS),
    ),
    "no data set": opening(
        "functions_of_mine:number", "functions_of_mine:number", "returned a int",
        "not a data set with a length", "return one of these",
        make=lambda: Path("functions_of_mine.py").write_text(FUNCTIONS),
    ),
    "failing item": Case(
        lambda folder: MapStyle("my:data", []).item(0), DataError, "my:data: image 0",
        "IndexError", "the data set raised", "correct it",
    ),
    "no pair": item(
        3, "my:data: image 0", "returned a int", "not a pair (image, label)", "have it return one"
    ),
    "no image": Case(
        lambda folder: as_image([1, 2], "image 3"), DataError, "image 3", "is a list",
        "neither a tensor nor a Pillow image", "have the data set return one of these",
    ),
    "image of four dimensions": Case(
        lambda folder: as_image(torch.zeros(1, 3, 4, 4), "image 3"), DataError, "image 3",
        "(1, 3, 4, 4)", "an image is (C, H, W)", "return images without the batch",
    ),
    "image of whole numbers": Case(
        lambda folder: as_image(torch.zeros(3, 4, 4).long(), "image 3"), DataError, "image 3",
        "torch.int64", "images are bytes", "convert them",
    ),
    "no label": Case(
        lambda folder: as_label("cat", "image 3"), DataError, "image 3", "'cat'",
        "a label is a class number from 0", "have the data set return such numbers",
    ),
    # preprocessing
    "setting": Case(
        lambda folder: Preprocessing(std=(0.5, 0)), UsageError, "preprocessing: std", "[0.5, 0.0]",
        "not numbers above 0", "correct this setting",
    ),
    "unknown setting stored": Case(
        stored(gamma=2), FormatError, "preprocessing", "'gamma'", "is no setting",
        "the file is damaged",
    ),
    "setting stored": Case(
        stored(scale=-1), FormatError, "preprocessing", "scale is -1", "not a number above 0",
        "the file is damaged",
    ),
    "crop": fitting(
        Preprocessing(crop=(9, 9)), [(3, 9, 9)], "a.npz: image 0", "8x8 pixels", "it must fit",
        "resize the images first",
    ),
    "mean": fitting(
        Preprocessing(mean=(0.5, 0.5)), [(3, 8, 8)], "a.npz: image 0", "mean has 2 numbers",
        "images of 3 channel(s)", "give mean one number for each channel",
    ),
    "channels": Case(
        lambda folder: Preprocessing(channels="gray")(torch.zeros(2, 4, 4)), DataError,
        "the images", "2 channels", "is for images of 1 or 3", "leave that setting out",
    ),
    # what does not fit the network
    "no batch": Case(
        lambda folder: batches(data(), Preprocessing(), 0), UsageError, "the batch size", "0",
        "is below 1", "give at least 1 image",
    ),
    "several sizes": Case(
        several_sizes, DataError, "my:data: image 1", "3x9x8 after preprocessing",
        "the images before it are 3x8x8", "resize all to one size",
    ),
    "no images": fitting(
        Preprocessing(), [(17,)], "a.npz: image 0", "3x8x8", "which are no images",
        "use the network from Python",
    ),
    "shape": fitting(
        Preprocessing(), [(3, 4, 4)], "a.npz: image 0", "3x8x8 after preprocessing",
        "the network takes 3x4x4", "give --resize, or --crop 4x4",
    ),
    "two inputs": fitting(
        Preprocessing(), [(3, 8, 8), (3, 8, 8)], "a.npz", "takes 2 inputs", "one image per sample",
        "run such a network from Python",
    ),
    "classes": Case(
        lambda folder: require_classes(data(classes=["a", "b"]), torch.tensor([0]), 10), DataError,
        "a.npz", "2 classes (a, b)", "the network tells 10 apart",
        "give data of the classes that it was trained on",
    ),
    "label": Case(
        lambda folder: require_classes(data(), torch.tensor([1]), 1), DataError,
        "a.npz", "the label 1", "the network tells 1 classes apart, 0 to 0",
        "give data of the classes that it was trained on",
    ),
}  # fmt: skip
