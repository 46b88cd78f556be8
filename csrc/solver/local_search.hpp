// First incumbents: greedy starts and seeded restarts, improved by exchanges of one or two members.
#pragma once

#include <atomic>

#include "best_subsets.hpp"
#include "problem.hpp"

namespace fastprune {

// Offers good subsets to `best`; afterwards `best` is full unless `stop` was set before its first subset.
void local_search(const Problem& problem, BestSubsets& best, std::size_t wanted,
                  const std::atomic<bool>& stop);

// Offers `start` (k members) and what exchanges of one member lead to from there.
void improve(const Problem& problem, const Subset& start, BestSubsets& best);

}  // namespace fastprune
