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

// Calls f(token, pointer to the token's line) for the tokens first..length of one kv head; lines are `stride` apart.
// Meanwhile the next block's lines, LINE bytes each, are fetched.
template <int LINE = 0, typename T, typename F>
inline void each_token(const T* cache, const int32_t* table, int64_t first, int64_t length, int64_t block_size,
                       int64_t stride, F f) {
    for (int64_t at = first; at < length;) {
        const int64_t block = at / block_size, offset = at % block_size, stop = std::min(length, (block + 1) * block_size);
        const T* line = cache + (table[block] * block_size + offset) * stride;
        const int64_t ahead = stop < length ? (table[block + 1] - table[block]) * block_size * stride : 0;
        for (; at < stop; at++, line += stride) {
            for (int i = 0; i < LINE; i += 64) __builtin_prefetch((const char*)(line + ahead) + i);
            f(at - first, line);
        }
    }
}

template <int WIDTH, typename T>
inline void load_line(const T* from, Lanes (&out)[WIDTH / LANES]) {
    int i = 0;
    for (; i + 1 < WIDTH / LANES; i += 2) load_pair(from + i * LANES, out[i], out[i + 1]);
    if (i < WIDTH / LANES) out[i] = load(from + i * LANES);
}

template <int WIDTH, typename T>
inline void store_line(const Lanes (&line)[WIDTH / LANES], T* out) {
    int i = 0;
    for (; i + 1 < WIDTH / LANES; i += 2) store_pair(line[i], line[i + 1], out + i * LANES);
    if (i < WIDTH / LANES) store(line[i], out + i * LANES);
}

// scores[h][i] = scale * query[h] . key[i] for HEADS query heads; rows of scores are `room` apart, a multiple of LANES.
// WIDTH is known at compile time and a multiple of LANES.
template <typename T, int WIDTH, int HEADS>
void score(const T* query, float scale, const T* keys, float* scores, int64_t room, const int32_t* table, int64_t first,
           int64_t length, int64_t block_size, int64_t stride) {
    Lanes q[HEADS][WIDTH / LANES], sums[HEADS][LANES] = {};
    for (int h = 0; h < HEADS; h++) {
        load_line<WIDTH>(query + h * WIDTH, q[h]);
        for (Lanes& part : q[h]) part *= scale;
    }
    each_token<WIDTH * sizeof(T)>(keys, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        Lanes key[WIDTH / LANES];
        load_line<WIDTH>(line, key);
        for (int h = 0; h < HEADS; h++) {
            Lanes sum = q[h][0] * key[0];
            for (int d = 1; d < WIDTH / LANES; d++) sum += q[h][d] * key[d];
            sums[h][i % LANES] = sum;
        }
        if (i % LANES == LANES - 1 || i == length - first - 1) {
            for (int h = 0; h < HEADS; h++) store(sum_each(sums[h]), scores + h * room + i / LANES * LANES);
        }
    });
}

// out[h] = sum over i of weights[h][i] * value[i], the sums kept in registers.
template <typename T, int WIDTH, int HEADS>
void mix(const float* weights, int64_t room, const T* values, T* out, const int32_t* table, int64_t first,
         int64_t length, int64_t block_size, int64_t stride) {
    Lanes sums[HEADS][WIDTH / LANES] = {};
    each_token<WIDTH * sizeof(T)>(values, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        Lanes value[WIDTH / LANES];
        load_line<WIDTH>(line, value);
        for (int h = 0; h < HEADS; h++) {
            for (int d = 0; d < WIDTH / LANES; d++) sums[h][d] += weights[h * room + i] * value[d];
        }
    });
    for (int h = 0; h < HEADS; h++) store_line<WIDTH>(sums[h], out + h * WIDTH);
}

// The same for any width, one head at a time.
template <typename T>
void score_any(const float* q, const T* keys, float* scores, const int32_t* table, int64_t first, int64_t length,
               int64_t block_size, int64_t stride, int64_t width) {
    each_token(keys, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < width; d++) dot += q[d] * to_float(line[d]);
        scores[i] = dot;
    });
}

template <typename T>
void mix_any(const float* weights, const T* values, float* out, const int32_t* table, int64_t first, int64_t length,
             int64_t block_size, int64_t stride, int64_t width) {
    std::fill(out, out + width, 0.0f);
    each_token(values, table, first, length, block_size, stride, [&](int64_t i, const T* line) {
#pragma omp simd
        for (int64_t d = 0; d < width; d++) out[d] += weights[i] * to_float(line[d]);
    });
}

// Scores to weights; `room`, a multiple of LANES, is how many there is space for: whole vectors are worked on.
void soften(float* row, int64_t count, int64_t room, float softcap, const float* sink) {
    if (softcap > 0) {
        for (int64_t i = 0; i < count; i++) row[i] = softcap * std::tanh(row[i] / softcap);
    }
    std::fill(row + count, row + room, -INFINITY);
    Lanes tops = load(row);
    for (int64_t i = LANES; i < room; i += LANES) tops = tops > load(row + i) ? tops : load(row + i);
    float top = sink ? *sink : row[0], total = 0;
    for (int i = 0; i < LANES; i++) top = std::max(top, tops[i]);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < room; i++) {
        row[i] = exp_nonpositive(row[i] - top);
        total += row[i];
    }
    if (sink) total += exp_nonpositive(*sink - top);
    const float inverse = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < room; i++) row[i] *= inverse;
}

// All query heads of one kv head of one row; WIDTH 0: not known at compile time.
template <typename T, int WIDTH>
void attend(const Shape& s, const T* query, const T* keys, const T* values, T* out, const int32_t* table,
            int64_t length, const float* sinks) {
    const int64_t group = s.heads / s.kv_heads, key_width = s.key_width, value_width = s.value_width;
    const int64_t first = s.window ? std::max<int64_t>(0, length - s.window) : 0, count = length - first;
    const int64_t key_stride = s.kv_heads * key_width, value_stride = s.kv_heads * value_width;
    const int64_t room = (count + LANES - 1) / LANES * LANES;
    thread_local std::vector<float> memory;
    memory.resize(4 * room + key_width + value_width);
    float* const scores = memory.data();
    for (int64_t g = 0, step; g < group; g += step) {
        const T* q = query + g * key_width;
        T* result = out + g * value_width;
        const auto soften_all = [&] {
            for (int64_t h = 0; h < step; h++) soften(scores + h * room, count, room, s.softcap, sinks ? sinks + g + h : nullptr);
        };
        if constexpr (WIDTH == 0) {
            step = 1;
            float *one = scores + room, *sums = one + key_width;
            for (int64_t i = 0; i < key_width; i++) one[i] = to_float(q[i]) * s.scale;
            score_any(one, keys, scores, table, first, length, s.block_size, key_stride, key_width);
            soften_all();
            mix_any(scores, values, sums, table, first, length, s.block_size, value_stride, value_width);
            for (int64_t i = 0; i < value_width; i++) store(sums[i], result + i);
        } else {
            // As many heads at once as their sums fit into the registers.
            step = std::min<int64_t>(group - g, WIDTH / LANES <= 6 ? 4 : 2);
            const auto run = [&](auto score_heads, auto mix_heads) {
                score_heads(q, s.scale, keys, scores, room, table, first, length, s.block_size, key_stride);
                soften_all();
                mix_heads(scores, room, values, result, table, first, length, s.block_size, value_stride);
            };
            switch (step) {
                case 4: run(score<T, WIDTH, 4>, mix<T, WIDTH, 4>); break;
                case 3: run(score<T, WIDTH, 3>, mix<T, WIDTH, 3>); break;
                case 2: run(score<T, WIDTH, 2>, mix<T, WIDTH, 2>); break;
                default: run(score<T, WIDTH, 1>, mix<T, WIDTH, 1>);
            }
        }
    }
}

template <typename T, int WIDTH>
void decode(const Shape& s, const T* query, const T* keys, const T* values, T* out, const int32_t* tables,
            const int32_t* lengths, const float* sinks) {
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
                      const int32_t* tables, const int32_t* lengths, const float* sinks) {
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
                                 const int32_t* tables, const int32_t* lengths, const float* sinks, int64_t rows,
                                 int64_t table_width, int64_t block_size, int64_t heads, int64_t kv_heads,
                                 int64_t key_width, int64_t value_width, float scale, float softcap, int64_t window) {
    const Shape shape{rows,      table_width, block_size, heads,   kv_heads,
                      key_width, value_width, scale,      softcap, window};
    (is_bf16 ? decode_any_width<bf16> : decode_any_width<float>)(shape, query, keys, values, out, tables, lengths, sinks);
}
