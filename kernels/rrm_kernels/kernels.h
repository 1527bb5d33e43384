// What one part of the library calls of another: kernels that a team of threads shares.

#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "common.h"

struct Linear {  // a packed weight, as in products.py
    const Bits* panels;
    const float* bias;
    int64_t columns, depth;
    int32_t kind;
};

namespace team {

// Memory that is kept from call to call; begins at a cache line.
class Room {
    static constexpr int64_t LINE = 64;
    std::vector<char> memory;

  public:
    void hold(int64_t bytes) {
        if (int64_t(memory.size()) < bytes + LINE) memory.resize(bytes + LINE);
    }

    template <typename T>
    T* as() {
        return (T*)(memory.data() + (-(intptr_t)memory.data() & (LINE - 1)));
    }
};

// Work in items that threads take until none is left. Each thread goes through a share of its own in order, for memory is
// read fastest so, and then takes what is left of the others' shares, from their ends. It is over when every item is done,
// not when every thread has come: one that other programs keep from running delays no more than the item that it holds, and
// what is over when it comes it passes by.
class Phase {
    // Then the waiting thread's core is free for one that holds an item.
    static constexpr std::chrono::microseconds SPIN{100}, SLEEP{20};
    static constexpr uint64_t FROM_END = uint64_t(1) << 32;

    // How many items were taken from a share: from its beginning in the lower half, from its end in the upper one.
    struct alignas(64) Taken {
        std::atomic<uint64_t> items{0};

        bool left(uint64_t had, int64_t size) const { return int64_t(had % FROM_END + had / FROM_END) < size; }
    };

    alignas(64) std::atomic<int64_t> done{0};
    std::vector<Taken> shares;

  public:
    void reset(int64_t threads) {
        done = 0;
        if (int64_t(shares.size()) < threads) shares = std::vector<Taken>(threads);
        for (int64_t i = 0; i < threads; i++) shares[i].items.store(0, std::memory_order_relaxed);
    }

    // An item for this thread, `items` if none is left.
    int64_t take(int64_t thread, int64_t threads, int64_t items) {
        for (int64_t i = 0; i < threads; i++) {
            const int64_t of = (thread + i) % threads, begin = items * of / threads, end = items * (of + 1) / threads;
            Taken& taken = shares[of];
            if (!taken.left(taken.items.load(std::memory_order_relaxed), end - begin)) continue;
            const uint64_t had = taken.items.fetch_add(i == 0 ? 1 : FROM_END, std::memory_order_relaxed);
            if (taken.left(had, end - begin)) return i == 0 ? begin + had % FROM_END : end - 1 - had / FROM_END;
        }
        return items;
    }

    // Add what this thread has done and wait for the others' items.
    void finish(int64_t count, int64_t items) {
        done.fetch_add(count, std::memory_order_release);
        const auto over = [&] { return done.load(std::memory_order_acquire) >= items; };
        if (over()) return;
        const auto began = std::chrono::steady_clock::now();
        while (!over()) {
            if (std::chrono::steady_clock::now() - began > SPIN) std::this_thread::sleep_for(SLEEP);
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// What the threads of one parallel region share. Before it one thread calls `hold`.
struct Team {
    Room inputs, sums;  // of products, one at a time
    Room parts;         // of attention

    void hold(int64_t phases) {
        if (phases > capacity) all = std::make_unique<Phase[]>(capacity = phases);
        for (int64_t i = 0; i < phases; i++) all[i].reset(omp_get_max_threads());
    }

    Phase& phase(int64_t i) { return all[i]; }

  private:
    std::unique_ptr<Phase[]> all;
    int64_t capacity = 0;
};

// One thread of a team. All of them call the same kernels with the same arguments in the same order.
class Member {
    int64_t phases = 0;

  public:
    Team& team;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();

    explicit Member(Team& team) : team(team) {}

    Phase& next() { return team.phase(phases++); }

    // An item of a phase, `items` if none is left.
    int64_t take(Phase& phase, int64_t items) const { return phase.take(thread, threads, items); }

    template <typename F>
    void share(int64_t items, F f) {
        Phase& phase = next();
        int64_t count = 0;
        for (int64_t item; (item = take(phase, items)) < items; count++) f(item);
        phase.finish(count, items);
    }
};

// Makes room for a product, before the parallel region. Returns its number of phases; 0 if this kind was not compiled. What
// has no `prepare` has one phase.
int64_t prepare(Team& team, const Linear& linear, int64_t rows);

void linear(Member& me, const Linear& linear, const void* x, void* out, int64_t rows);

void norm(Member& me, int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows,
          int64_t width, float eps);

void silu_mul(Member& me, int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width);

struct Rope {
    const void *q_norm, *k_norm;  // null: none
    const float *cos, *sin;       // [positions, rotary / 2]
    const int64_t *positions, *slots;
    int64_t heads, kv_heads, width, rotary;
    float eps;
};

void rope_store(Member& me, int is_bf16, const Rope& rope, const void* qkv, void* query, void* keys, void* values,
                int64_t rows);

// A row's tokens are done in spans of so many, each by itself, and what they give is put together in their order. So a long
// row is work for many threads, and a span's scores stay in the second cache.
constexpr int64_t SPAN = 960;

// Numbers of what one head gives for a span: its result, its highest score and its sum of exponentials.
constexpr int64_t part_size(int64_t width) { return 2 + width; }

struct Decode {
    const int32_t *tables, *lengths;
    const float* sinks;  // null: none
    int64_t rows, table_width, block_size, heads, kv_heads, key_width, value_width;
    float scale, softcap;  // softcap 0: none
    int64_t window;        // 0: none

    // The first token that a row attends to.
    int64_t first(int64_t row) const { return window ? std::max<int64_t>(0, lengths[row] - window) : 0; }

    int64_t spans(int64_t row) const { return std::max<int64_t>(1, whole(lengths[row] - first(row), SPAN)); }
};

// Makes room for attention, before the parallel region. Returns its number of phases.
int64_t prepare(Team& team, const Decode& decode);

void decode_bf16(Member& me, const Decode& decode, const void* query, const void* keys, const void* values, void* out);

void decode_fp32(Member& me, const Decode& decode, const void* query, const void* keys, const void* values, void* out);

void paged_decode(Member& me, int is_bf16, const Decode& decode, const void* query, const void* keys,
                  const void* values, void* out);

// Runs kernels on all threads if they are worth them. `prepare` makes the team ready and returns the number of phases; if
// that is 0 nothing runs and the result is false.
template <typename Prepare, typename Kernels>
bool run(bool worth_threads, Prepare prepare, Kernels kernels) {
    thread_local Team mine;
    Team& team = mine;  // the calling thread's, not each thread's own
    const int64_t phases = prepare(team);
    team.hold(phases);
#pragma omp parallel if (phases && worth_threads)
    if (phases) {
        Member me(team);
        kernels(me);
    }
    return phases;
}

template <typename Kernel>
void run(bool worth_threads, Kernel kernel) {
    run(worth_threads, [](Team&) { return 1; }, kernel);
}

}  // namespace team
