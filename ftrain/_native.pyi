"""The native part: shared pages, checksums, copies and file access on plain addresses. Built from csrc/.

Every call that can block or take long runs without the GIL. A failed system call raises OSError with its errno and what
was attempted. Addresses and sizes are in bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any

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

        False as well when it is woken and the word is the same.

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

    def populate(self, offset: int, nbytes: int) -> None:
        """Maps these pages now, so that nobody waits for them later. `offset` is that of a page."""

    def close(self) -> None:
        """Unmaps the memory. BufferError while a view of it is in use."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def memory_file(name: str, huge_pages: bool = False) -> int:
    """An anonymous file in memory, empty, close-on-exec: its descriptor. Size it with `os.ftruncate`."""

def crc32c(buffer: Buffer, value: int = 0) -> int:
    """CRC-32C (RFC 3720) of a contiguous buffer, continuing from the checksum `value` of what came before it."""

def crc32c_address(address: int, nbytes: int, value: int = 0) -> int:
    """As `crc32c`, for memory at an address."""

def crc32c_backend() -> str:
    """What computes checksums on this CPU: "sse4.2", "armv8" or "software"."""

def copy_batch(pairs: Sequence[tuple[int, int, int]], threads: int = 1) -> None:
    """Copies each (destination address, source address, nbytes), shared evenly among up to `threads` threads.

    No destination may overlap another range.
    """

def set_parent_death_signal(signum: int) -> None:
    """This process gets the signal when the thread that made it ends. Compare os.getppid() then: it may be gone."""

def set_child_subreaper(on: bool) -> None:
    """Whether orphaned descendants become children of this process."""

def list_gloo_waits() -> bool:
    """From now on `end_gloo_waits` knows who waits. False where torch's gloo is not built as it is known here."""

def end_gloo_waits(message: str) -> int:
    """Let every wait of gloo for a peer that is under way in this process raise RuntimeError. Returns how many."""

class Taken:
    """Processor time that one thread takes from others since it made this: none where processors idle.

    As much as it had to wait for a processor itself, and no more than it ran.
    """

    def __init__(self) -> None: ...
    def seconds(self) -> float:
        """To be asked by that thread."""

def wake_politely() -> None:
    """This thread, when it is woken, does not take the processor from who woke it, where the kernel allows that."""

def leave_sigterm_to_parent() -> None:
    """SIGTERM ends this process, with code 0, only where its parent or the process itself sent it."""

class CopyPlan:
    """Copies that are made again and again, as columns of 64-bit words such as `array("Q")`.

    Offsets count from the address that `Copier.begin` is given. ValueError for a source at 0 that is not empty.
    """

    def __init__(self, offsets: Buffer, sources: Buffer, sizes: Buffer) -> None: ...
    @property
    def nbytes(self) -> int: ...

class CopyJob:
    """One run of a plan. Its memory must stay until it is done, or its copier is gone."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Takes part in the copying, and returns once all is there."""
    def taken_seconds(self) -> float:
        """Processor time that all who copied took from other threads. Waits for those that still copy."""

class Copier:
    """Threads that copy one job after the other. In a forked child it has none: a job is copied by who waits for it.

    Dropped, it stops soon: what no thread has begun is left to `CopyJob.wait`.
    """

    def __init__(self, threads: int) -> None: ...
    def begin(self, plan: CopyPlan, base: int) -> CopyJob:
        """Starts copying to `base`. The sources must stay as they are until the job is done."""

class Look:
    """Where some tensors were and what they looked like: equal where memory, shapes, strides, types and devices are."""

    def is_of(self, other: Look) -> bool:
        """Whether the objects are the same, if both looks' still live."""

    @property
    def all_in_host_memory(self) -> bool:
        """Whether the elements of each lie there one after the other in C order, but for a sign that is turned."""

    def addresses(self) -> bytes:
        """Where the tensors are, as unsigned 64-bit words."""

    def recall(
        self, dicts: list[dict[Any, Any]], keys: list[Any], kinds: tuple[type, ...]
    ) -> tuple[list[Any], bytes] | None:
        """The values of these dicts and their versions, as signed 64-bit words, where they are the tensors looked at.

        None where a key or a value is another object, a value has another memory or counter or a type that is not among
        `kinds`, or where the look knew no anatomy. Dicts that did not change since the last time are not gone
        through again where `keys` is the same list, which must not have changed either.
        """

    def versions(self, tensors: list[Any]) -> bytes | None:
        """As `recall` does, of tensors that the caller holds."""

class Anatomy:
    """Where torch keeps what tells a tensor's memory and how often it was changed."""

def find_anatomy(tensors: list[Any], implementations: list[int], versions: list[int]) -> Anatomy | None:
    """Found by examining tensors of different versions, whose implementations are at these addresses."""

def look(
    tensors: list[Any],
    kinds: tuple[type, ...],
    exchange: object,
    before: Look | None = None,
    anatomy: Anatomy | None = None,
    at_a_time: int = 0,
) -> Look | None:
    """A look at tensors whose types are among `kinds`, of which `exchange` is the `__dlpack_c_exchange_api__`.

    None where one is of another type or of complex numbers, where the exchange refuses one, or where it is of another
    version. Quicker with an earlier look at the same tensors. After so many `at_a_time` (0: never) it lets the GIL go
    for a moment: the list is not to change meanwhile.
    """

def counters(
    objects: list[Any],
    descriptor: object,
    before: Look | None = None,
    anatomy: Anatomy | None = None,
    at_a_time: int = 0,
) -> bytes:
    """An attribute of each object, as signed 64-bit words; `descriptor` is the attribute in their class.

    TypeError where it is another kind of descriptor or of other objects. Quicker with an earlier look at the objects.
    With an anatomy the attribute is the version, and not asked where the counter is found. `at_a_time` is as in `look`.
    """

class Fence:
    """Tells when what the main thread is in right now, as native code that has let the GIL go, has come to its end.

    It has passed when the main thread was between two instructions of Python after it was set.
    """

    def set(self) -> bool:
        """Once. False where the interpreter takes no such call at the moment: then it never passes."""

    def wait(self) -> bool:
        """Until it has passed: True. False once it was dropped."""

    def drop(self) -> None:
        """Nobody is to wait for it any more. May be called at any time."""

def column(records: Sequence[Any], member: object) -> list[Any]:
    """A member of each record, by its descriptor in their class, which has slots: read where it lies.

    Here and below records are in a list or a tuple. TypeError for records of another class, and other descriptors.
    """

def column_words(records: Sequence[Any], member: object) -> bytes:
    """As `column`, of integers as unsigned 64-bit words."""

def column_is(records: Sequence[Any], member: object, value: object) -> bool:
    """Whether the member of each record is this object."""

def columns_equal(
    left: Sequence[Any], left_members: Sequence[object], right: Sequence[Any], right_members: Sequence[object]
) -> bool:
    """Whether there are as many records, and the members of each are equal to those of its counterpart, in pairs."""

class Pack:
    """The bytes of a pack's file, of which the boxes lie where they are until they are written. docs/format.md.

    Boxes are columns of 64-bit words such as `array("Q")`, in order of their offsets and disjoint. Between them the
    file has zeros, and `ending` as its last bytes. With `image`, the payload lies at that page just as in the file (its
    gaps zeros) and is written from there; without, through buffers. ValueError where that does not fit together. A
    pack holds addresses only: the memory must stay for as long as it is written.
    """

    def __init__(
        self,
        offsets: Buffer,
        addresses: Buffer,
        sizes: Buffer,
        payload_bytes: int,
        chunk_bytes: int,
        image_bytes: int,
        ending: bytes,
        image: int = 0,
    ) -> None: ...
    @property
    def nbytes(self) -> int:
        """Of the file."""

    def write(
        self,
        fd: int,
        *,
        threads: int = 1,
        depth: int = 8,
        nice: int = 0,
        bytes_per_second_max: int = 0,
        processors_max: float = 0.0,
        backend: str = "any",
        on_idle: Callable[[], object] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Writes all of it from offset 0, and returns the crc32c of each box and of each chunk. Does not sync.

        Each thread has `depth` transfers in flight, and as many buffers of a chunk where it needs them. While others
        wait for the processors, each takes so much of one (0: no bound); where the kernel does not tell, all.

        Signal handlers and `on_idle` run now and then; what they raise ends the work and comes out of here, and nothing
        is written any more by then.
        """

def fetch(
    files: Sequence[tuple[int, bool]],
    file_numbers: Buffer,
    sums: Buffer,
    offsets: Buffer,
    sizes: Buffer,
    addresses: Buffer,
    *,
    threads: int = 2,
    depth: int = 8,
    block_bytes: int = 2097152,
    backend: str = "any",
    on_idle: Callable[[], object] | None = None,
) -> list[int]:
    """Reads ranges of files to their addresses, and returns the places of those that do not match their crc32c.

    A file is a descriptor and whether it was opened with O_DIRECT; such a one holds whole pages. Ranges are columns of
    64-bit words such as `array("Q")`; those at address 0 are only proved. EOFError where a file ends early. Each thread
    has `depth` buffers of `block_bytes` for direct files. Interrupted as `Pack.write` is.
    """

def gather(
    image: int,
    nbytes: int,
    sums: Buffer,
    offsets: Buffer,
    sizes: Buffer,
    addresses: Buffer,
    *,
    threads: int = 2,
) -> list[int]:
    """As `fetch`, from `nbytes` of memory at `image`. ValueError for a range that reaches beyond them."""

def cached_share(fd: int) -> float:
    """How much of the file is in the page cache, 0 to 1; 0 where the kernel does not say."""

def transfer_backend(backend: str = "any") -> str:
    """What is used for `backend`, "any", "io_uring" or "threads": one of the latter. OSError where it is refused."""

class CudaFailure(RuntimeError):
    """A call of the CUDA driver or of its compiler failed or cannot be made. It says what was attempted."""

class CudaProbe:
    """Whether CUDA can be used in this process."""

    @property
    def usable(self) -> bool: ...
    @property
    def reason(self) -> str:
        """Why not: no driver, one that is too old, no device, a fork … Empty where it can."""

    @property
    def driver_version(self) -> int:
        """13000 for CUDA 13.0; 0 where there is no driver to ask."""

    @property
    def devices(self) -> int: ...

class CudaPin:
    """Host memory that the device reads and writes by itself, until `close`. Dropped, it closes."""

    @property
    def pinned(self) -> bool: ...
    @property
    def reason(self) -> str:
        """Why it is not pinned, where the driver refused: copies still work, but the host waits for them."""

    def close(self) -> None:
        """Waits for copies in flight and gives the memory back. Plans that rely on it can begin no more."""

class CudaTicket:
    """Copies that were begun. Dropped, it waits for them. CudaFailure where one of them went wrong."""

    def order(self, compute_stream: int) -> None:
        """What comes to the stream from now on waits for the copies, on the device."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Sleeps until they are done."""

class CudaPlan:
    """Copies worked out once, to be made many times without allocating anything."""

    @property
    def nbytes(self) -> int: ...
    def begin(self, compute_stream: int, keep: object = None) -> CudaTicket:
        """Starts the copies after what is on the stream now. `keep` is held until the ticket is done or dropped.

        To the device, what comes to the stream later runs after them. ValueError where a pin was closed meanwhile.
        """

class CudaStager:
    """Copies between host memory and one device, on a stream of its own, in the primary context (the one of torch).

    `nvrtc` names libraries to compile the kernels with, of which the first that loads is taken. A copy is (host
    address, device address, bytes); no destination may overlap another range, and the memory stays until the ticket is
    done. Streams are the driver's handles, 0 the default one. CudaFailure where a call of the driver fails.
    """

    def __init__(self, device: int = 0, nvrtc: Sequence[str] = ()) -> None: ...
    @property
    def device(self) -> int: ...
    def pin(self, address: int, nbytes: int) -> CudaPin:
        """Pins the memory. Where the driver refuses, the pin says why and copies go on, slower."""

    def plan(self, copies: Sequence[tuple[int, int, int]], upload: bool = False) -> CudaPlan:
        """Works out copies to the host, or to the device where `upload`. Pin the host's memory before."""

    def begin(self, copies: Sequence[tuple[int, int, int]], compute_stream: int, keep: object = None) -> CudaTicket:
        """`plan(copies).begin(compute_stream, keep)`."""

    def upload(self, copies: Sequence[tuple[int, int, int]], compute_stream: int, keep: object = None) -> CudaTicket:
        """`plan(copies, upload=True).begin(compute_stream, keep)`."""

    def small_copies(self) -> tuple[str, str]:
        """How small copies are made, "kernel", "batch" or "single", and why not by kernel. Compiles it once."""

    def digest(self, ranges: Sequence[tuple[int, int]], compute_stream: int) -> list[int]:
        """`digest_address` of each (device address, bytes), taken after what is on the stream. Needs the kernels."""

def cuda_probe() -> CudaProbe:
    """Loads the driver, starts CUDA, and says what is there. FTRAIN_LIBCUDA names a library in libcuda.so.1's place."""

def cuda_compile(capability: tuple[int, int], nvrtc: Sequence[str]) -> bytes:
    """The machine code of the kernels for devices of this compute capability. Needs no GPU."""

def digest_address(address: int, nbytes: int) -> int:
    """A 64-bit digest of host memory, for comparing replicas. csrc/cuda/digest.hpp defines it."""
