// A decoder layer's operations between its matrix products, for packed rows on CPU.
//
// Intermediate results are rounded to the tensors' type where transformers rounds them, so that bf16 results agree to the
// last bit.
// Called through ctypes by native.py, which checks shapes.

#include "common.h"
#include "kernels.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // elements from which on several threads are faster than one

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
void norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        if (residual) {
            T* sum = residual + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(to_float(sum[i]) + to_float(from[i]), sum + i);
            from = sum;
        }
        normalise(from, weight, out + row * width, width, eps);
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows * width > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            const float x = to_float(gate[i]), e = exp_nonpositive(-std::fabs(x));
            const float silu = x * (x < 0 ? e : 1.0f) / (1.0f + e);
            store(rounded<T>(silu) * to_float(up[i]), to + i);
        }
    }
}

struct Heads {
    int64_t heads, kv_heads, width, rotary;
    float eps;
};

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
void rope_store(const Heads& s, const T* qkv, const T* q_norm, const T* k_norm, const float* cos, const float* sin,
                const int64_t* positions, const int64_t* slots, T* query, T* keys, T* values, int64_t rows) {
    const int64_t all = s.heads + 2 * s.kv_heads;
#pragma omp parallel for if (rows * all * s.width > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = qkv + row * all * s.width;
        const float *c = cos + positions[row] * s.rotary / 2, *n = sin + positions[row] * s.rotary / 2;
        for (int64_t head = 0; head < s.heads + s.kv_heads; head++, from += s.width) {
            const bool is_query = head < s.heads;
            const T* weight = is_query ? q_norm : k_norm;
            T* to = is_query ? query + (row * s.heads + head) * s.width
                             : keys + (slots[row] * s.kv_heads + head - s.heads) * s.width;
            if (weight) {
                normalise(from, weight, to, s.width, s.eps);
            } else {
                std::memcpy(to, from, s.width * sizeof(T));
            }
            rotate(to, c, n, s.rotary);
        }
        std::memcpy(values + slots[row] * s.kv_heads * s.width, from, s.kv_heads * s.width * sizeof(T));
    }
}

}  // namespace

extern "C" void rrm_norm(int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                         int64_t width, float eps) {
    if (is_bf16) {
        norm((const bf16*)x, (bf16*)residual, (const bf16*)weight, (bf16*)out, rows, width, eps);
    } else {
        norm((const float*)x, (float*)residual, (const float*)weight, (float*)out, rows, width, eps);
    }
}

extern "C" void rrm_silu_mul(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width) {
    if (is_bf16) {
        silu_mul((const bf16*)gate_up, (bf16*)out, rows, width);
    } else {
        silu_mul((const float*)gate_up, (float*)out, rows, width);
    }
}

extern "C" void rrm_rope_store(int is_bf16, const void* qkv, const void* q_norm, const void* k_norm, const float* cos,
                               const float* sin, const int64_t* positions, const int64_t* slots, void* query,
                               void* keys, void* values, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                               int64_t rotary, float eps) {
    const Heads shape{heads, kv_heads, width, rotary, eps};
    if (is_bf16) {
        rope_store(shape, (const bf16*)qkv, (const bf16*)q_norm, (const bf16*)k_norm, cos, sin, positions, slots,
                   (bf16*)query, (bf16*)keys, (bf16*)values, rows);
    } else {
        rope_store(shape, (const float*)qkv, (const float*)q_norm, (const float*)k_norm, cos, sin, positions, slots,
                   (float*)query, (float*)keys, (float*)values, rows);
    }
}
