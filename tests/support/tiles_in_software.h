// The processor's product of tiles (AMX) in plain C++, for those that have none: included before the kernels, with vectors
// of 64 bytes. As in Intel's manual, a wrong use ends the program.

#pragma once

#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1
#ifndef __AVX512F__
#define __AVX512F__ 1
#endif

namespace in_software {

struct Tile {
    int rows = 0, bytes = 0;
    char at[16][64];
};
inline thread_local Tile tiles[8];

inline void require(bool allowed) {
    if (!allowed) std::abort();
}

inline void load_config(const void* from) {
    uint8_t shapes[64];
    std::memcpy(shapes, from, sizeof shapes);
    require(shapes[0] == 1 && shapes[1] == 0);
    for (int i = 2; i < 16; i++) require(shapes[i] == 0);
    for (int i = 0; i < 8; i++) {
        uint16_t bytes;
        std::memcpy(&bytes, shapes + 16 + 2 * i, sizeof bytes);
        require(bytes <= 64 && shapes[48 + i] <= 16 && !bytes == !shapes[48 + i]);
        tiles[i] = {shapes[48 + i], bytes, {}};
    }
}

inline Tile& tile(int i) {
    require(tiles[i].rows > 0);
    return tiles[i];
}

inline void load(int to, const void* from, int64_t stride) {
    Tile& t = tile(to);
    for (int row = 0; row < t.rows; row++) std::memcpy(t.at[row], (const char*)from + row * stride, t.bytes);
}

inline void store(int from, void* to, int64_t stride) {
    const Tile& t = tile(from);
    for (int row = 0; row < t.rows; row++) std::memcpy((char*)to + row * stride, t.at[row], t.bytes);
}

inline void zero(int i) { std::memset(tile(i).at, 0, sizeof tiles[i].at); }

inline void release() {
    for (Tile& t : tiles) t = {};
}

inline float number(const Tile& t, int row, int at) {
    uint16_t half;
    std::memcpy(&half, &t.at[row][2 * at], sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void multiply_add(int to, int first, int second) {
    Tile &sums = tile(to), &a = tile(first), &b = tile(second);
    require(a.rows == sums.rows && b.bytes == sums.bytes && a.bytes / 4 == b.rows);
    for (int row = 0; row < sums.rows; row++) {
        for (int column = 0; column < sums.bytes / 4; column++) {
            float even = 0, odd = 0, sum;
            for (int i = 0; i < b.rows; i++) {
                even += number(a, row, 2 * i) * number(b, i, 2 * column);
                odd += number(a, row, 2 * i + 1) * number(b, i, 2 * column + 1);
            }
            std::memcpy(&sum, &sums.at[row][4 * column], sizeof sum);
            sum += even + odd;
            std::memcpy(&sums.at[row][4 * column], &sum, sizeof sum);
        }
    }
}

}  // namespace in_software

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig in_software::load_config
#define _tile_release in_software::release
#define _tile_loadd in_software::load
#define _tile_stored in_software::store
#define _tile_zero in_software::zero
#define _tile_dpbf16ps in_software::multiply_add
#define syscall(...) 0  // asked for permission, Linux gives it
