"""The version of the package."""

__version__ = "0.1.0"

#: What a ``dyn.pt`` says that it is.
FILE_FORMAT = "s2d-compiler dynamic network"
