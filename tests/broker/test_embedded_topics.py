"""Subscription tree, retained tree and rights of the embedded broker, against the plain definition of matching."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.embedded.access import Rule, Rules, Users, hash_password, verify_password
from broker.embedded.limits import Limits
from broker.embedded.messages import make
from broker.embedded.retained import Retained
from broker.embedded.sessions import Session
from broker.embedded.stats import Stats
from broker.embedded.store import Store
from broker.embedded.topics import Subscription, Subscriptions, covers, is_filter, is_name, split_shared
from schemas.errors import ConfigError
from schemas.topics import matches

LEVELS = st.sampled_from(["a", "b", "", "$s", "é"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = (
    st.tuples(st.lists(LEVELS | st.just("+"), max_size=4), st.booleans())
    .map(lambda parts: "/".join([*parts[0], "#"] if parts[1] or not parts[0] else parts[0]))
    .filter(bool)
)


def sessions(count: int) -> list[Session]:
    return [Session(str(i), None, Limits(), Stats(), Store()) for i in range(count)]


@given(
    st.lists(st.tuples(st.integers(0, 2), FILTERS, st.booleans()), max_size=25),
    st.lists(TOPICS, min_size=1, max_size=8),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_routes_are_what_the_definition_says(steps: list[tuple[int, str, bool]], topics: list[str]) -> None:
    found = Subscriptions()
    who = sessions(3)
    present: dict[tuple[int, str], Subscription] = {}
    for index, pattern, add in steps:
        if add:
            present[index, pattern] = subscription = Subscription(who[index], pattern, 1)
            found.add(subscription)
        elif (index, pattern) in present:
            found.remove(present.pop((index, pattern)))
        for topic in topics:
            want = {who[i] for i, p in present if matches(p, topic)}
            assert {t.session for t in found.route(topic).targets} == want
    assert found.count == len(present)
    for subscription in list(present.values()):
        found.remove(subscription)
    assert not found._exact
    assert not found._root.children


@given(st.lists(st.tuples(TOPICS, st.booleans()), max_size=30), FILTERS)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_retained_are_what_the_definition_says(steps: list[tuple[str, bool]], pattern: str) -> None:
    retained = Retained(Limits())
    want: set[str] = set()
    for topic, keep in steps:
        retained.put(make(topic, b"x" if keep else b"", 0.0, retain=True))
        (want.add if keep else want.discard)(topic)
    found = [m.topic for m in retained.matching(pattern, 0.0)]
    assert sorted(found) == sorted(t for t in want if matches(pattern, t))
    for topic in want:
        retained.put(make(topic, b"", 0.0, retain=True))
    assert (len(retained), retained.bytes, retained._below) == (0, 0, {})


@given(FILTERS, FILTERS, st.lists(TOPICS, max_size=10))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_covered_filter_matches_nothing_more(wide: str, narrow: str, topics: list[str]) -> None:
    if covers(wide, narrow):
        assert all(matches(wide, t) for t in topics if matches(narrow, t))


@pytest.mark.parametrize(
    ("wide", "narrow", "answer"),
    [
        ("a/#", "a/#", True),
        ("a/#", "a", True),
        ("a/#", "a/+/b", True),
        ("a/+", "a/#", False),
        ("a/+", "a/b", True),
        ("a/b", "a/+", False),
        ("#", "$SYS/a", False),
        ("#", "#", True),
        ("+/a", "#", False),
    ],
)
def test_covers(wide: str, narrow: str, answer: bool) -> None:
    assert covers(wide, narrow) is answer


@given(st.text(st.sampled_from("ab/+#$\0"), max_size=8))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_filters_by_their_definition(text: str) -> None:
    """4.7.1: a wildcard fills its level, # is the last."""
    parts = text.split("/")
    good = bool(text) and "\0" not in text
    for i, part in enumerate(parts):
        good = good and not (("#" in part and (part != "#" or i < len(parts) - 1)) or ("+" in part and part != "+"))
    assert is_filter(text, 100) is good
    assert is_name(text, 100) is (good and "+" not in text and "#" not in text)


def test_shared_filters() -> None:
    """[MQTT-4.8.2-1], -2"""
    assert split_shared("a/b") == (None, "a/b")
    assert split_shared("$share/g/a/+/#") == ("g", "a/+/#")
    assert split_shared("$share/g//a") == ("g", "/a")
    for bad in ("$share/g", "$share//a", "$share/g/", "$share/+/a", "$share/#/a"):
        with pytest.raises(ValueError, match=r"\$share"):
            split_shared(bad)


def test_rules() -> None:
    allow = Rules([Rule("*", ["open/#"], ["open/+"]), Rule("ann", ["own/%u/#"], ["own/%u/#", "c/%c"])])
    assert allow("x", None, "publish", "open/a/b")
    assert allow("x", None, "subscribe", "open/+")
    assert not allow("x", None, "subscribe", "open/#")
    assert allow("x", "ann", "publish", "own/ann/1")
    assert not allow("x", "bob", "publish", "own/bob/1")
    assert allow("x", "ann", "subscribe", "c/x")
    assert not allow("+", "ann", "subscribe", "c/+"), "a client id must not widen a rule"
    with pytest.raises(ConfigError, match="not a topic filter"):
        Rules([Rule("x", ["a/#/b"])])


def test_passwords(tmp_path: Path) -> None:
    hashed = hash_password("sécret")
    assert hashed != hash_password("sécret")
    assert verify_password("sécret".encode(), hashed)
    assert not verify_password(b"secret", hashed)
    # RFC 7914, section 11: the test vector of PBKDF2-HMAC-SHA-256 ("passwd", "salt", 1), first 32 bytes.
    vector = "pbkdf2-sha256$1$c2FsdA==$VawEblbjCJ/sFpHCJUS2BflBhSFt3gRl5oudV8INrLw="
    assert verify_password(b"passwd", vector)
    path = tmp_path / "users"
    path.write_text(f"# people\n\nann:{hashed}\n")
    users = Users.read(path)
    assert not users.remembered("ann", "sécret".encode())
    assert users.check("ann", "sécret".encode())
    assert users.remembered("ann", "sécret".encode())
    assert not users.check("ann", b"wrong")
    assert not users.remembered("ann", b"wrong")
    assert not users.check("bob", "sécret".encode())
    for text in ("ann", "ann:plain", ":x", "ann:scrypt$1$2$3$x", "ann:scrypt$3$8$1$YQ==$YQ=="):
        path.write_text(text)
        with pytest.raises(ConfigError):
            Users.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Users.read(tmp_path / "none")
