"""Uploads to S3 that nobody will finish: found and given up, so that a dead writer's parts do not cost for ever.

obstore has no call for that, so the two requests are made here, signed by the access key of the environment. Sources:
Amazon S3 API reference (ListMultipartUploads, AbortMultipartUpload), AWS Signature Version 4. Where credentials come
from elsewhere (an instance's role), a lifecycle rule of the bucket has to do it: docs/checkpoints.md.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree as ET

log = logging.getLogger("ftrain")
TIMEOUT_SECONDS = 30
REPLY_BYTES_MAX = 8 << 20
PAGES_MAX = 1000
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class S3Uploads:
    """The unfinished uploads of a bucket below a prefix."""

    endpoint: str
    region: str
    bucket: str
    prefix: str
    access_key: str
    secret_key: str
    token: str

    @classmethod
    def of_environment(cls, bucket: str, prefix: str) -> Self | None:
        """None where the environment has no access key."""
        told = os.environ
        region = told.get("AWS_REGION") or told.get("AWS_DEFAULT_REGION") or "us-east-1"
        given = told.get("AWS_ENDPOINT_URL_S3") or told.get("AWS_ENDPOINT_URL") or told.get("AWS_ENDPOINT")
        endpoint = given or f"https://s3.{region}.amazonaws.com"
        access, secret = told.get("AWS_ACCESS_KEY_ID", ""), told.get("AWS_SECRET_ACCESS_KEY", "")
        token = told.get("AWS_SESSION_TOKEN") or told.get("AWS_TOKEN") or ""
        if not access or not secret:
            return None
        return cls(endpoint.rstrip("/"), region, bucket, prefix, access, secret, token)

    def abort_all(self, below: str) -> int:
        """Give up all uploads below, and count them. What goes wrong is logged: it costs room, nothing else."""
        count = 0
        try:
            for key, upload in self.find(f"{self.prefix}/{below}/".lstrip("/")):
                self.request("DELETE", key, {"uploadId": upload})
                count += 1
        except (OSError, ValueError, ET.ParseError) as error:
            log.warning("unfinished uploads below s3://%s/%s/%s remain: %s", self.bucket, self.prefix, below, error)
        return count

    def find(self, key_prefix: str) -> list[tuple[str, str]]:
        """(key, upload) of those in the bucket whose keys begin so. Raises `OSError`, `ParseError`."""
        query = {"uploads": "", "prefix": key_prefix}
        found: list[tuple[str, str]] = []
        for _ in range(PAGES_MAX):
            page = ET.fromstring(self.request("GET", "", query))
            found += [
                (one.findtext("{*}Key", ""), one.findtext("{*}UploadId", "")) for one in page.iterfind("{*}Upload")
            ]
            if page.findtext("{*}IsTruncated") != "true":
                break
            query["key-marker"] = page.findtext("{*}NextKeyMarker", "")
            query["upload-id-marker"] = page.findtext("{*}NextUploadIdMarker", "")
        return found

    def request(self, method: str, key: str, query: Mapping[str, str]) -> bytes:
        """One signed request without a body; what it answers. Raises `OSError`."""
        path = f"{urlsplit(self.endpoint).path}/{self.bucket}/{quote(key, safe='/-_.~')}".rstrip("/")
        said = "&".join(f"{quote(name, safe='-_.~')}={quote(query[name], safe='-_.~')}" for name in sorted(query))
        host = urlsplit(self.endpoint).netloc
        request = urllib.request.Request(
            f"{urlsplit(self.endpoint).scheme}://{host}{path}?{said}",
            method=method,
            headers=self._signed(method, host, path, said),
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                return bytes(reply.read(REPLY_BYTES_MAX))
        except urllib.error.HTTPError as error:
            if method == "DELETE" and error.code == 404:  # it is finished, or somebody gave it up
                return b""
            raise

    def _signed(self, method: str, host: str, path: str, query: str) -> dict[str, str]:
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        headers = {"host": host, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": now}
        if self.token:
            headers["x-amz-security-token"] = self.token
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{_EMPTY_SHA256}"
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        to_sign = "\n".join(("AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        signing_key = f"AWS4{self.secret_key}".encode()
        for word in scope.split("/"):
            signing_key = hmac.digest(signing_key, word.encode(), "sha256")
        signature = hmac.digest(signing_key, to_sign.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return headers
