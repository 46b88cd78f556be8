// The best subsets seen so far, ordered by energy and then lexicographically; shared by all threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <limits>
#include <mutex>
#include <set>
#include <vector>

#include "problem.hpp"
#include "subset.hpp"

namespace fastprune {

struct RankedSubset {
    double energy;
    Subset subset;

    friend bool operator<(const RankedSubset& a, const RankedSubset& b) {
        if (a.energy != b.energy) return a.energy < b.energy;
        return lex_less(a.subset, b.subset);
    }
};

class BestSubsets {
  public:
    BestSubsets(const Problem& problem, std::size_t capacity) : problem_(problem), capacity_(capacity) {}

    // Keeps the subset if it ranks among the best `capacity`; a subset seen before changes nothing.
    void offer(const Subset& subset) {
        const RankedSubset entry{problem_.energy(subset), subset};
        const std::lock_guard<std::mutex> lock(mutex_);
        if (kept_.size() == capacity_ && !(entry < *kept_.rbegin())) return;
        kept_.insert(entry);
        if (kept_.size() > capacity_) kept_.erase(std::prev(kept_.end()));
        if (kept_.size() == capacity_) {
            worst_.store(problem_.scaled(kept_.rbegin()->energy), std::memory_order_relaxed);
        }
    }

    // Search units: what lies above cannot be among the best. Includes the rounding margin, so that equal
    // energies are still looked at and ranked exactly.
    double cutoff() const { return worst_.load(std::memory_order_relaxed) + problem_.margin(); }

    std::size_t size() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return kept_.size();
    }

    std::vector<RankedSubset> ranked() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return {kept_.begin(), kept_.end()};
    }

  private:
    const Problem& problem_;
    const std::size_t capacity_;
    mutable std::mutex mutex_;
    std::set<RankedSubset> kept_;
    std::atomic<double> worst_{std::numeric_limits<double>::infinity()};
};

}  // namespace fastprune
