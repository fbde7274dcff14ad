#include "plan.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace ftrain::cuda {

namespace {

constexpr std::size_t SMALL_BYTES_MAX = 256 << 10;  // above, a copy engine is as fast as a kernel and costs training less
constexpr std::size_t PIECE_BYTES_MAX = 64 << 20;   // no single copy keeps the bus to itself for longer

}  // namespace

Plan::Plan(std::shared_ptr<Stager> stager, std::span<const HostDeviceCopy> copies, Direction direction)
    : stager_(std::move(stager)), direction_(direction) {
    const Current current(stager_->context());
    const std::lock_guard lock(stager_->mutex());
    for (const HostDeviceCopy& copy : copies) {
        if (copy.nbytes == 0) {
            continue;
        }
        if (copy.host == 0 || copy.device == 0) {
            throw std::invalid_argument("a copy was given a null address");
        }
        nbytes_ += copy.nbytes;
        add(copy);
    }
    if (!tiles_.empty()) {
        upload_tiles();
    }
}

Plan::~Plan() {
    if (scratch_) {
        if (!uploaded_->wait_quietly()) {
            stager_->stream().wait_quietly();
        }
        stager_->events().give(std::move(uploaded_));
        stager_->scratch().give(std::move(scratch_));
    }
}

void Plan::add(const HostDeviceCopy& copy) {
    const std::shared_ptr<const Pin> pin =
        copy.nbytes < SMALL_BYTES_MAX ? stager_->pin_over(copy.host, copy.nbytes) : nullptr;
    const SmallCopies how = pin ? stager_->small_copies() : SmallCopies::SINGLE;
    if (how == SmallCopies::SINGLE) {
        for (std::size_t at = 0; at < copy.nbytes; at += PIECE_BYTES_MAX) {
            singles_.push_back({copy.host + at, copy.device + at, std::min(PIECE_BYTES_MAX, copy.nbytes - at)});
        }
        return;
    }
    if (std::find(pins_.begin(), pins_.end(), pin) == pins_.end()) {
        pins_.push_back(pin);
    }
    if (how == SmallCopies::KERNEL) {
        add_tiles(copy, pin->seen_at(copy.host));
        return;
    }
    const bool to_host = direction_ == Direction::TO_HOST;
    batch_.to.push_back(to_host ? copy.host : copy.device);
    batch_.from.push_back(to_host ? copy.device : copy.host);
    batch_.nbytes.push_back(copy.nbytes);
}

void Plan::add_tiles(const HostDeviceCopy& copy, DeviceAddress seen) {
    const bool to_host = direction_ == Direction::TO_HOST;
    const DeviceAddress to = to_host ? seen : copy.device;
    const DeviceAddress from = to_host ? copy.device : seen;
    for (std::size_t at = 0; at < copy.nbytes; at += TILE_BYTES_MAX) {
        tiles_.push_back({to + at, from + at, std::min<std::size_t>(TILE_BYTES_MAX, copy.nbytes - at)});
    }
}

void Plan::upload_tiles() {
    const std::size_t table_bytes = tiles_.size() * sizeof(Tile);
    const StreamHandle stream = stager_->stream().handle();
    std::unique_ptr<Event> uploaded = stager_->events().take();
    std::unique_ptr<Scratch> scratch = stager_->scratch().take(table_bytes);
    std::memcpy(scratch->host<Tile>(), tiles_.data(), table_bytes);
    try {
        const Context& context = stager_->context();
        context.check(context.call().cuMemcpyHtoDAsync_v2(scratch->device(), scratch->host<Tile>(), table_bytes, stream),
                      "uploading a table of copies");
        uploaded->record(stream);
    } catch (...) {
        stager_->stream().wait_quietly();  // before the scratch goes
        throw;
    }
    tile_count_ = tiles_.size();
    tiles_ = {};
    scratch_ = std::move(scratch);
    uploaded_ = std::move(uploaded);
}

std::unique_ptr<Ticket> Plan::begin(StreamHandle compute) {
    const Current current(stager_->context());
    const std::lock_guard lock(stager_->mutex());
    require_pins();
    std::unique_ptr<Event> finished = stager_->events().take();
    stager_->order_after(compute);
    try {
        enqueue();
        finished->record(stager_->stream().handle());
        if (direction_ == Direction::TO_DEVICE) {
            finished->order(compute);
        }
        return std::make_unique<Ticket>(shared_from_this(), std::move(finished));
    } catch (...) {
        stager_->stream().wait_quietly();  // the caller gets no ticket to wait with for those that had begun
        throw;
    }
}

void Plan::require_pins() const {
    for (const std::shared_ptr<const Pin>& pin : pins_) {
        if (!pin->pinned()) {
            throw std::invalid_argument("the pinned memory that these copies go to was given back; plan them again");
        }
    }
}

void Plan::enqueue() {
    const Context& context = stager_->context();
    const StreamHandle stream = stager_->stream().handle();
    if (tile_count_ != 0) {  // first: the device is busy with these while the rest is being handed over
        const Kernels& kernels = *stager_->kernels();
        if (direction_ == Direction::TO_HOST) {
            kernels.gather(scratch_->device(), tile_count_, stream);
        } else {
            kernels.scatter(scratch_->device(), tile_count_, stream);
        }
    }
    if (!batch_.nbytes.empty()) {
        enqueue_batch();
    }
    for (const HostDeviceCopy& copy : singles_) {
        void* host = reinterpret_cast<void*>(copy.host);
        if (direction_ == Direction::TO_HOST) {
            context.check(context.call().cuMemcpyDtoHAsync_v2(host, copy.device, copy.nbytes, stream),
                          "copying to the host");
        } else {
            context.check(context.call().cuMemcpyHtoDAsync_v2(copy.device, host, copy.nbytes, stream),
                          "copying from the host");
        }
    }
}

void Plan::enqueue_batch() {
    const Context& context = stager_->context();
    const Table& call = context.call();
    const StreamHandle stream = stager_->stream().handle();
    BatchAttributes attributes{ACCESS_ORDER_STREAM, 0, 0, 0, 0, 0};
    std::size_t first = 0;  // the attributes are those of the copies from this one on
    std::size_t failed = 0;
    const std::size_t count = batch_.nbytes.size();
    const Outcome outcome =
        call.cuMemcpyBatchAsync_v2
            ? call.cuMemcpyBatchAsync_v2(batch_.to.data(), batch_.from.data(), batch_.nbytes.data(), count, &attributes,
                                         &first, 1, stream)
            : call.cuMemcpyBatchAsync(batch_.to.data(), batch_.from.data(), batch_.nbytes.data(), count, &attributes,
                                      &first, 1, &failed, stream);
    context.check(outcome, "copying a batch");
}

Ticket::~Ticket() {
    Stager& stager = plan_->stager();
    if (!finished_->wait_quietly()) {
        stager.stream().wait_quietly();
    }
    stager.events().give(std::move(finished_));
}

void Ticket::order(StreamHandle later) const {
    const Current current(plan_->stager().context());
    finished_->order(later);
}

bool Ticket::done() const {
    const Current current(plan_->stager().context());
    return finished_->done();
}

void Ticket::wait() const {
    const Current current(plan_->stager().context());
    finished_->wait();
}

}  // namespace ftrain::cuda
