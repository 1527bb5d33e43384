// Shared by the compiled CPU kernels: bf16, vectors as wide as the processor's, an exponential that vectorises.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Before a loop over an array of vectors: only what is unrolled early is kept in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void store(float x, float* out) { *out = x; }

inline void store(float x, bf16* out) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
constexpr int VECTOR = 64;  // bytes
#elif defined(__AVX2__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif
typedef float Lanes __attribute__((vector_size(VECTOR)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR)));
typedef uint16_t Narrow __attribute__((vector_size(VECTOR / 2)));
constexpr int64_t LANES = VECTOR / sizeof(float);

inline Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Lanes load(const bf16* from) {
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Lanes)(__builtin_convertvector(bits, Bits) << 16);
}

// Loads 2 * LANES consecutive numbers as two vectors: fp32 in order; of bf16 the even ones and the odd ones, which is
// faster. store_pair reverses it.
inline void load_pair(const float* from, Lanes& first, Lanes& second) {
    first = load(from);
    second = load(from + LANES);
}

inline void load_pair(const bf16* from, Lanes& first, Lanes& second) {
    Bits bits;
    std::memcpy(&bits, from, sizeof bits);
    first = (Lanes)(bits << 16);
    second = (Lanes)(bits & 0xffff0000u);
}

inline Bits bf16_above(Lanes x) {  // the upper 16 bits of each are x as bf16, rounded to nearest, ties to even
    const Bits bits = (Bits)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(Lanes x, float* out) { std::memcpy(out, &x, sizeof x); }

inline void store(Lanes x, bf16* out) {
    const Narrow narrow = __builtin_convertvector(bf16_above(x) >> 16, Narrow);
    std::memcpy(out, &narrow, sizeof narrow);
}

// Keeps a vector in a register. With 16 of them GCC takes a line of weights from memory again for every row, and puts sums
// away; with 32 it does neither.
inline void keep(Lanes& vector) {
#if defined(__x86_64__) && !defined(__AVX512F__)
    asm("" : "+x"(vector));
#endif
}

inline void store_pair(Lanes first, Lanes second, float* out) {
    store(first, out);
    store(second, out + LANES);
}

inline void store_pair(Lanes first, Lanes second, bf16* out) {
    const Bits bits = bf16_above(first) >> 16 | (bf16_above(second) & 0xffff0000u);
    std::memcpy(out, &bits, sizeof bits);
}

// Sums of lanes that are STEP apart: where bit STEP of the index is 0 those of a, where it is 1 those of b.
template <int STEP>
inline Lanes sum_neighbours(Lanes a, Lanes b) {
    typedef int32_t Order __attribute__((vector_size(VECTOR)));
    Order first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i & STEP ? LANES + i - STEP : i;
        second[i] = i & STEP ? LANES + i : i + STEP;
    }
#ifdef __clang__
    Lanes out;
    const auto at = [&](int i) { return i < LANES ? a[i] : b[i - LANES]; };
    for (int i = 0; i < LANES; i++) out[i] = at(first[i]) + at(second[i]);
    return out;
#else
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
#endif
}

// A vector whose lane i is the sum over all lanes of x[i].
template <int STEP = 1>
inline Lanes sum_each(Lanes (&x)[LANES]) {
    for (int i = 0; i < LANES / 2 / STEP; i++) x[i] = sum_neighbours<STEP>(x[2 * i], x[2 * i + 1]);
    if constexpr (2 * STEP < LANES) return sum_each<2 * STEP>(x);
    return x[0];
}

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f;  // together as precise as a double

// e^x for x <= 0, with a relative error below 2e-7: 2^floor times a polynomial for 2^fraction. Written out, because calls
// of std::exp do not vectorise.
inline float exp_nonpositive(float x) {
    x = std::max(x, -87.3f);
    const float whole = std::floor(x * LOG2_E);
    const float part = std::fma(x, LOG2_E, -whole) + x * LOG2_E_REST;
    float p = 2.15440324e-4f;
    p = p * part + 1.24819622e-3f;
    p = p * part + 9.67463454e-3f;
    p = p * part + 5.54852839e-2f;
    p = p * part + 2.40229408e-1f;
    p = p * part + 6.93147028e-1f;
    p = p * part + 1.0f;
    const int32_t scale_bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &scale_bits, sizeof scale);
    return p * scale;
}

}  // namespace
