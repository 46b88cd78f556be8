// Branch and bound over the convexified relaxation, by several threads on a shared queue of subtrees.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "best_subsets.hpp"
#include "problem.hpp"
#include "relaxation.hpp"
#include "symmetry.hpp"

namespace fastprune {

// An unfinished subtree: its decided variables, and the start of its relaxation.
struct Subtree {
    std::shared_ptr<const Relaxation> relaxation;
    Subset in;
    Subset open;
    std::vector<double> y;  // in the numbering of the relaxation, padded
    double lower;           // proven bound of its energies, search units
};

// Subtrees by ascending bound; knows when all work is done.
class SubtreeQueue {
  public:
    explicit SubtreeQueue(int workers) : active_(workers) {}

    void push(Subtree subtree);
    // Waits for work; false once nothing is left, or after stop(). The caller counts as active until it calls
    // again.
    bool pop(Subtree& subtree);
    void stop();
    bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
    const std::atomic<bool>& stop_flag() const { return stopped_; }

    // Whether a thread waits while the queue is empty.
    bool hungry() const { return hungry_.load(std::memory_order_relaxed); }
    std::size_t size() const { return size_.load(std::memory_order_relaxed); }

    // After the workers have ended: the least bound of the remaining subtrees, +inf without any.
    double lowest_bound() const;

  private:
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Subtree> heap_;
    int active_;
    std::atomic<bool> stopped_{false};
    std::atomic<bool> hungry_{false};
    std::atomic<std::size_t> size_{0};
};

struct SearchContext {
    const Problem& problem;
    const SymmetryClasses& symmetry;
    double wanted;  // number of subsets asked for
    BestSubsets& best;
    SubtreeQueue& queue;
    std::atomic<std::uint64_t>& nodes;
    bool subtree_diagonals;  // whether subtrees get relaxations of their own
};

// The whole problem with its relaxation.
Subtree root_subtree(const SearchContext& context);

// Works on subtrees until the queue is done or stopped. Called by each thread.
void work(const SearchContext& context);

}  // namespace fastprune
