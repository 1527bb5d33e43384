// The ways to multiply: how some rows and some panels of columns are added up. Each says what x and the output hold, what
// the inputs made of x are, and how many rows and bytes it takes at once.

#pragma once

#include <array>
#include <utility>

#include "common.h"
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int LINES = 2, TILE = LINES * LANES;  // columns done at once
constexpr int STEP = 64 / VECTOR;               // vectors of a panel done at once: a cache line
constexpr int WIDE = 3;                         // lines done at once for few rows
constexpr int64_t RUN = 64;                     // inputs of one row that lie side by side

// Where what will be read next lies, and how many bytes of it to fetch for 64 bytes read.
struct Ahead {
    const char* from;
    int64_t pace;
};

// Adds up N rows and L panels of columns over some runs, `first` from zero; panels are `length` vectors long.
// x [runs][N][RUN], sums [N][L].
using AddTile = void(const Bits* panel, int64_t length, int64_t runs, Ahead ahead, const void* x, bool first, Lanes* sums);

inline Bits line(const Bits* from) {
    Bits out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// Makes the compiler load from the panel again instead of keeping what it has loaded: there are too few registers.
inline void reload(const Bits*& panel) { asm("" : "+r"(panel)); }

// Vector by vector: P multiplies 64 bytes of every panel at a time, DEPTHS depths in STEP vectors.
template <typename P>
struct Vectors {
#if defined(__AVX512F__) || defined(__aarch64__)
    static constexpr int ROWS = 12;  // with two lines of columns each, their sums and the lines fill the 32 registers
#elif defined(__AVX2__)
    static constexpr int ROWS = 6;  // 16 registers
#else
    static constexpr int ROWS = 4;
#endif
    // One output's multiply-adds wait for each other. For few rows there are not enough of them to do meanwhile, unless more
    // columns are done at once.
    static constexpr int WIDE_ROWS = STEP > 1 ? ROWS * LINES / WIDE - 1 : 0;
    static constexpr int64_t CHUNK = 120;       // rows a weight is read for at once, at most
    static constexpr int64_t PART = 8192;       // bytes of a panel that stay in the first cache for all rows
    static constexpr int64_t NEAR = 384 << 10;  // bytes of inputs that stay in the second cache for all tiles

    template <int N, int L>
    static void add_tile(const Bits* panel, int64_t length, int64_t runs, Ahead ahead, const void* inputs, bool first,
                         Lanes* all) {
        const auto* x = (const typename P::Input*)inputs;
        Lanes sums[N][L];
        UNROLL for (int row = 0; row < N; row++) {
            UNROLL for (int i = 0; i < L; i++) sums[row][i] = first ? Lanes{} : all[row * L + i];
        }
        for (int64_t run = 0; run < runs; run++, x += (N - 1) * RUN) {
            for (int at = 0; at < RUN; at += P::DEPTHS, x += P::DEPTHS, panel += STEP, ahead.from += ahead.pace) {
                UNROLL for (int i = 0; i < L; i++) __builtin_prefetch(ahead.from + i * length * VECTOR, 0, 3);
                P::multiply(sums, panel, length, x);
            }
        }
        UNROLL for (int row = 0; row < N; row++) {
            UNROLL for (int i = 0; i < L; i++) all[row * L + i] = sums[row][i];
        }
    }

    static void release() {}
};

struct Fp32 : Vectors<Fp32> {
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
struct Halves : Vectors<Halves<T>> {  // both halves of every 32 bits made fp32
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
struct Dot : Vectors<Dot> {  // the processor's own product of pairs
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

#ifdef __AMX_BF16__
// The processor's own product of tiles: up to 16 rows by 16 columns over 32 depths, whose even ones it adds up apart from
// the odd ones (Intel's manual, TDPBF16PS). Every processor that has it has a second cache of 2 MiB.
struct Tiles {
    using Value = bf16;
    using Input = bf16;
    static constexpr int ROWS = 32, WIDE_ROWS = 0, DEPTHS = 2;
    static constexpr int64_t CHUNK = 256, PART = 32 << 10, NEAR = 1 << 20;
    static constexpr int HEIGHT = 16, DEEP = 32;  // a tile's rows and depths; of the weight 16 lines of 16 columns

    struct Shapes {  // of the eight tiles, as LDTILECFG reads them
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

    // Tiles 0 to 3: the sums of 16 rows and 2 lines each; 4, 5: inputs of 16 rows; 6, 7: weights of a line.
    template <int N>
    static constexpr Shapes shapes() {
        Shapes out;
        const auto set = [&](int tile, int rows) {
            out.rows[tile] = rows;
            out.bytes[tile] = rows ? 64 : 0;
        };
        for (int tile : {0, 1, 4}) set(tile, std::min(N, HEIGHT));
        for (int tile : {2, 3, 5}) set(tile, std::max(N - HEIGHT, 0));
        for (int tile : {6, 7}) set(tile, DEEP / 2);
        return out;
    }

    inline static thread_local int shaped = 0;  // the rows that this thread's tiles have the shapes for

    // The intrinsics do not tell the compiler that they read and write memory.
    static void settle() { asm volatile("" ::: "memory"); }

    template <int N, int L>
    static void add_tile(const Bits* panel, int64_t length, int64_t runs, Ahead ahead, const void* inputs, bool first,
                         Lanes* sums) {
        static_assert(L == LINES);
        constexpr bool both = N > HEIGHT;
        constexpr int64_t row = L * sizeof(Lanes);  // bytes of a row of sums
        const auto* x = (const Input*)inputs;
        settle();
        if (shaped != N) {
            static constexpr Shapes now = shapes<N>();
            _tile_loadconfig(&now);
            shaped = N;
        }
        Lanes* const below = sums + HEIGHT * L;  // of the rows from 16 on
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (both) {
                _tile_zero(2);
                _tile_zero(3);
            }
        } else {
            _tile_loadd(0, sums, row);
            _tile_loadd(1, sums + 1, row);
            if constexpr (both) {
                _tile_loadd(2, below, row);
                _tile_loadd(3, below + 1, row);
            }
        }
        for (int64_t run = 0; run < runs; run++, x += N * RUN) {
            for (int at = 0; at < RUN; at += DEEP, panel += DEEP / DEPTHS) {
                for (int i = 0; i < DEEP / DEPTHS; i++, ahead.from += ahead.pace) {
                    __builtin_prefetch(ahead.from, 0, 3);
                    __builtin_prefetch(ahead.from + length * VECTOR, 0, 3);
                }
                _tile_loadd(6, panel, VECTOR);
                _tile_loadd(7, panel + length, VECTOR);
                _tile_loadd(4, x + at, RUN * sizeof *x);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if constexpr (both) {
                    _tile_loadd(5, x + HEIGHT * RUN + at, RUN * sizeof *x);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, sums, row);
        _tile_stored(1, sums + 1, row);
        if constexpr (both) {
            _tile_stored(2, below, row);
            _tile_stored(3, below + 1, row);
        }
        settle();
    }

    // Leaves the operating system nothing to save.
    static void release() {
        _tile_release();
        shaped = 0;
    }

    // Whether this process may use tiles: Linux wants to be asked.
    static bool permitted() {
        constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
        return granted;
    }
};
#endif

template <typename P, int L, int... N>
constexpr std::array<AddTile*, sizeof...(N)> tiles_by_rows(std::integer_sequence<int, N...>) {
    return {P::template add_tile<N + 1, L>...};
}

// What adds up so many rows and lines.
template <typename P>
AddTile* tile_of(int64_t rows, int lines) {
    static constexpr auto two = tiles_by_rows<P, LINES>(std::make_integer_sequence<int, P::ROWS>());
    if constexpr (P::WIDE_ROWS > 0) {
        static constexpr auto three = tiles_by_rows<P, WIDE>(std::make_integer_sequence<int, P::WIDE_ROWS>());
        static constexpr auto one = tiles_by_rows<P, 1>(std::make_integer_sequence<int, P::WIDE_ROWS>());  // what is left
        if (lines != LINES) return lines == WIDE ? three[rows - 1] : one[rows - 1];
    }
    return two[rows - 1];
}

}  // namespace
