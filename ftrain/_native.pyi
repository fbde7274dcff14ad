"""The native part: shared pages, checksums, copies and file access on plain addresses. Built from csrc/.

Every call that can block or take long runs without the GIL. A failed system call raises OSError with its errno and what
was attempted. Addresses and sizes are in bytes.
"""

from collections.abc import Sequence

from typing_extensions import Buffer

class ControlPage:
    """4096 bytes that two processes share, as 512 signed 64-bit words. `ftrain.core.page.Field` names the words.

    A word that does not exist raises IndexError, a closed page ValueError.
    """

    def __init__(self, fd: int) -> None:
        """Maps the page behind `fd`, which may be closed afterwards."""

    @staticmethod
    def create(name: str) -> int:
        """Makes a page of zeros whose size is sealed, and returns its descriptor (close-on-exec)."""

    def load(self, index: int) -> int:
        """The word, sequentially consistent."""

    def store(self, index: int, value: int) -> None:
        """Sets the word, sequentially consistent. Wakes nobody."""

    def add(self, index: int, amount: int) -> int:
        """Adds to the word in one atomic step and returns its new value."""

    def wait(self, index: int, expected: int, timeout_seconds: float) -> bool:
        """Sleeps while the word is `expected`: True once it is not, False at the timeout (`math.inf` for none).

        Signal handlers run meanwhile, and what they raise comes out of here.
        """

    def wake(self, index: int) -> None:
        """Wakes all who wait on the word, in every process. Call it after the store."""

    def close(self) -> None:
        """Unmaps the page, once the last wait on it has returned."""

class Mapping:
    """The first `nbytes` of a file as shared, writable memory. ValueError where the file is shorter."""

    def __init__(self, fd: int, nbytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def view(self) -> memoryview:
        """The memory as writable bytes. It keeps the mapping alive."""

    def close(self) -> None:
        """Unmaps the memory. BufferError while a view of it is in use."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def memory_file(name: str, huge_pages: bool = False) -> int:
    """An anonymous file in memory, empty, close-on-exec: its descriptor. Size it with `os.ftruncate`."""

def crc32c(buffer: Buffer, value: int = 0) -> int:
    """CRC-32C (RFC 3720) of a contiguous buffer, continuing from the checksum `value` of what came before it."""

def crc32c_software(buffer: Buffer, value: int = 0) -> int:
    """The same as `crc32c`, by tables: what CPUs without the instruction run."""

def crc32c_address(address: int, nbytes: int, value: int = 0) -> int:
    """As `crc32c`, for memory at an address."""

def crc32c_chunks(address: int, nbytes: int, chunk_bytes: int) -> list[int]:
    """The checksum of each `chunk_bytes` of the memory, of which the last may be shorter."""

def crc32c_backend() -> str:
    """What computes checksums on this CPU: "sse4.2", "armv8" or "software"."""

def copy_batch(pairs: Sequence[tuple[int, int, int]], threads: int = 1) -> None:
    """Copies each (destination address, source address, nbytes), shared evenly among up to `threads` threads.

    No destination may overlap another range.
    """

def write_from(fd: int, address: int, nbytes: int, offset: int) -> None:
    """Writes all of the memory at `offset` of the file. With O_DIRECT all three are multiples of 4096."""

def read_into(fd: int, address: int, nbytes: int, offset: int) -> None:
    """Fills the memory from `offset` of the file. EOFError where the file ends before."""

def set_parent_death_signal(signum: int) -> None:
    """This process gets the signal when the thread that made it ends. Compare os.getppid() then: it may be gone."""

def set_child_subreaper(on: bool) -> None:
    """Whether orphaned descendants become children of this process."""
