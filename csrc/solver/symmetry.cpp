#include "symmetry.hpp"

#include <cstddef>

namespace fastprune {

SymmetryClasses::SymmetryClasses(int n, const double* h, const double* linear) {
    const auto entry = [&](int i, int j) {
        return h[static_cast<std::size_t>(i) * static_cast<std::size_t>(n) + static_cast<std::size_t>(j)];
    };
    const auto interchangeable = [&](int i, int j) {
        if (linear[i] != linear[j] || entry(i, i) != entry(j, j)) return false;
        for (int l = 0; l < n; ++l) {
            if (l != i && l != j && entry(i, l) != entry(j, l)) return false;
        }
        return true;
    };
    Subset assigned;
    for (int i = 0; i < n; ++i) {
        if (assigned.contains(i)) continue;
        std::vector<int> members{i};
        for (int j = i + 1; j < n; ++j) {
            if (!assigned.contains(j) && interchangeable(i, j)) {
                members.push_back(j);
                assigned.insert(j);
            }
        }
        if (members.size() > 1) classes_.push_back(std::move(members));
    }
}

double SymmetryClasses::predecessors(const Subset& in, const Subset& open) const {
    // Within a class, rearranging the decided members among their own positions keeps the energy; the
    // arrangements that come earlier are counted by the rank of the present one (ones first).
    double arrangements = 1.0;
    for (const auto& members : classes_) {
        int decided = 0;
        int ones = 0;
        for (int i : members) {
            decided += open.contains(i) ? 0 : 1;
            ones += in.contains(i) ? 1 : 0;
        }
        double rank = 0.0;
        for (int i : members) {
            if (open.contains(i)) continue;
            --decided;
            if (in.contains(i)) {
                --ones;
            } else {
                rank += binomial(decided, ones - 1);
            }
        }
        arrangements *= rank + 1.0;
    }
    return arrangements - 1.0;
}

}  // namespace fastprune
