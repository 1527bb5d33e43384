// Linear layers for a decode step's few rows and a prompt's many. A weight is stored in the order in which it is read, and
// read once for all rows.
//
// A weight [columns, depth] is packed into panels of LANES columns over the whole depth, padded with zeros, a vector
// holding one depth in fp32, two in bf16: [columns / LANES][depth][LANES] or [columns / LANES][depth / 2][LANES][2].
// Every output is one chain of multiply-adds in the order of depth, added up in fp32 and rounded once, however many rows,
// tiles, parts and threads there are: a row's result does not depend on its batch. Called through ctypes by products.py.

#include "common.h"
#include "kernels.h"

#include <array>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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
// One output's multiply-adds wait for each other. For few rows there are not enough of them to do meanwhile, unless more
// columns are done at once.
constexpr int WIDE = 3, WIDE_ROWS = STEP > 1 ? ROWS * LINES / WIDE - 1 : 0;
constexpr int64_t WIDE_TILES = 8;               // a thread's, at least, for it is alone with the last one
constexpr int64_t RUN = 64;                     // inputs of one row that lie side by side
constexpr int64_t CHUNK = 120;                  // rows a weight is read for at once, at most
constexpr int64_t FEW = 48;                     // at least, before the depth is done in several passes
constexpr int64_t PART = 8192;                  // bytes of a panel that stay in the first cache for all rows
constexpr int64_t NEAR = 384 << 10;             // bytes of inputs that stay in the second cache for all tiles
constexpr int64_t WORTH_THREADS = 1 << 17;      // multiply-adds

struct Sums {
    Lanes of[ROWS * LINES];  // of every row as many as there are lines
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

    template <int N, int L>
    static inline void add(Lanes (&sums)[N][L], Lanes (&weights)[L], const Input* x) {
        UNROLL for (int i = 0; i < L; i++) keep(weights[i]);
        UNROLL for (int row = 0; row < N; row++) {
            UNROLL for (int i = 0; i < L; i++) {
                sums[row][i] += x[row * RUN] * weights[i];
                keep(sums[row][i]);
            }
        }
    }

    template <int N, int L>
    static inline void multiply(Lanes (&sums)[N][L], const Bits* panel, int64_t length, const Input* x) {
        UNROLL for (int at = 0; at < STEP; at++) {
            Lanes weights[L];
            UNROLL for (int i = 0; i < L; i++) weights[i] = (Lanes)line(panel + i * length + at);
            add(sums, weights, x + at);
        }
    }
};

template <typename T>
struct Halves {  // both halves of every 32 bits made fp32
    using Value = T;
    using Input = float;
    static constexpr int DEPTHS = 2 * STEP;

    template <int N, int L>
    static inline void multiply(Lanes (&sums)[N][L], const Bits* panel, int64_t length, const Input* x) {
        UNROLL for (int at = 0; at < STEP; at++) {
            Lanes weights[L];
            UNROLL for (int i = 0; i < L; i++) weights[i] = (Lanes)(line(panel + i * length + at) << 16);
            Fp32::add(sums, weights, x + 2 * at);
            reload(panel);
            UNROLL for (int i = 0; i < L; i++) weights[i] = (Lanes)(line(panel + i * length + at) & 0xffff0000u);
            Fp32::add(sums, weights, x + 2 * at + 1);
        }
    }
};

#ifdef __AVX512BF16__
struct Dot {  // the processor's own product of pairs
    using Value = bf16;
    using Input = bf16;
    static constexpr int DEPTHS = 2 * STEP;

    template <int N, int L>
    static inline void multiply(Lanes (&sums)[N][L], const Bits* panel, int64_t length, const Input* x) {
        Bits both[L];
        UNROLL for (int i = 0; i < L; i++) both[i] = line(panel + i * length);
        UNROLL for (int row = 0; row < N; row++) {
            int pair;
            std::memcpy(&pair, x + row * RUN, sizeof pair);
            UNROLL for (int i = 0; i < L; i++) {
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

// Adds up N rows and L panels of columns over some runs; panels are `length` vectors long. x [runs][N][RUN].
template <typename P, int N, int L>
void multiply_tile(const Bits* panel, int64_t length, int64_t runs, Ahead ahead, const void* inputs, bool first,
                   Sums& all) {
    const auto* x = (const typename P::Input*)inputs;
    Lanes sums[N][L];
    UNROLL for (int row = 0; row < N; row++) {
        UNROLL for (int i = 0; i < L; i++) sums[row][i] = first ? Lanes{} : all.of[row * L + i];
    }
    for (int64_t run = 0; run < runs; run++, x += (N - 1) * RUN) {
        for (int at = 0; at < RUN; at += P::DEPTHS, x += P::DEPTHS, panel += STEP, ahead.from += ahead.pace) {
            UNROLL for (int i = 0; i < L; i++) __builtin_prefetch(ahead.from + i * length * VECTOR, 0, 3);
            P::multiply(sums, panel, length, x);
        }
    }
    UNROLL for (int row = 0; row < N; row++) {
        UNROLL for (int i = 0; i < L; i++) all.of[row * L + i] = sums[row][i];
    }
}

template <typename P, int L, int... N>
constexpr std::array<decltype(&multiply_tile<P, 1, L>), sizeof...(N)> tiles_by_rows(std::integer_sequence<int, N...>) {
    return {multiply_tile<P, N + 1, L>...};
}

// What adds up so many rows and lines.
template <typename P>
auto tile_of(int64_t rows, int lines) {
    static constexpr auto two = tiles_by_rows<P, LINES>(std::make_integer_sequence<int, ROWS>());
    static constexpr auto three = tiles_by_rows<P, WIDE>(std::make_integer_sequence<int, std::max(WIDE_ROWS, 1)>());
    static constexpr auto one = tiles_by_rows<P, 1>(std::make_integer_sequence<int, std::max(WIDE_ROWS, 1)>());  // what is left
    return lines == LINES ? two[rows - 1] : lines == WIDE ? three[rows - 1] : one[rows - 1];
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
void finish(const Sums& sums, int64_t rows, int lines, const float* bias, T* out, int64_t columns, int64_t column) {
    for (int i = 0; i < lines && column < columns; i++, column += LANES) {
        const Lanes add = bias ? load(bias + column) : Lanes{};
        const int64_t count = std::min(LANES, columns - column);
        for (int64_t row = 0; row < rows; row++) {
            T* to = out + row * columns + column;
            if (count == LANES) {
                store(sums.of[row * lines + i] + add, to);
            } else {
                T values[LANES];
                store(sums.of[row * lines + i] + add, values);
                std::copy(values, values + count, to);
            }
        }
    }
}

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
void multiply_parts(const Bits* panel, int lines, int64_t length, int64_t begin, int64_t end, const Bits* next,
                    const Inputs<P>& inputs, Sums* sums) {
    for (int64_t at = begin; at < end; at += PART_RUNS<P>) {
        const int64_t count = std::min(PART_RUNS<P>, end - at), bytes = count * RUN_LINES<P> * VECTOR;
        const char* then = (const char*)(at + count < end ? panel + (at + count) * RUN_LINES<P> : next);
        for (int64_t block = 0; block < inputs.blocks; block++) {
            const int64_t n = inputs.count(block);
            const Ahead ahead{then + bytes * block / inputs.blocks, 64 / inputs.blocks};
            tile_of<P>(n, lines)(panel + at * RUN_LINES<P>, length, count, ahead,
                                 inputs.x + inputs.first(block) * inputs.width + at * RUN * n, at == 0, sums[block]);
        }
    }
}

// How some rows are multiplied with a weight. A tile's panels are read once. Where the inputs of all rows are too many for
// the second cache, that is done for some of the depth after the other, and the sums of all tiles are kept in between.
template <typename P>
struct Split {
    int64_t runs, tiles, blocks, pass;

    Split(const Linear& s, int64_t rows)
        : runs(whole(s.depth, RUN)), tiles(whole(s.columns, TILE)), blocks(whole(rows, ROWS)),
          pass(std::max<int64_t>(1, NEAR / (rows * RUN * sizeof(typename P::Input)) / PART_RUNS<P>) * PART_RUNS<P>) {}

    bool once() const { return pass >= runs; }
};

template <typename P>
void multiply_chunk(team::Member& me, const Linear& s, const typename P::Value* x, typename P::Value* out, int64_t rows) {
    const Split<P> split(s, rows);
    const int64_t length = split.runs * RUN_LINES<P>, width = split.runs * RUN, blocks = split.blocks;
    const int64_t panels = split.tiles * LINES, threads = omp_get_num_threads();
    const int lines = rows <= WIDE_ROWS && panels >= WIDE * WIDE_TILES * threads ? WIDE : LINES;
    const int64_t tiles = whole(panels, lines);
    auto* const arranged = me.team.inputs.as<typename P::Input>();
    auto* const sums = me.team.sums.as<Sums>();
    const Inputs<P> inputs{arranged, rows, blocks, width};
    me.share(blocks, [&](int64_t block) {
        const int64_t first = inputs.first(block);
        arrange<P>(x + first * s.depth, inputs.count(block), s.depth, arranged + first * width);
    });
    for (int64_t begin = 0; begin < split.runs; begin += split.pass) {
        const int64_t end = std::min(begin + split.pass, split.runs);
        team::Phase& phase = me.next();
        int64_t count = 0;
        // A thread knows the tile that it takes after this one, which is fetched meanwhile.
        for (int64_t tile = phase.take(), following; tile < tiles; tile = following, count++) {
            following = phase.take();
            const int here = std::min<int64_t>(lines, panels - tile * lines);
            const auto panel = [&](int64_t of) { return s.panels + of * lines * length; };
            Sums* const tile_sums = sums + (split.once() ? me.thread : tile) * blocks;
            multiply_parts(panel(tile), here, length, begin, end, panel(following) + begin * RUN_LINES<P>, inputs,
                           tile_sums);
            if (end < split.runs) continue;
            for (int64_t block = 0; block < blocks; block++) {
                finish(tile_sums[block], inputs.count(block), here, s.bias, out + inputs.first(block) * s.columns,
                       s.columns, tile * lines * LANES);
            }
        }
        phase.finish(count, tiles);
    }
}

// How many chunks rows are done in: as many at once as leave their inputs in the second cache; passes over the depth cost
// more, fewer rows most.
template <typename P>
int64_t chunks_of(const Linear& s, int64_t rows) {
    const int64_t input_bytes = whole(s.depth, RUN) * RUN * sizeof(typename P::Input);
    const int64_t near = NEAR / input_bytes / ROWS * ROWS;
    return whole(rows, near >= FEW ? std::min(near, CHUNK) : CHUNK);
}

template <typename P>
int64_t prepare(team::Team& team, const Linear& s, int64_t rows) {
    if (rows == 0) return 1;
    const int64_t chunks = chunks_of<P>(s, rows), most = whole(rows, chunks);
    const Split<P> split(s, most);
    team.inputs.hold(most * split.runs * RUN * sizeof(typename P::Input));
    const int64_t threads = omp_get_max_threads();
    team.sums.hold(split.blocks * (split.once() ? threads : std::max(threads, split.tiles)) * sizeof(Sums));
    return chunks * (1 + whole(split.runs, split.pass));
}

template <typename P>
void multiply_all(team::Member& me, const Linear& s, const void* x, void* out, int64_t rows) {
    const int64_t chunks = chunks_of<P>(s, rows);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t row = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - row;
        multiply_chunk<P>(me, s, (const typename P::Value*)x + row * s.depth, (typename P::Value*)out + row * s.columns,
                          count);
    }
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

enum Kind : int32_t { NONE, FP32, FP32_BY_BF16, BF16, BF16_DOT };  // as in products.py

// Calls f with the way to multiply, if this kind was compiled.
template <typename F>
void by_kind(const Linear& s, F f) {
    switch (s.kind) {
        case FP32: return f(Fp32{});
        case FP32_BY_BF16: return f(Halves<float>{});
        case BF16: return f(Halves<bf16>{});
#ifdef __AVX512BF16__
        case BF16_DOT: return f(Dot{});
#endif
    }
}

}  // namespace

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

int64_t team::prepare(Team& team, const Linear& linear, int64_t rows) {
    int64_t phases = 0;
    by_kind(linear, [&](auto product) { phases = ::prepare<decltype(product)>(team, linear, rows); });
    return phases;
}

void team::linear(Member& me, const Linear& linear, const void* x, void* out, int64_t rows) {
    by_kind(linear, [&](auto product) { multiply_all<decltype(product)>(me, linear, x, out, rows); });
}

// False if this kind was not compiled.
extern "C" bool rrm_linear(const Linear* linear, const void* x, void* out, int64_t rows) {
    return team::run(
        rows * linear->columns * linear->depth > WORTH_THREADS,
        [&](team::Team& team) { return team::prepare(team, *linear, rows); },
        [&](team::Member& me) { team::linear(me, *linear, x, out, rows); });
}
