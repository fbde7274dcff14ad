"""The secret's file, and what its TLS contexts accept."""

from __future__ import annotations

import datetime as dt
import os
import ssl
import stat
import threading
from pathlib import Path

import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from ftrain.cli.secret import secret as secret_command
from ftrain.control import secret as module
from ftrain.control.secret import Secret
from ftrain.errors import UsageError


def test_created_secret_is_private_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    old = os.umask(0)
    try:
        made = Secret.create(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Secret.load(path) == made
    assert _names(tmp_path) == ["secret"]


def test_secret_is_not_in_its_repr(secret: Secret) -> None:
    assert "PRIVATE" not in repr(secret)
    assert secret.fingerprint in repr(secret)
    assert len(secret.fingerprint) == 12


def test_secret_in_memory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Secret.create()
    made.server_context()
    assert _names(tmp_path) == []
    assert Secret.from_pem(made.pem, "memory") == made


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already and is not overwritten"):
        Secret.create(path)
    assert path.read_text() == "precious"
    assert _names(tmp_path) == ["secret"]


def test_dangling_link_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists already"):
        Secret.create(path)
    assert _names(tmp_path) == ["secret"]


def test_two_creators_at_once_one_wins_and_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    outcomes: list[Secret | UsageError] = []

    def create() -> None:
        try:
            outcomes.append(Secret.create(path))
        except UsageError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [outcome for outcome in outcomes if isinstance(outcome, Secret)]
    assert made == [Secret.load(path)]
    assert len(outcomes) == 8
    assert _names(tmp_path) == ["secret"]


def test_missing_directory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        Secret.create(tmp_path / "nowhere" / "secret")


def test_missing_file_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no secret at .*: make one with `ftrain secret"):
        Secret.load(tmp_path / "secret")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_exposed_file_is_refused_with_the_chmod_to_run(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    Secret.create(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=rf"\(mode {mode:04o}\): run `chmod 600 {path}`"):
        Secret.load(path)


def test_unreadable_file_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    Secret.create(path)
    path.chmod(0)
    euid = os.geteuid()
    os.seteuid(euid or 65534)  # root reads everything
    try:
        with pytest.raises(UsageError, match="cannot be read: Permission denied"):
            Secret.load(path)
    finally:
        os.seteuid(euid)


def test_directory_or_pipe_is_not_a_secret(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        Secret.load(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UsageError, match="is not a file"):
        Secret.load(tmp_path / "pipe")


def test_every_torn_file_is_refused(secret: Secret) -> None:
    # The last byte is a line end, without which the file is still whole.
    for length in range(0, len(secret.pem) - 1, 7):
        with pytest.raises(UsageError, match="is not a run secret, or only a part of one"):
            Secret.from_pem(secret.pem[:length], "torn")


def test_halves_of_two_secrets_are_refused(secret: Secret, other_secret: Secret) -> None:
    boundary = b"-----BEGIN CERTIFICATE-----"
    mixed = secret.pem.partition(boundary)[0] + boundary + other_secret.pem.partition(boundary)[2]
    with pytest.raises(UsageError, match="is not a run secret"):
        Secret.from_pem(mixed, "mixed")


@pytest.mark.parametrize("junk", [b"", b"\x00" * 100, b"\xff\xfe", b"-----BEGIN PRIVATE KEY-----\nx\n", b"word\n" * 99])
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(UsageError, match="junk is not a run secret"):
        Secret.from_pem(junk, "junk")


def test_expired_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VALIDITY", dt.timedelta(hours=-1))
    with pytest.raises(UsageError, match=r"expired on 20..-..-..: make a new one"):
        Secret.create()


def test_secret_of_the_future_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOCK_SKEW", dt.timedelta(days=-1))
    with pytest.raises(UsageError, match="set the clock"):
        Secret.create()


def test_same_secret_on_both_sides_shakes_hands(secret: Secret) -> None:
    client, server = _shake_hands(secret.client_context(), secret.server_context())
    assert client.version() == server.version() == "TLSv1.3"
    assert client.getpeercert(binary_form=True) == server.getpeercert(binary_form=True) == secret.certificate


def test_other_secret_fails_on_either_side(secret: Secret, other_secret: Secret) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake_hands(secret.client_context(), other_secret.server_context())
    lenient = other_secret.client_context()
    lenient.verify_mode = ssl.CERT_NONE
    lenient.sslobject_class = ssl.SSLObject
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake_hands(lenient, secret.server_context())


@pytest.mark.parametrize("verified", [True, False])
def test_second_certificate_of_the_same_key_fails(secret: Secret, tmp_path: Path, verified: bool) -> None:
    """Even where OpenSSL were content: the certificate is compared byte for byte."""
    forged = tmp_path / "forged"
    forged.write_bytes(_reissue(secret))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(forged)
    context.load_verify_locations(cadata=secret.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    client = secret.client_context()
    if not verified:
        client.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed" if verified else "is not the run's"):
        _shake_hands(client, context)


def test_command_writes_a_secret_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    app = typer.Typer()
    app.command()(secret_command)
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == 0
    assert Secret.load(path).fingerprint in result.output


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _reissue(secret: Secret) -> bytes:
    """Another self-signed certificate of the same key and name."""
    key = serialization.load_pem_private_key(secret.pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = x509.load_der_x509_certificate(secret.certificate)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A TLS handshake in memory, up to and with one message of the server, which a client needs to see a refusal."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_side=False)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    while waiting:
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    return near, far
