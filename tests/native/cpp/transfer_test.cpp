// Transfers in flight by both backends, and what becomes of memory and queue when one of them fails.
#include "transfer.hpp"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "failure.hpp"
#include "memory.hpp"

using namespace ftrain;
using check::address_of;
using check::Bytes;
using check::TemporaryFile;

namespace {

constexpr unsigned DEPTH = 4;
constexpr std::size_t BLOCK_BYTES = 16 * PAGE_BYTES;
constexpr std::size_t BLOCKS = 12;

bool has_uring() {
    try {
        return TransferQueue::make(1, TransferBackend::uring) != nullptr;
    } catch (const SystemFailure&) {
        return false;
    }
}

std::uint64_t offset_of(std::size_t block) {
    return block * BLOCK_BYTES;
}

void blocks_arrive_there_and_back(TransferBackend backend) {
    const TemporaryFile file;
    const Bytes data = check::bytes_of(BLOCKS * BLOCK_BYTES, 1);
    for (const bool writes : {true, false}) {
        Bytes read(data.size());
        const Bytes& memory = writes ? data : read;
        const auto queue = TransferQueue::make(DEPTH, backend);
        unsigned used = 0;
        for (std::size_t block = 0; block < BLOCKS; ++block) {
            const unsigned slot = used < DEPTH ? used++ : queue->wait();
            CHECK(slot < DEPTH);
            queue->submit(slot, {writes, file.fd(), address_of(memory.data()) + offset_of(block), BLOCK_BYTES, offset_of(block)});
        }
        CHECK(queue->in_flight() == DEPTH);
        while (queue->in_flight() != 0) {
            queue->wait();
        }
        CHECK((writes ? file.bytes(data.size()) : read) == data);
    }
}

void queue_that_goes_waits_for_its_transfers(TransferBackend backend) {
    const Bytes data = check::bytes_of(DEPTH * BLOCK_BYTES, 2);
    const TemporaryFile file;
    file.write(data);
    for (int round = 0; round < 50; ++round) {
        Bytes read(data.size());
        {
            const auto queue = TransferQueue::make(DEPTH, backend);
            for (unsigned slot = 0; slot < DEPTH; ++slot) {
                queue->submit(slot, {false, file.fd(), address_of(read.data()) + offset_of(slot), BLOCK_BYTES, offset_of(slot)});
            }
        }
        CHECK(read == data);
    }
}

// As above, where the transfer is known not to be complete yet. A pipe has no offsets: threads refuse it.
void uring_that_goes_waits_for_what_comes_late() {
    const Bytes data = check::bytes_of(PAGE_BYTES, 6);
    const check::LatePipe pipe(data);
    Bytes read(data.size());
    {
        const auto queue = TransferQueue::make(DEPTH, TransferBackend::uring);
        queue->submit(0, {false, pipe.read_end(), address_of(read.data()), read.size(), 0});
    }
    CHECK(read == data);
}

void bad_descriptor_in_the_middle_is_thrown_once(TransferBackend backend) {
    const Bytes data = check::bytes_of(DEPTH * BLOCK_BYTES, 3);
    const TemporaryFile file;
    file.write(data);
    Bytes read(data.size());
    const auto queue = TransferQueue::make(DEPTH, backend);
    for (unsigned slot = 0; slot < DEPTH; ++slot) {
        const int fd = slot == 1 ? -1 : file.fd();
        queue->submit(slot, {false, fd, address_of(read.data()) + offset_of(slot), BLOCK_BYTES, offset_of(slot)});
    }
    int failures = 0;
    while (queue->in_flight() != 0) {
        try {
            CHECK(queue->wait() != 1);
        } catch (const SystemFailure& failure) {
            CHECK(failure.code() == EBADF);
            ++failures;
        }
    }
    CHECK(failures == 1);
    CHECK(std::equal(data.begin() + static_cast<std::ptrdiff_t>(offset_of(2)), data.end(),
                     read.begin() + static_cast<std::ptrdiff_t>(offset_of(2))));
}

void file_that_ends_early_is_named(TransferBackend backend) {
    const TemporaryFile file(BLOCK_BYTES + 100);
    Bytes read(2 * BLOCK_BYTES);
    const auto queue = TransferQueue::make(1, backend);
    queue->submit(0, {false, file.fd(), address_of(read.data()), 2 * BLOCK_BYTES, 0});
    CHECK_THROWS(ShortFile, queue->wait());
    CHECK(queue->in_flight() == 0);
    queue->submit(0, {false, file.fd(), address_of(read.data()), BLOCK_BYTES, 0});
    CHECK(queue->wait() == 0);
}

void pipe_that_takes_little_at_a_time_gets_all(TransferBackend backend) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    const Bytes data = check::bytes_of(300'000, 4);
    Bytes read(data.size());
    {
        // A pipe has no offsets: threads refuse it, io_uring takes what fits and goes on.
        const auto queue = TransferQueue::make(1, backend);
        queue->submit(0, {true, ends[1], address_of(data.data()), data.size(), 0});
        if (backend == TransferBackend::threads) {
            CHECK_THROWS(SystemFailure, queue->wait());
        } else {
            std::jthread reader([&] {
                for (std::size_t done = 0; done < read.size();) {
                    const ssize_t n = ::read(ends[0], read.data() + done, read.size() - done);
                    CHECK(n > 0);
                    done += static_cast<std::size_t>(n);
                }
            });
            CHECK(queue->wait() == 0);
            reader.join();
            CHECK(read == data);
        }
    }
    close(ends[0]);
    close(ends[1]);
}

// From here, io_uring_enter fails in this thread.
bool refuse_enter() {
    sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_enter, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    sock_fprog program{sizeof(code) / sizeof(code[0]), code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

void kernel_that_refuses_in_the_middle_still_gives_the_memory_back() {
    const Bytes data = check::bytes_of(DEPTH * BLOCK_BYTES, 5);
    const TemporaryFile file;
    file.write(data);
    std::jthread([&] {
        Bytes read(data.size());
        {
            const auto queue = TransferQueue::make(DEPTH, TransferBackend::uring);
            const auto submit = [&](unsigned slot) {
                queue->submit(slot, {false, file.fd(), address_of(read.data()) + offset_of(slot), BLOCK_BYTES, offset_of(slot)});
            };
            for (unsigned slot = 0; slot + 1 < DEPTH; ++slot) {
                submit(slot);
            }
            if (!refuse_enter()) {
                std::fprintf(stderr, "seccomp is not allowed here: skipped\n");
                return;
            }
            CHECK_THROWS(SystemFailure, submit(DEPTH - 1));
        }
        CHECK(std::equal(data.begin(), data.end() - static_cast<std::ptrdiff_t>(BLOCK_BYTES), read.begin()));
    }).join();
}

void impossible_depths_are_refused(TransferBackend backend) {
    CHECK_THROWS(std::invalid_argument, TransferQueue::make(0, backend));
    CHECK_THROWS(std::invalid_argument, TransferQueue::make(DEPTH_MAX + 1, backend));
    CHECK_THROWS(std::invalid_argument, TransferQueue::make(~0U, backend));
}

void buffers_are_whole_pages_that_no_count_overflows() {
    const Buffers none(0, PAGE_BYTES);
    const Buffers two(2, PAGE_BYTES);
    CHECK(address_of(two.at(1)) % PAGE_BYTES == 0);
    two.at(1)[PAGE_BYTES - 1] = std::byte{1};
    CHECK_THROWS(std::bad_alloc, Buffers(3, std::size_t{1} << 63));
    CHECK_THROWS(SystemFailure, Buffers(1, std::size_t{1} << 60));
}

}  // namespace

int main() {
    std::vector<TransferBackend> backends{TransferBackend::threads};
    if (has_uring()) {
        backends.push_back(TransferBackend::uring);
        kernel_that_refuses_in_the_middle_still_gives_the_memory_back();
        uring_that_goes_waits_for_what_comes_late();
    } else {
        std::fprintf(stderr, "io_uring is refused here: threads only\n");
    }
    for (const TransferBackend backend : backends) {
        blocks_arrive_there_and_back(backend);
        queue_that_goes_waits_for_its_transfers(backend);
        bad_descriptor_in_the_middle_is_thrown_once(backend);
        file_that_ends_early_is_named(backend);
        pipe_that_takes_little_at_a_time_gets_all(backend);
        impossible_depths_are_refused(backend);
    }
    buffers_are_whole_pages_that_no_count_overflows();
}
