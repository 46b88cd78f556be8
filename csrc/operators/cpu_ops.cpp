#include "cpu_ops.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "dispatch.hpp"

namespace fastprune {

namespace {

// The least elements for which another thread is worth its start (torch's own grain).
constexpr std::int64_t kGrain = 32768;

constexpr std::int64_t kLine = 16;  // floats of a cache line

// Calls run(thread, begin, end) on shares of the rows, with at most this number of threads.
template <class Run>
void share_out(std::int64_t rows, std::int64_t columns, int threads, Run run) {
    const std::int64_t useful = std::min(rows, rows * columns / kGrain);
    const int team = static_cast<int>(std::min<std::int64_t>(threads, useful));
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel num_threads(team)
        {
            const int thread = omp_get_thread_num();
            const int count = omp_get_num_threads();
            run(thread, rows * thread / count, rows * (thread + 1) / count);
        }
        return;
    }
#else
    static_cast<void>(team);
#endif
    run(0, 0, rows);
}

template <class Arguments>
void over_rows(const ForDtype<Arguments>& kernel, const Arguments& arguments, std::int64_t rows,
               std::int64_t columns, Dtype dtype, int threads) {
    const RowsFn<Arguments> run = dtype == Dtype::float32 ? kernel.float32 : kernel.bfloat16;
    share_out(rows, columns, threads, [&](int, std::int64_t begin, std::int64_t end) { run(arguments, begin, end); });
}

}  // namespace

void add_rms_norm(const AddRmsNorm& a, std::int64_t rows, Dtype dtype, int threads) {
    over_rows(instruction_set().cpu.add_rms_norm, a, rows, a.columns, dtype, threads);
}

void rotary(const Rotary& a, std::int64_t rows, std::int64_t positions, Dtype dtype, int threads) {
    for (std::int64_t row = 0; row < rows; ++row) {
        if (a.position[row] < 0 || a.position[row] >= positions) {
            throw std::invalid_argument("position must lie in 0.." + std::to_string(positions - 1) +
                                        ", the rows of cos, not " + std::to_string(a.position[row]));
        }
    }
    over_rows(instruction_set().cpu.rotary, a, rows, (a.heads + a.kv_heads) * a.head_dim, dtype, threads);
}

void gated_mlp(const GatedMlp& a, std::int64_t rows, Dtype dtype, int threads) {
    over_rows(instruction_set().cpu.gated_mlp, a, rows, a.columns, dtype, threads);
}

void log_sum_exp(const LogSumExp& a, std::int64_t rows, Dtype dtype, int threads) {
    over_rows(instruction_set().cpu.log_sum_exp, a, rows, a.columns, dtype, threads);
}

void divergence(const Divergence& a, std::int64_t rows, Dtype dtype, int threads) {
    over_rows(instruction_set().cpu.divergence, a, rows, a.columns, dtype, threads);
}

void attention(const Attention& a, std::int64_t rows, Dtype dtype, int threads) {
    for (std::int64_t i = 0; i < (a.rows_differ ? rows : 1) * a.length; ++i) {
        const Attention::Seen& s = a.seen[i];
        if (s.first_begin < 0 || s.first_end < s.first_begin || s.second_begin < s.first_end ||
            s.second_end < s.second_begin || s.second_end > a.length) {
            throw std::invalid_argument("seen must hold two runs of places in 0.." + std::to_string(a.length) +
                                        ", the first before the second");
        }
    }
    const CpuKernels& cpu = instruction_set().cpu;
    const AttentionFn run = dtype == Dtype::float32 ? cpu.attention_float32 : cpu.attention_bfloat16;
    const std::int64_t size = (a.scratch() + kLine - 1) / kLine * kLine;  // threads write to no line together
    const std::int64_t items = rows * a.heads * a.blocks();
    threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items)));
    const std::size_t bytes = static_cast<std::size_t>(size * threads) * sizeof(float);
    const std::unique_ptr<float, decltype(&std::free)> scratch(
        static_cast<float*>(std::aligned_alloc(kLine * sizeof(float), bytes)), &std::free);
    if (scratch == nullptr) throw std::bad_alloc();
    share_out(items, Attention::kBlock * a.head_dim * (1 + a.length / 16), threads,
              [&](int thread, std::int64_t begin, std::int64_t end) {
                  run(a, scratch.get() + thread * size, begin, end);
              });
}

}  // namespace fastprune
