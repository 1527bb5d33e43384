// Linear layers for a decode step's few rows and a prompt's many. A weight is stored in the order in which it is read, and
// read once for all rows.
//
// A weight [columns, depth] is packed into panels of LANES columns over the whole depth, padded with zeros, a vector
// holding one depth in fp32, two in bf16: [columns / LANES][depth][LANES] or [columns / LANES][depth / 2][LANES][2].
// Every output is added up in fp32 in the order of depth, by the same operations however many rows, tiles, parts and
// threads there are, and rounded once: a row's result does not depend on its batch. Called through ctypes by products.py.

#include "common.h"
#include "kernels.h"
#include "multiply.h"

namespace {

constexpr int64_t WIDE_TILES = 8;           // a thread's, at least, for it is alone with the last one
constexpr int64_t FEW = 48;                 // rows, at least, before the depth is done in several passes
constexpr int64_t WORTH_THREADS = 1 << 17;  // multiply-adds

template <typename P>
constexpr int64_t RUN_LINES = RUN / P::DEPTHS * STEP;  // vectors of a panel for one run of inputs

template <typename P>
constexpr int64_t PART_RUNS = std::max<int64_t>(1, P::PART / (RUN_LINES<P> * VECTOR));

template <typename P>
struct Sums {
    Lanes of[P::ROWS * LINES];  // of every row as many as there are lines
};

// Inputs of `rows` rows as add_tile reads them; those past the depth are zero.
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
void finish(const Lanes* sums, int64_t rows, int lines, const float* bias, T* out, int64_t columns, int64_t column) {
    for (int i = 0; i < lines && column < columns; i++, column += LANES) {
        const Lanes add = bias ? load(bias + column) : Lanes{};
        const int64_t count = std::min(LANES, columns - column);
        for (int64_t row = 0; row < rows; row++) {
            T* to = out + row * columns + column;
            if (count == LANES) {
                store(sums[row * lines + i] + add, to);
            } else {
                T values[LANES];
                store(sums[row * lines + i] + add, values);
                std::copy(values, values + count, to);
            }
        }
    }
}

// Some rows by some of the depth: what a tile's panels are multiplied with. `blocks` are of at most P::ROWS rows.
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
                    const Inputs<P>& inputs, Sums<P>* sums) {
    for (int64_t at = begin; at < end; at += PART_RUNS<P>) {
        const int64_t count = std::min(PART_RUNS<P>, end - at), bytes = count * RUN_LINES<P> * VECTOR;
        const char* then = (const char*)(at + count < end ? panel + (at + count) * RUN_LINES<P> : next);
        for (int64_t block = 0; block < inputs.blocks; block++) {
            const int64_t n = inputs.count(block);
            const Ahead ahead{then + bytes * block / inputs.blocks, 64 / inputs.blocks};
            tile_of<P>(n, lines)(panel + at * RUN_LINES<P>, length, count, ahead,
                                 inputs.x + inputs.first(block) * inputs.width + at * RUN * n, at == 0, sums[block].of);
        }
    }
}

// How some rows are multiplied with a weight. A tile's panels are read once. Where the inputs of all rows are too many for
// the second cache, that is done for some of the depth after the other, and the sums of all tiles are kept in between.
template <typename P>
struct Split {
    int64_t runs, tiles, blocks, pass;

    Split(const Linear& s, int64_t rows)
        : runs(whole(s.depth, RUN)), tiles(whole(s.columns, TILE)), blocks(whole(rows, P::ROWS)),
          pass(std::max<int64_t>(1, P::NEAR / (rows * RUN * sizeof(typename P::Input)) / PART_RUNS<P>) * PART_RUNS<P>) {}

    bool once() const { return pass >= runs; }
};

template <typename P>
void multiply_chunk(team::Member& me, const Linear& s, const typename P::Value* x, typename P::Value* out, int64_t rows) {
    const Split<P> split(s, rows);
    const int64_t length = split.runs * RUN_LINES<P>, width = split.runs * RUN, blocks = split.blocks;
    const int64_t panels = split.tiles * LINES;
    const int lines = rows <= P::WIDE_ROWS && panels >= WIDE * WIDE_TILES * me.threads ? WIDE : LINES;
    const int64_t tiles = whole(panels, lines);
    auto* const arranged = me.team.inputs.as<typename P::Input>();
    auto* const sums = me.team.sums.as<Sums<P>>();
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
        for (int64_t tile = me.take(phase, tiles), following; tile < tiles; tile = following, count++) {
            following = me.take(phase, tiles);
            const int here = std::min<int64_t>(lines, panels - tile * lines);
            const auto panel = [&](int64_t of) { return s.panels + of * lines * length; };
            Sums<P>* const tile_sums = sums + (split.once() ? me.thread : tile) * blocks;
            multiply_parts(panel(tile), here, length, begin, end, panel(following) + begin * RUN_LINES<P>, inputs,
                           tile_sums);
            if (end < split.runs) continue;
            for (int64_t block = 0; block < blocks; block++) {
                finish(tile_sums[block].of, inputs.count(block), here, s.bias, out + inputs.first(block) * s.columns,
                       s.columns, tile * lines * LANES);
            }
        }
        phase.finish(count, tiles);
    }
    P::release();
}

// How many chunks rows are done in: as many at once as leave their inputs in the second cache; passes over the depth cost
// more, fewer rows most.
template <typename P>
int64_t chunks_of(const Linear& s, int64_t rows) {
    const int64_t input_bytes = whole(s.depth, RUN) * RUN * sizeof(typename P::Input);
    const int64_t near = P::NEAR / input_bytes / P::ROWS * P::ROWS;
    return whole(rows, near >= FEW ? std::min(near, P::CHUNK) : P::CHUNK);
}

template <typename P>
int64_t prepare(team::Team& team, const Linear& s, int64_t rows) {
    if (rows == 0) return 1;
    const int64_t chunks = chunks_of<P>(s, rows), most = whole(rows, chunks);
    const Split<P> split(s, most);
    team.inputs.hold(most * split.runs * RUN * sizeof(typename P::Input));
    const int64_t threads = omp_get_max_threads();
    team.sums.hold(split.blocks * (split.once() ? threads : std::max(threads, split.tiles)) * sizeof(Sums<P>));
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

enum Kind : int32_t { FP32 = 1, FP32_BY_BF16, BF16, BF16_DOT, BF16_TILES };  // as in products.py

// Calls f with the way to multiply, if this kind was compiled and may be used.
template <typename F>
void by_kind(const Linear& s, F f) {
    switch (s.kind) {
        case FP32: return f(Fp32{});
        case FP32_BY_BF16: return f(Halves<float>{});
        case BF16: return f(Halves<bf16>{});
#ifdef __AVX512BF16__
        case BF16_DOT: return f(Dot{});
#endif
#ifdef __AMX_BF16__
        case BF16_TILES:
            if (Tiles::permitted()) return f(Tiles{});
#endif
    }
}

}  // namespace

// The fastest kind here.
extern "C" int32_t rrm_linear_kind(int is_bf16) {
    if (!is_bf16) return FP32;
#ifdef __AMX_BF16__
    if (Tiles::permitted()) return BF16_TILES;
#endif
#ifdef __AVX512BF16__
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

// False if this kind was not compiled or may not be used.
extern "C" bool rrm_linear(const Linear* linear, const void* x, void* out, int64_t rows) {
    return team::run(
        rows * linear->columns * linear->depth > WORTH_THREADS,
        [&](team::Team& team) { return team::prepare(team, *linear, rows); },
        [&](team::Member& me) { team::linear(me, *linear, x, out, rows); });
}
