// Interchangeable variables: exchanging them maps every subset to one of equal energy. Without care, ties
// between such subsets would have to be enumerated before the best can be called proven.
#pragma once

#include <vector>

#include "problem.hpp"
#include "subset.hpp"

namespace fastprune {

class SymmetryClasses {
  public:
    SymmetryClasses() = default;  // none are known
    // h and linear as given to Problem.
    SymmetryClasses(int n, const double* h, const double* linear);

    // A lower bound, for every subset that holds `in` and avoids `out`, of the number of subsets of equal
    // energy that precede it lexicographically.
    double predecessors(const Subset& in, const Subset& open) const;

    bool trivial() const { return classes_.empty(); }

  private:
    std::vector<std::vector<int>> classes_;  // only those with two members or more
};

}  // namespace fastprune
