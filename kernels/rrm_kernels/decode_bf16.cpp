#include "decode.h"

void team::decode_bf16(Member& me, const Decode& decode, const void* query, const void* keys, const void* values,
                       void* out) {
    decode_any_width<bf16>(me, decode, query, keys, values, out);
}
