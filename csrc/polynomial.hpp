// Arithmetic of polynomials over GF(2) modulo the Castagnoli polynomial, with which checksums of adjacent ranges join.
//
// All in the reflected order of the checksum itself: bit 31 is the coefficient of x^0, bit 0 of x^31.
#pragma once

#include <cstdint>

namespace ftrain::polynomial {

constexpr std::uint32_t CASTAGNOLI = 0x82F63B78U;  // x^32 modulo the polynomial
constexpr std::uint32_t ONE = 0x80000000U;

constexpr std::uint32_t times_x(std::uint32_t a) {
    return (a >> 1) ^ ((a & 1U) != 0 ? CASTAGNOLI : 0U);
}

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = ONE; bit != 0; bit >>= 1) {
        product ^= (a & bit) != 0 ? b : 0U;
        b = times_x(b);
    }
    return product;
}

constexpr std::uint32_t x_to_the(std::uint64_t exponent) {
    std::uint32_t result = ONE;
    for (std::uint32_t square = ONE >> 1; exponent != 0; exponent >>= 1) {
        if ((exponent & 1U) != 0) {
            result = multiply(result, square);
        }
        square = multiply(square, square);
    }
    return result;
}

}  // namespace ftrain::polynomial
