"""The run secret: one key and its self-signed certificate, held by every node of a run and by nobody else.

Both sides of every connection show this certificate and accept this one only, so holding the file is what makes a
process a member. There is no authority, no name check and no second certificate: who has the file may join, stop and
read the run, who has not may do nothing.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ftrain.errors import UsageError

VALIDITY = dt.timedelta(days=3653)
CLOCK_SKEW = dt.timedelta(days=1)  # a node whose clock is behind must still accept a fresh secret
FILE_BYTES_MAX = 64 << 10
SECRET_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Secret:
    """A run's secret in memory. `pem` is the key itself: it is kept out of `repr` and must be kept out of logs."""

    pem: bytes = field(repr=False)
    certificate: bytes = field(repr=False)  # DER
    fingerprint: str  # the first 12 hex digits of the certificate's SHA-256, for logs

    @classmethod
    def create(cls, path: Path | None = None) -> Secret:
        """Make a new secret, and with `path` a file of it that only its owner can read.

        The file appears complete and durable or not at all. Raises UsageError where something of that name exists or
        the directory cannot be written.
        """
        pem = _generate()
        if path is not None:
            _write_exclusive(path, pem)
        return cls.from_pem(pem, "the new secret")

    @classmethod
    def load(cls, path: Path) -> Secret:
        """Read a secret that `create` wrote. Raises UsageError when it is missing, exposed, torn or expired."""
        return cls.from_pem(_read_private(path), str(path))

    @classmethod
    def from_pem(cls, pem: bytes, where: str) -> Secret:
        """Parse a secret. `where` names its source in the UsageError that anything else than a valid one raises."""
        certificate = _parse(pem, where)
        now = dt.datetime.now(dt.UTC)
        if now > certificate.not_valid_after_utc:
            raise UsageError(
                f"The secret {where} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: "
                "make a new one with `ftrain secret` and give it to every node."
            )
        if now < certificate.not_valid_before_utc:
            raise UsageError(
                f"The secret {where} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} on, which this "
                "machine's clock has not reached: set the clock."
            )
        der = certificate.public_bytes(serialization.Encoding.DER)
        return cls(pem, der, certificate.fingerprint(hashes.SHA256()).hex()[:12])

    def server_context(self) -> ssl.SSLContext:
        """A TLS 1.3 context that accepts holders of this secret only."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes a session: every connection proves the secret anew
        return context

    def client_context(self) -> ssl.SSLContext:
        """A TLS 1.3 context that shows this secret, and talks to holders of it only."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the certificate itself is the identity, wherever its holder runs
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.certificate)
        context.sslobject_class = type("RunObject", (_PinnedObject,), {"certificate": self.certificate})
        # `load_cert_chain` reads files only. A memory file keeps a secret that was never written off the disk.
        descriptor = os.memfd_create("ftrain-secret", os.MFD_CLOEXEC)
        try:
            _write_all(descriptor, self.pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


class _PinnedObject(ssl.SSLObject):
    """A TLS connection whose handshake fails unless the peer's certificate is the run's, byte for byte.

    OpenSSL's verification against a single trusted certificate says the same. This says it without depending on how
    chains are built.
    """

    certificate: ClassVar[bytes]

    def do_handshake(self) -> None:
        super().do_handshake()
        if self.getpeercert(binary_form=True) != self.certificate:
            raise ssl.SSLCertVerificationError("the peer's certificate is not the run's")


def _generate() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    # Two secrets never share a name: OpenSSL looks certificates up by it.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ftrain run {secrets.token_hex(8)}")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALIDITY)
        # Not an authority: nobody can sign a second certificate that this one vouches for.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _parse(pem: bytes, where: str) -> x509.Certificate:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(pem)
        public = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != public:
            raise ValueError("the key is not the certificate's")
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise UsageError(
            f"{where} is not a run secret, or only a part of one: copy it again, or make one with `ftrain secret`."
        ) from error
    return certificate


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_private(path, os.fstat(descriptor))
            return os.read(descriptor, FILE_BYTES_MAX)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise UsageError(f"There is no secret at {path}: make one with `ftrain secret {path}`.") from None
    except OSError as error:
        raise UsageError(f"The secret {path} cannot be read: {error.strerror}.") from error


def _check_private(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise UsageError(f"{path} is not a file, so it is not a run secret: name the file that has it.")
    if state.st_mode & 0o077:
        raise UsageError(
            f"The secret {path} is open to others (mode {stat.S_IMODE(state.st_mode):04o}): run `chmod 600 {path}`."
        )


def _write_exclusive(path: Path, pem: bytes) -> None:
    try:
        if os.path.lexists(path):
            raise FileExistsError
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SECRET_MODE)
        try:
            try:
                os.fchmod(descriptor, SECRET_MODE)  # whatever the umask was
                _write_all(descriptor, pem)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.link(temporary, path)  # unlike a rename, refuses to replace
        finally:
            temporary.unlink()
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError:
        raise UsageError(f"{path} exists already and is not overwritten: use it, or name another file.") from None
    except OSError as error:
        raise UsageError(
            f"The secret {path} cannot be written: {error.strerror}. Name a file in a directory that you can write."
        ) from error


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
