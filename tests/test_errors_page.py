"""docs/errors.md and the docstrings that it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.errors_page import PAGE, example_of, page
from s2d_compiler import errors
from tests.test_errors import CASES, outcome

README = Path(__file__).parent.parent / "README.md"
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.S2DError)
]


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.errors_page"
    assert "docs/errors.md" in README.read_text()


# The base is never raised.
@pytest.mark.parametrize("kind", [k for k in CLASSES if k is not errors.S2DError])
def test_every_class_shows_a_message_that_it_has_and_what_to_do(kind: type) -> None:
    """The example is what one of the cases says, its folders aside."""
    example = example_of(kind)
    assert example is not None
    assert "What to do:" in (kind.__doc__ or "")
    said = set()
    for name, case in CASES.items():
        if case.error is kind:
            _, error, _, _ = outcome(name)
            said.add(str(error).replace(f"{Path(__file__).parent}/formats/dyn-v1-original", "dyn"))
    assert example in said
