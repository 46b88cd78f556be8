// Convex relaxation of the problem restricted to some open variables, the others being decided.
#pragma once

#include <memory>
#include <vector>

#include "kernels.hpp"
#include "problem.hpp"
#include "subset.hpp"

namespace fastprune {

class Relaxation {
  public:
    // Open variables are numbered 0..size()-1 in the order of variables().
    const std::vector<int>& variables() const { return variables_; }
    int size() const { return static_cast<int>(variables_.size()); }
    int stride() const { return view_.stride; }
    const RelaxationView& view() const { return view_; }
    const std::vector<double>& diagonal() const { return diagonal_; }
    double twice(int i, int j) const {
        return twice_[static_cast<std::size_t>(i) * static_cast<std::size_t>(view_.stride) +
                      static_cast<std::size_t>(j)];
    }

    // gradient = lin + 2P y
    void gradient_at(const double* y, double* gradient) const;

    Relaxation(const Relaxation&) = delete;
    Relaxation& operator=(const Relaxation&) = delete;

  private:
    friend std::shared_ptr<const Relaxation> make_relaxation(const Problem&, const Subset&, const Subset&,
                                                             const std::vector<double>&);
    Relaxation() = default;

    std::vector<int> variables_;
    std::vector<double> diagonal_;
    std::vector<double> lin_;
    std::vector<double> twice_;
    RelaxationView view_{};
};

// H restricted to the open variables, dense.
std::vector<double> open_block(const Problem& problem, const Subset& open);

// diagonal: feasible (see convexify.hpp) for the open variables, in their order.
std::shared_ptr<const Relaxation> make_relaxation(const Problem& problem, const Subset& in,
                                                  const Subset& open, const std::vector<double>& diagonal);

}  // namespace fastprune
