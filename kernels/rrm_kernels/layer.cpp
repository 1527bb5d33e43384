// A decoder layer's operations between its matrix products, for packed rows on CPU.
//
// Intermediate results are rounded to the tensors' type where transformers rounds them, so that bf16 results agree to the
// last bit.
// Called through ctypes by native.py, which checks shapes.

#include "common.h"
#include "kernels.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // elements from which on several threads are faster than one
constexpr int64_t PIECE = 512;              // elements of a row that a thread takes at once

template <typename T>
inline float rounded(float x) {
    T out;
    store(x, &out);
    return to_float(out);
}

template <typename T>
inline void normalise(const T* x, const T* weight, T* out, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt(squares / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) store(to_float(weight[i]) * rounded<T>(to_float(x[i]) * scale), out + i);
}

template <typename T>
void norm(team::Member& me, const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
    me.share(rows, [&](int64_t row) {
        const T* from = x + row * width;
        if (residual) {
            T* sum = residual + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(to_float(sum[i]) + to_float(from[i]), sum + i);
            from = sum;
        }
        normalise(from, weight, out + row * width, width, eps);
    });
}

template <typename T>
void silu_mul(team::Member& me, const T* gate_up, T* out, int64_t rows, int64_t width) {
    const int64_t pieces = (width + PIECE - 1) / PIECE;
    me.share(rows * pieces, [&](int64_t item) {
        const int64_t row = item / pieces, first = item % pieces * PIECE, count = std::min(PIECE, width - first);
        const T *gate = gate_up + row * 2 * width + first, *up = gate + width;
        T* to = out + row * width + first;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            const float x = to_float(gate[i]), e = exp_nonpositive(-std::fabs(x));
            const float silu = x * (x < 0 ? e : 1.0f) / (1.0f + e);
            store(rounded<T>(silu) * to_float(up[i]), to + i);
        }
    });
}

// Half-split (NeoX) rotation of one head in place; cos and sin hold rotary / 2 values.
template <typename T>
inline void rotate(T* head, const float* cos, const float* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = to_float(head[i]), second = to_float(head[i + half]);
        store(rounded<T>(first * cos[i]) + rounded<T>(-second * sin[i]), head + i);
        store(rounded<T>(second * cos[i]) + rounded<T>(first * sin[i]), head + i + half);
    }
}

template <typename T>
void rope_store(team::Member& me, const team::Rope& s, const T* qkv, T* query, T* keys, T* values, int64_t rows) {
    const int64_t all = s.heads + 2 * s.kv_heads;
    const auto move = [&](const T* from, T* to, const void* norm, int64_t row) {
        if (norm) {
            normalise(from, (const T*)norm, to, s.width, s.eps);
        } else {
            std::memcpy(to, from, s.width * sizeof(T));
        }
        const int64_t at = s.positions[row] * s.rotary / 2;
        rotate(to, s.cos + at, s.sin + at, s.rotary);
    };
    me.share(rows * all, [&](int64_t item) {
        const int64_t row = item / all, head = item % all, key = head - s.heads, value = key - s.kv_heads;
        const T* from = qkv + item * s.width;
        const auto cached = [&](T* cache, int64_t kv_head) {
            return cache + (s.slots[row] * s.kv_heads + kv_head) * s.width;
        };
        if (key < 0) {
            move(from, query + (row * s.heads + head) * s.width, s.q_norm, row);
        } else if (value < 0) {
            move(from, cached(keys, key), s.k_norm, row);
        } else {
            std::memcpy(cached(values, value), from, s.width * sizeof(T));
        }
    });
}

}  // namespace

void team::norm(Member& me, int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                int64_t width, float eps) {
    if (is_bf16) {
        ::norm(me, (const bf16*)x, (bf16*)residual, (const bf16*)weight, (bf16*)out, rows, width, eps);
    } else {
        ::norm(me, (const float*)x, (float*)residual, (const float*)weight, (float*)out, rows, width, eps);
    }
}

void team::silu_mul(Member& me, int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width) {
    if (is_bf16) {
        ::silu_mul(me, (const bf16*)gate_up, (bf16*)out, rows, width);
    } else {
        ::silu_mul(me, (const float*)gate_up, (float*)out, rows, width);
    }
}

void team::rope_store(Member& me, int is_bf16, const Rope& rope, const void* qkv, void* query, void* keys,
                      void* values, int64_t rows) {
    if (is_bf16) {
        ::rope_store(me, rope, (const bf16*)qkv, (bf16*)query, (bf16*)keys, (bf16*)values, rows);
    } else {
        ::rope_store(me, rope, (const float*)qkv, (float*)query, (float*)keys, (float*)values, rows);
    }
}

extern "C" void rrm_norm(int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                         int64_t width, float eps) {
    team::run(rows * width > WORTH_THREADS, [&](team::Member& me) {
        team::norm(me, is_bf16, x, residual, weight, out, rows, width, eps);
    });
}

extern "C" void rrm_silu_mul(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width) {
    team::run(rows * width > WORTH_THREADS,
              [&](team::Member& me) { team::silu_mul(me, is_bf16, gate_up, out, rows, width); });
}

extern "C" void rrm_rope_store(int is_bf16, const void* qkv, const void* q_norm, const void* k_norm, const float* cos,
                               const float* sin, const int64_t* positions, const int64_t* slots, void* query,
                               void* keys, void* values, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                               int64_t rotary, float eps) {
    const team::Rope rope{q_norm, k_norm, cos, sin, positions, slots, heads, kv_heads, width, rotary, eps};
    team::run(rows * (heads + 2 * kv_heads) * width > WORTH_THREADS,
              [&](team::Member& me) { team::rope_store(me, is_bf16, rope, qkv, query, keys, values, rows); });
}
