#include "decode.h"

void team::decode_fp32(Member& me, const Decode& decode, const void* query, const void* keys, const void* values,
                       void* out) {
    decode_any_width<float>(me, decode, query, keys, values, out);
}
