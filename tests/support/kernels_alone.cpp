// Runs every compiled CPU kernel without Python, on the same made-up numbers wherever it is compiled, and prints results.
//
// A line is a name and its numbers. Compiled together with the library's own sources.

#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {
int64_t rrm_linear_size(int64_t columns, int64_t depth);
void rrm_linear_pack(int is_bf16, const void* weight, void* panels, int64_t columns, int64_t depth);
bool rrm_linear(const void* linear, const void* x, void* out, int64_t rows);
void rrm_paged_decode(int is_bf16, const void* query, const void* keys, const void* values, void* out,
                      const int32_t* tables, const int32_t* lengths, const float* sinks, int64_t rows,
                      int64_t table_width, int64_t block_size, int64_t heads, int64_t kv_heads, int64_t key_width,
                      int64_t value_width, float scale, float softcap, int64_t window);
void rrm_norm(int is_bf16, const void* x, void* residual, const void* weight, void* out, int64_t rows, int64_t width,
              float eps);
void rrm_silu_mul(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t width);
}

struct Linear {
    const void* panels;
    const float* bias;
    int64_t columns, depth;
    int32_t kind;
};

static uint32_t state = 1;

// Numbers from -1 to 1, in bf16 as the upper halves of fp32.
template <typename T>
std::vector<T> numbers(int64_t count) {
    std::vector<T> out(count);
    for (T& number : out) {
        state = state * 1664525u + 1013904223u;
        const float value = float(int32_t(state)) / 2147483648.0f;
        std::memcpy(&number, (const char*)&value + sizeof value - sizeof number, sizeof number);
    }
    return out;
}

template <typename T>
void print(const char* name, const std::vector<T>& out) {
    std::printf("%s%zu", name, sizeof(T) * 8);
    for (const T& number : out) {
        float value = 0;
        std::memcpy((char*)&value + sizeof value - sizeof number, &number, sizeof number);
        std::printf(" %a", value);
    }
    std::printf("\n");
}

template <typename T>
void run(int is_bf16, int32_t kind) {
    const int64_t columns = 77, depth = 201;
    const auto weight = numbers<T>(columns * depth);
    const auto bias = numbers<float>(columns + 64);
    for (int64_t rows : {1, 5, 29, 130}) {
        std::vector<T> memory(rrm_linear_size(columns, depth) + 64), out(rows * columns);
        void* panels = (void*)(((uintptr_t)memory.data() + 63) / 64 * 64);
        rrm_linear_pack(is_bf16, weight.data(), panels, columns, depth);
        const Linear linear{panels, bias.data(), columns, depth, kind};
        if (!rrm_linear(&linear, numbers<T>(rows * depth).data(), out.data(), rows)) std::printf("refused\n");
        print("product", out);
    }
    const int64_t heads = 7, kv_heads = 1, block = 16, blocks = 63;
    const int32_t lengths[] = {9, 1000};
    int32_t tables[2 * blocks];
    for (int i = 0; i < 2 * blocks; i++) tables[i] = i * 5 % (blocks + 1);
    for (int64_t width : {20, 48, 64, 128}) {
        const auto query = numbers<T>(2 * heads * width), keys = numbers<T>((blocks + 1) * block * width),
                   values = numbers<T>((blocks + 1) * block * width);
        std::vector<T> out(2 * heads * width);
        rrm_paged_decode(is_bf16, query.data(), keys.data(), values.data(), out.data(), tables, lengths, nullptr, 2, blocks,
                         block, heads, kv_heads, width, width, 0.3f, 0, 0);
        print("attention", out);
    }
    const auto x = numbers<T>(3 * 96), scale = numbers<T>(96), both = numbers<T>(3 * 192);
    std::vector<T> out(3 * 96);
    rrm_norm(is_bf16, x.data(), nullptr, scale.data(), out.data(), 3, 96, 1e-6f);
    print("norm", out);
    rrm_silu_mul(is_bf16, both.data(), out.data(), 3, 96);
    print("silu", out);
}

int main() {
    run<float>(0, 1);
    run<uint16_t>(1, 3);
}
