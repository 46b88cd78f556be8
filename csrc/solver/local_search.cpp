#include "local_search.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastprune {
namespace {

// Fixed sequence, the same on every platform (splitmix64).
class Random {
  public:
    int below(int bound) {
        state_ += 0x9e3779b97f4a7c15U;
        std::uint64_t z = state_;
        z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
        z ^= z >> 31U;
        return static_cast<int>(z % static_cast<std::uint64_t>(bound));
    }

  private:
    std::uint64_t state_ = 1;
};

class Walker {
  public:
    Walker(const Problem& problem, BestSubsets& best)
        : problem_(problem),
          best_(best),
          field_(static_cast<std::size_t>(problem.n())),
          free_from_(static_cast<std::size_t>(problem.n())) {}

    void clear() {
        members_ = Subset{};
        energy_ = 0.0;
        for (int i = 0; i < problem_.n(); ++i) field(i) = problem_.unary(i);
    }

    void insert(int i) {
        energy_ += field(i);
        members_.insert(i);
        for (int j = 0; j < problem_.n(); ++j) field(j) += problem_.coupling(i, j);
    }

    void erase(int i) {
        members_.erase(i);
        for (int j = 0; j < problem_.n(); ++j) field(j) -= problem_.coupling(i, j);
        energy_ -= field(i);
    }

    void assign(const Subset& s) {
        clear();
        s.for_each([&](int i) { insert(i); });
    }

    int size() const { return members_.size(); }

    void insert_cheapest() {
        int at = -1;
        for (int i = 0; i < problem_.n(); ++i) {
            if (!members_.contains(i) && (at < 0 || field(i) < field(at))) at = i;
        }
        insert(at);
    }

    void erase_dearest() {
        int at = -1;
        for (int i = 0; i < problem_.n(); ++i) {
            if (members_.contains(i) && (at < 0 || field(i) > field(at))) at = i;
        }
        erase(at);
    }

    void exchange_random(Random& random) {
        split();
        if (in_.empty() || out_.empty()) return;
        erase(in_[static_cast<std::size_t>(random.below(static_cast<int>(in_.size())))]);
        insert(out_[static_cast<std::size_t>(random.below(static_cast<int>(out_.size())))]);
    }

    // Steepest descent over single exchanges.
    void descend() {
        std::fill(free_from_.begin(), free_from_.end(), 0);
        best_.offer(members_);
        for (Exchange e = best_exchange(0); e.change < -problem_.margin(); e = best_exchange(0)) apply(e);
    }

    // Tabu search: always the best exchange, also uphill, that moves nothing moved a short while ago.
    void wander(int steps, Random& random) {
        std::fill(free_from_.begin(), free_from_.end(), 0);
        for (int step = 1; step <= steps; ++step) {
            const Exchange e = best_exchange(step);
            if (e.leave < 0) return;
            apply(e);
            free_from_[static_cast<std::size_t>(e.leave)] = step + 3 + random.below(8);
            free_from_[static_cast<std::size_t>(e.enter)] = step + 3 + random.below(8);
            best_.offer(members_);
        }
    }

    // Best exchange of two members for two others, if one improves.
    bool descend_pair() {
        split();
        double best_change = -problem_.margin();
        int move[4] = {-1, -1, -1, -1};
        for (std::size_t a = 0; a < in_.size(); ++a) {
            for (std::size_t b = a + 1; b < in_.size(); ++b) {
                const int i = in_[a];
                const int l = in_[b];
                const double removed = -field(i) - field(l) + problem_.coupling(i, l);
                for (std::size_t c = 0; c < out_.size(); ++c) {
                    const int p = out_[c];
                    const double half =
                        removed + field(p) - problem_.coupling(p, i) - problem_.coupling(p, l);
                    for (std::size_t e = c + 1; e < out_.size(); ++e) {
                        const int q = out_[e];
                        const double change = half + field(q) + problem_.coupling(p, q) -
                                              problem_.coupling(q, i) - problem_.coupling(q, l);
                        if (change < best_change) {
                            best_change = change;
                            move[0] = i;
                            move[1] = l;
                            move[2] = p;
                            move[3] = q;
                        }
                    }
                }
            }
        }
        if (move[0] < 0) return false;
        erase(move[0]);
        erase(move[1]);
        insert(move[2]);
        insert(move[3]);
        return true;
    }

  private:
    struct Exchange {
        double change = std::numeric_limits<double>::infinity();
        int leave = -1;
        int enter = -1;
    };

    // Among variables free at this step. Subsets looked at that rank are offered.
    Exchange best_exchange(int step) {
        split();
        Exchange best;
        // Ties with the last one kept are left to the search, or a matrix full of ties would offer
        // everything.
        const double cutoff = best_.cutoff() - 2.0 * problem_.margin();
        for (int i : in_) {
            const bool tabu = free_from_[static_cast<std::size_t>(i)] > step;
            for (int j : out_) {
                const double change = field(j) - field(i) - problem_.coupling(i, j);
                if (energy_ + change < cutoff) offer_exchanged(i, j);
                if (change < best.change && !tabu && free_from_[static_cast<std::size_t>(j)] <= step) {
                    best = {change, i, j};
                }
            }
        }
        return best;
    }

    void apply(const Exchange& e) {
        erase(e.leave);
        insert(e.enter);
    }

    double& field(int i) { return field_[static_cast<std::size_t>(i)]; }
    double field(int i) const { return field_[static_cast<std::size_t>(i)]; }

    void split() {
        in_.clear();
        out_.clear();
        for (int i = 0; i < problem_.n(); ++i) (members_.contains(i) ? in_ : out_).push_back(i);
    }

    void offer_exchanged(int leave, int enter) {
        Subset s = members_;
        s.erase(leave);
        s.insert(enter);
        best_.offer(s);
    }

    const Problem& problem_;
    BestSubsets& best_;
    Subset members_;
    double energy_ = 0.0;
    std::vector<double> field_;   // energy change of adding a non-member; of keeping a member
    std::vector<int> free_from_;  // step from which a variable may move again
    std::vector<int> in_;
    std::vector<int> out_;
};

// The first subsets in lexicographic order, until `wanted` are held: what the search found is too few.
void fill(const Problem& problem, BestSubsets& best, std::size_t wanted) {
    const int n = problem.n();
    const int k = problem.k();
    std::vector<int> c(static_cast<std::size_t>(k));
    for (int i = 0; i < k; ++i) c[static_cast<std::size_t>(i)] = i;
    while (best.size() < wanted) {
        Subset s;
        for (int i : c) s.insert(i);
        best.offer(s);
        int at = k - 1;
        while (at >= 0 && c[static_cast<std::size_t>(at)] == n - k + at) --at;
        if (at < 0) return;
        ++c[static_cast<std::size_t>(at)];
        for (int i = at + 1; i < k; ++i)
            c[static_cast<std::size_t>(i)] = c[static_cast<std::size_t>(i - 1)] + 1;
    }
}

}  // namespace

void improve(const Problem& problem, const Subset& start, BestSubsets& best) {
    Walker walker(problem, best);
    walker.assign(start);
    walker.descend();
}

void local_search(const Problem& problem, BestSubsets& best, std::size_t wanted,
                  const std::atomic<bool>& stop) {
    constexpr int kRestarts = 16;
    constexpr int kWalks = 4;
    const int n = problem.n();
    const int k = problem.k();
    Random random;
    Walker walker(problem, best);

    walker.clear();
    while (walker.size() < k) walker.insert_cheapest();
    walker.descend();

    walker.clear();
    for (int i = 0; i < n; ++i) walker.insert(i);
    while (walker.size() > k) walker.erase_dearest();
    walker.descend();

    for (int restart = 0; restart < kRestarts && !stop; ++restart) {
        for (int i = 0; i < k; ++i) walker.exchange_random(random);
        walker.descend();
    }
    fill(problem, best, wanted);
    for (int walk = 0; walk < kWalks && !stop; ++walk) {
        walker.assign(best.ranked().front().subset);
        for (int i = 0; i < 4; ++i) walker.exchange_random(random);
        walker.descend();
        walker.wander(5 * n, random);
    }
    while (!stop) {
        walker.assign(best.ranked().front().subset);
        if (!walker.descend_pair()) return;
        walker.descend();
    }
}

}  // namespace fastprune
