#include "transfer_uring.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "failure.hpp"

namespace ftrain {

namespace {

constexpr auto RETRY_AFTER = std::chrono::milliseconds(1);
constexpr std::size_t TRANSFER_BYTES_MAX = std::size_t{1} << 30;  // the kernel takes a length of 32 bits, and less at a time

class Ring {
public:
    explicit Ring(unsigned entries) {
        io_uring_params params{};
        fd_ = static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
        if (fd_ < 0) {
            throw SystemFailure(errno, "io_uring_setup of " + std::to_string(entries) + " entries");
        }
        try {
            map(params);
        } catch (...) {
            unmap();
            throw;
        }
    }

    ~Ring() { unmap(); }
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    void push(const io_uring_sqe& entry) {
        const unsigned tail = *sq_tail_;
        const unsigned at = tail & sq_mask_;
        entries_[at] = entry;
        sq_array_[at] = at;
        std::atomic_ref<unsigned>(*sq_tail_).store(tail + 1, std::memory_order_release);
        ++unsubmitted_;
    }

    // Submits what was pushed, and waits for `wanted` completions.
    void enter(unsigned wanted) {
        while (unsubmitted_ != 0 || (wanted != 0 && !has_completion())) {
            const long taken = try_enter(unsubmitted_, wanted);
            if (taken >= 0) {
                unsubmitted_ -= static_cast<unsigned>(taken);
            } else if (errno == EAGAIN || errno == EBUSY) {
                std::this_thread::sleep_for(RETRY_AFTER);  // the kernel is short of memory, and asks to be asked again
            } else if (errno != EINTR) {
                throw SystemFailure(errno, "io_uring_enter");
            }
        }
    }

    // Takes back what was pushed and not submitted, and says how much that was.
    unsigned drop_unsubmitted() noexcept {
        std::atomic_ref<unsigned>(*sq_tail_).store(*sq_tail_ - unsubmitted_, std::memory_order_release);
        return std::exchange(unsubmitted_, 0);
    }

    // Waits for a completion, whatever the kernel says: completions of what it holds arrive even where it refuses to wait.
    void await_completion() noexcept {
        while (!has_completion()) {
            if (try_enter(0, 1) < 0 && errno != EINTR) {
                std::this_thread::sleep_for(RETRY_AFTER);
            }
        }
    }

    bool has_completion() const {
        return std::atomic_ref<unsigned>(*cq_tail_).load(std::memory_order_acquire) != *cq_head_;
    }

    io_uring_cqe pop() {
        const unsigned head = *cq_head_;
        const io_uring_cqe found = completions_[head & cq_mask_];
        std::atomic_ref<unsigned>(*cq_head_).store(head + 1, std::memory_order_release);
        return found;
    }

private:
    long try_enter(unsigned submitted, unsigned wanted) const noexcept {
        return syscall(__NR_io_uring_enter, fd_, submitted, wanted, wanted != 0 ? IORING_ENTER_GETEVENTS : 0U, nullptr, 0);
    }

    void map(const io_uring_params& params) {
        // The second came with 5.6, as did the reads and writes that are used here.
        constexpr unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS;
        if ((params.features & needed) != needed) {
            throw SystemFailure(ENOSYS, "io_uring_setup: the kernel is older than 5.6");
        }
        if (try_enter(0, 0) < 0) {
            throw SystemFailure(errno, "io_uring_enter");  // a sandbox may allow the one call and refuse the other
        }
        rings_bytes_ = std::max<std::size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                             params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
        rings_ = map_at(rings_bytes_, IORING_OFF_SQ_RING);
        entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        entries_ = static_cast<io_uring_sqe*>(map_at(entries_bytes_, IORING_OFF_SQES));
        auto* base = static_cast<std::byte*>(rings_);
        sq_tail_ = reinterpret_cast<unsigned*>(base + params.sq_off.tail);
        sq_mask_ = *reinterpret_cast<unsigned*>(base + params.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<unsigned*>(base + params.sq_off.array);
        cq_head_ = reinterpret_cast<unsigned*>(base + params.cq_off.head);
        cq_tail_ = reinterpret_cast<unsigned*>(base + params.cq_off.tail);
        cq_mask_ = *reinterpret_cast<unsigned*>(base + params.cq_off.ring_mask);
        completions_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
    }

    void* map_at(std::size_t nbytes, std::uint64_t what) {
        void* found = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, static_cast<off_t>(what));
        if (found == MAP_FAILED) {
            throw SystemFailure(errno, "mmap of an io_uring");
        }
        return found;
    }

    void unmap() {
        if (entries_ != nullptr) {
            munmap(entries_, entries_bytes_);
        }
        if (rings_ != nullptr) {
            munmap(rings_, rings_bytes_);
        }
        close(fd_);
    }

    int fd_ = -1;
    void* rings_ = nullptr;
    std::size_t rings_bytes_ = 0;
    io_uring_sqe* entries_ = nullptr;
    std::size_t entries_bytes_ = 0;
    unsigned* sq_tail_ = nullptr;
    unsigned* sq_array_ = nullptr;
    unsigned* cq_head_ = nullptr;
    unsigned* cq_tail_ = nullptr;
    io_uring_cqe* completions_ = nullptr;
    unsigned sq_mask_ = 0;
    unsigned cq_mask_ = 0;
    unsigned unsubmitted_ = 0;
};

class UringQueue final : public TransferQueue {
public:
    explicit UringQueue(unsigned depth) : ring_(std::bit_ceil(depth)), transfers_(depth) {}

    ~UringQueue() override {
        // What fails now was given up already; that the kernel is done with the memory is all that matters.
        in_flight_ -= ring_.drop_unsubmitted();
        for (; in_flight_ != 0; --in_flight_) {
            ring_.await_completion();
            ring_.pop();
        }
    }

    void submit(unsigned slot, const Transfer& transfer) override {
        transfers_[slot] = transfer;
        push(slot);
        ++in_flight_;
        ring_.enter(0);
    }

    unsigned wait() override {
        for (;;) {
            ring_.enter(1);
            const io_uring_cqe completion = ring_.pop();
            const auto slot = static_cast<unsigned>(completion.user_data);
            if (is_done(slot, completion.res)) {
                --in_flight_;
                return slot;
            }
        }
    }

    const char* name() const noexcept override { return "io_uring"; }

private:
    void push(unsigned slot) {
        const Transfer& transfer = transfers_[slot];
        io_uring_sqe entry{};
        entry.opcode = transfer.writes ? IORING_OP_WRITE : IORING_OP_READ;
        entry.fd = transfer.fd;
        entry.addr = transfer.address;
        entry.len = static_cast<unsigned>(std::min(transfer.nbytes, TRANSFER_BYTES_MAX));
        entry.off = transfer.offset;
        entry.user_data = slot;
        ring_.push(entry);
    }

    // Goes on with a transfer of which only a part was done.
    bool is_done(unsigned slot, int result) {
        Transfer& transfer = transfers_[slot];
        if (result > 0) {
            const auto n = static_cast<std::size_t>(result);
            transfer.address += n;
            transfer.offset += n;
            transfer.nbytes -= n;
            if (transfer.nbytes == 0) {
                return true;
            }
        } else if (result != -EINTR && result != -EAGAIN) {
            --in_flight_;
            fail(transfer, result);
        }
        push(slot);
        return false;
    }

    [[noreturn]] static void fail(const Transfer& transfer, int result) {
        const std::string what = std::string(transfer.writes ? "write" : "read") + " of " + std::to_string(transfer.nbytes) +
                                 " bytes at offset " + std::to_string(transfer.offset) + " of fd " + std::to_string(transfer.fd);
        if (result == 0 && !transfer.writes) {
            throw ShortFile("the file ends early: " + what);
        }
        throw SystemFailure(result == 0 ? EIO : -result, what);
    }

    Ring ring_;
    std::vector<Transfer> transfers_;
};

}  // namespace

std::unique_ptr<TransferQueue> make_uring_queue(unsigned depth) {
    return std::make_unique<UringQueue>(depth);
}

}  // namespace ftrain
