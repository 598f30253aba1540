"""A PostgreSQL server for tests: its own cluster in a folder, a free port, a unix socket, TLS; killed and started at will."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

PASSWORD = "meter-secret"  # noqa: S105 - of a server that lives for one test run


def programs() -> Path | None:
    """Folder of ``initdb`` and ``postgres``, the newest; None where they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


class Server:
    """Runs as somebody else where we are root, which it refuses to be. Has a database ``site`` and a user ``meter``."""

    def __init__(self, programs: Path) -> None:
        self._bin = programs
        names = {entry.pw_name for entry in pwd.getpwall()}
        self._as = None if os.geteuid() else next(name for name in ("postgres", "nobody") if name in names)
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 bytes
        self.ca = self.folder / "server.crt"
        self._data = self.folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None
        self._make()
        self.start()
        self.query(f"CREATE ROLE meter LOGIN PASSWORD '{PASSWORD}'", database="postgres")
        self.query("CREATE DATABASE site OWNER meter", database="postgres")

    @property
    def url(self) -> str:
        """Without user and password."""
        return f"postgres://127.0.0.1:{self.port}/site"

    def _make(self) -> None:
        _certificate(self.ca, self.folder / "server.key")
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        for path in (*self.folder.iterdir(), self.folder):
            path.chmod(0o711 if path.is_dir() else 0o600)
            if self._as is not None:
                shutil.chown(path, self._as)
        arguments = [
            "--no-sync",
            "-A",
            "scram-sha-256",
            "-U",
            "owner",
            f"--pwfile={secret}",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        made = [str(self._bin / "initdb"), "-D", str(self._data), *arguments]
        subprocess.run(made, check=True, capture_output=True, user=self._as, cwd=self.folder)

    def start(self) -> None:
        """Start it and wait until it lets somebody in."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.folder,
            "max_connections": 12,
            "shared_buffers": "16MB",
            "fsync": "off",  # processes die in these tests, the machine does not
            "ssl": "on",
            "ssl_cert_file": self.ca,
            "ssl_key_file": self.folder / "server.key",
        }
        command = [str(self._bin / "postgres"), "-D", str(self._data)]
        command += [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        until = time.monotonic() + 20
        while True:
            # after a kill, its children take a moment to notice, and it will not begin as long as one is there
            if self.process is None or self.process.poll() is not None:
                with (self.folder / "log").open("ab") as log:
                    self.process = subprocess.Popen(command, stdout=log, stderr=log, user=self._as, cwd=self.folder)
            try:
                self.query("SELECT 1", database="postgres")
                return
            except Exception:  # noqa: BLE001 - whatever it says while it is starting
                if time.monotonic() > until:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL it; its children see that and leave without finishing anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        """End it and delete its files."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # "fast": disconnects everybody
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def query(self, sql: str, *values: Any, database: str = "site", user: str = "owner") -> list[tuple[Any, ...]]:
        """What it answers the owner, or another user."""
        return asyncio.run(self._query(sql, values, database, user))

    async def connect(self, database: str = "site", user: str = "owner") -> Any:
        """A connection of one's own."""
        import asyncpg  # type: ignore[import-untyped] # has no py.typed

        return await asyncpg.connect(
            host="127.0.0.1", port=self.port, user=user, password=PASSWORD, database=database, timeout=5
        )

    async def _query(self, sql: str, values: Any, database: str, user: str) -> list[tuple[Any, ...]]:
        connection = await self.connect(database, user)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *values)]
        finally:
            await connection.close()


def _certificate(certificate: Path, key: Path) -> None:
    """A certificate for 127.0.0.1 that is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
