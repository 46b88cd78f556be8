// Native tests of the solver against brute force. Exits with a message at the first failure.
#include "qubo.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "dispatch.hpp"
#include "exact_sum.hpp"

namespace {

using fastprune::SolveOptions;
using fastprune::SolveResult;
using Matrix = std::vector<double>;
using fastprune_tests::check;
using fastprune_tests::run;
using std::size_t;

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

SolveResult solve(int n, int k, const Matrix& h, const std::vector<double>& g, size_t states,
                  double enumerate_up_to, int threads = 1) {
    SolveOptions options;
    options.num_states = states;
    options.enumerate_up_to = enumerate_up_to;
    options.threads = threads;
    SolveResult r = fastprune::solve_subset(n, k, h.data(), g.data(), options);
    check(r.proven && r.gap == 0.0, "proven without a time limit");
    return r;
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
                    const SolveResult listed = solve(n, k, h, g, states, 1e6);
                    compare(listed.subsets, listed.energies, truth, states, name + " by enumeration");
                    const SolveResult searched = solve(n, k, h, g, states, 0.0);
                    compare(searched.subsets, searched.energies, truth, states, name + " by search");
                }
            }
        }
    }
}

void test_search_equals_enumeration() {
    for (const Family family : {Family::fisher, Family::indefinite, Family::integer}) {
        for (const int k : {5, 10, 14}) {
            const int n = 20;
            const Matrix h = make(family, n, static_cast<std::uint64_t>(k));
            const std::vector<double> g(static_cast<size_t>(n), 0.0);
            for (const size_t states : {1, 40, 1000}) {
                const SolveResult listed = solve(n, k, h, g, states, 1e6);
                const SolveResult searched = solve(n, k, h, g, states, 0.0, 2);
                check(listed.nodes == 0 && searched.nodes > 0, "20 variables: both ways taken");
                check(listed.subsets == searched.subsets && listed.energies == searched.energies,
                      "20 variables: search equals enumeration");
            }
        }
    }
}

void test_threads_do_not_change_the_result() {
    const int n = 36;
    const Matrix h = make(Family::fisher, n, 5);
    const std::vector<double> g(static_cast<size_t>(n), 0.0);
    const SolveResult one = solve(n, 13, h, g, 50, 1e6, 1);
    for (const int threads : {2, 3, 8}) {
        const SolveResult r = solve(n, 13, h, g, 50, 1e6, threads);
        check(r.subsets == one.subsets && r.energies == one.energies, "threads change the result");
    }
}

// Every instruction set: the revolving door meets each subset once with the right energy, and the descent
// brackets the minimum.
void test_kernels() {
    const int n = 11;
    const int q = 4;
    const Matrix h = make(Family::fisher, n, 3);
    const std::vector<double> g(static_cast<size_t>(n), 0.0);
    const auto truth = brute_force(n, q, h, g);
    const int stride = fastprune::padded(n);
    std::vector<double> coupling(static_cast<size_t>(n * stride), 0.0);
    std::vector<double> twice(static_cast<size_t>(stride * stride), 0.0);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            const double x = 2.0 * h[static_cast<size_t>(i * n + j)];
            twice[static_cast<size_t>(i * stride + j)] = x;
            if (i != j) coupling[static_cast<size_t>(i * stride + j)] = x;
        }
    }
    for (const fastprune::InstructionSet& set : fastprune::instruction_sets()) {
        const fastprune::Kernels& table = set.solver;
        const std::string name = std::string("kernels ") + set.name;
        std::vector<int> c{0, 0, 1, 2, 3, n};
        std::vector<double> field(static_cast<size_t>(stride), 0.0);
        double energy = 0.0;
        for (int i = 0; i < n; ++i) {
            const auto row = static_cast<size_t>(i);
            field[row] = h[row * static_cast<size_t>(n) + row];
            for (int j = 0; j < q; ++j) field[row] += coupling[static_cast<size_t>(i * stride + j)];
        }
        for (int i = 0; i < q; ++i) {
            for (int j = 0; j < q; ++j) energy += h[static_cast<size_t>(i * n + j)];
        }
        fastprune::RevolvingDoor door{n, q, stride, coupling.data(), field.data(), c.data(), energy, false};
        std::vector<Ranked> seen;
        do {
            seen.push_back({door.energy, {c.begin() + 1, c.begin() + 1 + q}});
        } while (table.advance(door, 1e300, 1));
        std::sort(seen.begin(), seen.end());
        check(seen.size() == truth.size(), name + ": number of subsets");
        for (size_t s = 0; s < seen.size(); ++s) {
            check(seen[s].subset == truth[s].subset && std::fabs(seen[s].energy - truth[s].energy) < 1e-10,
                  name + ": subsets and energies");
        }

        std::vector<double> y(static_cast<size_t>(stride), 0.0);
        std::vector<double> open(static_cast<size_t>(stride), 0.0);
        const std::vector<double> lin(static_cast<size_t>(stride), 0.0);
        std::vector<double> gradient(static_cast<size_t>(stride), 0.0);
        for (int i = 0; i < n; ++i) {
            y[static_cast<size_t>(i)] = static_cast<double>(q) / n;
            open[static_cast<size_t>(i)] = 1.0;
        }
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < n; ++j) {
                gradient[static_cast<size_t>(i)] +=
                    twice[static_cast<size_t>(i * stride + j)] * y[static_cast<size_t>(j)];
            }
        }
        const fastprune::RelaxationView relaxation{stride, twice.data(), lin.data(), 0.0};
        const auto r =
            table.descend(relaxation, {y.data(), gradient.data(), open.data(), q}, 1e300, -1e300, 10000);
        check(r.lower <= truth.front().energy + 1e-9, name + ": lower bound holds");
        check(std::fabs(r.upper - r.lower) < 1e-6, name + ": descent converges");
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
    run("test_exact_sum", test_exact_sum);
    run("test_against_brute_force", test_against_brute_force);
    run("test_kernels", test_kernels);
    run("test_search_equals_enumeration", test_search_equals_enumeration);
    run("test_threads_do_not_change_the_result", test_threads_do_not_change_the_result);
    run("test_ties_of_interchangeable_variables", test_ties_of_interchangeable_variables);
    run("test_time_limit_and_interrupt", test_time_limit_and_interrupt);
    std::printf("all native solver tests passed (%s kernels)\n", fastprune::instruction_set().name);
}
