// The inner loops of the CPU operators, compiled once per instruction set like those of kernels.hpp: plain
// data and functions. Every loop works on rows begin..end - 1, and a row's result depends on that row alone.
#pragma once

#include <cstdint>

namespace fastprune {

// Matrices are row-major and contiguous. Elements are float or bfloat16, whichever table entry is called.

struct AddRmsNorm {
    const void* states;  // [M, columns]
    const void* branch;  // [M, columns] or null
    const void* weight;  // [columns] or null: 1
    void* residual;      // [M, columns] or null: states + branch, rounded
    void* normed;        // [M, columns]
    long columns;
    double eps;
    bool centered = false;       // the mean is taken off first (LayerNorm)
    float offset = 0.0F;         // added to the weight
    const void* bias = nullptr;  // [columns] or null: 0
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
    float offset = 0.0F;       // added to the norms' weights
    bool interleaved = false;  // pairs are columns 2i and 2i + 1, not i and half + i
    bool norm_after = false;   // heads are normed after the rotation, not before
};

enum class Activation { silu, gelu_tanh };

struct GatedMlp {
    const void* gate_up;  // [T, 2 columns], gate first
    void* out;            // [T, columns]
    long columns;
    Activation activation = Activation::silu;
};

struct LogSumExp {
    const void* logits;  // [P, columns]
    float* out;          // [P]
    long columns;
    long stride;  // elements from one row to the next
};

// A part of the vocabulary in a Kullback-Leibler divergence, whose sums must not show their rounding.
struct Divergence {
    const void* logits;        // [P, columns], of the masked model
    const void* dense;         // [P, columns], of the dense one, or null: no means
    const double* dense_sums;  // [P], log-sum-exps of dense
    double* sums;              // [P], log-sum-exps of logits
    double* means;             // [P], sums of exp(dense - float(dense_sums)) (dense - logits), or null
    long columns;
    long stride;        // of logits: elements from one row to the next
    long dense_stride;  // likewise
};

struct Attention {
    // The keys that a query sees: two runs of places in its row, the first before the second.
    struct Seen {
        std::int32_t first_begin, first_end, second_begin, second_end;
    };
    static constexpr long kBlock = 24;  // queries that pass the keys together
    static constexpr long kPad = 64;    // scratch is made for a multiple of so many keys, and columns

    const void* qkv;   // [rows * length, (heads + 2 kv_heads) * head_dim], q, then k, then v
    void* out;         // [rows * length, heads * head_dim]
    const Seen* seen;  // [rows or 1, length]
    bool rows_differ;  // whether seen has every row
    long length;
    long heads;
    long kv_heads;
    long head_dim;
    float scale;
    float soft_cap = 0.0F;        // scores become cap tanh(score / cap); 0: none
    const void* sinks = nullptr;  // [heads], a score of each head without a value; null: none

    // Of queries, of one head and row.
    long blocks() const { return (length + kBlock - 1) / kBlock; }
    // Floats that a thread needs.
    long scratch() const {
        const auto padded = [](long n) { return (n + kPad - 1) / kPad * kPad; };
        return padded(length) * head_dim + length * padded(head_dim) + kBlock * (head_dim + padded(length));
    }
};

template <class Arguments>
using RowsFn = void (*)(const Arguments&, long begin, long end);

template <class Arguments>
struct ForDtype {
    RowsFn<Arguments> float32;
    RowsFn<Arguments> bfloat16;
};

// Items begin..end - 1, each a block of queries: item = (row * heads + head) * blocks + block.
using AttentionFn = void (*)(const Attention&, float* scratch, long begin, long end);

struct CpuKernels {
    ForDtype<AddRmsNorm> add_rms_norm;
    ForDtype<Rotary> rotary;
    ForDtype<GatedMlp> gated_mlp;
    ForDtype<LogSumExp> log_sum_exp;
    ForDtype<Divergence> divergence;
    AttentionFn attention_float32;
    AttentionFn attention_bfloat16;
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
