// The inner loops of the CPU operators, compiled once per instruction set like those of kernels.hpp: plain
// data and functions. Every loop works on rows begin..end - 1, and a row's result depends on that row alone.
#pragma once

#include <cstdint>

namespace fastprune {

// Matrices are row-major and contiguous. Elements are float or bfloat16, whichever table entry is called.

struct AddRmsNorm {
    const void* states;  // [M, columns]
    const void* branch;  // [M, columns] or null
    const void* weight;  // [columns]
    void* residual;      // [M, columns] or null: states + branch, rounded
    void* normed;        // [M, columns]
    long columns;
    double eps;
};

struct Rotary {
    void* qkv;                     // [T, (heads + 2 kv_heads) * head_dim]
    const float* cos;              // [N, half]
    const float* sin;              // [N, half]
    const std::int64_t* position;  // [T], in 0..N-1
    const void* q_weight;          // [head_dim] or null: no norm
    const void* k_weight;
    long heads;
    long kv_heads;
    long head_dim;
    long half;
    double eps;
};

struct GatedMlp {
    const void* gate_up;  // [T, 2 columns], gate first
    void* out;            // [T, columns]
    long columns;
};

struct LogSumExp {
    const void* logits;  // [P, columns]
    float* out;          // [P]
    long columns;
    long stride;  // elements from one row to the next
};

template <class Arguments>
using RowsFn = void (*)(const Arguments&, long begin, long end);

template <class Arguments>
struct ForDtype {
    RowsFn<Arguments> float32;
    RowsFn<Arguments> bfloat16;
};

struct CpuKernels {
    ForDtype<AddRmsNorm> add_rms_norm;
    ForDtype<Rotary> rotary;
    ForDtype<GatedMlp> gated_mlp;
    ForDtype<LogSumExp> log_sum_exp;
};

namespace generic {
extern const CpuKernels cpu_table;
}
namespace avx2 {
extern const CpuKernels cpu_table;
}
namespace avx512 {
extern const CpuKernels cpu_table;
}

}  // namespace fastprune
