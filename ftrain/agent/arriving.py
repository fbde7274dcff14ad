"""A snapshot of another node on its way into an arena here, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.agent.peer_wire import CHUNK_BYTES, Data
from ftrain.checkpoint.staging.arena import Arena


@dataclass(slots=True)
class Arriving:
    """Its image comes first, then its index. The chunks of the image are received where they belong."""

    arena: Arena
    slot: int
    image_bytes: int
    index_bytes: int
    arrived_bytes: int = 0
    index: bytearray = field(default_factory=bytearray)

    @property
    def nbytes(self) -> int:
        return self.image_bytes + self.index_bytes

    @property
    def is_whole(self) -> bool:
        return self.arrived_bytes == self.nbytes

    def follows(self, offset: int, nbytes: int) -> bool:
        """Whether a chunk of that size at that offset is the next one."""
        return offset == self.arrived_bytes and nbytes == min(CHUNK_BYTES, self.nbytes - offset) > 0

    def place(self, offset: int, nbytes: int) -> memoryview | None:
        """Where the next chunk belongs; None for one that is no next one, or not of the image alone."""
        if not self.follows(offset, nbytes) or offset + nbytes > self.image_bytes:
            return None
        return self.arena.view(self.slot, offset, nbytes)

    def take(self, data: Data) -> None:
        """The next chunk, which lies where `place` said if that was anywhere."""
        rest = max(0, self.image_bytes - self.arrived_bytes)
        if 0 < rest < len(data):
            self.arena.view(self.slot, self.arrived_bytes, rest)[:] = data[:rest]
        self.index += data[rest:]
        self.arrived_bytes += len(data)
