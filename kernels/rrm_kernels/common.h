// What the compiled CPU kernels share: bf16, sixteen fp32 lanes, an exponential that vectorises.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

inline Lanes load(const float* from) {
    Lanes out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Lanes load(const bf16* from) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Lanes)(__builtin_convertvector(bits, Wide) << 16);
}

typedef uint32_t Bits __attribute__((vector_size(64)));

// 2 * LANES neighbours as two vectors: fp32 as they lie, of bf16 the even ones and the odd ones, which costs less.
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

inline Bits bf16_above(Lanes x) {  // the upper halves are x rounded to nearest, ties to even
    const Bits bits = (Bits)x;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(Lanes x, float* out) { std::memcpy(out, &x, sizeof x); }

inline void store(Lanes x, bf16* out) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    const Narrow narrow = __builtin_convertvector(bf16_above(x) >> 16, Narrow);
    std::memcpy(out, &narrow, sizeof narrow);
}

inline void store_pair(Lanes first, Lanes second, float* out) {
    store(first, out);
    store(second, out + LANES);
}

inline void store_pair(Lanes first, Lanes second, bf16* out) {
    const Bits bits = bf16_above(first) >> 16 | (bf16_above(second) & 0xffff0000u);
    std::memcpy(out, &bits, sizeof bits);
}

inline float sum(Lanes x) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    const Half half = halves[0] + halves[1];
    Quarter quarters[2];
    std::memcpy(quarters, &half, sizeof half);
    const Quarter quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

#if defined(__GNUC__) && !defined(__clang__)
template <int STEP>
inline Lanes sum_neighbours(Lanes a, Lanes b) {  // lanes STEP apart added up; those of b take the place of a's second
    typedef int32_t Order __attribute__((vector_size(64)));
    Order first, second;
    for (int i = 0; i < LANES; i++) {
        first[i] = i & STEP ? LANES + i - STEP : i;
        second[i] = i & STEP ? LANES + i : i + STEP;
    }
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}

inline Lanes sum_each(Lanes (&x)[LANES]) {  // lane i: the sum of x[i]
    for (int i = 0; i < 8; i++) x[i] = sum_neighbours<1>(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4; i++) x[i] = sum_neighbours<2>(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 2; i++) x[i] = sum_neighbours<4>(x[2 * i], x[2 * i + 1]);
    return sum_neighbours<8>(x[0], x[1]);
}
#else
inline Lanes sum_each(Lanes (&x)[LANES]) {
    Lanes out;
    for (int i = 0; i < LANES; i++) out[i] = sum(x[i]);
    return out;
}
#endif

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.92596303e-8f;  // together as exact as a double

// e^x for x <= 0, within 2e-7 relative: 2^floor times a polynomial for 2^fraction. Written out so that it vectorises.
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
