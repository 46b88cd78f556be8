// Diagonal perturbation of quadratic convex reformulation: z_i^2 = z_i on binary z, so a diagonal d can move
// from the quadratic to the linear part. The bound of the continuous relaxation improves with d as long as
// H - Diag(d) stays positive semidefinite on the directions that keep the sum of z.
#pragma once

#include <vector>

namespace fastprune {

// A diagonal d is feasible here if H - Diag(d) + u 11' is positive definite for a certain large u. Matrices
// are m x m, dense.

// Leaves a feasible d alone, else replaces it by a negative multiple of the identity that is feasible.
void make_feasible(int m, const std::vector<double>& h, std::vector<double>& d);

// Maximises weight.d over feasible d by a barrier method with Newton steps. weight: m entries > 0; d:
// feasible start, and result. O(m^3) a step, some tens of steps.
void maximise_diagonal(int m, const std::vector<double>& h, const std::vector<double>& weight,
                       std::vector<double>& d);

}  // namespace fastprune
