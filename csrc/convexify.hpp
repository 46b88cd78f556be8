// Diagonal perturbation of quadratic convex reformulation: z_i^2 = z_i on binary z, so a diagonal d can move
// from the quadratic to the linear part. The bound of the continuous relaxation improves with d as long as
// H - Diag(d) stays positive semidefinite on the directions that keep the sum of z.
#pragma once

#include <vector>

namespace fastprune {

// Maximises weight.d subject to H - Diag(d) + u 11' positive definite (u large) by a barrier method with
// Newton steps. h: m x m; weight: m entries > 0; d: start (used if feasible) and result, which is strictly
// feasible. O(m^3) a step, some tens of steps.
void maximise_diagonal(int m, const std::vector<double>& h, const std::vector<double>& weight,
                       std::vector<double>& d);

}  // namespace fastprune
