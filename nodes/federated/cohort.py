"""Who is asked, in few bytes: a call goes to every client in every round, and the names of a thousand are most of it.

Up to :data:`NAMED` clients are named. More are a set of hashes, as short as may be so that nobody whom the coordinator knows is
in it by chance: a salt is looked for with which that is so. A client that the coordinator has not heard of yet may take itself
for asked, one in 64 at most; its update is then refused (``not-asked``), and harms nothing.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

import msgspec

NAMED = 32
"""Clients that are named."""
_SALTS = 8
"""Salts that are tried before the hashes are made longer by a byte."""
_LONGEST = 8


class Crowd(msgspec.Struct, frozen=True, gc=False):
    """Many clients.

    :param salt: goes before a name when it is hashed.
    :param width: bytes of a hash: the first of BLAKE2b of ``<salt>:<name>``.
    :param data: the hashes, in ascending order, one after the other.
    """

    salt: int
    width: int
    data: bytes

    def __len__(self) -> int:
        return len(self.data) // self.width if self.width > 0 else 0

    def __contains__(self, name: str) -> bool:
        if not (0 < self.width <= _LONGEST and len(self.data) % self.width == 0):
            return False
        return self._at(_hash(self.salt, self.width, name))

    def _at(self, wanted: bytes) -> bool:
        data, width = self.data, self.width
        at = bisect_left(range(len(self)), wanted, key=lambda i: data[i * width : (i + 1) * width])
        return data[at * width : (at + 1) * width] == wanted


def crowd(asked: Sequence[str], known: Collection[str]) -> Crowd:
    """The set of ``asked``.

    :param known: all clients that the coordinator has heard of.
    """
    inside = set(asked)
    others = [name for name in known if name not in inside]
    width = next(width for width in range(1, _LONGEST + 1) if 64 * len(inside) <= 256**width)
    while True:
        for salt in range(_SALTS):
            hashes = {_hash(salt, width, name) for name in inside}
            if width == _LONGEST or not _meets(hashes, salt, width, others):
                return Crowd(salt, width, b"".join(sorted(hashes)))
        width += 1


def _meets(hashes: set[bytes], salt: int, width: int, others: Iterable[str]) -> bool:
    return any(_hash(salt, width, name) in hashes for name in others)


def _hash(salt: int, width: int, name: str) -> bytes:
    return hashlib.blake2b(f"{salt}:{name}".encode(), digest_size=_LONGEST).digest()[:width]
