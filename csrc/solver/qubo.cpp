#include "qubo.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

#include "best_subsets.hpp"
#include "branch_bound.hpp"
#include "enumerate.hpp"
#include "local_search.hpp"
#include "problem.hpp"
#include "symmetry.hpp"

namespace fastprune {
namespace {

using Clock = std::chrono::steady_clock;

// One thread prepares and seeds the queue, then all work through it.
class Search {
  public:
    Search(const Problem& problem, const SymmetryClasses& symmetry, std::size_t wanted, BestSubsets& best,
           const SolveOptions& options, int threads)
        : queue_(threads),
          context_{problem, symmetry, static_cast<double>(wanted), best, queue_, nodes_, options.subtree_diagonals},
          wanted_(wanted),
          running_(threads) {
        for (int t = 0; t < threads; ++t) threads_.emplace_back([this, t] { run(t == 0); });
    }

    ~Search() {
        queue_.stop();
        for (std::thread& t : threads_) t.join();
    }

    Search(const Search&) = delete;
    Search& operator=(const Search&) = delete;

    // True once every thread has ended.
    bool wait_for(std::chrono::milliseconds time) {
        std::unique_lock<std::mutex> lock(mutex_);
        return ended_.wait_for(lock, time, [this] { return running_ == 0; });
    }

    void stop() { queue_.stop(); }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }
    double lowest_bound() const {
        return prepared_ ? queue_.lowest_bound() : -std::numeric_limits<double>::infinity();
    }
    std::uint64_t nodes() const { return nodes_; }

  private:
    void run(bool first) {
        try {
            if (first) {
                local_search(context_.problem, context_.best, wanted_, queue_.stop_flag());
                queue_.push(root_subtree(context_));
                prepared_ = true;
            }
            work(context_);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            error_ = std::current_exception();
            queue_.stop();
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        --running_;
        ended_.notify_all();
    }

    SubtreeQueue queue_;
    std::atomic<std::uint64_t> nodes_{0};
    SearchContext context_;
    std::size_t wanted_;
    std::atomic<bool> prepared_{false};
    std::mutex mutex_;
    std::condition_variable ended_;
    int running_;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

SolveResult collect(const BestSubsets& best) {
    SolveResult result;
    for (const RankedSubset& entry : best.ranked()) {
        std::vector<int> members;
        entry.subset.for_each([&](int i) { members.push_back(i); });
        result.subsets.push_back(std::move(members));
        result.energies.push_back(entry.energy);
    }
    return result;
}

}  // namespace

SolveResult solve_subset(int n, int k, const double* h, const double* linear, const SolveOptions& options) {
    const Clock::time_point start = Clock::now();
    const Problem problem(n, k, h, linear, options.exact_sums);
    const double count = binomial(n, k);
    const std::size_t wanted = static_cast<double>(options.num_states) < count
                                   ? options.num_states
                                   : static_cast<std::size_t>(count);
    BestSubsets best(problem, wanted);
    const std::atomic<bool> never{false};

    if (count <= options.enumerate_up_to) {
        Subset all;
        for (int i = 0; i < n; ++i) all.insert(i);
        Enumerator().run(problem, Subset{}, all, k, best, never);
        SolveResult result = collect(best);
        result.proven = true;
        return result;
    }

    const SymmetryClasses symmetry = options.symmetry ? SymmetryClasses(n, h, linear) : SymmetryClasses();
    const int threads = options.threads > 0
                            ? options.threads
                            : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    Search search(problem, symmetry, wanted, best, options, threads);
    while (!search.wait_for(std::chrono::milliseconds(10))) {
        const std::chrono::duration<double> elapsed = Clock::now() - start;
        const bool late = options.time_limit > 0.0 && elapsed.count() >= options.time_limit;
        if (late || (options.interrupted && options.interrupted())) search.stop();
    }
    search.rethrow();

    SolveResult result = collect(best);
    const double bound = search.lowest_bound();
    result.nodes = search.nodes();
    result.proven = bound > best.cutoff();
    if (!result.proven) result.gap = std::max(0.0, result.energies.back() - problem.unscaled(bound));
    return result;
}

}  // namespace fastprune
