// The CPU operators of the fused path: rows of the kernels shared out among threads. What each computes is
// said in docs/kernels.md; a row's result depends on neither the other rows nor the number of threads.
#pragma once

#include <cstdint>

#include "cpu_kernels.hpp"

namespace fastprune {

enum class Dtype { float32, bfloat16 };

void add_rms_norm(const AddRmsNorm& arguments, std::int64_t rows, Dtype dtype, int threads);

// Throws std::invalid_argument, with qkv untouched, where a position lies outside the tables' `positions`
// rows.
void rotary(const Rotary& arguments, std::int64_t rows, std::int64_t positions, Dtype dtype, int threads);

void gated_mlp(const GatedMlp& arguments, std::int64_t rows, Dtype dtype, int threads);

void log_sum_exp(const LogSumExp& arguments, std::int64_t rows, Dtype dtype, int threads);

void divergence(const Divergence& arguments, std::int64_t rows, Dtype dtype, int threads);

// rows: of tokens, each of `length`. Throws std::invalid_argument where seen holds anything but runs of places.
void attention(const Attention& arguments, std::int64_t rows, Dtype dtype, int threads);

}  // namespace fastprune
