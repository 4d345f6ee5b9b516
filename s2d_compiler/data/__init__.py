"""Labelled images for calibration, evaluation and benchmarks.

- ``opening``: ``open_data``: from ``cifar10:/path`` and its like to data.
- ``sources``: what data are: images, labels, names of classes; parts of them.
- ``arrays``, ``folders``, ``functions``: CIFAR and ``.npz`` files, folders of images, and data
  sets that a function of yours returns.
- ``preprocessing``: from an image to what a network takes; stored with the network.
- ``loading``: batches, and whether data fit a network.
"""

from s2d_compiler.data.loading import batches, require_fit
from s2d_compiler.data.opening import open_data
from s2d_compiler.data.preprocessing import Preprocessing
from s2d_compiler.data.sources import Data

__all__ = ["Data", "Preprocessing", "batches", "open_data", "require_fit"]
