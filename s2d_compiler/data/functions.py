"""Data sets that a function of the user's returns."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.architecture import importing_from_here
from s2d_compiler.data.sources import Data, as_image, as_label
from s2d_compiler.errors import DataError, first_line
from s2d_compiler.memory import let_through

__all__ = ["MapStyle", "open_function"]


class MapStyle(Data):
    """A map-style data set of torch: ``dataset[index]`` is ``(image, label)``.

    Args:
        name: Where it comes from.
        dataset: The data set. It is asked by one thread at a time.
        classes: Names of the classes.
    """

    def __init__(self, name: str, dataset: Any, classes: list[str] | None = None) -> None:
        super().__init__(name, classes)
        self.dataset = dataset
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Tensor:
        """All labels; the first time, every image is read for them."""
        if self._labels is None:
            self._labels = torch.tensor([self.item(index)[1] for index in range(len(self))])
        return self._labels

    def image(self, index: int) -> Tensor:
        return self.item(index)[0]

    def label(self, index: int) -> int:
        return self.item(index)[1]

    def item(self, index: int) -> tuple[Tensor, int]:
        place = self.place(index)
        try:
            found = self.dataset[index]
        except Exception as error:
            let_through(error)
            raise DataError(
                f"{place}: the data set raised {type(error).__name__}: {first_line(error)[:160]}; "
                "correct it"
            ) from error
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise DataError(
                f"{place}: the data set returned a {type(found).__name__}, and not a pair (image, "
                "label); have it return one"
            )
        return as_image(found[0], place), as_label(found[1], place)


def open_function(name: str, split: str | None) -> MapStyle:
    """Import a function and call it; it returns a map-style data set.

    Args:
        name: ``package.module:function``; modules of the current directory are found too.
        split: Handed over as ``split=...`` if there is one.

    Raises:
        DataError: It cannot be imported or called, or returns something else.
    """
    module, _, function = name.partition(":")
    arguments = {} if split is None else {"split": split}
    with importing_from_here():
        try:
            found: Any = importlib.import_module(module)
            for part in function.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{name}: it cannot be imported ({type(error).__name__}: "
                f"{first_line(error)[:160]}); name a function as package.module:function, and run "
                "this from the folder that holds it, or install it"
            ) from error
        try:
            dataset = found(**arguments)
        except (Exception, SystemExit) as error:
            let_through(error)
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise DataError(
                f"{name}: {function}({given}) raised {type(error).__name__}: "
                f"{first_line(error)[:160]}; correct the function, or the split that it is given"
            ) from error
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name}: it returned a {type(dataset).__name__}, and not a data set with a length and "
            "items by index (torch.utils.data.Dataset); return one of these"
        )
    return MapStyle(name if split is None else f"{name} {split}", dataset, _class_names(dataset))


def _class_names(dataset: Any) -> list[str] | None:
    names = inspect.getattr_static(dataset, "classes", None)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None
