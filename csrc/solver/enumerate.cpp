#include "enumerate.hpp"

#include <cstddef>

#include "dispatch.hpp"

namespace fastprune {

using std::size_t;

bool Enumerator::run(const Problem& problem, const Subset& in, const Subset& open, int q, BestSubsets& best,
                     const std::atomic<bool>& stop) {
    constexpr long kVisitsBetweenRefresh = 8192;  // bounds the rounding error of the running energy

    variables_.clear();
    open.for_each([&](int i) { variables_.push_back(i); });
    const size_t n = variables_.size();
    const auto stride = static_cast<size_t>(padded(static_cast<int>(n)));
    coupling_.assign(n * stride, 0.0);
    for (size_t a = 0; a < n; ++a) {
        const double* row = problem.coupling_row(variables_[a]);
        for (size_t b = 0; b < n; ++b) coupling_[a * stride + b] = row[variables_[b]];
    }
    double base = 0.0;
    in.for_each([&](int i) {
        base += problem.unary(i);
        in.for_each([&](int j) { base += 0.5 * problem.coupling(i, j); });
    });
    std::vector<double>& field = field_;
    field.assign(2 * stride, 0.0);
    double* start = field.data() + stride;  // field of the empty completion
    for (size_t a = 0; a < n; ++a) {
        start[a] = problem.unary(variables_[a]);
        in.for_each([&](int j) { start[a] += problem.coupling(variables_[a], j); });
    }

    members_.assign(static_cast<size_t>(q) + 2, 0);
    for (int j = 1; j <= q; ++j) members_[static_cast<size_t>(j)] = j - 1;
    members_[static_cast<size_t>(q) + 1] = static_cast<int>(n);
    RevolvingDoor door{static_cast<int>(n),
                       q,
                       static_cast<int>(stride),
                       coupling_.data(),
                       field.data(),
                       members_.data(),
                       0.0,
                       false};

    const auto refresh = [&] {
        door.energy = base;
        for (size_t a = 0; a < stride; ++a) field[a] = start[a];
        for (int j = 1; j <= q; ++j) {
            const auto i = static_cast<size_t>(members_[static_cast<size_t>(j)]);
            door.energy += field[i];
            for (size_t a = 0; a < n; ++a) field[a] += coupling_[i * stride + a];
        }
    };
    const auto offer = [&] {
        Subset s = in;
        for (int j = 1; j <= q; ++j) {
            s.insert(variables_[static_cast<size_t>(members_[static_cast<size_t>(j)])]);
        }
        best.offer(s);
    };

    refresh();
    if (door.energy <= best.cutoff()) offer();
    long left = kVisitsBetweenRefresh;
    for (;;) {
        if (instruction_set().solver.advance(door, best.cutoff(), left)) {
            offer();
            --left;  // at least: what matters is that a refresh comes within a bounded number of offers
            if (left > 0) continue;
        }
        if (door.finished) return true;
        if (stop.load(std::memory_order_relaxed)) return false;
        refresh();
        left = kVisitsBetweenRefresh;
    }
}

}  // namespace fastprune
