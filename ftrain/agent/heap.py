"""glibc's heap as workers have it, and memory of it that is touched before it is needed.

Memory that a process touches for the first time comes from the kernel page by page, at 1 to 2 GB/s on a virtual
machine: a rank that was forked anew spends much of its recovery on that. glibc's heap can be made that much longer
ahead, and keeps what it has.
"""

from __future__ import annotations

import ctypes
import mmap

MAPPED_BYTES = 32 << 20  # blocks from here on have a mapping of their own
SLACK_BYTES = 64 << 20  # free memory at the heap's end that is kept, beside what is touched ahead
# To glibc: huge pages for its heap, and, from the first allocation on, blocks in the heap up to the size that glibc
# comes to by itself once such a block was freed. See docs/decisions/0011.
TUNABLES = (
    f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={MAPPED_BYTES}:glibc.malloc.trim_threshold={SLACK_BYTES}"
)
_TRIM_THRESHOLD, _TOP_PAD = -1, -2  # as in malloc.h
_TOP_PAD_BYTES = 128 << 10  # glibc's own
_POPULATE_WRITE = 23  # of madvise, since Linux 5.14
_BLOCK_BYTES = MAPPED_BYTES // 2  # in the heap, therefore
_BLOCKS_MAX = 256  # for a heap with more than that in its holes nothing has to be done
BYTES_MAX = (2 << 30) - (128 << 20)  # what mallopt takes is an int


class HeapRoom:
    """So many bytes at the heap's end; none where the C library is another one, or the kernel is older."""

    def __init__(self, nbytes: int) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._next = self._end = 0
        if nbytes and all(hasattr(self._library, name) for name in ("mallopt", "sbrk")):
            self._grow(min(nbytes, BYTES_MAX))

    def touch(self, nbytes: int) -> bool:
        """Touch so many bytes more. False when all are."""
        size = min(nbytes, self._end - self._next)
        if size <= 0:
            return False
        if self._library.madvise(ctypes.c_void_p(self._next), ctypes.c_size_t(size), _POPULATE_WRITE) != 0:
            self._end = self._next
            return False
        self._next += size
        return True

    def _grow(self, nbytes: int) -> None:
        library = self._library
        library.sbrk.restype = library.malloc.restype = ctypes.c_void_p
        library.sbrk.argtypes = [ctypes.c_ssize_t]
        library.malloc.argtypes = [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        begin = library.sbrk(0)
        library.mallopt(_TRIM_THRESHOLD, nbytes + SLACK_BYTES)
        library.mallopt(_TOP_PAD, max(_TOP_PAD_BYTES, nbytes - _BLOCK_BYTES))
        blocks: list[int] = []
        while library.sbrk(0) == begin and len(blocks) < _BLOCKS_MAX:
            blocks.append(library.malloc(_BLOCK_BYTES))
        for block in blocks:
            library.free(block)
        library.mallopt(_TOP_PAD, _TOP_PAD_BYTES)
        self._next, self._end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, library.sbrk(0)
