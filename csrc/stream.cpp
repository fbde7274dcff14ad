#include "stream.hpp"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace ftrain {

#if defined(__x86_64__)

namespace {

constexpr std::size_t LINE_BYTES = 64;
constexpr std::size_t STREAM_BYTES_MIN = 4096;  // below, the fence costs more than the caches gain
constexpr std::size_t AHEAD_BYTES = 512;

}  // namespace

void stream_copy(void* to, const void* from, std::size_t nbytes) {
    auto* target = static_cast<std::byte*>(to);
    const auto* source = static_cast<const std::byte*>(from);
    if (nbytes < STREAM_BYTES_MIN) {
        std::memcpy(target, source, nbytes);
        return;
    }
    const std::size_t head = (LINE_BYTES - reinterpret_cast<std::uintptr_t>(target) % LINE_BYTES) % LINE_BYTES;
    std::memcpy(target, source, head);
    const std::size_t lines = (nbytes - head) / LINE_BYTES;
    auto* out = reinterpret_cast<__m128i*>(target + head);
    const auto* in = reinterpret_cast<const __m128i*>(source + head);
    for (std::size_t i = 0; i < lines; ++i, out += 4, in += 4) {
        _mm_prefetch(reinterpret_cast<const char*>(in) + AHEAD_BYTES, _MM_HINT_NTA);
        const __m128i a = _mm_loadu_si128(in);
        const __m128i b = _mm_loadu_si128(in + 1);
        const __m128i c = _mm_loadu_si128(in + 2);
        const __m128i d = _mm_loadu_si128(in + 3);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    _mm_sfence();
    const std::size_t done = head + lines * LINE_BYTES;
    std::memcpy(target + done, source + done, nbytes - done);
}

#else

void stream_copy(void* to, const void* from, std::size_t nbytes) {
    std::memcpy(to, from, nbytes);
}

#endif

}  // namespace ftrain
