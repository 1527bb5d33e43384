// Linear layers for a decode step's few rows and a prompt's many. A weight is stored in the order in which it is read, and
// read once for all rows.
//
// A weight [columns, depth] is packed into panels of LANES columns over the whole depth, padded with zeros, a vector
// holding one depth in fp32, two in bf16: [columns / LANES][depth][LANES] or [columns / LANES][depth / 2][LANES][2].
// Every output is one chain of multiply-adds in the order of depth, added up in fp32 and rounded once, however many rows,
// tiles, parts and threads there are: a row's result does not depend on its batch. Called through ctypes by products.py.

#include "common.h"
#include "kernels.h"

#include <omp.h>

#include <array>
#include <atomic>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

struct Linear {  // as in products.py
    const Bits* panels;
    const float* bias;
    int64_t columns, depth;
    int32_t kind;
};

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 12;  // with two lines of columns each, their sums and the lines fill the 32 registers
#elif defined(__AVX2__)
constexpr int ROWS = 6;  // 16 registers
#else
constexpr int ROWS = 4;
#endif
constexpr int LINES = 2, TILE = LINES * LANES;  // columns done at once
constexpr int STEP = 64 / VECTOR;               // vectors of a panel done at once: a cache line
constexpr int64_t RUN = 64;                     // inputs of one row that lie side by side
constexpr int64_t CHUNK = 120;                  // rows a weight is read for at once, at most
constexpr int64_t FEW = 48;                     // at least, before the depth is done in several passes
constexpr int64_t PART = 8192;                  // bytes of a panel that stay in the first cache for all rows
constexpr int64_t NEAR = 384 << 10;             // bytes of inputs that stay in the second cache for all tiles
constexpr int64_t WORTH_THREADS = 1 << 17;      // multiply-adds

struct Sums {
    Lanes of[ROWS][LINES];
};

inline Bits line(const Bits* from) {
    Bits out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// Makes the compiler load from the panel again instead of keeping what it has loaded: there are too few registers.
inline void reload(const Bits*& panel) { asm("" : "+r"(panel)); }

// The ways to multiply: what x and the output hold, and the inputs made of x. They go 64 bytes of every panel at a time,
// DEPTHS depths in STEP vectors.

struct Fp32 {
    using Value = float;
    using Input = float;
    static constexpr int DEPTHS = STEP;

    template <int N>
    static inline void add(Lanes (&sums)[N][LINES], const Lanes (&weights)[LINES], const Input* x) {
#pragma GCC unroll 16
        for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) sums[row][i] += x[row * RUN] * weights[i];
        }
    }

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits* panel, int64_t length, const Input* x) {
#pragma GCC unroll 4
        for (int at = 0; at < STEP; at++) {
            Lanes weights[LINES];
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) weights[i] = (Lanes)line(panel + i * length + at);
            add(sums, weights, x + at);
        }
    }
};

template <typename T>
struct Halves {  // both halves of every 32 bits made fp32
    using Value = T;
    using Input = float;
    static constexpr int DEPTHS = 2 * STEP;

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits* panel, int64_t length, const Input* x) {
#pragma GCC unroll 4
        for (int at = 0; at < STEP; at++) {
            Lanes weights[LINES];
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) weights[i] = (Lanes)(line(panel + i * length + at) << 16);
            Fp32::add(sums, weights, x + 2 * at);
            reload(panel);
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) weights[i] = (Lanes)(line(panel + i * length + at) & 0xffff0000u);
            Fp32::add(sums, weights, x + 2 * at + 1);
        }
    }
};

#ifdef __AVX512BF16__
struct Dot {  // the processor's own product of pairs
    using Value = bf16;
    using Input = bf16;
    static constexpr int DEPTHS = 2 * STEP;

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits* panel, int64_t length, const Input* x) {
        Bits both[LINES];
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) both[i] = line(panel + i * length);
#pragma GCC unroll 16
        for (int row = 0; row < N; row++) {
            int pair;
            std::memcpy(&pair, x + row * RUN, sizeof pair);
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) {
                sums[row][i] = (Lanes)_mm512_dpbf16_ps((__m512)sums[row][i], (__m512bh)_mm512_set1_epi32(pair),
                                                       (__m512bh)both[i]);
            }
        }
    }
};
#endif

template <typename P>
constexpr int64_t RUN_LINES = RUN / P::DEPTHS * STEP;  // vectors of a panel for one run of inputs

template <typename P>
constexpr int64_t PART_RUNS = std::max<int64_t>(1, PART / (RUN_LINES<P> * VECTOR));

// Where what will be read next lies, and how many bytes of it to fetch for 64 bytes read.
struct Ahead {
    const char* from;
    int64_t pace;
};

// Adds up N rows and one tile of columns over some runs; panels are `length` vectors long. x [runs][N][RUN].
template <typename P, int N>
void multiply_tile(const Bits* panel, int64_t length, int64_t runs, Ahead ahead, const void* inputs, bool first,
                   Sums& all) {
    const auto* x = (const typename P::Input*)inputs;
    Lanes sums[N][LINES];
#pragma GCC unroll 16
    for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) sums[row][i] = first ? Lanes{} : all.of[row][i];
    }
    for (int64_t run = 0; run < runs; run++, x += (N - 1) * RUN) {
        for (int at = 0; at < RUN; at += P::DEPTHS, x += P::DEPTHS, panel += STEP, ahead.from += ahead.pace) {
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead.from + i * length * VECTOR, 0, 3);
            P::multiply(sums, panel, length, x);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) all.of[row][i] = sums[row][i];
    }
}

template <typename P, int... N>
constexpr std::array<decltype(&multiply_tile<P, 1>), ROWS> tiles_by_rows(std::integer_sequence<int, N...>) {
    return {multiply_tile<P, N + 1>...};
}

// Inputs of `rows` rows as multiply_tile reads them; those past the depth are zero.
template <typename P>
void arrange(const typename P::Value* x, int64_t rows, int64_t depth, typename P::Input* out) {
    for (int64_t start = 0; start < depth; start += RUN) {
        const int64_t count = std::min(RUN, depth - start);
        for (int64_t row = 0; row < rows; row++, out += RUN) {
            const typename P::Value* from = x + row * depth + start;
            if constexpr (std::is_same_v<typename P::Value, typename P::Input>) {
                std::memcpy(out, from, count * sizeof *out);
            } else {
                for (int64_t i = 0; i < count; i++) out[i] = to_float(from[i]);
            }
            std::fill(out + count, out + RUN, typename P::Input{});
        }
    }
}

// Sums of `rows` rows into out [rows, columns] from `column` on; `bias` is padded with zeros.
template <typename T>
void finish(const Sums& sums, int64_t rows, const float* bias, T* out, int64_t columns, int64_t column) {
    for (int i = 0; i < LINES && column < columns; i++, column += LANES) {
        const Lanes add = bias ? load(bias + column) : Lanes{};
        const int64_t count = std::min(LANES, columns - column);
        for (int64_t row = 0; row < rows; row++) {
            T* to = out + row * columns + column;
            if (count == LANES) {
                store(sums.of[row][i] + add, to);
            } else {
                T values[LANES];
                store(sums.of[row][i] + add, values);
                std::copy(values, values + count, to);
            }
        }
    }
}

constexpr int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Some rows by some of the depth: what a tile's panels are multiplied with. `blocks` are of at most ROWS rows.
template <typename P>
struct Inputs {
    const typename P::Input* x;  // [blocks][runs][rows of the block][RUN]
    int64_t rows, blocks, width;

    int64_t first(int64_t block) const { return rows * block / blocks; }
    int64_t count(int64_t block) const { return first(block + 1) - first(block); }
};

// Adds up all rows and one tile of columns over the runs from `begin` to `end`, part by part, each part for all rows;
// what comes after the tile is at `next`.
template <typename P>
void multiply_parts(const Bits* panel, int64_t length, int64_t begin, int64_t end, const Bits* next,
                    const Inputs<P>& inputs, Sums* sums) {
    static constexpr auto multiply = tiles_by_rows<P>(std::make_integer_sequence<int, ROWS>());
    for (int64_t at = begin; at < end; at += PART_RUNS<P>) {
        const int64_t count = std::min(PART_RUNS<P>, end - at), bytes = count * RUN_LINES<P> * VECTOR;
        const char* then = (const char*)(at + count < end ? panel + (at + count) * RUN_LINES<P> : next);
        for (int64_t block = 0; block < inputs.blocks; block++) {
            const int64_t n = inputs.count(block);
            const Ahead ahead{then + bytes * block / inputs.blocks, 64 / inputs.blocks};
            multiply[n - 1](panel + at * RUN_LINES<P>, length, count, ahead,
                            inputs.x + inputs.first(block) * inputs.width + at * RUN * n, at == 0, sums[block]);
        }
    }
}

// A tile's panels are read once. Where the inputs of all rows are too many for the second cache, that is done for some of
// the depth after the other, and the sums of all tiles are kept in between.
template <typename P>
void multiply_chunk(const Linear& s, const typename P::Value* x, typename P::Value* out, int64_t rows) {
    using Input = typename P::Input;
    const int64_t runs = whole(s.depth, RUN), length = runs * RUN_LINES<P>, width = runs * RUN;
    const int64_t tiles = whole(s.columns, TILE), blocks = whole(rows, ROWS);
    const int64_t pass = std::max<int64_t>(1, NEAR / (rows * RUN * sizeof(Input)) / PART_RUNS<P>) * PART_RUNS<P>;
    const bool once = pass >= runs;
    thread_local std::vector<Input> memory;
    thread_local std::vector<Sums> kept;
    memory.resize(rows * width);
    kept.resize(blocks * (once ? omp_get_max_threads() : tiles));
    Input* const arranged = memory.data();
    Sums* const sums = kept.data();
    const Inputs<P> inputs{arranged, rows, blocks, width};
    std::atomic<int64_t> taken{0};
#pragma omp parallel if (rows * s.columns * s.depth > WORTH_THREADS)
    {
#pragma omp for
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = inputs.first(block);
            arrange<P>(x + first * s.depth, inputs.count(block), s.depth, arranged + first * width);
        }
        // In a single pass a thread takes the next tile that nobody has: one that other programs hold up delays no more
        // than that. In several it has the same tiles in each. Either way it knows the tile after, which is fetched.
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const auto tile_after = [&](int64_t tile) { return once ? taken++ : tile + threads; };
        for (int64_t begin = 0; begin < runs; begin += pass) {
            const int64_t end = std::min(begin + pass, runs);
            for (int64_t tile = tile_after(thread - threads), following; tile < tiles; tile = following) {
                following = tile_after(tile);
                const auto panels = [&](int64_t of) { return s.panels + of * LINES * length; };
                Sums* const tile_sums = sums + (once ? thread : tile) * blocks;
                multiply_parts(panels(tile), length, begin, end, panels(following) + begin * RUN_LINES<P>, inputs,
                               tile_sums);
                if (end < runs) continue;
                for (int64_t block = 0; block < blocks; block++) {
                    finish(tile_sums[block], inputs.count(block), s.bias, out + inputs.first(block) * s.columns,
                           s.columns, tile * TILE);
                }
            }
        }
    }
}

template <typename P>
bool multiply_all(const Linear& s, const void* x, void* out, int64_t rows) {
    // As many rows at once as leave their inputs in the second cache; passes over the depth cost more, fewer rows most.
    const int64_t input_bytes = whole(s.depth, RUN) * RUN * sizeof(typename P::Input);
    const int64_t near = NEAR / input_bytes / ROWS * ROWS;
    const int64_t chunks = whole(rows, near >= FEW ? std::min(near, CHUNK) : CHUNK);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t row = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - row;
        multiply_chunk<P>(s, (const typename P::Value*)x + row * s.depth, (typename P::Value*)out + row * s.columns,
                          count);
    }
    return true;
}

// DEPTHS neighbours in depth lie side by side.
template <typename T, int DEPTHS>
void pack(const T* weight, T* panels, int64_t columns, int64_t depth) {
    const int64_t padded = whole(depth, RUN) * RUN, all = whole(columns, TILE) * LINES;
#pragma omp parallel for
    for (int64_t panel = 0; panel < all; panel++) {
        T* to = panels + panel * padded * LANES;
        for (int64_t start = 0; start < padded; start += DEPTHS) {
            for (int64_t i = 0; i < LANES * DEPTHS; i++) {
                const int64_t column = panel * LANES + i / DEPTHS, at = start + i % DEPTHS;
                *to++ = column < columns && at < depth ? weight[column * depth + at] : T{};
            }
        }
    }
}

}  // namespace

enum Kind : int32_t { NONE, FP32, FP32_BY_BF16, BF16, BF16_DOT };  // as in products.py

// The fastest kind here, NONE where other libraries do better.
extern "C" int32_t rrm_linear_kind(int is_bf16) {
    if (!is_bf16) return FP32;
#if defined(__AMX_BF16__)
    return NONE;
#elif defined(__AVX512BF16__)
    // On AMD's processors twice as fast as multiply-adds in fp32, on Intel's half as fast.
    return __builtin_cpu_is("amd") ? BF16_DOT : BF16;
#else
    return BF16;
#endif
}

extern "C" int64_t rrm_linear_tile() { return TILE; }

// How many numbers the panels hold.
extern "C" int64_t rrm_linear_size(int64_t columns, int64_t depth) {
    return whole(columns, TILE) * TILE * whole(depth, RUN) * RUN;
}

extern "C" void rrm_linear_pack(int is_bf16, const void* weight, void* panels, int64_t columns, int64_t depth) {
    if (is_bf16) {
        pack<bf16, 2>((const bf16*)weight, (bf16*)panels, columns, depth);
    } else {
        pack<float, 1>((const float*)weight, (float*)panels, columns, depth);
    }
}

// False if this kind was not compiled.
extern "C" bool rrm_linear(const Linear* linear, const void* x, void* out, int64_t rows) {
    switch (linear->kind) {
        case FP32: return multiply_all<Fp32>(*linear, x, out, rows);
        case FP32_BY_BF16: return multiply_all<Halves<float>>(*linear, x, out, rows);
        case BF16: return multiply_all<Halves<bf16>>(*linear, x, out, rows);
#ifdef __AVX512BF16__
        case BF16_DOT: return multiply_all<Dot>(*linear, x, out, rows);
#endif
        default: return false;
    }
}
