// Linear layers for the few rows of a decode step: the weight is laid out once as it is read, and read once for all rows.
//
// A weight [columns, depth] is packed into panels of 16 columns over the whole depth, a 64-byte line holding one depth in
// fp32, two in bf16: [columns / 16][depth][16] or [columns / 16][depth / 2][16][2], padded with zeros. Every output is
// one chain of multiply-adds in the order of depth, added up in fp32 and rounded once, however many rows, tiles and
// threads there are: a row's result does not depend on its batch. Called through ctypes by products.py.

#include "common.h"

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
constexpr int64_t RUN = 64;                     // inputs of one row that lie side by side
constexpr int64_t CHUNK = 20 * ROWS;            // rows a weight is read for at once
constexpr int64_t NEXT = 8;                     // lines fetched ahead where they are near
constexpr int64_t WORTH_THREADS = 1 << 17;      // multiply-adds

using Sums = Lanes[ROWS][LINES];

// The ways to multiply a line of DEPTHS depths: what x and the output hold, the weights, and the inputs made of x.

struct Fp32 {
    using Value = float;
    using Weight = float;
    using Input = float;
    static constexpr int DEPTHS = 1;

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits (&lines)[LINES], const Input* x) {
#pragma GCC unroll 16
        for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) sums[row][i] += x[row * RUN] * (Lanes)lines[i];
        }
    }
};

template <typename T>
struct Halves {  // both halves of a line made fp32
    using Value = T;
    using Weight = bf16;
    using Input = float;
    static constexpr int DEPTHS = 2;

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits (&lines)[LINES], const Input* x) {
        Bits even[LINES], odd[LINES];
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) even[i] = lines[i] << 16, odd[i] = lines[i] & 0xffff0000u;
        Fp32::multiply(sums, even, x);
        Fp32::multiply(sums, odd, x + 1);
    }
};

#ifdef __AVX512BF16__
struct Dot {  // the processor's own product of pairs
    using Value = bf16;
    using Weight = bf16;
    using Input = bf16;
    static constexpr int DEPTHS = 2;

    template <int N>
    static inline void multiply(Lanes (&sums)[N][LINES], const Bits (&lines)[LINES], const Input* x) {
#pragma GCC unroll 16
        for (int row = 0; row < N; row++) {
            int pair;
            std::memcpy(&pair, x + row * RUN, sizeof pair);
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) {
                sums[row][i] = (Lanes)_mm512_dpbf16_ps((__m512)sums[row][i], (__m512bh)_mm512_set1_epi32(pair),
                                                       (__m512bh)lines[i]);
            }
        }
    }
};
#endif

// The sums of N rows and one tile of columns. x [depth / RUN][N][RUN]; `ahead`: how far behind these panels' lines the
// next ones to be read lie.
template <typename P, int N>
void multiply_tile(const Bits* panel, int64_t lines, int64_t ahead, const void* inputs, Sums& out) {
    const auto* x = (const typename P::Input*)inputs;
    Lanes sums[N][LINES];
#pragma GCC unroll 16
    for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) sums[row][i] = Lanes{};
    }
    for (int64_t start = 0; start < lines; start += RUN / P::DEPTHS, x += (N - 1) * RUN) {
        const int64_t stop = std::min(lines, start + RUN / P::DEPTHS);
        for (int64_t at = start; at < stop; at++, x += P::DEPTHS) {
            Bits line[LINES];
#pragma GCC unroll 2
            for (int i = 0; i < LINES; i++) {
                const Bits* from = panel + i * lines + at;
                std::memcpy(&line[i], from, sizeof line[i]);
                __builtin_prefetch(from + ahead, 0, 3);
            }
            P::multiply(sums, line, x);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < N; row++) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) out[row][i] = sums[row][i];
    }
}

template <typename P, int... N>
constexpr std::array<decltype(&multiply_tile<P, 1>), ROWS> tiles_by_rows(std::integer_sequence<int, N...>) {
    return {multiply_tile<P, N + 1>...};
}

// Inputs of `rows` rows as multiply_tile reads them; those behind the depth are zero.
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
                store(sums[row][i] + add, to);
            } else {
                T values[LANES];
                store(sums[row][i] + add, values);
                std::copy(values, values + count, to);
            }
        }
    }
}

struct Linear {
    const Bits* panels;
    const float* bias;
    int64_t columns, depth;
    int32_t kind;
};

template <typename P>
void multiply_chunk(const Linear& s, const typename P::Value* x, typename P::Value* out, int64_t rows) {
    static constexpr auto multiply = tiles_by_rows<P>(std::make_integer_sequence<int, ROWS>());
    const int64_t lines = (s.depth + P::DEPTHS - 1) / P::DEPTHS, width = (s.depth + RUN - 1) / RUN * RUN;
    const int64_t tiles = (s.columns + TILE - 1) / TILE, blocks = (rows + ROWS - 1) / ROWS;
    thread_local std::vector<typename P::Input> memory;
    memory.resize(rows * width);
    typename P::Input* const inputs = memory.data();
#pragma omp parallel if (rows * s.columns * s.depth > WORTH_THREADS)
    {
#pragma omp for
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
            arrange<P>(x + first * s.depth, count, s.depth, inputs + first * width);
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const Bits* panel = s.panels + tile * LINES * lines;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
                const bool last = block + 1 == blocks && tile + 1 < tiles;
                Sums sums;
                multiply[count - 1](panel, lines, last ? LINES * lines : NEXT, inputs + first * width, sums);
                finish(sums, count, s.bias, out + first * s.columns, s.columns, tile * TILE);
            }
        }
    }
}

template <typename P>
bool multiply_all(const Linear& s, const void* x, void* out, int64_t rows) {
    for (int64_t row = 0; row < rows; row += CHUNK) {
        multiply_chunk<P>(s, (const typename P::Value*)x + row * s.depth, (typename P::Value*)out + row * s.columns,
                          std::min(CHUNK, rows - row));
    }
    return true;
}

template <typename T, int DEPTHS>
void pack(const T* weight, T* panels, int64_t columns, int64_t depth) {
    const int64_t lines = (depth + DEPTHS - 1) / DEPTHS, all = (columns + TILE - 1) / TILE * LINES;
#pragma omp parallel for
    for (int64_t panel = 0; panel < all; panel++) {
        T* to = panels + panel * lines * LANES * DEPTHS;
        for (int64_t line = 0; line < lines; line++) {
            for (int64_t i = 0; i < LANES * DEPTHS; i++) {
                const int64_t column = panel * LANES + i / DEPTHS, at = line * DEPTHS + i % DEPTHS;
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
