"""One mistake, and the four things that the message about it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from s2d_compiler.errors import S2DError


@dataclass(frozen=True)
class Case:
    """A mistake. The four texts are parts of the message, ``{folder}`` being the test's folder.

    Attributes:
        trigger: Makes the mistake, given an empty folder that is the current one as well.
        error: The class of the error.
        place: Where it is.
        value: What was found there.
        rule: What it breaks.
        remedy: What to do.
    """

    trigger: Callable[[Path], object]
    error: type[S2DError]
    place: str
    value: str
    rule: str
    remedy: str

    def parts(self, folder: Path) -> dict[str, str]:
        """The four texts."""
        texts = {key: getattr(self, key) for key in ("place", "value", "rule", "remedy")}
        return {key: text.replace("{folder}", str(folder)) for key, text in texts.items()}
