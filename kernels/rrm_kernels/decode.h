// Paged decode attention on CPU: one query token per sequence, K and V read in place from the blocks.
//
// Caches are [blocks, block_size, kv_heads, width]; query and out are [rows, heads, width]. Compiled for each type by
// itself, because it takes most of the library's compile time.

#pragma once

#include "attend.h"

namespace {

// What the rows' tokens are divided into.
struct Spans {
    const Shape& s;
    bool whole_rows;
    int64_t count = 0, tokens = 0, longest = 0;  // of all rows; the tokens of the longest span

    Spans(const Shape& s, bool whole_rows) : s(s), whole_rows(whole_rows) {
        for (int64_t row = 0; row < s.rows; row++) {
            const Context first = context(row, 0);
            count += of(row), tokens += s.lengths[row] - s.first(row), longest = std::max(longest, first.count);
        }
    }

    int64_t of(int64_t row) const { return whole_rows ? 1 : s.spans(row); }

    Context context(int64_t row, int64_t span) const {
        const int64_t first = s.first(row) + span * team::SPAN, length = s.lengths[row];
        return {s.tables + row * s.table_width, first, whole_rows ? length : std::min(first + team::SPAN, length)};
    }

    // A row and how many spans there are before it. Goes forward fastest.
    struct Walk {
        const Spans& spans;
        int64_t row = 0, before = 0;

        explicit Walk(const Spans& spans) : spans(spans) {}

        void to_row(int64_t wanted) {
            if (wanted < row) row = before = 0;
            while (row < wanted) before += spans.of(row++);
        }

        void to_span(int64_t wanted) {
            if (wanted < before) row = before = 0;
            while (before + spans.of(row) <= wanted) before += spans.of(row++);
        }
    };
};

template <typename T, int WIDTH>
void decode(team::Member& me, const Shape& s, const T* query, const T* keys, const T* values, T* out) {
    constexpr bool WHOLE_ROWS = WIDTH == 0;
    const int64_t group = s.heads / s.kv_heads, part = team::part_size(WIDTH);
    const Spans all(s, WHOLE_ROWS);
    // All heads of a span together, because what memory holds side by side comes from it fastest; fewer of them where a span
    // would be more than a thread's share.
    const int64_t wanted = all.tokens > 0 ? whole(me.threads * all.longest, all.tokens) : 1;
    const int64_t pieces = WHOLE_ROWS ? s.kv_heads : std::min(s.kv_heads, wanted);
    float* const parts = me.team.parts.as<float>();  // [spans of all rows][heads][part]
    Spans::Walk walk(all);
    me.share(all.count * pieces, [&](int64_t item) {
        const int64_t index = item / pieces, piece = item % pieces;
        walk.to_span(index);
        const int64_t row = walk.row, span = index - walk.before;
        const int64_t head = s.kv_heads * piece / pieces, count = s.kv_heads * (piece + 1) / pieces - head;
        const int64_t at = row * s.heads + head * group;
        const Context context = all.context(row, span);
        const auto run = [&](auto attend, auto... more) {
            attend(s, query + at * s.key_width, keys + head * s.key_width, values + head * s.value_width,
                   out + at * s.value_width, context, s.sinks && span == 0 ? s.sinks + head * group : nullptr, more...);
        };
        if constexpr (WHOLE_ROWS) run(attend_any<T>);
        else run(attend<T, WIDTH>, all.of(row) > 1 ? parts + (index * s.heads + head * group) * part : nullptr, count);
    });
    if constexpr (!WHOLE_ROWS) {
        if (all.count == s.rows) return;
        Spans::Walk again(all);
        me.share(s.rows, [&](int64_t row) {
            again.to_row(row);
            for (int64_t head = 0; head < s.heads && all.of(row) > 1; head++) {
                join<T, WIDTH>(parts + (again.before * s.heads + head) * part, all.of(row), s.heads * part,
                               out + (row * s.heads + head) * WIDTH);
            }
        });
    }
}

template <typename T>
void decode_any_width(team::Member& me, const Shape& s, const void* query, const void* keys, const void* values, void* out) {
    auto run = decode<T, 0>;
    if (s.key_width == s.value_width) {
        switch (s.key_width) {
            case 48: run = decode<T, 48>; break;
            case 64: run = decode<T, 64>; break;
            case 80: run = decode<T, 80>; break;
            case 96: run = decode<T, 96>; break;
            case 128: run = decode<T, 128>; break;
            case 256: run = decode<T, 256>; break;
        }
    }
    run(me, s, static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values),
        static_cast<T*>(out));
}

}  // namespace
