// Exact minimisation of z'Hz + g'z over binary z with k ones: the best subsets, in order, with proof.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace fastprune {

struct SolveOptions {
    std::size_t num_states = 1;  // capped at C(n, k)
    double time_limit = 0.0;     // seconds; 0: none
    int threads = 0;             // 0: all that the process may use
    // Up to this many subsets all are enumerated: some milliseconds, about as long as setting up a search
    // takes.
    double enumerate_up_to = 1e6;
    // What bench/bench_solver.py leaves out in turn, to see what it is worth; a result is the same in any case but for
    // exact_sums, without which equal energies may differ by roundings.
    bool exact_sums = true;
    bool symmetry = true;
    bool subtree_diagonals = true;
    // Called every few milliseconds from the calling thread; true asks to stop.
    std::function<bool()> interrupted;
};

struct SolveResult {
    std::vector<std::vector<int>> subsets;  // each ascending; ordered by energy, then lexicographically
    std::vector<double> energies;           // correctly rounded
    bool proven = false;
    double gap = 0.0;  // worst energy returned minus the bound of everything unexplored; 0 when proven
    std::uint64_t nodes = 0;
};

// h: n x n, symmetric, finite, row-major; linear: n finite entries; 1 <= n <= 128, 0 <= k <= n.
SolveResult solve_subset(int n, int k, const double* h, const double* linear, const SolveOptions& options);

}  // namespace fastprune
