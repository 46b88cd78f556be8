#include "relaxation.hpp"

#include <cstddef>

namespace fastprune {

using std::size_t;

std::vector<double> open_block(const Problem& problem, const Subset& open) {
    std::vector<double> h;
    open.for_each([&](int i) { open.for_each([&](int j) { h.push_back(problem.quadratic(i, j)); }); });
    return h;
}

std::shared_ptr<const Relaxation> make_relaxation(const Problem& problem, const Subset& in,
                                                  const Subset& open, const std::vector<double>& diagonal) {
    const std::shared_ptr<Relaxation> r(new Relaxation());
    open.for_each([&](int i) { r->variables_.push_back(i); });
    const size_t m = r->variables_.size();
    const auto stride = static_cast<size_t>(padded(static_cast<int>(m)));
    r->diagonal_ = diagonal;
    r->lin_.assign(stride, 0.0);
    r->twice_.assign(stride * stride, 0.0);
    for (size_t i = 0; i < m; ++i) {
        double lin = problem.linear(r->variables_[i]) + r->diagonal_[i];
        in.for_each([&](int j) { lin += problem.coupling(r->variables_[i], j); });
        r->lin_[i] = lin;
        for (size_t j = 0; j < m; ++j) {
            r->twice_[i * stride + j] = 2.0 * problem.quadratic(r->variables_[i], r->variables_[j]);
        }
        r->twice_[i * stride + i] -= 2.0 * r->diagonal_[i];
    }
    double base = 0.0;
    in.for_each([&](int i) {
        base += problem.unary(i);
        in.for_each([&](int j) { base += 0.5 * problem.coupling(i, j); });
    });
    r->view_ = RelaxationView{static_cast<int>(stride), r->twice_.data(), r->lin_.data(), base};
    return r;
}

void Relaxation::gradient_at(const double* y, double* gradient) const {
    const auto stride = static_cast<size_t>(view_.stride);
    for (size_t i = 0; i < stride; ++i) gradient[i] = lin_[i];
    for (size_t j = 0; j < variables_.size(); ++j) {
        if (y[j] == 0.0) continue;
        for (size_t i = 0; i < stride; ++i) gradient[i] += y[j] * twice_[j * stride + i];
    }
}

}  // namespace fastprune
