"""What tables of messages have in common, whatever database they are in: keys, names of columns, revisions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256

import numpy as np

from schemas.messages import Aggregate, Column, Message
from schemas.rows import Rows, rows


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def row_key(message: Message) -> str:
    """Key of a message's rows: its id; an aggregate's without the revision (``/<revision>``, then ``@<edge>`` where the
    runtime told two inputs apart), so that all revisions share one row.
    """
    body = message.body
    if not isinstance(body, Aggregate) or not body.revision:
        return message.id
    first, found, rest = message.id.rpartition(f"/{body.revision}")
    return first + rest if found and rest[:1] in ("", "@") else message.id


def with_revisions(messages: Sequence[Message]) -> tuple[Rows, dict[str, Column], bool]:
    """The rows of messages, their columns, and whether one of these is ``revision`` because there are aggregates.

    :raises TypeError: a message that has no rows.
    """
    table = rows(messages)
    columns = dict(table.columns)
    revised = any(isinstance(m.body, Aggregate) for m in messages)
    if revised:
        bodies = [m.body for m in messages]
        revisions = np.array([b.revision if isinstance(b, Aggregate) else 0 for b in bodies], np.int64)
        columns["revision"] = revisions[table.message]
    return table, columns, revised


class Names:
    """SQL names of fields.

    SQL names ignore case and fields do not: a field whose name is taken by another gets ``_2`` at its end, one that is
    called like a column of the table's own is ``field_<name>``. The same columns give the same names after a restart.

    :param own: columns of the table's own.
    :param columns: those that are there.
    :param most: most columns.
    :param longest: bytes that a name may have; a longer one is cut, and ends with a digest of itself.
    """

    def __init__(self, own: Collection[str], columns: Iterable[str], most: int, longest: int | None = None) -> None:
        self._own = own
        self._columns = set(columns)
        self._folded = {name.lower() for name in self._columns}
        self._of_field: dict[str, str] = {}
        self._most = most
        self._longest = longest

    def get(self, field: str) -> str | None:
        """The name of a field that has a column in use."""
        return self._of_field.get(field)

    def find(self, field: str) -> tuple[str, bool]:
        """The name for a field, and whether its column must be made (then call :meth:`use`, as for one that is there).

        :raises ValueError: it cannot be a column, or there are too many.
        """
        base = name = self._fitting(f"field_{field}" if field.lower() in self._own else (field or "_"))
        number = 1
        taken = set(self._of_field.values())
        while name in taken or (name not in self._columns and name.lower() in self._folded):
            number += 1
            name = self._fitting(f"{base}_{number}")
        if name in self._columns:
            return name, False
        if len(self._columns) >= self._most:
            raise ValueError(f"field {field[:64]!r} would be column {len(self._columns) + 1} of at most {self._most}")
        if "\0" in name:
            raise ValueError(f"field {field[:64]!r} cannot be a column")
        return name, True

    def use(self, field: str, name: str) -> None:
        """The field has this column from now on."""
        self._columns.add(name)
        self._folded.add(name.lower())
        self._of_field[field] = name

    def keep(self, other: Names) -> None:
        """Take over the names in use of a table that has got more columns since."""
        for field, name in other._of_field.items():
            self.use(field, name)

    def _fitting(self, name: str) -> str:
        if self._longest is None or len(data := name.encode("utf-8", "replace")) <= self._longest:
            return name
        return f"{data[: self._longest - 9].decode('utf-8', 'ignore')}_{sha256(data).hexdigest()[:8]}"
