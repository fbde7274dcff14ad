#include "crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#include "polynomial.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace ftrain {

// Below, a "register" is the checksum without its final inversion: what the instructions work on.
namespace {

using Step = std::uint32_t (*)(std::uint32_t state, const unsigned char* p, std::size_t n);

struct Backend {
    const char* name;
    Step step;
};

std::uint64_t word_at(const unsigned char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

// ------------------------------------------------------------------------------------------------------- software

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// TABLES[k][b]: what byte b leaves in the register once k more bytes have followed.
constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) {
            state = polynomial::times_x(state);
        }
        tables[0][byte] = state;
    }
    for (std::size_t k = 1; k < tables.size(); ++k) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const std::uint32_t before = tables[k - 1][byte];
            tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFFU];
        }
    }
    return tables;
}

constexpr Tables TABLES = make_tables();

std::uint32_t step_software(std::uint32_t state, const unsigned char* p, std::size_t n) {
    if constexpr (std::endian::native == std::endian::little) {
        for (; n >= 8; p += 8, n -= 8) {
            const std::uint64_t word = word_at(p) ^ state;
            std::uint32_t next = 0;
            for (std::size_t k = 0; k < 8; ++k) {
                next ^= TABLES[7 - k][(word >> (8 * k)) & 0xFFU];
            }
            state = next;
        }
    }
    for (; n != 0; ++p, --n) {
        state = (state >> 8) ^ TABLES[0][(state ^ *p) & 0xFFU];
    }
    return state;
}

// ------------------------------------------------------------------------------------------------------- hardware

// The instruction takes one word a cycle but answers three cycles later: three independent lanes keep it busy. Each lane
// is LANE bytes of a block of three; the first two registers are then moved past the bytes that follow them.

#if defined(__x86_64__)

#if defined(__clang__)  // which counts the instruction as a feature of its own
#define FTRAIN_CRC_TARGET __attribute__((target("sse4.2,crc32,pclmul")))
#else
#define FTRAIN_CRC_TARGET __attribute__((target("sse4.2,pclmul")))
#endif

FTRAIN_CRC_TARGET inline std::uint32_t step_word(std::uint32_t state, std::uint64_t word) {
    return static_cast<std::uint32_t>(_mm_crc32_u64(state, word));
}

FTRAIN_CRC_TARGET inline std::uint32_t step_byte(std::uint32_t state, unsigned char byte) {
    return _mm_crc32_u8(state, byte);
}

// A carry-less product of two reflected 32-bit values is one power of x short, and the instruction that reduces it adds 32.
constexpr std::uint32_t shift_factor(std::size_t nbytes) {
    return polynomial::x_to_the(8 * nbytes - 33);
}

FTRAIN_CRC_TARGET inline std::uint64_t product(std::uint32_t a, std::uint32_t b) {
    const __m128i c = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(a)), _mm_cvtsi32_si128(static_cast<int>(b)), 0);
    return static_cast<std::uint64_t>(_mm_cvtsi128_si64(c));
}

FTRAIN_CRC_TARGET inline std::uint32_t join_lanes(std::uint32_t a, std::uint32_t far, std::uint32_t b, std::uint32_t near,
                                                  std::uint32_t c) {
    return c ^ step_word(0, product(a, far) ^ product(b, near));
}

bool has_instructions() {
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

constexpr const char* HARDWARE = "sse4.2";

#elif defined(__aarch64__)

#define FTRAIN_CRC_TARGET __attribute__((target("+crc")))

FTRAIN_CRC_TARGET inline std::uint32_t step_word(std::uint32_t state, std::uint64_t word) {
    return __crc32cd(state, word);
}

FTRAIN_CRC_TARGET inline std::uint32_t step_byte(std::uint32_t state, unsigned char byte) {
    return __crc32cb(state, byte);
}

constexpr std::uint32_t shift_factor(std::size_t nbytes) {
    return polynomial::x_to_the(8 * nbytes);
}

FTRAIN_CRC_TARGET inline std::uint32_t join_lanes(std::uint32_t a, std::uint32_t far, std::uint32_t b, std::uint32_t near,
                                                  std::uint32_t c) {
    return c ^ polynomial::multiply(a, far) ^ polynomial::multiply(b, near);
}

bool has_instructions() {
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

constexpr const char* HARDWARE = "armv8";

#endif

#if defined(FTRAIN_CRC_TARGET)

template <std::size_t LANE>
FTRAIN_CRC_TARGET inline void step_blocks(std::uint32_t& state, const unsigned char*& p, std::size_t& n) {
    static_assert(LANE % 8 == 0);
    constexpr std::uint32_t far = shift_factor(2 * LANE);
    constexpr std::uint32_t near = shift_factor(LANE);
    for (; n >= 3 * LANE; p += 3 * LANE, n -= 3 * LANE) {
        std::uint32_t a = state;
        std::uint32_t b = 0;
        std::uint32_t c = 0;
        for (std::size_t i = 0; i < LANE; i += 8) {
            a = step_word(a, word_at(p + i));
            b = step_word(b, word_at(p + i + LANE));
            c = step_word(c, word_at(p + i + 2 * LANE));
        }
        state = join_lanes(a, far, b, near, c);
    }
}

FTRAIN_CRC_TARGET std::uint32_t step_hardware(std::uint32_t state, const unsigned char* p, std::size_t n) {
    step_blocks<8192>(state, p, n);  // joining costs nothing against so much
    step_blocks<256>(state, p, n);   // what is left of a chunk, and small boxes
    for (; n >= 8; p += 8, n -= 8) {
        state = step_word(state, word_at(p));
    }
    for (; n != 0; ++p, --n) {
        state = step_byte(state, *p);
    }
    return state;
}

Backend choose() {
    return has_instructions() ? Backend{HARDWARE, step_hardware} : Backend{"software", step_software};
}

#else

Backend choose() {
    return {"software", step_software};
}

#endif

const Backend& backend() {
    static const Backend chosen = choose();
    return chosen;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t nbytes, std::uint32_t value) {
    return ~backend().step(~value, static_cast<const unsigned char*>(data), nbytes);
}

std::uint32_t crc32c_software(const void* data, std::size_t nbytes, std::uint32_t value) {
    return ~step_software(~value, static_cast<const unsigned char*>(data), nbytes);
}

const char* crc32c_backend() {
    return backend().name;
}

}  // namespace ftrain
