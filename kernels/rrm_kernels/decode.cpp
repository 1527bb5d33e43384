// Paged decode attention on CPU: one query token a sequence, K and V read in place from the blocks.
//
// Caches are [blocks, block_size, kv_heads, width]; query and out are [rows, heads, width]. Scores and sums are fp32
// whatever the caches hold. Called through ctypes by native.py, which checks shapes.

#include "common.h"

namespace {

struct Shape {
    int64_t rows, table_width, block_size, heads, kv_heads, key_width, value_width;
    float scale, softcap;  // softcap 0: none
    int64_t window;        // 0: none
};

// Calls f(token, pointer to the token's line) for the tokens first..length of one kv head; lines are head_stride apart.
template <typename T, typename F>
inline void each_token(const T* cache, const int64_t* table, int64_t first, int64_t length, int64_t block_size,
                       int64_t stride, F f) {
    for (int64_t at = first; at < length;) {
        const int64_t offset = at % block_size, stop = std::min(length, at - offset + block_size);
        const T* line = cache + (table[at / block_size] * block_size + offset) * stride;
        for (; at < stop; at++, line += stride) f(at - first, line);
    }
}

// scores[h][i] = query[h] . key[i] for HEADS query heads; WIDTH is known at compile time and a multiple of LANES.
template <typename T, int WIDTH, int HEADS>
void score(const float* q, const T* keys, float* scores, const int64_t* table, int64_t first, int64_t length,
           int64_t block_size, int64_t stride) {
    each_token(keys, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        Lanes sums[HEADS] = {};
        for (int d = 0; d < WIDTH; d += LANES) {
            const Lanes key = load(line + d);
            for (int h = 0; h < HEADS; h++) sums[h] += load(q + h * WIDTH + d) * key;
        }
        for (int h = 0; h < HEADS; h++) scores[h * (length - first) + i] = sum(sums[h]);
    });
}

// out[h] = sum over i of weights[h][i] * value[i], the sums kept in registers.
template <typename T, int WIDTH, int HEADS>
void mix(const float* weights, const T* values, float* out, const int64_t* table, int64_t first, int64_t length,
         int64_t block_size, int64_t stride) {
    Lanes sums[HEADS][WIDTH / LANES] = {};
    each_token(values, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        for (int d = 0; d < WIDTH / LANES; d++) {
            const Lanes value = load(line + d * LANES);
            for (int h = 0; h < HEADS; h++) sums[h][d] += weights[h * (length - first) + i] * value;
        }
    });
    std::memcpy(out, sums, sizeof sums);
}

// The same for any width, one head at a time.
template <typename T>
void score_any(const float* q, const T* keys, float* scores, const int64_t* table, int64_t first, int64_t length,
               int64_t block_size, int64_t stride, int64_t width) {
    each_token(keys, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < width; d++) dot += q[d] * to_float(line[d]);
        scores[i] = dot;
    });
}

template <typename T>
void mix_any(const float* weights, const T* values, float* out, const int64_t* table, int64_t first, int64_t length,
             int64_t block_size, int64_t stride, int64_t width) {
    std::fill(out, out + width, 0.0f);
    each_token(values, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
#pragma omp simd
        for (int64_t d = 0; d < width; d++) out[d] += weights[i] * to_float(line[d]);
    });
}

void soften(float* row, int64_t count, float softcap, const float* sink) {
    if (softcap > 0) {
        for (int64_t i = 0; i < count; i++) row[i] = softcap * std::tanh(row[i] / softcap);
    }
    float top = sink ? *sink : row[0], total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) top = std::max(top, row[i]);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        row[i] = exp_nonpositive(row[i] - top);
        total += row[i];
    }
    if (sink) total += exp_nonpositive(*sink - top);
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) row[i] *= inverse;
}

// All query heads of one kv head of one row; WIDTH 0: not known at compile time.
template <typename T, int WIDTH>
void attend(const Shape& s, const T* query, const T* keys, const T* values, T* out, const int64_t* table,
            int64_t length, const float* sinks) {
    const int64_t group = s.heads / s.kv_heads, key_width = s.key_width, value_width = s.value_width;
    const int64_t first = s.window ? std::max<int64_t>(0, length - s.window) : 0, count = length - first;
    const int64_t key_stride = s.kv_heads * key_width, value_stride = s.kv_heads * value_width;
    thread_local std::vector<float> memory;
    memory.resize(group * (key_width + value_width + count));
    float* q = memory.data();
    float* sums = q + group * key_width;
    float* scores = sums + group * value_width;
    for (int64_t i = 0; i < group * key_width; i++) q[i] = to_float(query[i]) * s.scale;
    for (int64_t g = 0, step; g < group; g += step) {
        const float* one = q + g * key_width;
        float *row = scores + g * count, *result = sums + g * value_width;
        const auto each = [&](auto score_heads, auto mix_heads) {
            score_heads(one, keys, row, table, first, length, s.block_size, key_stride);
            for (int64_t h = 0; h < step; h++) soften(row + h * count, count, s.softcap, sinks ? sinks + g + h : nullptr);
            mix_heads(row, values, result, table, first, length, s.block_size, value_stride);
        };
        if constexpr (WIDTH == 0) {
            step = 1;
            score_any(one, keys, row, table, first, length, s.block_size, key_stride, key_width);
            soften(row, count, s.softcap, sinks ? sinks + g : nullptr);
            mix_any(row, values, result, table, first, length, s.block_size, value_stride, value_width);
        } else {
            // As many heads at once as their sums fit into the registers.
            step = std::min<int64_t>(group - g, WIDTH <= 96 ? 4 : 2);
            switch (step) {
                case 4: each(score<T, WIDTH, 4>, mix<T, WIDTH, 4>); break;
                case 3: each(score<T, WIDTH, 3>, mix<T, WIDTH, 3>); break;
                case 2: each(score<T, WIDTH, 2>, mix<T, WIDTH, 2>); break;
                default: each(score<T, WIDTH, 1>, mix<T, WIDTH, 1>);
            }
        }
    }
    for (int64_t i = 0; i < group * value_width; i++) store(sums[i], out + i);
}

template <typename T, int WIDTH>
void decode(const Shape& s, const T* query, const T* keys, const T* values, T* out, const int64_t* tables,
            const int64_t* lengths, const float* sinks) {
    const int64_t group = s.heads / s.kv_heads;
    int64_t tokens = 0;
    for (int64_t row = 0; row < s.rows; row++) tokens += lengths[row];
    const bool worth_threads = tokens * s.heads * s.key_width > 1 << 18;
#pragma omp parallel for collapse(2) schedule(dynamic) if (worth_threads)
    for (int64_t row = 0; row < s.rows; row++) {
        for (int64_t head = 0; head < s.kv_heads; head++) {
            attend<T, WIDTH>(s, query + (row * s.heads + head * group) * s.key_width, keys + head * s.key_width,
                                  values + head * s.value_width, out + (row * s.heads + head * group) * s.value_width,
                                  tables + row * s.table_width, lengths[row], sinks ? sinks + head * group : nullptr);
        }
    }
}

template <typename T>
void decode_any_width(const Shape& s, const void* query, const void* keys, const void* values, void* out,
                      const int64_t* tables, const int64_t* lengths, const float* sinks) {
    auto run = decode<T, 0>;
    if (s.key_width == s.value_width) {
        switch (s.key_width) {
            case 48: run = decode<T, 48>; break;
            case 64: run = decode<T, 64>; break;
            case 80: run = decode<T, 80>; break;
            case 96: run = decode<T, 96>; break;
            case 128: run = decode<T, 128>; break;
            case 256: run = decode<T, 256>; break;
        }
    }
    run(s, static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values),
        static_cast<T*>(out), tables, lengths, sinks);
}

}  // namespace

extern "C" void rrm_paged_decode(int is_bf16, const void* query, const void* keys, const void* values, void* out,
                                 const int64_t* tables, const int64_t* lengths, const float* sinks, int64_t rows,
                                 int64_t table_width, int64_t block_size, int64_t heads, int64_t kv_heads,
                                 int64_t key_width, int64_t value_width, float scale, float softcap, int64_t window) {
    const Shape shape{rows,      table_width, block_size, heads,   kv_heads,
                      key_width, value_width, scale,      softcap, window};
    (is_bf16 ? decode_any_width<bf16> : decode_any_width<float>)(shape, query, keys, values, out, tables, lengths, sinks);
}
