// The inner loops. They are compiled once per instruction set (see CMakeLists.txt), so this interface is
// plain data and functions: nothing here may pull in inline library code that the linker would share between
// builds.
#pragma once

namespace fastprune {

// Vectors are padded with zeros to a multiple of this many doubles.
constexpr int kLanes = 8;

constexpr int padded(int n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

// Continuous relaxation min f(y) = base + lin.y + y'Py over 0 <= y <= 1, sum y fixed, P positive semidefinite
// on directions that keep the sum. Variable i may move only where open[i] is 1.
struct RelaxationView {
    int stride;           // padded number of variables
    const double* twice;  // 2P, stride x stride
    const double* lin;
    double base;
};

struct NodeView {
    double* y;
    double* gradient;  // of f at y
    const double* open;
    int q;  // how many open variables are 1 in every subset below: the sum of y over open
};

struct DescentResult {
    double lower;       // proven: f(z) >= lower for every feasible binary z
    double lower_at_y;  // the same from the final y alone; reduced costs add to this one
    double threshold;   // multiplier of the sum constraint that gives lower_at_y
    double upper;       // f(y)
};

// Pairwise coordinate descent from y: stops once lower > cutoff (the node is pruned), once f(y) <= give_up
// (no point of this relaxation can prune the node when give_up is the cutoff), or at convergence.
using DescendFn = DescentResult (*)(const RelaxationView&, const NodeView&, double cutoff, double give_up,
                                    int max_steps);

// Enumerates the t-subsets of n variables in revolving-door order (Knuth, TAOCP 7.2.1.3, algorithm R): each
// subset differs from the one before by one swap, so energy and field are kept up in O(n).
struct RevolvingDoor {
    int n;
    int t;
    int stride;
    const double* coupling;  // 2Q with zero diagonal, n rows of `stride`
    double* field;           // field[i] = energy change of adding i, given the current subset
    int* c;                  // t + 2 entries, ascending members c[1..t]
    double energy;
    bool finished;
};

// Moves on, at most `max_visits` subsets, to the first subset with energy <= threshold and returns true
// there; false when the quota is used up or (finished) nothing is left.
using AdvanceFn = bool (*)(RevolvingDoor&, double threshold, long max_visits);

struct Kernels {
    DescendFn descend;
    AdvanceFn advance;
};

namespace generic {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

}  // namespace fastprune
