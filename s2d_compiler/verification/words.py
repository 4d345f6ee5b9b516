"""Words that several messages of the verification share."""

from __future__ import annotations

#: What is wrong with a file in which something cannot be, and what to do.
DAMAGED = "the file is damaged, or was not made from this model; compile the model again."
