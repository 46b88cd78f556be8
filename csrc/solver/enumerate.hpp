// Enumerates every completion of a partial subset.
#pragma once

#include <atomic>
#include <vector>

#include "best_subsets.hpp"
#include "problem.hpp"
#include "subset.hpp"

namespace fastprune {

class Enumerator {
  public:
    // Offers to `best` every subset of `in` plus q open variables that could rank. False when stopped early.
    bool run(const Problem& problem, const Subset& in, const Subset& open, int q, BestSubsets& best,
             const std::atomic<bool>& stop);

  private:
    // Buffers, kept because leaves of the search call run() very often.
    std::vector<int> variables_;
    std::vector<int> members_;
    std::vector<double> coupling_;
    std::vector<double> field_;
};

}  // namespace fastprune
