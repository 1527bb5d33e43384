// A decoder's layers for a step of decodes, all in one call: called one by one from Python, a small model's kernels take
// less time than what lies between the calls. The kernels, their order and so every bit of the result are the same.

#include "common.h"
#include "kernels.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 18;  // multiply-adds of all layers

struct Layer {  // as in native_decoder.py
    const Linear *qkv, *output, *gate_up, *down;
    const void *q_norm, *k_norm, *mlp_norm, *next_norm;
    void *keys, *values;
    int64_t heads, kv_heads, width, gated, window;
    float scale, qk_eps, mlp_eps, next_eps;

    int64_t size() const {
        int64_t numbers = 0;
        for (const Linear* linear : {qkv, output, gate_up, down}) numbers += linear->columns * linear->depth;
        return numbers;
    }
};

struct Rooms {  // for what lies between the kernels
    team::Room qkv, query, mixed, out, gate_up, gated;

    // Returns the number of phases of the layer.
    int64_t hold(team::Team& team, const Layer& s, const team::Decode& decode, int64_t hidden, int64_t number_bytes) {
        const int64_t rows = decode.rows, row_bytes = rows * number_bytes;
        qkv.hold(row_bytes * (s.heads + 2 * s.kv_heads) * s.width);
        query.hold(row_bytes * s.heads * s.width);
        mixed.hold(row_bytes * s.heads * s.width);
        out.hold(row_bytes * hidden);
        gate_up.hold(row_bytes * 2 * s.gated);
        gated.hold(row_bytes * s.gated);
        int64_t phases = 4 + team::prepare(team, decode);  // rope_store, norm, silu_mul, norm
        for (const Linear* linear : {s.qkv, s.output, s.gate_up, s.down}) phases += team::prepare(team, *linear, rows);
        return phases;
    }
};

}  // namespace

// `residual` and `normed` are [rows, hidden]: the layers' input and its first norm, then their output and its last norm.
extern "C" void rrm_decode_layers(int is_bf16, const Layer* layers, int64_t count, void* residual, void* normed,
                                  int64_t rows, int64_t hidden, const int64_t* positions, const int64_t* slots,
                                  const float* cos, const float* sin, int64_t rotary, const int32_t* tables,
                                  const int32_t* lengths, int64_t table_width, int64_t block_size) {
    thread_local Rooms mine;
    Rooms& rooms = mine;  // the calling thread's, not each thread's own
    int64_t work = 0;
    for (int64_t i = 0; i < count; i++) work += rows * layers[i].size();
    const auto decode_of = [&](const Layer& s) {
        return team::Decode{tables,     lengths, nullptr, rows,    table_width, block_size, s.heads,
                            s.kv_heads, s.width, s.width, s.scale, 0,           s.window};
    };
    const auto prepare = [&](team::Team& team) {
        int64_t phases = 0;
        for (int64_t i = 0; i < count; i++) {
            phases += rooms.hold(team, layers[i], decode_of(layers[i]), hidden, is_bf16 ? 2 : 4);
        }
        return phases;
    };
    // One team for all layers: to gather threads for every kernel takes as long as a small model's kernels.
    team::run(work > WORTH_THREADS, prepare, [&](team::Member& me) {
        void *const qkv = rooms.qkv.as<void>(), *const query = rooms.query.as<void>();
        void *const mixed = rooms.mixed.as<void>(), *const out = rooms.out.as<void>();
        void *const gate_up = rooms.gate_up.as<void>(), *const gated = rooms.gated.as<void>();
        for (const Layer* layer = layers; layer < layers + count; layer++) {
            const Layer& s = *layer;
            const team::Rope rope{s.q_norm, s.k_norm,   cos,     sin,    positions, slots,
                                  s.heads,  s.kv_heads, s.width, rotary, s.qk_eps};
            team::linear(me, *s.qkv, normed, qkv, rows);
            team::rope_store(me, is_bf16, rope, qkv, query, s.keys, s.values, rows);
            team::paged_decode(me, is_bf16, decode_of(s), query, s.keys, s.values, mixed);
            team::linear(me, *s.output, mixed, out, rows);
            team::norm(me, is_bf16, out, residual, s.mlp_norm, normed, rows, hidden, s.mlp_eps);
            team::linear(me, *s.gate_up, normed, gate_up, rows);
            team::silu_mul(me, is_bf16, gate_up, gated, rows, s.gated);
            team::linear(me, *s.down, gated, out, rows);
            team::norm(me, is_bf16, out, residual, s.next_norm, normed, rows, hidden, s.next_eps);
        }
    });
}
