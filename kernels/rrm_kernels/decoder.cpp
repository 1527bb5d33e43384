// A decoder's layers for a step of decodes, all in one call: called one by one from Python, a small model's kernels take
// less time than what lies between the calls. The kernels, their order and so every bit of the result are the same.

#include "common.h"
#include "kernels.h"

namespace {

// Memory that is kept from step to step; begins at a cache line.
class Room {
    std::vector<char> memory;

  public:
    void* of(int64_t bytes) {
        constexpr int64_t LINE = 64;
        if (int64_t(memory.size()) < bytes + LINE) memory.resize(bytes + LINE);
        return memory.data() + (-(intptr_t)memory.data() & (LINE - 1));
    }
};

struct Layer {  // as in native_decoder.py
    const Linear *qkv, *output, *gate_up, *down;
    const void *q_norm, *k_norm, *mlp_norm, *next_norm;
    void *keys, *values;
    int64_t heads, kv_heads, width, gated, window;
    float scale, qk_eps, mlp_eps, next_eps;
};

}  // namespace

// `residual` and `normed` are [rows, hidden]: the layers' input and its first norm, then their output and its last norm.
extern "C" void rrm_decode_layers(int is_bf16, const Layer* layers, int64_t count, void* residual, void* normed,
                                  int64_t rows, int64_t hidden, const int64_t* positions, const int64_t* slots,
                                  const float* cos, const float* sin, int64_t rotary, const int32_t* tables,
                                  const int32_t* lengths, int64_t table_width, int64_t block_size) {
    thread_local Room of_qkv, of_query, of_mixed, of_out, of_gate_up, of_gated;
    const int64_t row_bytes = rows * (is_bf16 ? 2 : 4);  // of one column
    void* const out = of_out.of(row_bytes * hidden);
    for (const Layer* layer = layers; layer < layers + count; layer++) {
        const Layer& s = *layer;
        void* const qkv = of_qkv.of(row_bytes * (s.heads + 2 * s.kv_heads) * s.width);
        void* const query = of_query.of(row_bytes * s.heads * s.width);
        void* const mixed = of_mixed.of(row_bytes * s.heads * s.width);
        void* const gate_up = of_gate_up.of(row_bytes * 2 * s.gated);
        void* const gated = of_gated.of(row_bytes * s.gated);
        rrm_linear(s.qkv, normed, qkv, rows);
        rrm_rope_store(is_bf16, qkv, s.q_norm, s.k_norm, cos, sin, positions, slots, query, s.keys, s.values, rows,
                       s.heads, s.kv_heads, s.width, rotary, s.qk_eps);
        rrm_paged_decode(is_bf16, query, s.keys, s.values, mixed, tables, lengths, nullptr, rows, table_width,
                         block_size, s.heads, s.kv_heads, s.width, s.width, s.scale, 0, s.window);
        rrm_linear(s.output, mixed, out, rows);
        rrm_norm(is_bf16, out, residual, s.mlp_norm, normed, rows, hidden, s.mlp_eps);
        rrm_linear(s.gate_up, normed, gate_up, rows);
        rrm_silu_mul(is_bf16, gate_up, gated, rows, s.gated);
        rrm_linear(s.down, gated, out, rows);
        rrm_norm(is_bf16, out, residual, s.next_norm, normed, rows, hidden, s.next_eps);
    }
}
