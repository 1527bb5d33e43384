// Finds the tokens of a vocabulary that may have the largest score plus noise. They are very few, and only they need
// logarithms.
//
// The noise is that of rrm_engine.engine.sampler: -log(-log(u)), with u made from (key, position, token id). It exceeds g
// if and only if u exceeds exp(-exp(-g)). So the best sum so far gives the least u that a token needs to reach it, and
// whether a token does is a comparison of integers. Called through ctypes by draw.py.

#include "common.h"

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, MIX_1 = 0xBF58476D1CE4E5B9, MIX_2 = 0x94D049BB133111EB;
constexpr double ONE = 9007199254740992.0;  // 2^53
constexpr double SLACK = 1e-6;              // more than the logarithms of two libraries can differ
constexpr int64_t BLOCK = 64;               // tokens compared with the same bound

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * MIX_1;
    x = (x ^ (x >> 27)) * MIX_2;
    return x ^ (x >> 31);
}

inline double gumbel(uint64_t bits) { return -std::log(-std::log((double(bits) + 0.5) / ONE)); }

// Writes the indices, ascending, of the tokens whose sum may be the largest, `room` at most; returns how many there are.
int64_t leaders(const float* scores, const int64_t* ids, int64_t count, int64_t key, int64_t position, int64_t* places,
                int64_t room) {
    const uint64_t state = mix(uint64_t(key) + uint64_t(position) * GOLDEN);
    const auto bits_of = [&](int64_t i) { return mix(state + (uint64_t(ids ? ids[i] : i) + 1) * GOLDEN) >> 11; };
    const int64_t likeliest = std::max_element(scores, scores + count) - scores;
    double best = scores[likeliest] + gumbel(bits_of(likeliest));
    thread_local std::vector<std::pair<int64_t, double>> found;
    found.clear();
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t stop = std::min(count, start + BLOCK);
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t i = start; i < stop; i++) top = std::max(top, scores[i]);
        if (top == -INFINITY) continue;
        const double least = std::floor(std::exp(-std::exp(top - best + SLACK)) * ONE) - 2;
        if (least > ONE - 1) continue;
        const uint64_t bound = least > 0 ? uint64_t(least) : 0;
        uint64_t bits[BLOCK];
#pragma omp simd
        for (int64_t i = start; i < stop; i++) bits[i - start] = bits_of(i);
        for (int64_t i = start; i < stop; i++) {
            if (bits[i - start] < bound || scores[i] == -INFINITY) continue;
            const double sum = scores[i] + gumbel(bits[i - start]);
            if (sum < best - SLACK) continue;
            best = std::max(best, sum);
            found.emplace_back(i, sum);
        }
    }
    int64_t kept = 0;
    for (const auto& [place, sum] : found) {
        if (sum < best - SLACK) continue;
        if (kept < room) places[kept] = place;
        kept++;
    }
    return kept;
}

}  // namespace

// scores [rows, count], ids likewise or null for 0, 1, 2, ...; places [rows, room], padded with the row's first index.
// Returns false if some row has no candidate, or more than `room`.
extern "C" bool rrm_leaders(const float* scores, const int64_t* ids, const int64_t* keys, const int64_t* positions,
                            int64_t* places, int64_t rows, int64_t count, int64_t room) {
    bool all = true;
#pragma omp parallel for reduction(&& : all) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t* const own = places + row * room;
        const int64_t kept = leaders(scores + row * count, ids ? ids + row * count : nullptr, count, keys[row],
                                     positions[row], own, room);
        all = all && 0 < kept && kept <= room;
        for (int64_t i = kept; i < room && kept; i++) own[i] = own[0];
    }
    return all;
}
