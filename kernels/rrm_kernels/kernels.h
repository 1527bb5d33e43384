// What Python calls, and what one part of the library calls of another.

#pragma once

#include <cstdint>

struct Linear;  // a packed weight, in products.cpp

extern "C" {
bool rrm_linear(const Linear* linear, const void* x, void* out, int64_t rows);

void rrm_norm(int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows, int64_t width,
              float eps);

void rrm_silu_mul(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width);

void rrm_rope_store(int is_bf16, const void* qkv, const void* q_norm, const void* k_norm, const float* cos,
                    const float* sin, const int64_t* positions, const int64_t* slots, void* query, void* keys,
                    void* values, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t rotary,
                    float eps);

void rrm_paged_decode(int is_bf16, const void* query, const void* keys, const void* values, void* out,
                      const int32_t* tables, const int32_t* lengths, const float* sinks, int64_t rows,
                      int64_t table_width, int64_t block_size, int64_t heads, int64_t kv_heads, int64_t key_width,
                      int64_t value_width, float scale, float softcap, int64_t window);
}
