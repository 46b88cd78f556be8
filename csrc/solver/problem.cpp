#include "problem.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "exact_sum.hpp"
#include "kernels.hpp"

namespace fastprune {

Problem::Problem(int n, int k, const double* h, const double* linear, bool exact_sums)
    : n_(n),
      k_(k),
      stride_(padded(n)),
      exact_sums_(exact_sums),
      original_(h, h + static_cast<std::size_t>(n) * static_cast<std::size_t>(n)),
      original_linear_(linear, linear + n) {
    double largest = 0.0;
    for (double x : original_) largest = std::max(largest, std::fabs(x));
    for (double x : original_linear_) largest = std::max(largest, std::fabs(x));
    if (largest > 0.0) std::frexp(largest, &exponent_);

    const auto size = static_cast<std::size_t>(n);
    quadratic_.resize(size * size);
    coupling_.assign(size * static_cast<std::size_t>(stride_), 0.0);
    std::vector<double> row_size(size);
    for (int i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        scaled_linear_.push_back(scaled(linear[i]));
        row_size[at] = std::fabs(scaled_linear_[at]);
        for (int j = 0; j < n; ++j) {
            const double x = scaled(original_[index(i, j)]);
            quadratic_[index(i, j)] = x;
            row_size[at] += std::fabs(x);
            if (i != j)
                coupling_[at * static_cast<std::size_t>(stride_) + static_cast<std::size_t>(j)] = 2.0 * x;
        }
        unary_.push_back(scaled_linear_[at] + quadratic_[index(i, i)]);
    }
    // Rounding of a few thousand updates of terms of this size stays an order of magnitude below 1e-11.
    std::sort(row_size.begin(), row_size.end(), std::greater<>());
    double magnitude = 0.0;
    for (int i = 0; i < std::max(k, 1) && i < n; ++i) magnitude += row_size[static_cast<std::size_t>(i)];
    margin_ = 1e-11 * magnitude;
}

double Problem::scaled(double energy) const {
    return std::ldexp(energy, -exponent_);
}

double Problem::unscaled(double value) const {
    return std::ldexp(value, exponent_);
}

double Problem::energy(const Subset& s) const {
    std::array<int, kMaxVariables> members;
    int count = 0;
    s.for_each([&](int i) { members[static_cast<std::size_t>(count++)] = i; });
    const auto each_term = [&](auto&& add) {
        for (int a = 0; a < count; ++a) {
            const int i = members[static_cast<std::size_t>(a)];
            add(original_linear_[static_cast<std::size_t>(i)]);
            add(original_[index(i, i)]);
            for (int b = 0; b < a; ++b) add(2.0 * original_[index(i, members[static_cast<std::size_t>(b)])]);
        }
    };
    if (!exact_sums_) {
        double rounded = 0.0;
        each_term([&](double x) { rounded += x; });
        return rounded;
    }
    ExactSum sum;
    each_term([&](double x) { sum.add(x); });
    return sum.value();
}

double binomial(int n, int k) {
    if (k < 0 || k > n) return 0.0;
    k = std::min(k, n - k);
    double value = 1.0;
    // Every intermediate is a binomial coefficient; round() keeps it exact while it fits in 53 bits.
    for (int i = 1; i <= k; ++i) value = std::round(value * (n - k + i) / i);
    return value;
}

}  // namespace fastprune
