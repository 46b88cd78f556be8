// Compiled once per instruction set with FASTPRUNE_ISA naming the namespace.
#include "cpu_kernels.hpp"

#include "attention.hpp"
#include "vector.hpp"

namespace fastprune {
namespace FASTPRUNE_ISA {
namespace {

constexpr float kInf = __builtin_inff();

// Lanes behind the end of a row, for which load gives 0, take another value.
inline Vec fill(Vec v, float, All) {
    return v;
}

inline Vec fill(Vec v, float value, First lanes) {
    float part[kWidth];
    store(part, v, All{});
    for (long i = lanes.count; i < kWidth; ++i) part[i] = value;
    return load(part, All{});
}

// 1 / sqrt(mean of squares + eps) of a row, from sums over lanes.
inline float inverse_rms(Vec squares, long columns, double eps) {
    return static_cast<float>(1.0 / __builtin_sqrt(sum(squares) / static_cast<double>(columns) + eps));
}

// body(accumulator, i, lanes) for the vectors of columns i..end - 1, with four accumulators in turn.
template <class Body>
inline void accumulate(long i, long end, Vec (&four)[4], Body body) {
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
        for (int a = 0; a < 4; ++a) body(four[a], i + a * kWidth, All{});
    }
    for (; i + kWidth <= end; i += kWidth) body(four[0], i, All{});
    if (i < end) body(four[1], i, First{end - i});
}

// Sums over the lanes of term(i, lanes) for the vectors of a row. Blocks keep the chains of additions, and so
// their rounding, short.
template <class Term>
inline Vec lane_sums(long columns, Term term) {
    constexpr long kBlock = 64 * kWidth;
    Vec sums = {};
    for (long i = 0; i < columns; i += kBlock) {
        Vec four[4] = {};
        accumulate(i, i + kBlock < columns ? i + kBlock : columns, four,
                   [=](Vec& s, long j, auto lanes) { s += term(j, lanes); });
        sums += (four[0] + four[1]) + (four[2] + four[3]);
    }
    return sums;
}

template <class T>
inline Vec squares_of(const T* x, long columns) {
    return lane_sums(columns, [=](long i, auto lanes) {
        const Vec v = load(x + i, lanes);
        return v * v;
    });
}

// A row's mean, and the squares of the differences to it as sums over lanes.
template <class T>
inline float center(const T* x, long columns, Vec& squares) {
    const float mean = sum(lane_sums(columns, [=](long i, auto lanes) { return load(x + i, lanes); })) /
                       static_cast<float>(columns);
    squares = lane_sums(columns, [=](long i, auto lanes) {
        const Vec v = fill(load(x + i, lanes) - mean, 0.0F, lanes);
        return v * v;
    });
    return mean;
}

template <class T>
void add_rms_norm(const AddRmsNorm& a, long begin, long end) {
    const auto* weight = static_cast<const T*>(a.weight);
    const auto* bias = static_cast<const T*>(a.bias);
    const float offset = a.offset;
    for (long row = begin; row < end; ++row) {
        const long base = row * a.columns;
        const T* x = static_cast<const T*>(a.states) + base;
        T* normed = static_cast<T*>(a.normed) + base;
        Vec squares;
        // without a place of its own, the sum waits in the place of its norm
        T* added = a.residual != nullptr ? static_cast<T*>(a.residual) + base : normed;
        if (a.branch != nullptr) {
            const T* branch = static_cast<const T*>(a.branch) + base;
            squares = lane_sums(a.columns, [=](long i, auto lanes) {
                const Vec v = rounded_to(x, load(x + i, lanes) + load(branch + i, lanes));
                store_rounded(added + i, v, lanes);
                return v * v;
            });
            x = added;
        } else {
            if (a.residual != nullptr && x != added) {
                __builtin_memcpy(added, x, static_cast<unsigned long>(a.columns) * sizeof(T));
            }
            squares = squares_of(x, a.columns);
        }
        const float mean = a.centered ? center(x, a.columns, squares) : 0.0F;
        const float scale = inverse_rms(squares, a.columns, a.eps);
        for_each_vector(a.columns, [=](long i, auto lanes) {
            Vec v = (a.centered ? load(x + i, lanes) - mean : load(x + i, lanes)) * scale;
            if (weight != nullptr) v = v * (load(weight + i, lanes) + offset);
            store(normed + i, bias == nullptr ? v : v + load(bias + i, lanes), lanes);
        });
    }
}

// RMSNorm of one head, in place.
template <class T>
void norm_head(T* head, const T* weight, const Rotary& a) {
    const float scale = inverse_rms(squares_of(head, a.head_dim), a.head_dim, a.eps);
    for_each_vector(a.head_dim, [=](long i, auto lanes) {
        store(head + i, load(head + i, lanes) * scale * (load(weight + i, lanes) + a.offset), lanes);
    });
}

// Columns 2i and 2i + 1 by the angle i, a vector of pairs at a time.
template <class T>
void rotate_neighbours(T* head, const float* cos, const float* sin, long half) {
    for_each_vector(half, [=](long i, auto lanes) {
        T* pairs = head + 2 * i;
        const long count = half - i < kWidth ? half - i : kWidth;
        float even[kWidth] = {};
        float odd[kWidth] = {};
        for (long l = 0; l < count; ++l) {
            even[l] = to_float(pairs[2 * l]);
            odd[l] = to_float(pairs[2 * l + 1]);
        }
        const Vec c = load(cos + i, lanes);
        const Vec s = load(sin + i, lanes);
        const Vec first = load(even, All{});
        const Vec second = load(odd, All{});
        store(even, first * c - second * s, All{});
        store(odd, second * c + first * s, All{});
        float both[2 * kWidth];
        for (long l = 0; l < kWidth; ++l) {
            both[2 * l] = even[l];
            both[2 * l + 1] = odd[l];
        }
        const float* from = both;
        for_each_vector(2 * count, [=](long j, auto some) { store(pairs + j, load(from + j, some), some); });
    });
}

template <class T>
void rotate_head(T* head, const float* cos, const float* sin, const T* weight, const Rotary& a) {
    const long half = a.half;
    if (weight != nullptr && (a.interleaved || a.norm_after)) {  // one after the other
        if (!a.norm_after) norm_head(head, weight, a);
        rotate_head<T>(head, cos, sin, nullptr, a);
        if (a.norm_after) norm_head(head, weight, a);
        return;
    }
    if (a.interleaved) {
        rotate_neighbours(head, cos, sin, half);
        return;
    }
    if (weight == nullptr) {
        for_each_vector(half, [=](long i, auto lanes) {
            const Vec c = load(cos + i, lanes);
            const Vec s = load(sin + i, lanes);
            const Vec first = load(head + i, lanes);
            const Vec second = load(head + half + i, lanes);
            store(head + i, first * c - second * s, lanes);
            store(head + half + i, second * c + first * s, lanes);
        });
        return;
    }
    const float scale = inverse_rms(squares_of(head, a.head_dim), a.head_dim, a.eps);
    for_each_vector(half, [=](long i, auto lanes) {
        const Vec c = load(cos + i, lanes);
        const Vec s = load(sin + i, lanes);
        const Vec first = load(head + i, lanes) * scale * (load(weight + i, lanes) + a.offset);
        const Vec second = load(head + half + i, lanes) * scale * (load(weight + half + i, lanes) + a.offset);
        store(head + i, first * c - second * s, lanes);
        store(head + half + i, second * c + first * s, lanes);
    });
    for_each_vector(a.head_dim - 2 * half, [=](long i, auto lanes) {
        const long at = 2 * half + i;
        store(head + at, load(head + at, lanes) * scale * (load(weight + at, lanes) + a.offset), lanes);
    });
}

template <class T>
void rotary(const Rotary& a, long begin, long end) {
    for (long token = begin; token < end; ++token) {
        T* head = static_cast<T*>(a.qkv) + token * (a.heads + 2 * a.kv_heads) * a.head_dim;
        const float* cos = a.cos + a.position[token] * a.half;
        const float* sin = a.sin + a.position[token] * a.half;
        for (long h = 0; h < a.heads + a.kv_heads; ++h, head += a.head_dim) {
            const void* weight = h < a.heads ? a.q_weight : a.k_weight;
            rotate_head(head, cos, sin, static_cast<const T*>(weight), a);
        }
    }
}

// g / (1 + exp(-g)). Below -88, where it is smaller than 1e-36, it is -0; at -inf NaN, as in torch.
inline Vec silu(Vec g) {
    const Vec low = broadcast(-88.0F);
    const Vec e = exp(-least(broadcast(87.0F), g));
    return g < low ? g * 0.0F : g / (e + 1.0F);
}

// g / (1 + exp(-2u)) with u of GELU's approximation by tanh; like silu far from zero.
inline Vec gelu_tanh(Vec g) {
    const Vec twice = (g + g * g * g * 0.044715F) * 1.59576912F;
    const Vec low = broadcast(-87.0F);
    const Vec e = exp(greatest(low, least(broadcast(87.0F), -twice)));
    return twice < low ? g * 0.0F : g / (e + 1.0F);
}

template <class Act, class T>
inline void multiply_activated(const T* gate, const T* up, T* out, long columns, Act activate) {
    for_each_vector(columns, [=](long i, auto lanes) {
        store(out + i, activate(load(gate + i, lanes)) * load(up + i, lanes), lanes);
    });
}

template <class T>
void gated_mlp(const GatedMlp& a, long begin, long end) {
    for (long row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.columns;
        const T* up = gate + a.columns;
        T* out = static_cast<T*>(a.out) + row * a.columns;
        if (a.activation == Activation::silu) {
            multiply_activated(gate, up, out, a.columns, [](Vec g) { return silu(g); });
        } else {
            multiply_activated(gate, up, out, a.columns, [](Vec g) { return gelu_tanh(g); });
        }
    }
}

// The greatest element besides NaN; -inf if all are NaN.
template <class T>
float maximum(const T* x, long columns) {
    Vec most[4] = {};
    for (Vec& m : most) m = broadcast(-kInf);
    accumulate(0, columns, most, [=](Vec& m, long i, auto lanes) {
        const Vec v = fill(load(x + i, lanes), -kInf, lanes);
        m = greatest(v, m);
    });
    float result = -kInf;
    for (const Vec& m : most) {
        for (int l = 0; l < kWidth; ++l) result = m[l] > result ? m[l] : result;
    }
    return result;
}

template <class T>
void log_sum_exp(const LogSumExp& a, long begin, long end) {
    for (long row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.logits) + row * a.stride;
        const float most = maximum(x, a.columns);
        if (most == kInf || most == -kInf) {
            // infinite, unless there is a NaN, which the maximum passed over
            a.out[row] = most + sum(lane_sums(a.columns, [=](long i, auto lanes) {
                             const Vec v = load(x + i, lanes);
                             return v == v ? Vec{} : v;
                         }));
            continue;
        }
        const Vec low = broadcast(-87.0F);  // what lies further below the greatest adds nothing
        const float total = sum(lane_sums(a.columns, [=](long i, auto lanes) {
            return exp(greatest(low, fill(load(x + i, lanes), -kInf, lanes) - most));
        }));
        a.out[row] = static_cast<float>(most + __builtin_log(total));
    }
}

// Sum of term(i, lanes) for the vectors of a row: short chains of float32, the rest in double.
template <class Term>
inline double exact_sum(long columns, Term term) {
    constexpr long kBlock = 64 * kWidth;
    double total = 0.0;
    for (long i = 0; i < columns; i += kBlock) {
        Vec four[4] = {};
        accumulate(i, i + kBlock < columns ? i + kBlock : columns, four,
                   [=](Vec& s, long j, auto lanes) { s += term(j, lanes); });
        for (const Vec& s : four) {
            for (int l = 0; l < kWidth; ++l) total += static_cast<double>(s[l]);
        }
    }
    return total;
}

template <class T>
double exact_log_sum_exp(const T* x, long columns) {
    const float most = maximum(x, columns);
    if (most == kInf || most == -kInf) {
        return most + exact_sum(columns, [=](long i, auto lanes) {
                   const Vec v = load(x + i, lanes);
                   return v == v ? Vec{} : v;
               });
    }
    const Vec low = broadcast(-87.0F);
    return most + __builtin_log(exact_sum(columns, [=](long i, auto lanes) {
               return exp(greatest(low, fill(load(x + i, lanes), -kInf, lanes) - most));
           }));
}

template <class T>
void divergence(const Divergence& a, long begin, long end) {
    for (long row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.logits) + row * a.stride;
        a.sums[row] = exact_log_sum_exp(x, a.columns);
        if (a.dense == nullptr) continue;
        const T* dense = static_cast<const T*>(a.dense) + row * a.dense_stride;
        const Vec sum = broadcast(static_cast<float>(a.dense_sums[row]));
        const Vec low = broadcast(-87.0F);
        a.means[row] = exact_sum(a.columns, [=](long i, auto lanes) {
            const Vec l = load(dense + i, lanes);
            const Vec log_p = l - sum;
            const Vec p = exp(greatest(low, log_p));
            // a token of p = 0 adds 0, also if its logits are -inf; behind the end of a row both are 0
            return log_p < low ? Vec{} : p * (l - load(x + i, lanes));
        });
    }
}

}  // namespace

extern const CpuKernels cpu_table;
const CpuKernels cpu_table = {
    {add_rms_norm<float>, add_rms_norm<Bfloat16>},
    {rotary<float>, rotary<Bfloat16>},
    {gated_mlp<float>, gated_mlp<Bfloat16>},
    {log_sum_exp<float>, log_sum_exp<Bfloat16>},
    {divergence<float>, divergence<Bfloat16>},
    attention<float>,
    attention<Bfloat16>,
};

}  // namespace FASTPRUNE_ISA
}  // namespace fastprune
