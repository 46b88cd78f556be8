#include "cpu_ops.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.hpp"

namespace fastprune {

namespace {

// A thread is worth waking for this many elements (torch's own grain).
constexpr std::int64_t kGrain = 32768;

template <class Arguments>
void over_rows(const ForDtype<Arguments>& kernel, const Arguments& arguments, std::int64_t rows,
               std::int64_t columns, Dtype dtype, int threads) {
    const RowsFn<Arguments> run = dtype == Dtype::float32 ? kernel.float32 : kernel.bfloat16;
    const std::int64_t useful = std::min(rows, rows * columns / kGrain);
    const int team = static_cast<int>(std::min<std::int64_t>(threads, useful));
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel num_threads(team)
        {
            const int thread = omp_get_thread_num();
            const int count = omp_get_num_threads();
            run(arguments, rows * thread / count, rows * (thread + 1) / count);
        }
        return;
    }
#else
    static_cast<void>(team);
#endif
    run(arguments, 0, rows);
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

}  // namespace fastprune
