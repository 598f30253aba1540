"""Keys as files and text: how a device's private key is kept, and how public ones are written where people see them.

A private key is a file of one line, ``ed25519-private:…``, that only its owner may read. A public key is the text ``ed25519:…``:
in a file, in a table of many, or in the topology itself. Nothing here needs the library that computes with them.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from schemas import topics
from schemas.errors import ConfigError

PUBLIC, PRIVATE = "ed25519:", "ed25519-private:"
_KEY = 32
_LARGEST = 4 << 20
"""Bytes of a file that may be a table of keys; a hundred thousand clients have 6 MB, and a folder."""


def text_of(public: bytes) -> str:
    """A public key as people see it."""
    return PUBLIC + base64.urlsafe_b64encode(public).decode().rstrip("=")


def public_of(text: str) -> bytes:
    """32 bytes of a public key's text.

    :raises ConfigError: it is none; of what else it may be nothing is repeated, should it be a secret.
    """
    return _bytes(text.strip(), PUBLIC, "public")


def private_of(text: str) -> bytes:
    """32 bytes of a private key's text.

    :raises ConfigError: it is none.
    """
    return _bytes(text.strip(), PRIVATE, "private")


def _bytes(text: str, prefix: str, kind: str) -> bytes:
    other = {PUBLIC: "private", PRIVATE: "public"}[prefix]
    if not text.startswith(prefix):
        if text.startswith((PUBLIC, PRIVATE)):
            raise ConfigError(f"a {other} key, where a {kind} one is wanted")
        raise ConfigError(f"not a {kind} key: expected {prefix}… as 'penstock fl key' writes it")
    rest = text.removeprefix(prefix)
    try:
        key = base64.b64decode(rest + "=" * (-len(rest) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != _KEY:
        raise ConfigError(f"not a {kind} key: what follows {prefix} is not 32 bytes in base64")
    return key


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"no such file: {path}" if not path.exists() else f"not a file: {path}")
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path} is larger than any file of keys")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read {path}: {why}") from None


def read_private(path: Path) -> bytes:
    """The private key in a file.

    :raises ConfigError: it is not there, others than its owner may read it, or it is none.
    """
    text = _read(path)
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise ConfigError(f"{path} is a private key that others may read (mode {mode:04o}): chmod 600 {path}")
    try:
        return private_of(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_public(path: Path) -> bytes:
    """The public key in a file.

    :raises ConfigError: it is not there, or is none.
    """
    try:
        return public_of(_read(path))
    except ConfigError as error:
        raise error if str(path) in str(error) else ConfigError(f"{path}: {error}") from None


def write_private(path: Path, private: bytes) -> None:
    """Make the file; it is whole on the disk, or not there.

    :raises ConfigError: there is something of that name already, or it cannot be written.
    """
    text = PRIVATE + base64.urlsafe_b64encode(private).decode().rstrip("=") + "\n"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; a key is never overwritten") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    try:
        with open(handle, "w", encoding="ascii") as file:
            os.fchmod(handle, 0o600)  # whatever the umask
            file.write(text)
            file.flush()
            os.fsync(handle)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read_devices(path: Path) -> dict[str, bytes]:
    """Client's name → its public key: a folder of files ``NAME.pub``, or a file with a line ``NAME: KEY`` for each.

    :raises ConfigError: there are none, a name may not be a client's, a key is none, or two clients have the same.
    """
    if path.is_dir():
        found = [(file.stem, read_public(file)) for file in sorted(path.glob("*.pub"))]
        if not found:
            raise ConfigError(f"{path} has no file NAME.pub")
        return _devices(found, str(path))
    table: list[tuple[str, bytes]] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        name, colon, key = text.partition(":")
        if not colon:
            raise ConfigError(f"{path}:{number}: expected NAME: {PUBLIC}…")
        try:
            table.append((name.strip(), public_of(key)))
        except ConfigError as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
    if not table:
        raise ConfigError(f"{path} has no line NAME: {PUBLIC}…")
    return _devices(table, str(path))


def named(devices: Mapping[str, str]) -> dict[str, bytes]:
    """The same of a map of texts.

    :raises ConfigError: as :func:`read_devices`.
    """
    out = []
    for name, text in devices.items():
        try:
            out.append((name, public_of(text)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return _devices(out, "")


def _devices(found: list[tuple[str, bytes]], where: str) -> dict[str, bytes]:
    at = f"{where}: " if where else ""
    devices: dict[str, bytes] = {}
    owners: dict[bytes, str] = {}
    for name, key in found:
        if not topics.is_level(name):
            raise ConfigError(f"{at}{name[:64]!r} cannot be a client's name: expected a-z, 0-9, _ and -")
        if name in devices:
            raise ConfigError(f"{at}{name!r} is there twice")
        if (other := owners.setdefault(key, name)) != name:
            raise ConfigError(f"{at}{other!r} and {name!r} have the same key: either could speak for the other")
        devices[name] = key
    return devices
