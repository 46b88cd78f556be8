// Compiled once per instruction set with FASTPRUNE_ISA naming the namespace. Vector extensions of GCC and
// Clang: 8 doubles, lowered to what the target has.
#include "kernels.hpp"

namespace fastprune {
namespace FASTPRUNE_ISA {
namespace {

typedef double Vec __attribute__((vector_size(64), aligned(8), may_alias));
typedef long long Index __attribute__((vector_size(64)));

constexpr double kInf = __builtin_inf();

#define FASTPRUNE_LOAD(p) (*reinterpret_cast<const Vec*>(p))
#define FASTPRUNE_STORE(p) (*reinterpret_cast<Vec*>(p))

// Lagrangian bound at y with multiplier tau on the sum: for binary z,
//   f(z) >= gradient.z + (base - y'Py) >= q tau + sum_open min(0, gradient - tau) + sum_fixed gradient y +
//   ...
double lagrangian_bound(const RelaxationView& r, const NodeView& v, double tau) {
    Vec sum = {};
    const Vec zero = {};
    for (int i = 0; i < r.stride; i += kLanes) {
        const Vec y = FASTPRUNE_LOAD(v.y + i);
        const Vec g = FASTPRUNE_LOAD(v.gradient + i);
        const Vec open = FASTPRUNE_LOAD(v.open + i);
        const Vec excess = g - tau;
        sum += open * (excess < zero ? excess : zero) + (1.0 - open) * g * y;
        sum -= 0.5 * y * (g - FASTPRUNE_LOAD(r.lin + i));
    }
    double total = 0.0;
    for (int l = 0; l < kLanes; ++l) total += sum[l];
    return total + r.base + v.q * tau;
}

double value_at(const RelaxationView& r, const NodeView& v) {
    Vec sum = {};
    for (int i = 0; i < r.stride; i += kLanes) {
        sum += FASTPRUNE_LOAD(v.y + i) * (FASTPRUNE_LOAD(v.gradient + i) + FASTPRUNE_LOAD(r.lin + i));
    }
    double total = 0.0;
    for (int l = 0; l < kLanes; ++l) total += sum[l];
    return r.base + 0.5 * total;
}

// Mean gradient of the fractional variables: the multiplier at convergence.
double fractional_mean(const RelaxationView& r, const NodeView& v, double fallback) {
    Vec weight = {};
    Vec weighted = {};
    for (int i = 0; i < r.stride; i += kLanes) {
        const Vec y = FASTPRUNE_LOAD(v.y + i);
        const Vec w = y * (FASTPRUNE_LOAD(v.open + i) - y) * FASTPRUNE_LOAD(v.open + i);
        weight += w;
        weighted += w * FASTPRUNE_LOAD(v.gradient + i);
    }
    double total = 0.0;
    double mean = 0.0;
    for (int l = 0; l < kLanes; ++l) {
        total += weight[l];
        mean += weighted[l];
    }
    return total > 1e-9 ? mean / total : fallback;
}

DescentResult descend(const RelaxationView& r, const NodeView& v, double cutoff, double give_up,
                      int max_steps) {
    constexpr int kBoundEvery = 4;
    DescentResult result{-kInf, -kInf, 0.0, value_at(r, v)};
    for (int step = 1;; ++step) {
        // Steepest pair: raise the smallest gradient that can go up, lower the largest that can go down.
        Vec low = {kInf, kInf, kInf, kInf, kInf, kInf, kInf, kInf};
        Vec high = -low;
        const Vec plus = low;
        const Vec minus = high;
        const Vec zero = {};
        Index at = {0, 1, 2, 3, 4, 5, 6, 7};
        Index low_at = at;
        Index high_at = at;
        for (int i = 0; i < r.stride; i += kLanes) {
            const Vec y = FASTPRUNE_LOAD(v.y + i);
            const Vec g = FASTPRUNE_LOAD(v.gradient + i);
            const Vec open = FASTPRUNE_LOAD(v.open + i);
            const Vec up = y < open ? g : plus;
            const Vec down = y * open > zero ? g : minus;
            low_at = up < low ? at : low_at;
            low = up < low ? up : low;
            high_at = down > high ? at : high_at;
            high = down > high ? down : high;
            at += kLanes;
        }
        int i = static_cast<int>(low_at[0]);
        int j = static_cast<int>(high_at[0]);
        double gi = low[0];
        double gj = high[0];
        for (int l = 1; l < kLanes; ++l) {
            if (low[l] < gi) {
                gi = low[l];
                i = static_cast<int>(low_at[l]);
            }
            if (high[l] > gj) {
                gj = high[l];
                j = static_cast<int>(high_at[l]);
            }
        }
        const bool movable = gi < kInf && gj > -kInf;
        const double violation = movable ? gj - gi : 0.0;
        const double tolerance = 1e-9 * (1.0 + (result.upper < 0 ? -result.upper : result.upper));
        const bool last = violation <= tolerance || step >= max_steps;
        const bool hopeless = result.upper <= give_up;
        if (last || hopeless || step % kBoundEvery == 0) {
            const double middle = movable ? 0.5 * (gi + gj) : (gi < kInf ? gi : (gj > -kInf ? gj : 0.0));
            const double taus[2] = {fractional_mean(r, v, middle), middle};
            result.lower_at_y = -kInf;
            for (double tau : taus) {
                const double bound = lagrangian_bound(r, v, tau);
                if (bound > result.lower_at_y) {
                    result.lower_at_y = bound;
                    result.threshold = tau;
                }
            }
            if (result.lower_at_y > result.lower) result.lower = result.lower_at_y;
            if (last || hopeless || result.lower > cutoff) return result;
        }
        const double* pi = r.twice + static_cast<long>(i) * r.stride;
        const double* pj = r.twice + static_cast<long>(j) * r.stride;
        const double curvature = pi[i] + pj[j] - 2.0 * pi[j];
        double move = curvature > 0.0 ? violation / curvature : kInf;
        const double room_up = 1.0 - v.y[i];
        const double room_down = v.y[j];
        if (move >= room_up || move >= room_down) {
            move = room_up < room_down ? room_up : room_down;
            v.y[i] = room_up <= room_down ? 1.0 : v.y[i] + move;
            v.y[j] = room_down <= room_up ? 0.0 : v.y[j] - move;
        } else {
            v.y[i] += move;
            v.y[j] -= move;
        }
        result.upper += move * (0.5 * curvature * move - violation);
        for (int b = 0; b < r.stride; b += kLanes) {
            FASTPRUNE_STORE(v.gradient + b) += move * (FASTPRUNE_LOAD(pi + b) - FASTPRUNE_LOAD(pj + b));
        }
    }
}

void swap_members(RevolvingDoor& d, int out, int in) {
    const double* row_out = d.coupling + static_cast<long>(out) * d.stride;
    const double* row_in = d.coupling + static_cast<long>(in) * d.stride;
    d.energy += d.field[in] - d.field[out] - row_out[in];
    for (int b = 0; b < d.stride; b += kLanes) {
        FASTPRUNE_STORE(d.field + b) += FASTPRUNE_LOAD(row_in + b) - FASTPRUNE_LOAD(row_out + b);
    }
}

// One step of algorithm R; false after the last subset.
bool step(RevolvingDoor& d) {
    int* c = d.c;
    const int t = d.t;
    if (t == 0) return false;
    if (t & 1) {
        if (c[1] + 1 < c[2]) {
            swap_members(d, c[1], c[1] + 1);
            ++c[1];
            return true;
        }
    } else if (c[1] > 0) {
        swap_members(d, c[1], c[1] - 1);
        --c[1];
        return true;
    }
    bool decrease = (t & 1) != 0;
    for (int j = 2; j <= t; ++j, decrease = !decrease) {
        if (decrease) {
            if (c[j] >= j) {
                swap_members(d, c[j], j - 2);
                c[j] = c[j - 1];
                c[j - 1] = j - 2;
                return true;
            }
        } else if (c[j] + 1 < c[j + 1]) {
            swap_members(d, c[j - 1], c[j] + 1);
            c[j - 1] = c[j];
            ++c[j];
            return true;
        }
    }
    return false;
}

bool advance(RevolvingDoor& d, double threshold, long max_visits) {
    for (long visit = 0; visit < max_visits; ++visit) {
        if (!step(d)) {
            d.finished = true;
            return false;
        }
        if (d.energy <= threshold) return true;
    }
    return false;
}

}  // namespace

extern const Kernels table;
const Kernels table = {descend, advance};

}  // namespace FASTPRUNE_ISA
}  // namespace fastprune
