// A set of up to 128 variables as a bit mask.
#pragma once

#include <array>
#include <cstdint>

namespace fastprune {

constexpr int kMaxVariables = 128;

class Subset {
  public:
    bool contains(int i) const { return (words_[word(i)] >> bit(i)) & 1U; }
    void insert(int i) { words_[word(i)] |= std::uint64_t{1} << bit(i); }
    void erase(int i) { words_[word(i)] &= ~(std::uint64_t{1} << bit(i)); }

    // Calls f(i) for every member, in ascending order.
    template <typename F>
    void for_each(F&& f) const {
        for (std::size_t w = 0; w < words_.size(); ++w) {
            for (std::uint64_t rest = words_[w]; rest != 0; rest &= rest - 1) {
                f(static_cast<int>(64 * w) + __builtin_ctzll(rest));
            }
        }
    }

    int size() const { return __builtin_popcountll(words_[0]) + __builtin_popcountll(words_[1]); }

    friend bool operator==(const Subset& a, const Subset& b) { return a.words_ == b.words_; }

    // Order of the sorted index tuples, for subsets of equal size: the one that owns the smallest index in
    // which the two differ comes first.
    friend bool lex_less(const Subset& a, const Subset& b) {
        for (std::size_t w = 0; w < a.words_.size(); ++w) {
            const std::uint64_t differ = a.words_[w] ^ b.words_[w];
            if (differ != 0) return (a.words_[w] & differ & (~differ + 1)) != 0;
        }
        return false;
    }

  private:
    static std::size_t word(int i) { return static_cast<std::size_t>(i) >> 6U; }
    static unsigned bit(int i) { return static_cast<unsigned>(i) & 63U; }

    std::array<std::uint64_t, 2> words_{};
};

}  // namespace fastprune
