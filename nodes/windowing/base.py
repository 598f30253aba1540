"""What the kinds of window have in common. An operator adds rows, then asks which windows are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nodes.statistics.state import Slots, Times
from nodes.windowing.groups import Groups
from nodes.windowing.keys import Kids

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOOR = -(2**62)
"""The watermark before anything is known."""
HORIZON = 2**62
"""After every time that rows may have."""
FOREVER = 2**63 - 1
"""After the end of every window."""

Window: TypeAlias = tuple[int, int]
"""A window of a key: (number that names it, key number)."""


@dataclass(slots=True)
class Due:
    """Groups to answer, g of them.

    :param number: what names the window among those of its key: its start, or for count windows its number.
    :param temporary: slots were opened for this answer only.
    """

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    number: NDArray[np.int64]
    kid: Kids
    slots: Slots
    temporary: bool = False


@dataclass(slots=True)
class Added:
    """What became of rows.

    :param slots: slot of each row, -1 where it was not taken.
    :param late: rows too late for every window of theirs; None: none.
    :param again: windows answered before that these rows have changed.
    """

    slots: Slots
    late: NDArray[np.bool_] | None = None
    again: set[Window] | frozenset[Window] = frozenset()


def bounds(times: Times) -> tuple[int, int]:
    """The least and the greatest of at least one time. Of a single one in a tenth of what the two reductions cost."""
    if len(times) == 1:
        only = int(times[0])
        return only, only
    return int(times.min()), int(times.max())


def nothing() -> Due:
    """No group."""
    empty = np.zeros(0, np.int64)
    return Due(empty, empty, empty, empty, empty)


class Windows(ABC):
    """Which open group each row belongs to, and when groups are due. Times are ns, ends exclusive.

    :ivar answered: windows answered and still kept: window → (rows at its first answer, rows at its last).
    """

    spans = False
    """Groups need their first and last event time."""

    in_order = False
    """:meth:`due` gives windows in the order to answer them; otherwise that is by end and key."""

    def __init__(self, groups: Groups, lateness: int) -> None:
        self.groups = groups
        self.keys = groups.keys
        self.lateness = lateness
        self.mark = FLOOR
        self.answered: dict[Window, tuple[int, int]] = {}

    def split(self, kid: Kids, time: Times, marks: Times) -> int:
        """Rows that may be added in one call: up to the first that the watermarks of those before it make late.

        :param marks: watermark as row i comes; ``marks[0]`` is the present one.
        """
        return len(time)

    @abstractmethod
    def add(self, kid: Kids, time: Times) -> Added:
        """Find or open the groups of rows, in the order they came. The caller updates the groups."""

    @abstractmethod
    def due(self, mark: int) -> Due:
        """Windows that end as the watermark comes to ``mark``."""

    def finish(self) -> Due:
        """All windows that have not ended; :meth:`purge` then forgets everything."""
        return self.due(FOREVER)

    @abstractmethod
    def unended(self, horizon: int) -> Due:
        """Windows that the watermark has not ended and that end by ``horizon``."""

    @abstractmethod
    def find(self, windows: Iterable[Window]) -> Due:
        """These windows as they are now."""

    @abstractmethod
    def purge(self) -> None:
        """Forget what no row can change any more."""

    @abstractmethod
    def next_end(self, after: int) -> int | None:
        """The least end beyond ``after`` of a window that the watermark has not ended."""

    def _open(self, kids: Kids) -> Slots:
        """Slots for these different keys; -1 where there is no more room."""
        room = self.groups.room()
        if room >= len(kids):
            return self.groups.open(kids)
        return np.concatenate([self.groups.open(kids[:room]), np.full(len(kids) - room, -1)])

    @abstractmethod
    def live(self) -> Slots:
        """All slots in use, in a fixed order."""

    @abstractmethod
    def snapshot(self) -> Any:
        """State as plain msgpack types. Slots are those of :meth:`live`, numbered from 0."""

    @abstractmethod
    def restore(self, state: Any, renumber: NDArray[np.int64]) -> None:
        """Continue; ``renumber`` maps key numbers of the snapshot to present ones."""
