// Paged decode attention on CPU: one query token per sequence, K and V read in place from the blocks.
//
// Caches are [blocks, block_size, kv_heads, width]; query and out are [rows, heads, width]. Scores and sums are fp32
// whatever the caches hold. Compiled for each type by itself, because it takes most of the library's compile time.

#pragma once

#include <type_traits>

#include "common.h"
#include "kernels.h"

namespace {

using Shape = team::Decode;

// Tokens that are processed at once, by one group of heads after another, while their keys or values stay in the
// processor's cache. A multiple of LANES for every vector width.
constexpr int64_t TILE = 64;

// What to prefetch meanwhile: of the keys or values one tile ahead, up to the token `known`, every `every`-th, beginning
// with number `phase`.
struct Fetch {
    int64_t known = 0;
    int every = 1, phase = 0;
};

// Calls f(token - first, pointer to its key or value) for the tokens first..length of one kv head. These vectors are
// `stride` elements apart, and of LINE bytes if they are to be prefetched.
template <int LINE = 0, typename T, typename F>
inline void each_token(const T* cache, const int32_t* table, int64_t first, int64_t length, int64_t block_size,
                       int64_t stride, F f, const Fetch& fetch = {}) {
    const int64_t hop = std::max<int64_t>(1, TILE / block_size);
    int wait = fetch.phase;
    for (int64_t at = first; at < length;) {
        const int64_t block = at / block_size, offset = at % block_size, stop = std::min(length, (block + 1) * block_size);
        const T* line = cache + (table[block] * block_size + offset) * stride;
        const bool follows = (block + hop) * block_size < fetch.known;
        const int64_t ahead = follows ? int64_t(table[block + hop] - table[block]) * block_size * stride : 0;
        for (; at < stop; at++, line += stride) {
            if (LINE > 0 && wait-- == 0) {
                for (int i = 0; i < LINE; i += 64) __builtin_prefetch((const char*)(line + ahead) + i);
                wait = fetch.every - 1;
            }
            f(at - first, line);
        }
    }
}

template <int N>
using Heads = std::integral_constant<int, N>;

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

// scores[h][i] = query[h] . key[i] for HEADS query heads; queries are fp32 in the order of load_line, and rows of scores
// are `room` apart, a multiple of LANES. WIDTH is a multiple of LANES.
template <typename T, int WIDTH, int HEADS>
void score(const float* query, const T* keys, float* scores, int64_t room, const int32_t* table, int64_t first,
           int64_t length, int64_t block_size, int64_t stride, const Fetch& fetch) {
    Lanes q[HEADS][WIDTH / LANES], sums[HEADS][LANES];
    if ((length - first) % LANES) std::memset(sums, 0, sizeof sums);  // the last vector may be partial
    for (int h = 0; h < HEADS; h++) {
        for (int d = 0; d < WIDTH / LANES; d++) q[h][d] = load(query + h * WIDTH + d * LANES);
    }
    const auto one = [&](int64_t i, const T* line) {
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
    };
    each_token<WIDTH * sizeof(T)>(keys, table, first, length, block_size, stride, one, fetch);
}

// sums[h] += sum over i of weights[h][i] * value[i], fp32 in the order of load_line, in registers during the loop.
template <typename T, int WIDTH, int HEADS>
void mix(const float* weights, int64_t room, const T* values, float* sums, const int32_t* table, int64_t first,
         int64_t length, int64_t block_size, int64_t stride, const Fetch& fetch) {
    Lanes held[HEADS][WIDTH / LANES];
    for (int h = 0; h < HEADS; h++) {
        for (int d = 0; d < WIDTH / LANES; d++) held[h][d] = load(sums + h * WIDTH + d * LANES);
    }
    const auto one = [&](int64_t i, const T* line) {
        Lanes value[WIDTH / LANES];
        load_line<WIDTH>(line, value);
        for (int h = 0; h < HEADS; h++) {
            for (int d = 0; d < WIDTH / LANES; d++) held[h][d] += weights[h * room + i] * value[d];
        }
    };
    each_token<WIDTH * sizeof(T)>(values, table, first, length, block_size, stride, one, fetch);
    for (int h = 0; h < HEADS; h++) {
        for (int d = 0; d < WIDTH / LANES; d++) store(held[h][d], sums + h * WIDTH + d * LANES);
    }
}

// score and mix for any width, one head at a time.
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

// Softmax of `count` scores in place. The row has space for `room` of them, a multiple of LANES, so that only whole vectors
// are computed.
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

// What all query heads of one row share. `first` to `length` are the tokens they attend to.
struct Context {
    const int32_t* table;
    int64_t first, length, count, room;

    Context(const Shape& s, const int32_t* table, int64_t length)
        : table(table), first(s.window ? std::max<int64_t>(0, length - s.window) : 0), length(length),
          count(length - first), room((count + LANES - 1) / LANES * LANES) {}

    template <typename F>  // f(first token of a tile, the one after its last)
    void each_tile(F f) const {
        for (int64_t at = first; at < length; at += TILE) f(at, std::min(length, at + TILE));
    }
};

// All query heads of one kv head of one row, tile by tile: K and V come from memory once.
template <typename T, int WIDTH>
void attend(const Shape& s, const T* query, const T* keys, const T* values, T* out, const Context& c, const float* sinks) {
    const int64_t group = s.heads / s.kv_heads, stride = s.kv_heads * WIDTH;
    thread_local std::vector<float> memory;
    memory.resize(group * (c.room + 2 * WIDTH));
    float *const scores = memory.data(), *const q = scores + group * c.room, *const sums = q + group * WIDTH;
    for (int64_t g = 0; g < group; g++) {
        Lanes line[WIDTH / LANES];
        load_line<WIDTH>(query + g * WIDTH, line);
        for (int d = 0; d < WIDTH / LANES; d++) store(line[d] * s.scale, q + g * WIDTH + d * LANES);
    }
    std::fill(sums, sums + group * WIDTH, 0.0f);
    // As many heads at once as have room for their sums in registers. Each of these steps prefetches its share of the next
    // tile.
    const auto in_steps = [&](auto four, auto three, auto two, auto one) {
        constexpr int64_t most = WIDTH / LANES <= 6 ? 4 : 2;
        Fetch fetch{c.length, int((group + most - 1) / most), 0};
        for (int64_t g = 0, step; g < group; g += step, fetch.phase++) {
            step = std::min(group - g, most);
            step == 4 ? four(g, fetch) : step == 3 ? three(g, fetch) : step == 2 ? two(g, fetch) : one(g, fetch);
        }
    };
    c.each_tile([&](int64_t at, int64_t stop) {
        const auto run = [&](auto heads) {
            return [&, heads](int64_t g, const Fetch& fetch) {
                score<T, WIDTH, decltype(heads)::value>(q + g * WIDTH, keys, scores + g * c.room + at - c.first, c.room,
                                                        c.table, at, stop, s.block_size, stride, fetch);
            };
        };
        in_steps(run(Heads<4>{}), run(Heads<3>{}), run(Heads<2>{}), run(Heads<1>{}));
    });
    for (int64_t g = 0; g < group; g++) {
        soften(scores + g * c.room, c.count, c.room, s.softcap, sinks ? sinks + g : nullptr);
    }
    c.each_tile([&](int64_t at, int64_t stop) {
        const auto run = [&](auto heads) {
            return [&, heads](int64_t g, const Fetch& fetch) {
                mix<T, WIDTH, decltype(heads)::value>(scores + g * c.room + at - c.first, c.room, values, sums + g * WIDTH,
                                                      c.table, at, stop, s.block_size, stride, fetch);
            };
        };
        in_steps(run(Heads<4>{}), run(Heads<3>{}), run(Heads<2>{}), run(Heads<1>{}));
    });
    for (int64_t g = 0; g < group; g++) {
        Lanes line[WIDTH / LANES];
        for (int d = 0; d < WIDTH / LANES; d++) line[d] = load(sums + g * WIDTH + d * LANES);
        store_line<WIDTH>(line, out + g * WIDTH);
    }
}

// attend for widths that are not known at compile time.
template <typename T>
void attend_any(const Shape& s, const T* query, const T* keys, const T* values, T* out, const Context& c,
                const float* sinks) {
    thread_local std::vector<float> memory;
    memory.resize(c.room + s.key_width + s.value_width);
    float *const scores = memory.data(), *const q = scores + c.room, *const sums = q + s.key_width;
    for (int64_t g = 0; g < s.heads / s.kv_heads; g++) {
        for (int64_t d = 0; d < s.key_width; d++) q[d] = to_float(query[g * s.key_width + d]) * s.scale;
        score_any(q, keys, scores, c.table, c.first, c.length, s.block_size, s.kv_heads * s.key_width, s.key_width);
        soften(scores, c.count, c.room, s.softcap, sinks ? sinks + g : nullptr);
        mix_any(scores, values, sums, c.table, c.first, c.length, s.block_size, s.kv_heads * s.value_width, s.value_width);
        for (int64_t d = 0; d < s.value_width; d++) store(sums[d], out + g * s.value_width + d);
    }
}

template <typename T, int WIDTH>
void decode(team::Member& me, const Shape& s, const T* query, const T* keys, const T* values, T* out) {
    const int64_t group = s.heads / s.kv_heads;
    me.share(s.rows * s.kv_heads, [&](int64_t item) {
        const int64_t row = item / s.kv_heads, head = item % s.kv_heads, at = item * group;
        const Context context(s, s.tables + row * s.table_width, s.lengths[row]);
        const auto run = [&](auto attend) {
            attend(s, query + at * s.key_width, keys + head * s.key_width, values + head * s.value_width,
                   out + at * s.value_width, context, s.sinks ? s.sinks + head * group : nullptr);
        };
        if constexpr (WIDTH == 0) run(attend_any<T>);
        else run(attend<T, WIDTH>);
    });
}

template <typename T>
void decode_any_width(team::Member& me, const Shape& s, const void* query, const void* keys, const void* values, void* out) {
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
    run(me, s, static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values),
        static_cast<T*>(out));
}

}  // namespace
