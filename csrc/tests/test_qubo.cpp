// Native tests of the solver against brute force. Exits with a message at the first failure.
#include "qubo.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "branch_bound.hpp"
#include "exact_sum.hpp"
#include "kernels.hpp"
#include "local_search.hpp"

namespace {

using fastprune::SolveOptions;
using fastprune::SolveResult;
using Matrix = std::vector<double>;
using std::size_t;

void check(bool ok, const std::string& what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

enum class Family { fisher, indefinite, integer, identity };

Matrix make(Family family, int n, std::uint64_t seed) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> normal;
    const auto size = static_cast<size_t>(n);
    Matrix h(size * size, 0.0);
    if (family == Family::fisher) {
        for (int sample = 0; sample < 3; ++sample) {
            std::vector<double> row(size);
            for (double& x : row) x = normal(rng);
            for (size_t i = 0; i < size; ++i) {
                for (size_t j = 0; j < size; ++j) h[i * size + j] += row[i] * row[j];
            }
        }
        for (size_t i = 0; i < size; ++i) h[i * size + i] += std::fabs(normal(rng));
        return h;
    }
    for (size_t i = 0; i < size; ++i) {
        for (size_t j = 0; j <= i; ++j) {
            double x = normal(rng);
            if (family == Family::integer) x = std::round(x);
            if (family == Family::identity) x = i == j ? 1.0 : 0.0;
            h[i * size + j] = h[j * size + i] = x;
        }
    }
    return h;
}

struct Ranked {
    double energy;
    std::vector<int> subset;
    bool operator<(const Ranked& o) const {
        return energy != o.energy ? energy < o.energy : subset < o.subset;
    }
};

std::vector<Ranked> brute_force(int n, int k, const Matrix& h, const std::vector<double>& g) {
    std::vector<Ranked> all;
    const auto size = static_cast<size_t>(n);
    for (std::uint32_t mask = 0; mask < (1U << static_cast<unsigned>(n)); ++mask) {
        if (__builtin_popcount(mask) != k) continue;
        Ranked entry{0.0, {}};
        for (int i = 0; i < n; ++i) {
            if ((mask >> static_cast<unsigned>(i)) & 1U) entry.subset.push_back(i);
        }
        fastprune::ExactSum sum;
        for (int i : entry.subset) {
            sum.add(g[static_cast<size_t>(i)]);
            for (int j : entry.subset) sum.add(h[static_cast<size_t>(i) * size + static_cast<size_t>(j)]);
        }
        entry.energy = sum.value();
        all.push_back(std::move(entry));
    }
    std::sort(all.begin(), all.end());
    return all;
}

void compare(const std::vector<std::vector<int>>& subsets, const std::vector<double>& energies,
             const std::vector<Ranked>& truth, size_t states, const std::string& name) {
    const size_t expected = std::min(states, truth.size());
    check(subsets.size() == expected, name + ": number of subsets");
    for (size_t s = 0; s < expected; ++s) {
        check(subsets[s] == truth[s].subset, name + ": subset " + std::to_string(s));
        check(energies[s] == truth[s].energy, name + ": energy " + std::to_string(s));
    }
}

// The search itself, also where solve_subset would enumerate.
SolveResult search(int n, int k, const Matrix& h, const std::vector<double>& g, size_t states) {
    const fastprune::Problem problem(n, k, h.data(), g.data());
    const fastprune::SymmetryClasses symmetry(n, h.data(), g.data());
    const size_t wanted = std::min(states, static_cast<size_t>(fastprune::binomial(n, k)));
    fastprune::BestSubsets best(problem, wanted);
    fastprune::SubtreeQueue queue(1);
    std::atomic<std::uint64_t> nodes{0};
    const fastprune::SearchContext context{problem, symmetry, static_cast<double>(wanted),
                                           best,    queue,    nodes};
    fastprune::local_search(problem, best, wanted, queue.stop_flag());
    queue.push(fastprune::root_subtree(context));
    fastprune::work(context);
    SolveResult result;
    for (const auto& entry : best.ranked()) {
        std::vector<int> members;
        entry.subset.for_each([&](int i) { members.push_back(i); });
        result.subsets.push_back(members);
        result.energies.push_back(entry.energy);
    }
    return result;
}

void test_against_brute_force() {
    for (const Family family : {Family::fisher, Family::indefinite, Family::integer, Family::identity}) {
        for (const int n : {1, 2, 3, 5, 8, 9, 12, 14}) {
            const auto seed = static_cast<std::uint64_t>(100 * n) + static_cast<std::uint64_t>(family);
            const Matrix h = make(family, n, seed);
            std::vector<double> g(static_cast<size_t>(n), 0.0);
            if (n % 2 == 0) {
                for (int i = 0; i < n; ++i) g[static_cast<size_t>(i)] = 0.25 * ((7 * i) % 5) - 0.5;
            }
            for (int k = 0; k <= n; ++k) {
                const auto truth = brute_force(n, k, h, g);
                for (const size_t states : {1, 7, 100, 100000}) {
                    const std::string name = "family " + std::to_string(static_cast<int>(family)) +
                                             " n=" + std::to_string(n) + " k=" + std::to_string(k) +
                                             " states=" + std::to_string(states);
                    SolveOptions options;
                    options.num_states = states;
                    const SolveResult r = fastprune::solve_subset(n, k, h.data(), g.data(), options);
                    check(r.proven && r.gap == 0.0, name + ": proven");
                    compare(r.subsets, r.energies, truth, states, name);
                    const SolveResult s = search(n, k, h, g, states);
                    compare(s.subsets, s.energies, truth, states, name + " (search)");
                }
            }
        }
    }
}

void test_search_equals_for_any_number_of_threads() {
    const int n = 36;
    const Matrix h = make(Family::fisher, n, 5);
    const std::vector<double> g(static_cast<size_t>(n), 0.0);
    SolveOptions options;
    options.num_states = 50;
    options.threads = 1;
    const SolveResult one = fastprune::solve_subset(n, 13, h.data(), g.data(), options);
    check(one.proven && one.nodes > 0, "36 variables: proven by search");
    for (const int threads : {2, 3, 8}) {
        options.threads = threads;
        const SolveResult r = fastprune::solve_subset(n, 13, h.data(), g.data(), options);
        check(r.proven && r.subsets == one.subsets && r.energies == one.energies,
              "threads change the result");
    }
}

void test_ties_of_interchangeable_variables() {
    const int n = 128;
    const Matrix h = make(Family::identity, n, 0);
    const std::vector<double> g(static_cast<size_t>(n), 0.0);
    SolveOptions options;
    options.num_states = 3;
    const SolveResult r = fastprune::solve_subset(n, 64, h.data(), g.data(), options);
    check(r.proven, "identity: proven");
    std::vector<int> first;
    for (int i = 0; i < 64; ++i) first.push_back(i);
    for (int s = 0; s < 3; ++s) {
        first.back() = 63 + s;
        check(r.subsets[static_cast<size_t>(s)] == first && r.energies[static_cast<size_t>(s)] == 64.0,
              "identity: lexicographic order");
    }
}

void test_time_limit_and_interrupt() {
    const int n = 128;
    const Matrix h = make(Family::indefinite, n, 9);
    const std::vector<double> g(static_cast<size_t>(n), 0.0);
    SolveOptions options;
    options.num_states = 4;
    options.time_limit = 0.3;
    const SolveResult r = fastprune::solve_subset(n, 40, h.data(), g.data(), options);
    check(!r.proven && r.gap > 0.0 && std::isfinite(r.gap) && r.subsets.size() == 4, "time limit");
    options.time_limit = 0.0;
    int polls = 0;
    options.interrupted = [&polls] { return ++polls > 5; };
    const SolveResult s = fastprune::solve_subset(n, 40, h.data(), g.data(), options);
    check(!s.proven && s.subsets.size() == 4 && polls > 5, "interrupt");
}

void test_exact_sum() {
    fastprune::ExactSum sum;
    for (const double x : {1e100, 1.0, -1e100, 1e-30, -1.0}) sum.add(x);
    check(sum.value() == 1e-30, "exact sum cancels");
    fastprune::ExactSum half;
    for (const double x : {1e16, 1.0, 1e-16}) half.add(x);
    check(half.value() == 10000000000000002.0, "exact sum rounds half-way cases by the rest");
}

}  // namespace

int main() {
    test_exact_sum();
    test_against_brute_force();
    test_search_equals_for_any_number_of_threads();
    test_ties_of_interchangeable_variables();
    test_time_limit_and_interrupt();
    std::printf("all native solver tests passed (%s kernels)\n", fastprune::kernels().name);
}
