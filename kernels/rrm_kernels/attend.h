// Attention of one row's query heads to some of its tokens, whose K and V lie in blocks: see decode.h. Scores and sums are
// fp32 whatever the caches hold.

#pragma once

#include <type_traits>

#include "common.h"
#include "kernels.h"

namespace {

using Shape = team::Decode;

// Tokens that are processed at once, by one group of heads after another, while their keys or values stay in the
// processor's first cache. A multiple of three vectors of scores, which is as many as a loop takes at once.
constexpr int TILE = 48;
static_assert(team::SPAN % TILE == 0);

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 16;  // vectors of sums that a loop holds: half of the registers
#else
constexpr int SUMS = 12;  // of 16, for with fewer sums multiply-adds wait for each other
#endif

// Where the keys or values of some tokens lie, from the first head of an item on.
template <typename T>
struct Tile {
    const T* lines[TILE];
    int count = 0;

    // The tokens from `at` on, TILE of them or those before `length`. `stride` is between tokens.
    void find(const T* cache, const int32_t* table, int64_t at, int64_t length, int64_t block_size, int64_t stride) {
        const int64_t stop = std::min(at + TILE, length);
        for (count = 0; at < stop;) {
            const int64_t block = at / block_size, offset = at % block_size, end = std::min(stop, (block + 1) * block_size);
            const T* line = cache + (table[block] * block_size + offset) * stride;
            for (; at < end; at++, line += stride) lines[count++] = line;
        }
    }
};

// Fetches the next tile from memory, in the order in which it lies there, while this one is being processed: PIECE bytes
// for every token of every head.
template <int PIECE>
struct Ahead {
    const char *const *line, *const *end;
    int64_t bytes;  // of a line
    const char *at = nullptr, *stop = nullptr;

    template <typename T>
    Ahead(const Tile<T>& next, int64_t width)
        : line((const char* const*)next.lines), end(line + next.count), bytes(width * sizeof(T)) {}

    inline void fetch(int pieces) {
        for (; pieces > 0; pieces--) {
            if (at == stop) {
                if (line == end) return;
                at = *line++;
                stop = at + bytes;
            }
            UNROLL for (int i = 0; i < PIECE; i += 64) __builtin_prefetch(at + i);
            at += PIECE;
        }
    }
};

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

// One head's keys or values of a tile side by side as fp32, in the order of load_line.
template <int WIDTH, typename T>
void widen(const Tile<T>& tile, int64_t head, float* out) {
    for (int i = 0; i < tile.count; i++, out += WIDTH) {
        Lanes line[WIDTH / LANES];
        load_line<WIDTH>(tile.lines[i] + head * WIDTH, line);
        for (int d = 0; d < WIDTH / LANES; d++) store(line[d], out + d * LANES);
    }
}

// How many keys a loop takes at once for that many heads. Divides a vector of scores, or three of them.
constexpr int keys_of(int heads) {
    const int most = std::min<int>(SUMS / heads, LANES);
    return most >= 8 ? 8 : most >= 6 ? 6 : std::min(most, 4);
}

// held[h][k] += query[h] * key[k], a vector of both. Rows of either are WIDTH apart.
template <int WIDTH, int HEADS, int KEYS>
inline void multiply(const float* query, const float* keys, Lanes (&held)[HEADS][KEYS]) {
    constexpr bool few_keys = KEYS < HEADS;  // what are fewer is loaded first
    constexpr int OUTER = few_keys ? HEADS : KEYS, INNER = few_keys ? KEYS : HEADS;
    const float *const outer = few_keys ? query : keys, *const inner = few_keys ? keys : query;
    Lanes kept[INNER];
    UNROLL for (int i = 0; i < INNER; i++) {
        kept[i] = load(inner + i * WIDTH);
        keep(kept[i]);
    }
    UNROLL for (int o = 0; o < OUTER; o++) {
        Lanes one = load(outer + o * WIDTH);
        keep(one);
        UNROLL for (int i = 0; i < INNER; i++) {
            Lanes& sum = few_keys ? held[o][i] : held[i][o];
            sum += one * kept[i];
            keep(sum);
        }
    }
}

// scores[h][i] = query[h] . key[i] for HEADS query heads. Rows of scores are `room` apart, a multiple of LANES; what is
// written after `count` is of no use. Of `parts` calls for a tile and head each fetches its share. Out of line, for
// inlined GCC keeps the sums in memory.
template <int WIDTH, int HEADS, int PIECE>
__attribute__((noinline)) void score(const float* query, const float* keys, int count, float* scores, int64_t room,
                                     Ahead<PIECE>& ahead, int parts) {
    constexpr int KEYS = keys_of(HEADS), RUN = KEYS % 3 ? LANES : 3 * LANES;
    Lanes sums[HEADS][RUN];
    int wait = 0;
    for (int first = 0; first < count; first += RUN) {
        for (int i = 0; i < RUN; i += KEYS) {
            if (wait-- == 0) ahead.fetch(KEYS), wait = parts - 1;
            Lanes held[HEADS][KEYS];
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int k = 0; k < KEYS; k++) held[h][k] = Lanes{};
            const float* from = keys + (first + i) * WIDTH;
            for (int d = 0; d < WIDTH; d += LANES) multiply<WIDTH>(query + d, from + d, held);
            UNROLL for (int h = 0; h < HEADS; h++) UNROLL for (int k = 0; k < KEYS; k++) sums[h][i + k] = held[h][k];
        }
        for (int h = 0; h < HEADS; h++) {
            for (int i = 0; i < RUN && first + i < count; i += LANES) {
                store(sum_each(*(Lanes(*)[LANES])(sums[h] + i)), scores + h * room + first + i);
            }
        }
    }
}

// sums[h] += sum over i of weights[h][i] * value[i], for VECTORS vectors of the values' width.
template <int WIDTH, int HEADS, int VECTORS, int PIECE>
__attribute__((noinline)) void mix_some(const float* weights, int64_t room, const float* values, int count, float* sums,
                                        Ahead<PIECE>& ahead, int parts) {
    Lanes held[HEADS][VECTORS];
    UNROLL for (int h = 0; h < HEADS; h++) {
        UNROLL for (int d = 0; d < VECTORS; d++) held[h][d] = load(sums + h * WIDTH + d * LANES);
    }
    int wait = 0;
    for (int i = 0; i < count; i++) {
        if (wait-- == 0) ahead.fetch(1), wait = parts - 1;
        Lanes value[VECTORS];
        UNROLL for (int d = 0; d < VECTORS; d++) {
            value[d] = load(values + i * WIDTH + d * LANES);
            if (HEADS >= VECTORS) keep(value[d]);
        }
        UNROLL for (int h = 0; h < HEADS; h++) {
            Lanes weight = weights[h * room + i] - Lanes{};
            keep(weight);
            UNROLL for (int d = 0; d < VECTORS; d++) {
                held[h][d] += weight * value[d];
                keep(held[h][d]);
            }
        }
    }
    UNROLL for (int h = 0; h < HEADS; h++) {
        UNROLL for (int d = 0; d < VECTORS; d++) store(held[h][d], sums + h * WIDTH + d * LANES);
    }
}

template <int WIDTH, int HEADS, int PIECE>
void mix(const float* weights, int64_t room, const float* values, int count, float* sums, Ahead<PIECE>& ahead, int parts) {
    constexpr int ALL = WIDTH / LANES, VECTORS = std::min({ALL, SUMS / HEADS, 8}), REST = ALL % VECTORS;
    parts *= whole(ALL, VECTORS);
    for (int at = 0; at < WIDTH - REST * LANES; at += VECTORS * LANES) {
        mix_some<WIDTH, HEADS, VECTORS>(weights, room, values + at, count, sums + at, ahead, parts);
    }
    if constexpr (REST > 0) {
        constexpr int at = WIDTH - REST * LANES;
        mix_some<WIDTH, HEADS, REST>(weights, room, values + at, count, sums + at, ahead, parts);
    }
}

// score and mix where each kv head has one query head: nothing is read twice, so nothing is widened.
template <int WIDTH, typename T, int PIECE>
void score_one(const float* query, const Tile<T>& keys, int64_t head, float* scores, Ahead<PIECE>& ahead) {
    Lanes sums[LANES];
    for (int i = 0; i < keys.count; i++) {
        ahead.fetch(1);
        Lanes key[WIDTH / LANES];
        load_line<WIDTH>(keys.lines[i] + head * WIDTH, key);
        Lanes sum = load(query) * key[0];
        for (int d = 1; d < WIDTH / LANES; d++) sum += load(query + d * LANES) * key[d];
        sums[i % LANES] = sum;
        if (i % LANES == LANES - 1 || i == keys.count - 1) store(sum_each(sums), scores + i / LANES * LANES);
    }
}

template <int WIDTH, typename T, int PIECE>
void mix_one(const float* weights, const Tile<T>& values, int64_t head, float* sums, Ahead<PIECE>& ahead) {
    Lanes held[WIDTH / LANES];
    for (int d = 0; d < WIDTH / LANES; d++) held[d] = load(sums + d * LANES);
    for (int i = 0; i < values.count; i++) {
        ahead.fetch(1);
        Lanes value[WIDTH / LANES];
        load_line<WIDTH>(values.lines[i] + head * WIDTH, value);
        for (int d = 0; d < WIDTH / LANES; d++) held[d] += weights[i] * value[d];
    }
    for (int d = 0; d < WIDTH / LANES; d++) store(held[d], sums + d * LANES);
}

// score and mix for any width, one head at a time.
template <typename T>
void score_any(const float* q, const Tile<T>& keys, float* scores, int64_t width) {
    for (int i = 0; i < keys.count; i++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < width; d++) dot += q[d] * to_float(keys.lines[i][d]);
        scores[i] = dot;
    }
}

template <typename T>
void mix_any(const float* weights, const Tile<T>& values, float* sums, int64_t width) {
    for (int i = 0; i < values.count; i++) {
#pragma omp simd
        for (int64_t d = 0; d < width; d++) sums[d] += weights[i] * to_float(values.lines[i][d]);
    }
}

template <int N>
using Heads = std::integral_constant<int, N>;

struct Softmax {
    float top, total;  // the highest score, the sum of exponentials of the scores less it
};

// Softmax of `count` scores in place. The row has space for `room` of them, a multiple of LANES, so that only whole vectors
// are computed.
Softmax soften(float* row, int64_t count, int64_t room, float softcap, const float* sink) {
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
    return {top, total};
}

// What all query heads of one row share. `first` to `length` are the tokens they attend to.
struct Context {
    const int32_t* table;
    int64_t first, length, count, room;

    Context(const int32_t* table, int64_t first, int64_t length)
        : table(table), first(first), length(length), count(length - first), room(whole(count, LANES) * LANES) {}
};

// All query heads of `kv_heads` kv heads of one row, tile by tile: K and V come from memory once. The result is in `out`
// or, for a span of several, in `parts`.
template <typename T, int WIDTH>
void attend(const Shape& s, const T* query, const T* keys, const T* values, T* out, const Context& c, const float* sinks,
            float* parts, int64_t kv_heads) {
    const int64_t group = s.heads / s.kv_heads, heads = group * kv_heads;
    thread_local team::Room memory;
    memory.hold((TILE * WIDTH + heads * (c.room + 2 * WIDTH)) * sizeof(float));
    float *const wide = memory.as<float>(), *const scores = wide + TILE * WIDTH, *const q = scores + heads * c.room;
    float* const sums = q + heads * WIDTH;
    for (int64_t h = 0; h < heads; h++) {
        Lanes line[WIDTH / LANES];
        load_line<WIDTH>(query + h * WIDTH, line);
        for (int d = 0; d < WIDTH / LANES; d++) store(line[d] * s.scale, q + h * WIDTH + d * LANES);
    }
    std::fill(sums, sums + heads * WIDTH, 0.0f);
    // Up to four heads at once, as evenly as the group divides.
    const int turns = whole(group, 4);
    Tile<T> tiles[2];
    int now = 0;
    const auto find = [&](const T* cache, int64_t at, Tile<T>& tile) {
        tile.find(cache, c.table, at, c.length, s.block_size, s.kv_heads * WIDTH);
    };
    find(keys, c.first, tiles[now]);
    const auto in_tiles = [&](const T* cache, auto step) {
        for (int64_t at = c.first; at < c.length; at += TILE, now ^= 1) {
            const Tile<T>& tile = tiles[now];
            if (at + TILE < c.length) find(cache, at + TILE, tiles[now ^ 1]);
            else find(values, c.first, tiles[now ^ 1]);
            Ahead<WIDTH * sizeof(T)> ahead(tiles[now ^ 1], kv_heads * WIDTH);
            for (int64_t i = 0; i < kv_heads * turns; i++) {
                const int64_t head = i / turns, turn = i % turns;
                if (group > 1 && turn == 0) widen<WIDTH>(tile, head, wide);
                const int64_t first = head * group + group * turn / turns, stop = head * group + group * (turn + 1) / turns;
                float *const of_tile = scores + first * c.room + at - c.first, *const line = q + first * WIDTH;
                const auto run = [&](auto n) { step(n, line, tile, head, of_tile, ahead); };
                switch (stop - first) {
                    case 4: run(Heads<4>{}); break;
                    case 3: run(Heads<3>{}); break;
                    case 2: run(Heads<2>{}); break;
                    case 1: run(Heads<1>{}); break;
                }
            }
        }
    };
    in_tiles(keys, [&](auto n, const float* line, const Tile<T>& tile, int64_t head, float* of_tile, auto& ahead) {
        if constexpr (n == 1) score_one<WIDTH>(line, tile, head, of_tile, ahead);
        else score<WIDTH, n>(line, wide, tile.count, of_tile, c.room, ahead, turns);
    });
    for (int64_t h = 0; h < heads; h++) {
        const Softmax of = soften(scores + h * c.room, c.count, c.room, s.softcap, sinks ? sinks + h : nullptr);
        if (parts) std::memcpy(parts + h * team::part_size(WIDTH) + WIDTH, &of, sizeof of);
    }
    in_tiles(values, [&](auto n, const float* line, const Tile<T>& tile, int64_t head, float* of_tile, auto& ahead) {
        if constexpr (n == 1) mix_one<WIDTH>(of_tile, tile, head, sums + (line - q), ahead);
        else mix<WIDTH, n>(of_tile, c.room, wide, tile.count, sums + (line - q), ahead, turns);
    });
    for (int64_t h = 0; h < heads; h++) {
        const float* from = sums + h * WIDTH;
        if (parts) {
            std::copy(from, from + WIDTH, parts + h * team::part_size(WIDTH));
        } else {
            Lanes line[WIDTH / LANES];
            for (int d = 0; d < WIDTH / LANES; d++) line[d] = load(from + d * LANES);
            store_line<WIDTH>(line, out + h * WIDTH);
        }
    }
}

// One head's result from those of its spans, which are `stride` numbers apart.
template <typename T, int WIDTH>
void join(const float* parts, int64_t spans, int64_t stride, T* out) {
    float top = -INFINITY, total = 0;
    for (int64_t span = 0; span < spans; span++) top = std::max(top, parts[span * stride + WIDTH]);
    Lanes line[WIDTH / LANES] = {};
    for (int64_t span = 0; span < spans; span++) {
        const float* part = parts + span * stride;
        const float weight = exp_nonpositive(part[WIDTH] - top) * part[WIDTH + 1];
        total += weight;
        for (int d = 0; d < WIDTH / LANES; d++) line[d] += weight * load(part + d * LANES);
    }
    for (Lanes& lanes : line) lanes /= total;
    store_line<WIDTH>(line, out);
}

// attend for widths that are not known at compile time.
template <typename T>
void attend_any(const Shape& s, const T* query, const T* keys, const T* values, T* out, const Context& c,
                const float* sinks) {
    thread_local std::vector<float> memory;
    memory.resize(c.room + s.key_width + s.value_width);
    float *const scores = memory.data(), *const q = scores + c.room, *const sums = q + s.key_width;
    Tile<T> tile;
    for (int64_t g = 0; g < s.heads / s.kv_heads; g++) {
        for (int64_t d = 0; d < s.key_width; d++) q[d] = to_float(query[g * s.key_width + d]) * s.scale;
        for (int64_t at = c.first; at < c.length; at += TILE) {
            tile.find(keys, c.table, at, c.length, s.block_size, s.kv_heads * s.key_width);
            score_any(q, tile, scores + at - c.first, s.key_width);
        }
        soften(scores, c.count, c.room, s.softcap, sinks ? sinks + g : nullptr);
        std::fill(sums, sums + s.value_width, 0.0f);
        for (int64_t at = c.first; at < c.length; at += TILE) {
            tile.find(values, c.table, at, c.length, s.block_size, s.kv_heads * s.value_width);
            mix_any(scores + at - c.first, tile, sums, s.value_width);
        }
        for (int64_t d = 0; d < s.value_width; d++) store(sums[d], out + g * s.value_width + d);
    }
}

}  // namespace
