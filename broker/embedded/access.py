"""Who may come in, and who may publish and subscribe to what."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from broker.embedded.topics import covers, is_filter
from schemas.errors import ConfigError, Problem

Action: TypeAlias = Literal["publish", "subscribe"]

Authorize: TypeAlias = Callable[[str, str | None, Action, str], bool]
"""``authorize(client_id, user, action, topic)``; for ``subscribe`` the topic is the filter asked for, without its
``$share/<group>/``. Called in the broker's loop, once per connection and topic or filter: it must answer at once."""

_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 14, 8, 1
_MAX_CACHED = 4096


def hash_password(password: str) -> str:
    """``scrypt$<n>$<r>$<p>$<salt>$<hash>`` of a password, with a fresh salt (RFC 7914; about 50 ms)."""
    salt = os.urandom(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, dklen=32)
    encoded = (base64.b64encode(part).decode() for part in (salt, digest))
    return "$".join(("scrypt", str(_SCRYPT_N), str(_SCRYPT_R), str(_SCRYPT_P), *encoded))


def verify_password(password: bytes, hashed: str) -> bool:
    """Whether ``password`` belongs to ``hashed`` (the form of :func:`hash_password`, or
    ``pbkdf2-sha256$<iterations>$<salt>$<hash>``). Takes as long as the hash is meant to take.

    :raises ValueError: ``hashed`` has neither form.
    """
    kind, *rest = hashed.split("$")
    salt, wanted = (base64.b64decode(part, validate=True) for part in rest[-2:])
    if not wanted:
        raise ValueError("an empty hash")
    if kind == "scrypt" and len(rest) == 5:
        n, r, p = map(int, rest[:3])
        digest = hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=len(wanted), maxmem=256 * n * r + 1_048_576)
    elif kind == "pbkdf2-sha256" and len(rest) == 3:
        digest = hashlib.pbkdf2_hmac("sha256", password, salt, int(rest[0]), len(wanted))
    else:
        raise ValueError(f"unknown form of password hash: {kind}")
    return hmac.compare_digest(digest, wanted)


class Users:
    """User names and password hashes.

    :param hashes: name -> hash of :func:`hash_password`.
    :raises ConfigError: a hash has an unknown form.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        for name, hashed in hashes.items():
            try:
                verify_password(b"", hashed)
            except (ValueError, OverflowError) as error:
                raise ConfigError(Problem((name,), f"not a password hash: {error}")) from None
        self._hashes = dict(hashes)
        self._known: dict[bytes, bool] = {}
        self._key = os.urandom(16)
        self._nobody = hash_password("nobody")

    @classmethod
    def of(cls, passwords: Mapping[str, str]) -> Users:
        """From passwords in clear, hashed now."""
        return cls({name: hash_password(password) for name, password in passwords.items()})

    @classmethod
    def read(cls, path: Path) -> Users:
        """From a file of lines ``name:hash``; empty lines and ``#`` comments are left out.

        :raises ConfigError: the file cannot be read, or a line is not of that form.
        """
        hashes: dict[str, str] = {}
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem((str(path),), f"the password file cannot be read: {error}")) from None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, colon, hashed = line.partition(":")
            if not colon or not name:
                raise ConfigError(Problem((str(path), number), f"line {number}: expected name:hash"))
            hashes[name] = hashed.strip()
        return cls(hashes)

    def remembered(self, name: str, password: bytes) -> bool:
        """Whether this name and password were found right before; costs nothing, so that reconnects are quick."""
        return self._fingerprint(name, password) in self._known

    def check(self, name: str, password: bytes) -> bool:
        """Whether the password is the name's. Takes some 50 ms (a thread's work), for an unknown name too."""
        hashed = self._hashes.get(name)
        good = verify_password(password, self._nobody if hashed is None else hashed) and hashed is not None
        if good and len(self._known) < _MAX_CACHED:
            self._known[self._fingerprint(name, password)] = True
        return good

    def _fingerprint(self, name: str, password: bytes) -> bytes:
        return hashlib.blake2b(name.encode() + b"\0" + password, key=self._key, digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class Rule:
    """What a user may do.

    :param user: user name; ``"*"`` for everybody, those without a name too.
    :param publish: topic filters; ``%u`` in them is the user name, ``%c`` the client id.
    :param subscribe: topic filters; a wider SUBSCRIBE than one of them is refused.
    """

    user: str
    publish: Sequence[str] = ()
    subscribe: Sequence[str] = ()


class Rules:
    """An :data:`Authorize` from rules. What no rule allows is denied.

    :raises ConfigError: a rule has something that is not a topic filter.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        problems = [
            Problem((index, action), f"{pattern!r} is not a topic filter")
            for index, rule in enumerate(rules)
            for action, patterns in (("publish", rule.publish), ("subscribe", rule.subscribe))
            for pattern in patterns
            if not is_filter(pattern, 65_536)
        ]
        if problems:
            raise ConfigError(*problems)
        self._rules = tuple(rules)

    def __call__(self, client_id: str, user: str | None, action: Action, topic: str) -> bool:
        for rule in self._rules:
            if rule.user not in {"*", user}:
                continue
            for pattern in rule.publish if action == "publish" else rule.subscribe:
                if (own := _fill(pattern, client_id, user)) is not None and covers(own, topic):
                    return True
        return False


def _fill(pattern: str, client_id: str, user: str | None) -> str | None:
    """``pattern`` with the client's names in it; None where a name would widen it or is not there."""
    if "%" not in pattern:
        return pattern
    for mark, name in (("%u", user), ("%c", client_id)):
        if mark in pattern:
            if not name or any(c in name for c in "+#/"):
                return None
            pattern = pattern.replace(mark, name)
    return pattern
