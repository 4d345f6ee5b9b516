"""Letters of einsums: which dimensions of a contraction are one."""

from __future__ import annotations

from collections.abc import Sequence

from s2d_compiler.verification.terms import Terms


def pairing(subscripts: Sequence[Sequence[str]], result: Sequence[str]) -> list[list[int]]:
    """Which dimensions are summed together: per operand the number of each letter that is not in
    the result, counted from the first one."""
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(n, len(numbers)) for n in names if n not in result]
            for names in subscripts]  # fmt: skip


def diagonals(
    terms: Terms, names: Sequence[str], result: Sequence[str]
) -> tuple[Terms, Sequence[str]]:
    """An operand without letters that stand twice in it and once in the result."""
    names = list(names)
    for name in result:
        while names.count(name) > 1:
            first = names.index(name)
            second = names.index(name, first + 1)
            terms = terms.diagonal(0, first, second)
            names = [n for d, n in enumerate(names) if d not in (first, second)] + [name]
    return terms, names


def matmul_subscripts(a: int, b: int) -> tuple[list[list[str]], list[str]]:
    """The einsum that a matrix product of two ranks is."""
    outer = [f"batch{k}" for k in range(max(a, b, 2) - 2)]

    def batch(rank: int) -> list[str]:
        return outer[len(outer) - max(0, rank - 2) :]

    left = [*batch(a), *(["i"] if a > 1 else []), "k"]
    right = [*batch(b), "k", *(["j"] if b > 1 else [])]
    return [left, right], [*outer, *(["i"] if a > 1 else []), *(["j"] if b > 1 else [])]


def equation(text: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The letters of an einsum's operands and of its result."""
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)
         if "..." in t), default=0,
    )  # fmt: skip

    def letters(spelled: str, rank: int | None) -> list[str]:
        before, dots, after = spelled.partition("...")
        own = (hidden if rank is None else rank - len(before) - len(after)) if dots else 0
        return [*before, *(f"...{k}" for k in range(hidden - own, hidden)), *after]

    if not arrow:
        once = sorted({c for c in left if c.isalpha() and left.count(c) == 1})
        right = ("..." if "..." in left else "") + "".join(once)
    return [letters(t, r) for t, r in zip(terms, ranks, strict=True)], letters(right, None)
