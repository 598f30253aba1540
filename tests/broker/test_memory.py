"""What becomes of a large block when it is freed, by who has asked for what; in a process of its own for each case."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_SEEN = """
import ctypes, sys
from broker.memory import KEPT, give_back, keep_freed

class Seen(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

look = ctypes.CDLL(None).mallinfo2
look.restype = Seen
for word in sys.argv[1:]:
    give_back() if word == "give" else keep_freed(4 << 20) if word == "frames" else keep_freed(KEPT)
before = look().hblks
block = bytearray(1 << 20)
print("own" if look().hblks > before else "heap")
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library than glibc, or an old one")
@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ("give", "own"),
        ("frames", "heap"),
        ("threads", "heap"),
        ("give frames", "own"),
        ("frames give", "own"),
        ("frames give frames", "own"),
        ("give threads", "heap"),
        ("threads give", "heap"),
        ("threads give frames", "heap"),
    ],
)
def test_a_megabyte_is_a_piece_of_its_own_where_it_is_to_go_back(asked: str, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SEEN, *asked.split()], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [where]
