// Correctly rounded sum of doubles (Shewchuk's non-overlapping partials, as in Python's math.fsum). The
// result does not depend on the order of the terms, so equal sums compare equal and every implementation of
// the energy agrees to the last bit.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

namespace fastprune {

class ExactSum {
  public:
    void add(double x) {
        std::size_t kept = 0;
        for (std::size_t i = 0; i < count_; ++i) {
            double y = partials_[i];
            if (std::fabs(x) < std::fabs(y)) std::swap(x, y);
            const double high = x + y;
            const double low = y - (high - x);
            if (low != 0.0) partials_[kept++] = low;
            x = high;
        }
        count_ = kept;
        if (x != 0.0) partials_[count_++] = x;
    }

    double value() const {
        if (count_ == 0) return 0.0;
        std::size_t n = count_;
        double high = partials_[--n];
        double low = 0.0;
        while (n > 0) {
            const double x = high;
            const double y = partials_[--n];
            high = x + y;
            low = y - (high - x);
            if (low != 0.0) break;
        }
        // Half-way case: the partials below decide the direction of rounding.
        if (n > 0 && ((low < 0.0 && partials_[n - 1] < 0.0) || (low > 0.0 && partials_[n - 1] > 0.0))) {
            const double twice = 2.0 * low;
            const double x = high + twice;
            if (x - high == twice) high = x;
        }
        return high;
    }

  private:
    // 2098 bits of double range / 53 bits a partial: never more than 40 are non-zero at once.
    std::array<double, 48> partials_{};
    std::size_t count_ = 0;
};

}  // namespace fastprune
