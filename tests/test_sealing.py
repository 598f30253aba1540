"""Updates signed by their device and sealed to the coordinator."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.privacy import keys
from nodes.privacy.keys import Pair, SealError, Signer, derive, lock, unlock, verify
from nodes.privacy.sealing import Opener, seal_for
from schemas.errors import MissingError

pytest.importorskip("cryptography", reason="cryptography is not installed: nothing is signed or sealed")
ABOUT = b"digits/7/gateway-1"


def test_only_its_receiver_opens_a_box_and_knows_who_sent_it() -> None:
    device, coordinator = Signer(), Opener()
    update = bytes(range(256)) * 40
    box = seal_for(coordinator.public, update, ABOUT, device)
    assert coordinator.open(box, ABOUT, device.public) == update
    assert len(box) == len(update) + 124
    assert update[:16] not in box
    assert device.public not in box  # who sent it, only the topic tells
    assert box != seal_for(coordinator.public, update, ABOUT, device)
    again = Opener(coordinator.secret)
    assert again.public == coordinator.public
    assert again.open(box, ABOUT, device.public) == update


def test_everything_else_is_refused() -> None:
    device, other, coordinator = Signer(), Signer(), Opener()
    box = seal_for(coordinator.public, b"update", ABOUT, device)
    for opener, about, sender in (
        (Opener(), ABOUT, device.public),
        (coordinator, b"digits/8/gateway-1", device.public),
        (coordinator, ABOUT, other.public),
        (coordinator, ABOUT, b"no key"),
    ):
        with pytest.raises(SealError):
            opener.open(box, about, sender)
    with pytest.raises(SealError):
        seal_for(b"no key", b"update", ABOUT, device)
    with pytest.raises(SealError):
        seal_for(bytes(32), b"update", ABOUT, device)  # a point of low order: the secret would be known to all


def test_a_box_cannot_be_sent_on_in_the_same_name() -> None:
    """A coordinator that opened a box cannot make of it one for another coordinator: the signature says for whom it is."""
    device, first, second = Signer(), Opener(), Opener()
    box = seal_for(first.public, b"update", ABOUT, device)
    stolen = first._pair.agree(box[:32], b"penstock|sealed|" + box[:32] + first.public)
    inside = unlock(stolen, box[32:], ABOUT)
    once = Pair(bytes(16), b"penstock|sealed")
    key = once.agree(second.public, b"penstock|sealed|" + once.public + second.public)
    with pytest.raises(SealError, match="signature"):
        second.open(once.public + lock(key, inside, ABOUT), ABOUT, device.public)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_no_changed_box_opens(data: st.DataObject) -> None:
    device, coordinator = _KNOWN
    box = bytearray(seal_for(coordinator.public, b"some update", ABOUT, device))
    if data.draw(st.booleans(), label="cut"):
        changed = bytes(box[: data.draw(st.integers(0, len(box) - 1))])
    else:
        at = data.draw(st.integers(0, len(box) - 1))
        box[at] ^= data.draw(st.integers(1, 255))
        changed = bytes(box)
    with pytest.raises(SealError):
        coordinator.open(changed, ABOUT, device.public)


def test_a_signature_is_for_one_thing() -> None:
    device = Signer()
    signature = device.sign("update", b"data")
    verify(device.public, "update", b"data", signature)
    for purpose, what, by in (
        ("model", b"data", signature),
        ("update", b"date", signature),
        ("update", b"data", bytes(64)),
        ("update", b"data", b""),
    ):
        with pytest.raises(SealError, match=f"signature of the {purpose}"):
            verify(device.public, purpose, what, by)
    again = Signer(device.private())
    assert again.public == device.public
    assert again.sign("update", b"data") == signature


def test_locks_and_derived_keys() -> None:
    key = derive(b"secret", b"one")
    assert key != derive(b"secret", b"two")
    # RFC 5869, test case 3: no salt, no info
    wanted = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert derive(b"\x0b" * 22, b"", 42).hex() == wanted
    locked = lock(key, b"plain", b"about")
    assert unlock(key, locked, b"about") == b"plain"
    for wrong in (locked[:-1], locked[:5], b"", locked + b"x"):
        with pytest.raises(SealError):
            unlock(key, wrong, b"about")
    with pytest.raises(SealError):
        unlock(key, locked, b"else")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    keys._library.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingError, match=r"penstock\[federated\]"):
        Signer()
    monkeypatch.undo()
    keys._library.cache_clear()
    Signer()


_KNOWN = (Signer(), Opener())
