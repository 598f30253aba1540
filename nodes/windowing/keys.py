"""Keys of groups as small numbers, so that arrays can be indexed by them; and how keys are read from rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from schemas.messages import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kids: TypeAlias = "NDArray[np.int64]"
"""Key numbers."""


class Keys:
    """Key text ↔ number. Numbers of keys that nothing refers to any more are used again (:meth:`collect`)."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self.texts: list[str] = []
        self._free: list[int] = []
        self.refs = np.zeros(64, np.int64)
        self._last: tuple[list[str], Kids] = ([], np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Numbers are below this."""
        return len(self.texts)

    def lookup(self, texts: list[str]) -> Kids:
        """The number of each text; new texts get one."""
        last, known = self._last
        if texts == last:
            return known
        try:
            made = np.fromiter(map(self._ids.__getitem__, texts), np.int64, len(texts))
        except KeyError:
            for text in dict.fromkeys(texts):
                if text not in self._ids:
                    self._add(text)
            made = np.fromiter(map(self._ids.__getitem__, texts), np.int64, len(texts))
        self._last = (texts, made)
        return made

    def _add(self, text: str) -> None:
        if self._free:
            number = self._free.pop()
            self.texts[number] = text
        else:
            number = len(self.texts)
            self.texts.append(text)
            if number >= len(self.refs):
                self.refs = np.concatenate([self.refs, np.zeros(len(self.refs), np.int64)])
        self._ids[text] = number

    def hold(self, kids: Kids) -> None:
        """One more thing refers to each of these."""
        np.add.at(self.refs, kids, 1)

    def release(self, kids: Kids) -> None:
        """One thing less refers to each of these."""
        np.subtract.at(self.refs, kids, 1)

    def collect(self) -> None:
        """Forget keys without references, when there are many. Not while numbers from :meth:`lookup` are still in use."""
        if len(self._ids) < 4096:
            return
        held = self.refs[: len(self.texts)] > 0
        if len(self._ids) < 2 * int(held.sum()):
            return
        taken = set(self._free)
        for number in np.flatnonzero(~held).tolist():
            if number not in taken:
                del self._ids[self.texts[number]]
                self._free.append(number)
        self._last = ([], np.zeros(0, np.int64))


def texts_of(column: Column, n: int) -> list[str]:
    """Values of a column as keys: whole numbers without a point, truth values as true and false, missing as ''."""
    if isinstance(column, list):
        return ["" if v is None else v for v in column]
    if len(column) != n:
        raise ValueError(f"a column to group by has {len(column)} of {n} rows")
    if column.dtype == np.bool_:
        return ["true" if v else "false" for v in column.tolist()]
    unique, where = np.unique(column, return_inverse=True)
    names = [_name(v) for v in unique.tolist()]
    return [names[i] for i in where.tolist()]


def _name(value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return ""
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
    return str(value)


def join(parts: Sequence[list[str]]) -> list[str]:
    """Keys of several parts: joined by ``/``; a ``/`` or ``%`` within a part is written ``%2F``, ``%25``."""
    if len(parts) == 1:
        return parts[0]
    return ["/".join(p.replace("%", "%25").replace("/", "%2F") for p in row) for row in zip(*parts, strict=True)]
