"""Terms: numbers that say how a number is computed.

A term is a 64-bit integer, the hash of an expression: equal expressions have equal terms, and
different ones have different terms but for a chance of about one in 2^64 per comparison. Leaves
are hashed under a secret key, so that no file can be written to collide on purpose.

A tensor of terms has the shape of the tensor that it describes; zero is the term of the constant
zero, so that operators that fill with zeros (padding, new_zeros) do to terms what they do to
numbers. Arithmetic is modulo 2^64.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from s2d_compiler.provenance import Slice

Terms = torch.Tensor

_FACTOR = 0x5851F42D4C957F2D
_STEPS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def scrambled(x: Terms) -> Terms:
    """Every term through an invertible function that looks random (splitmix64's last steps)."""
    for shift, factor in _STEPS:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mixed(first: Terms | int, *others: Terms | int) -> Terms:
    """The term of an operator, from its own number and its operands in order; broadcasts."""
    result = scrambled(torch.as_tensor(first))
    for other in others:
        result = scrambled(result * _FACTOR + other)
    return result


def chosen(held: Slice, dimension: int, size: int) -> torch.Tensor:
    """Positions that a slice takes along a dimension, of which the slice has ``size``."""
    positions = held.index[dimension]
    return torch.arange(size) if positions is None else torch.tensor(positions, dtype=torch.int64)


@dataclass(frozen=True)
class Keys:
    """The secret of one verification, and the numbers that it gives to names.

    Attributes:
        secret: The key.
    """

    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def of(self, *parts: Any) -> int:
        """A number for a name: operators, settings, sources."""
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8, key=self.secret)
        return int.from_bytes(digest.digest(), "little", signed=True)

    def constants(self, values: torch.Tensor) -> Terms:
        """Terms of numbers that are known: equal numbers have equal terms, zero has zero.
        Integers are told apart from numbers with a fraction, since they overflow."""
        if values.is_complex():
            real, imaginary = (self.constants(v) for v in (values.real, values.imag))
            return torch.where(imaginary == 0, real, mixed(self.of("complex"), real, imaginary))
        values = values.detach().to("cpu")
        if values.is_floating_point():
            bits = values.to(torch.float64).contiguous().view(torch.int64)  # -0.0 is no zero
        else:
            bits = values.to(torch.int64)
        name = self.of("constant", values.is_floating_point())
        return torch.where(bits == 0, torch.zeros_like(bits), mixed(name, bits))

    def number(self, value: bool | int | float) -> int:
        """The term of a number that stands in a graph; its type counts, as in promotions."""
        if not isinstance(value, float):
            return self.of(type(value).__name__, value)
        return int(self.constants(torch.tensor(value, dtype=torch.float64)))

    def elements(self, held: Slice, shape: Sequence[int]) -> Terms:
        """Terms of the elements of a slice of a named tensor."""
        result = torch.full((1,) * len(shape), self.of("element of", held.source))
        for d, (size, _) in enumerate(zip(shape, held.index, strict=True)):
            form = [-1 if e == d else 1 for e in range(len(shape))]
            result = mixed(result, chosen(held, d, size).reshape(form))
        return result

    def positions(self, kind: str, count: int) -> Terms:
        """Numbers of positions along a dimension."""
        return mixed(self.of("position", kind), torch.arange(count))

    def collected(self, x: Terms, dims: Collection[int]) -> Terms:
        """One term for all that lies along some dimensions, in any order; they keep size 1."""
        dims = sorted(d % x.dim() for d in dims) if x.dim() else []
        if not dims:
            return mixed(self.of("alone"), x)
        return scrambled(x + self.of("collected")).sum(dims, keepdim=True)

    def gathered(self, x: Terms, dims: Collection[int]) -> Terms:
        """One term for all that lies along some dimensions, in order; they keep size 1."""
        dims = sorted(d % x.dim() for d in dims)
        if not dims:
            return x
        for d in reversed(dims):
            form = [-1 if e == d else 1 for e in range(x.dim())]
            x = scrambled(x + self.positions("gathered", x.shape[d]).reshape(form)).sum(
                d, keepdim=True
            )
        return x

    def spread(self, x: Terms, shape: Sequence[int]) -> Terms:
        """Terms of a result that depends on all of ``x``'s size-1 dimensions' sources: as large
        as ``shape``, with a term of its own for every position along dimensions that grow."""
        for d, size in enumerate(shape):
            if x.shape[d] == 1 and size > 1:
                form = [-1 if e == d else 1 for e in range(len(shape))]
                x = mixed(x, self.positions("spread", size).reshape(form))
        return x.expand(tuple(shape))
