"""Shamir's secret sharing (1979): a secret in n shares, any t of which give it back, and fewer say nothing about it.

Over the integers modulo 2¹³⁰ - 5, a prime. (A field of 2¹²⁸ elements, as pycryptodome's ``SecretSharing`` has, needs no prime,
but costs many times as much in Python, where whole numbers of any length are built in; a coordinator of a thousand clients puts
thousands of secrets together.) What is computed here with secrets takes a time that depends on them a little; who can measure it
sits in the device that knows them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

from nodes.privacy.keys import SEED

PRIME = 2**130 - 5
SIZE = 17
"""Bytes of a share."""


def split(secret: bytes, needed: int, count: int) -> list[bytes]:
    """Shares 1 to ``count`` of a secret of 16 bytes, :data:`SIZE` bytes each.

    :param needed: how many of them give it back; 1 ≤ needed ≤ count.
    """
    if len(secret) != SEED or not 1 <= needed <= count:
        raise ValueError(f"{len(secret)} bytes in {count} shares, {needed} of them needed")
    line = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(needed - 1))][::-1]
    out = []
    for x in range(1, count + 1):
        y = 0
        for factor in line:
            y = (y * x + factor) % PRIME
        out.append(y.to_bytes(SIZE, "little"))
    return out


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly as many shares as are needed, by their numbers.

    Wrong or changed shares give another secret, or none; there is a commitment or a public key to compare it with.

    :raises ValueError: what they give is no secret of 16 bytes.
    """
    numbers = tuple(sorted(shares))
    total = 0
    for number, factor in zip(numbers, _factors(numbers), strict=True):
        total = (total + int.from_bytes(shares[number], "little") * factor) % PRIME
    if total >> (8 * SEED):
        raise ValueError("these shares do not fit together")
    return total.to_bytes(SEED, "little")


@lru_cache(4096)
def _factors(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's polynomials at 0: what each share is multiplied by."""
    out = []
    for mine in numbers:
        above = below = 1
        for other in numbers:
            if other != mine:
                above = above * other % PRIME
                below = below * (other - mine) % PRIME
        out.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(out)
