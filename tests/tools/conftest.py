from __future__ import annotations

from tests.storage.conftest import moto, s3

__all__ = ["moto", "s3"]
