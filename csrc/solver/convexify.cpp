#include "convexify.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace fastprune {
namespace {

using std::size_t;

// In-place lower Cholesky factor; false when the matrix is not positive definite.
bool cholesky(size_t m, std::vector<double>& a) {
    for (size_t j = 0; j < m; ++j) {
        double* row_j = &a[j * m];
        for (size_t i = 0; i < j; ++i) {
            const double* row_i = &a[i * m];
            double s = row_j[i];
            for (size_t p = 0; p < i; ++p) s -= row_j[p] * row_i[p];
            row_j[i] = s / row_i[i];
        }
        double s = row_j[j];
        for (size_t p = 0; p < j; ++p) s -= row_j[p] * row_j[p];
        if (!(s > 0.0)) return false;
        row_j[j] = std::sqrt(s);
    }
    return true;
}

double log_det(size_t m, const std::vector<double>& factor) {
    double s = 0.0;
    for (size_t i = 0; i < m; ++i) s += std::log(factor[i * m + i]);
    return 2.0 * s;
}

// Inverse of L L' from its factor: rows of L^-1 first, then X = L^-T L^-1.
std::vector<double> inverse(size_t m, const std::vector<double>& factor) {
    std::vector<double> w(m * m, 0.0);
    for (size_t i = 0; i < m; ++i) {
        double* row = &w[i * m];
        for (size_t p = 0; p < i; ++p) {
            const double l = factor[i * m + p];
            const double* other = &w[p * m];
            for (size_t j = 0; j <= p; ++j) row[j] -= l * other[j];
        }
        const double scale = 1.0 / factor[i * m + i];
        for (size_t j = 0; j < i; ++j) row[j] *= scale;
        row[i] = scale;
    }
    std::vector<double> x(m * m, 0.0);
    for (size_t p = 0; p < m; ++p) {
        const double* row = &w[p * m];
        for (size_t i = 0; i <= p; ++i) {
            for (size_t j = 0; j <= p; ++j) x[i * m + j] += row[i] * row[j];
        }
    }
    return x;
}

void solve(size_t m, const std::vector<double>& factor, std::vector<double>& b) {
    for (size_t i = 0; i < m; ++i) {
        for (size_t p = 0; p < i; ++p) b[i] -= factor[i * m + p] * b[p];
        b[i] /= factor[i * m + i];
    }
    for (size_t i = m; i-- > 0;) {
        for (size_t p = i + 1; p < m; ++p) b[i] -= factor[p * m + i] * b[p];
        b[i] /= factor[i * m + i];
    }
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double s = 0.0;
    for (size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
    return s;
}

// H with the direction of the sum lifted out of the way, minus a diagonal.
struct Lifted {
    Lifted(size_t order, const std::vector<double>& h) : m(order), b(h) {
        for (size_t i = 0; i < m; ++i) {
            double row = 0.0;
            for (size_t j = 0; j < m; ++j) row += std::fabs(h[i * m + j]);
            scale = std::max(scale, row);
        }
        // Zero stays convex with any lift; a larger lift only costs digits.
        const double lift = (scale > 0.0 ? 10.0 * scale : 1.0) / static_cast<double>(m);
        for (double& x : b) x += lift;
        if (scale == 0.0) scale = 1.0;
    }

    // The Cholesky factor; empty unless positive definite.
    std::vector<double> factorised(const std::vector<double>& diagonal) const {
        std::vector<double> a(b);
        for (size_t i = 0; i < m; ++i) a[i * m + i] -= diagonal[i];
        if (!cholesky(m, a)) a.clear();
        return a;
    }

    size_t m;
    std::vector<double> b;
    double scale = 0.0;  // largest absolute row sum of H
};

}  // namespace

void make_feasible(int variables, const std::vector<double>& h, std::vector<double>& d) {
    const Lifted lifted(static_cast<size_t>(variables), h);
    for (double shift = 1e-6 * lifted.scale; lifted.factorised(d).empty(); shift *= 4.0) {
        std::fill(d.begin(), d.end(), -shift);
    }
}

void maximise_diagonal(int variables, const std::vector<double>& h, const std::vector<double>& weight,
                       std::vector<double>& d) {
    constexpr int kMaxNewtonSteps = 80;
    constexpr double kShrink = 0.1;         // of the barrier weight, between centrings
    constexpr double kRelativeGap = 1e-4;   // of weight.d at the end
    constexpr double kSafetyShift = 1e-11;  // far above the backward error of the Cholesky test

    const auto m = static_cast<size_t>(variables);
    const Lifted lifted(m, h);
    double size = 0.0;
    for (size_t i = 0; i < m; ++i) {
        for (size_t j = 0; j < m; ++j) size += weight[i] * std::fabs(h[i * m + j]);
    }
    if (size == 0.0) return;
    std::vector<double> factor = lifted.factorised(d);
    std::vector<double> x = inverse(m, factor);
    double weight_sum = 0.0;
    double trace = 0.0;
    for (size_t i = 0; i < m; ++i) {
        weight_sum += weight[i];
        trace += x[i * m + i];
    }
    const double final_barrier = kRelativeGap * size / static_cast<double>(m);
    double barrier = std::max(weight_sum / trace, final_barrier);
    for (int newton = 0; newton < kMaxNewtonSteps; ++newton) {
        std::vector<double> hessian(m * m);
        for (size_t i = 0; i < m * m; ++i) hessian[i] = x[i] * x[i];
        std::vector<double> residual(m);
        for (size_t i = 0; i < m; ++i) residual[i] = weight[i] / barrier - x[i * m + i];
        std::vector<double> step(residual);
        if (!cholesky(m, hessian)) break;
        solve(m, hessian, step);
        const double decrement = dot(residual, step);
        if (decrement < 0.1) {
            if (barrier <= final_barrier) break;
            barrier = std::max(kShrink * barrier, final_barrier);
            continue;
        }
        const double merit = dot(weight, d) / barrier + log_det(m, factor);
        double length = 1.0;
        std::vector<double> trial(m);
        std::vector<double> trial_factor;
        for (; length > 1e-6; length *= 0.5) {
            for (size_t i = 0; i < m; ++i) trial[i] = d[i] + length * step[i];
            trial_factor = lifted.factorised(trial);
            if (trial_factor.empty()) continue;
            if (dot(weight, trial) / barrier + log_det(m, trial_factor) > merit) break;
        }
        if (length <= 1e-6) break;
        d = trial;
        factor = std::move(trial_factor);
        x = inverse(m, factor);
    }
    for (double& entry : d) entry -= kSafetyShift * lifted.scale;
}

}  // namespace fastprune
