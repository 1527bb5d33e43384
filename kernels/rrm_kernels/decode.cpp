// Paged decode attention of either type: see decode.h. Called through ctypes by native.py, which checks shapes.

#include "common.h"
#include "kernels.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 18;  // products of a query and a key, in numbers

}  // namespace

int64_t team::prepare(Team& team, const Decode& decode) {
    int64_t spans = 0;
    for (int64_t row = 0; row < decode.rows; row++) spans += decode.spans(row);
    if (spans > decode.rows) team.parts.hold(spans * decode.heads * part_size(decode.value_width) * sizeof(float));
    return 2;
}

void team::paged_decode(Member& me, int is_bf16, const Decode& decode, const void* query, const void* keys,
                        const void* values, void* out) {
    (is_bf16 ? decode_bf16 : decode_fp32)(me, decode, query, keys, values, out);
}

extern "C" void rrm_paged_decode(int is_bf16, const void* query, const void* keys, const void* values, void* out,
                                 const int32_t* tables, const int32_t* lengths, const float* sinks, int64_t rows,
                                 int64_t table_width, int64_t block_size, int64_t heads, int64_t kv_heads,
                                 int64_t key_width, int64_t value_width, float scale, float softcap, int64_t window) {
    const team::Decode decode{tables, lengths,  sinks,     rows,        table_width, block_size, heads,
                              kv_heads, key_width, value_width, scale,       softcap,     window};
    int64_t tokens = 0;
    for (int64_t row = 0; row < rows; row++) tokens += lengths[row];
    team::run(
        tokens * heads * key_width > WORTH_THREADS, [&](team::Team& team) { return team::prepare(team, decode); },
        [&](team::Member& me) { team::paged_decode(me, is_bf16, decode, query, keys, values, out); });
}
