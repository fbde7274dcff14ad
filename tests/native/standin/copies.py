"""Random copies between a host image and device memory, with what the bytes must be afterwards."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

from tests.native.standin.gpu import Gpu

SIZES = (0, 1, 3, 7, 8, 15, 16, 17, 31, 100, 1000, 4096, 16384, 16385, 50_001, 262_143, 262_144, 300_007)
GAP_BYTES_MAX = 40


class Image:
    """Host memory, not pinned, with copies to or from it. Made, it has the GPU work in the order of the seed."""

    def __init__(self, gpu: Gpu, seed: int, count: int = 25, sizes: Sequence[int] = SIZES) -> None:
        choice = random.Random(seed)
        gpu.seed(seed)
        self.gpu = gpu
        self.copies: list[tuple[int, int, int]] = []
        places = []
        host_bytes = device_bytes = 0
        for _ in range(count):
            nbytes = choice.choice(sizes)
            host_bytes += choice.randrange(GAP_BYTES_MAX)
            device_bytes += choice.choice((0, 1, 2, 4, 8, 16, 256))
            places.append((host_bytes, device_bytes, nbytes))
            host_bytes += nbytes
            device_bytes += nbytes
        self._memory = ctypes.create_string_buffer(host_bytes + GAP_BYTES_MAX)
        self.nbytes = len(self._memory)
        self.address = ctypes.addressof(self._memory)
        self.device_nbytes = device_bytes + 1
        self.device_address = gpu.allocate(self.device_nbytes)
        self._places = places
        self.copies = [(self.address + host, self.device_address + device, n) for host, device, n in places]
        self.fill(choice.randbytes(self.nbytes))

    def fill(self, data: bytes) -> None:
        """Set the host's memory."""
        self._background = data.ljust(self.nbytes, b"\0")[: self.nbytes]
        ctypes.memmove(self.address, self._background, self.nbytes)

    def compute(self, stream: int, seed: int) -> bytes:
        """On the stream, device memory gets new content: returned."""
        content = random.Random(seed).randbytes(self.device_nbytes)
        self.gpu.write(stream, self.device_address, content)
        return content

    def host(self) -> bytes:
        return self._memory.raw

    def device(self) -> bytes:
        return self.gpu.peek(self.device_address, self.device_nbytes)

    def host_after(self, content: bytes) -> bytes:
        """The host's memory once all of `content` was copied to it, and nothing else was touched."""
        after = bytearray(self._background)
        for host, device, nbytes in self._places:
            after[host : host + nbytes] = content[device : device + nbytes]
        return bytes(after)

    def device_after(self, content: bytes) -> bytes:
        """Device memory that held `content`, once the host's memory was copied to it."""
        after = bytearray(content)
        for host, device, nbytes in self._places:
            after[device : device + nbytes] = self._background[host : host + nbytes]
        return bytes(after)
