// The CPU operators of the fused path, which divide the rows of the kernels among threads. docs/kernels.md
// defines them. A row's result depends neither on the other rows nor on the number of threads.
#pragma once

#include <cstdint>

#include "cpu_kernels.hpp"

namespace fastprune {

enum class Dtype { float32, bfloat16 };

void add_rms_norm(const AddRmsNorm& arguments, std::int64_t rows, Dtype dtype, int threads);

// Throws std::invalid_argument, with qkv unchanged, for a position outside of the tables' `positions` rows.
void rotary(const Rotary& arguments, std::int64_t rows, std::int64_t positions, Dtype dtype, int threads);

void gated_mlp(const GatedMlp& arguments, std::int64_t rows, Dtype dtype, int threads);

void log_sum_exp(const LogSumExp& arguments, std::int64_t rows, Dtype dtype, int threads);

void divergence(const Divergence& arguments, std::int64_t rows, Dtype dtype, int threads);

// rows: of `length` tokens each. Throws std::invalid_argument unless seen holds runs of places.
void attention(const Attention& arguments, std::int64_t rows, Dtype dtype, int threads);

}  // namespace fastprune
