// The quadratic problem min z'Hz + g'z over binary z with k ones, in the two forms that the solver uses: the
// caller's numbers (for the energies that are reported) and a copy scaled to unit size (for the search).
#pragma once

#include <cstddef>
#include <vector>

#include "subset.hpp"

namespace fastprune {

class Problem {
  public:
    // h: n x n symmetric, row-major; linear: n entries.
    Problem(int n, int k, const double* h, const double* linear, bool exact_sums = true);

    int n() const { return n_; }
    int k() const { return k_; }
    int stride() const { return stride_; }

    // Correctly rounded energy in the caller's units. Ordering and results use this value only.
    double energy(const Subset& s) const;

    // From the caller's units to those of the search, which are smaller or larger by a power of two.
    double scaled(double energy) const;
    double unscaled(double value) const;

    // Search units. quadratic: diagonal included; coupling: 2H with zero diagonal, rows padded to stride;
    // unary[i] = g[i] + H[i][i].
    double quadratic(int i, int j) const { return quadratic_[index(i, j)]; }
    double linear(int i) const { return scaled_linear_[static_cast<std::size_t>(i)]; }
    double unary(int i) const { return unary_[static_cast<std::size_t>(i)]; }
    double coupling(int i, int j) const { return coupling_row(i)[j]; }
    const double* coupling_row(int i) const {
        return coupling_.data() + static_cast<std::size_t>(i) * static_cast<std::size_t>(stride_);
    }

    // Search units: bounds and incrementally updated energies are trusted up to this much.
    double margin() const { return margin_; }

  private:
    std::size_t index(int i, int j) const {
        return static_cast<std::size_t>(i) * static_cast<std::size_t>(n_) + static_cast<std::size_t>(j);
    }

    int n_;
    int k_;
    int stride_;
    bool exact_sums_;
    int exponent_ = 0;
    double margin_ = 0.0;
    std::vector<double> original_;
    std::vector<double> original_linear_;
    std::vector<double> quadratic_;
    std::vector<double> scaled_linear_;
    std::vector<double> unary_;
    std::vector<double> coupling_;
};

// C(n, k) as a double: exact below 2^53, infinity never reached for n <= 128.
double binomial(int n, int k);

}  // namespace fastprune
