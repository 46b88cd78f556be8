// Native tests of the CPU operators against the same in double: every instruction set, both dtypes, odd
// sizes. Buffers are of the exact size, so that a sanitizer sees a read or write behind a row; outputs are
// full of NaN before.
#include "cpu_ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "dispatch.hpp"

namespace {

using fastprune::Dtype;
using fastprune_tests::check;
using fastprune_tests::run;
using std::size_t;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Bfloat16 {
    std::uint16_t bits;
};

float to_float(float x) {
    return x;
}

float to_float(Bfloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16U;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class T>
T from_float(float x);

template <>
float from_float<float>(float x) {
    return x;
}

template <>
Bfloat16 from_float<Bfloat16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return {0x7fc0};
    return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U)};
}

template <class T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::bfloat16;

// Of one rounding to T, relative.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-24 : 0x1p-8;

template <class T>
using Rows = std::vector<T>;

template <class T>
Rows<T> random(size_t count, std::uint64_t seed, float scale = 1.0F) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal;
    Rows<T> x(count);
    for (T& value : x) value = from_float<T>(scale * normal(rng));
    return x;
}

template <class T>
Rows<T> nans(size_t count) {
    return Rows<T>(count, from_float<T>(kNan));
}

template <class T>
bool same_bits(const Rows<T>& a, const Rows<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
Rows<T> slice(const Rows<T>& x, size_t begin, size_t end) {
    return Rows<T>(x.begin() + static_cast<std::ptrdiff_t>(begin),
                   x.begin() + static_cast<std::ptrdiff_t>(end));
}

// Within `roundings` of T, relative to the greater of the truth and `magnitude` (that of what cancels in it).
template <class T>
void check_close(T found, double truth, double magnitude, double roundings, const std::string& what) {
    const double error = std::fabs(static_cast<double>(to_float(found)) - truth);
    const double allowed = roundings * kRounding<T> * std::max(std::fabs(truth), magnitude);
    check(error <= allowed, what + ": " + std::to_string(to_float(found)) + " for " + std::to_string(truth));
}

// test(name) for every instruction set, then back to the fastest.
template <class Test>
void for_each_set(Test test) {
    for (const auto& set : fastprune::instruction_sets()) {
        fastprune::use_instruction_set(set.name);
        test(std::string(set.name));
    }
    fastprune::use_instruction_set(fastprune::instruction_sets().back().name);
}

constexpr double kEps = 1e-5;

template <class T>
Rows<T> norm_of(const Rows<T>& states, const Rows<T>* branch, const Rows<T>& weight, Rows<T>* residual,
                int threads) {
    const size_t columns = weight.size();
    Rows<T> normed = nans<T>(states.size());
    fastprune::add_rms_norm(
        {states.data(), branch != nullptr ? branch->data() : nullptr, weight.data(),
         residual != nullptr ? residual->data() : nullptr, normed.data(), static_cast<long>(columns), kEps},
        static_cast<std::int64_t>(states.size() / columns), kDtype<T>, threads);
    return normed;
}

template <class T>
void norm(const std::string& name, size_t rows, size_t columns) {
    const auto states = random<T>(rows * columns, 1);
    const auto branch = random<T>(rows * columns, 2);
    const auto weight = random<T>(columns, 3);
    auto residual = nans<T>(rows * columns);
    const auto normed = norm_of(states, &branch, weight, &residual, 1);
    for (size_t row = 0; row < rows; ++row) {
        double squares = 0.0;
        for (size_t i = row * columns; i < (row + 1) * columns; ++i) {
            const float sum = to_float(from_float<T>(to_float(states[i]) + to_float(branch[i])));
            check(to_float(residual[i]) == sum, name + ": the sum");
            squares += static_cast<double>(sum) * sum;
        }
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(columns) + kEps);
        for (size_t c = 0; c < columns; ++c) {
            const size_t i = row * columns + c;
            check_close(normed[i], to_float(residual[i]) * scale * to_float(weight[c]), 0.0,
                        sizeof(T) == 4 ? 8.0 : 1.01, name + ": the norm");
        }
    }
    check(same_bits(norm_of<T>(states, &branch, weight, nullptr, 1), normed), name + ": without a residual");
    auto copy = nans<T>(rows * columns);
    check(same_bits(norm_of<T>(residual, nullptr, weight, &copy, 2), normed),
          name + ": without a branch, on 2 threads");
    check(same_bits(copy, residual), name + ": residual without a branch");
    for (const size_t row : {size_t{0}, rows - 1}) {
        const size_t from = row * columns;
        const auto alone = norm_of<T>(slice(residual, from, from + columns), nullptr, weight, nullptr, 1);
        check(same_bits(alone, slice(normed, from, from + columns)), name + ": a row alone");
    }
}

// LayerNorm without a weight, with a bias.
void centered_norm(const std::string& name, size_t rows, size_t columns) {
    const auto states = random<float>(rows * columns, 1);
    const auto bias = random<float>(columns, 2);
    auto normed = nans<float>(rows * columns);
    fastprune::add_rms_norm(
        {states.data(), nullptr, nullptr, nullptr, normed.data(), static_cast<long>(columns), kEps, true, 0.0F,
         bias.data()},
        static_cast<std::int64_t>(rows), Dtype::float32, 1);
    for (size_t row = 0; row < rows; ++row) {
        double mean = 0.0;
        double squares = 0.0;
        for (size_t i = row * columns; i < (row + 1) * columns; ++i) mean += states[i];
        mean /= static_cast<double>(columns);
        for (size_t i = row * columns; i < (row + 1) * columns; ++i)
            squares += (states[i] - mean) * (states[i] - mean);
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(columns) + kEps);
        for (size_t i = row * columns; i < (row + 1) * columns; ++i)
            check_close(normed[i], (states[i] - mean) * scale + bias[i - row * columns], 1.0, 16.0, name);
    }
}

void test_norm() {
    for_each_set([](const std::string& set) {
        for (const size_t columns : {size_t{1}, size_t{60}, size_t{128}, size_t{1025}})
            centered_norm("centered norm, " + set, 5, columns);
        for (const auto& [rows, columns] :
             {std::pair<size_t, size_t>{63, 60}, {1, 1}, {5, 128}, {2, 1025}, {1200, 60}}) {
            norm<float>("add_rms_norm, " + set + ", float32", rows, columns);
            norm<Bfloat16>("add_rms_norm, " + set + ", bfloat16", rows, columns);
        }
        const Rows<float> weight(7, 1.0F);
        Rows<float> states(14, 1.0F);
        states[8] = kNan;
        const auto normed = norm_of<float>(states, nullptr, weight, nullptr, 1);
        for (size_t i = 0; i < 14; ++i)
            check(std::isnan(normed[i]) == (i >= 7), set + ": NaN stays in its row");
    });
}

struct Heads {
    size_t q, kv, size, half;
    size_t width() const { return (q + 2 * kv) * size; }
};

constexpr size_t kPositions = 50;

template <class T>
Rows<T> rotated(Rows<T> qkv, const Rows<float>& cos, const Rows<float>& sin,
                const std::vector<std::int64_t>& position, Heads h, const Rows<T>* weight, int threads) {
    const T* scale = weight != nullptr ? weight->data() : nullptr;
    fastprune::rotary(
        {qkv.data(), cos.data(), sin.data(), position.data(), scale, scale, static_cast<long>(h.q),
         static_cast<long>(h.kv), static_cast<long>(h.size), static_cast<long>(h.half), kEps},
        static_cast<std::int64_t>(position.size()), kPositions, kDtype<T>, threads);
    return qkv;
}

template <class T>
void rotary(const std::string& name, size_t tokens, Heads h, bool with_norm) {
    const auto qkv = random<T>(tokens * h.width(), 1);
    const auto weight = random<T>(h.size, 2);
    Rows<float> cos(kPositions * h.half);
    Rows<float> sin(kPositions * h.half);
    for (size_t i = 0; i < cos.size(); ++i) {
        const double angle = 0.1 * static_cast<double>(i / h.half) * static_cast<double>(i % h.half + 1);
        cos[i] = static_cast<float>(std::cos(angle));
        sin[i] = static_cast<float>(std::sin(angle));
    }
    std::vector<std::int64_t> position(tokens);
    for (size_t t = 0; t < tokens; ++t) position[t] = static_cast<std::int64_t>(t * 7 % kPositions);
    const auto result = rotated<T>(qkv, cos, sin, position, h, with_norm ? &weight : nullptr, 1);
    for (size_t head = 0; head < tokens * (h.q + 2 * h.kv); ++head) {
        const size_t base = head * h.size;
        std::vector<double> x(h.size);
        for (size_t i = 0; i < h.size; ++i) x[i] = to_float(qkv[base + i]);
        if (head % (h.q + 2 * h.kv) >= h.q + h.kv) {
            for (size_t i = 0; i < h.size; ++i) check(to_float(result[base + i]) == x[i], name + ": v stays");
            continue;
        }
        if (with_norm) {
            double squares = 0.0;
            for (const double value : x) squares += value * value;
            const double scale = 1.0 / std::sqrt(squares / static_cast<double>(h.size) + kEps);
            for (size_t i = 0; i < h.size; ++i) x[i] *= scale * to_float(weight[i]);
        }
        const size_t table = static_cast<size_t>(position[head / (h.q + 2 * h.kv)]) * h.half;
        for (size_t i = 0; i < h.half; ++i) {
            const double c = cos[table + i];
            const double s = sin[table + i];
            const double magnitude = std::fabs(x[i]) + std::fabs(x[h.half + i]);
            const double first = x[i] * c - x[h.half + i] * s;
            const double second = x[h.half + i] * c + x[i] * s;
            check_close(result[base + i], first, magnitude, 8.0, name + ": first half");
            check_close(result[base + h.half + i], second, magnitude, 8.0, name + ": second half");
        }
        for (size_t i = 2 * h.half; i < h.size; ++i)
            check_close(result[base + i], x[i], 0.0, 8.0, name + ": the rest");
    }
    check(same_bits(rotated<T>(qkv, cos, sin, position, h, with_norm ? &weight : nullptr, 2), result),
          name + ": on 2 threads");
    const size_t last = (tokens - 1) * h.width();
    const auto alone = rotated<T>(slice(qkv, last, qkv.size()), cos, sin, {position.back()}, h,
                                  with_norm ? &weight : nullptr, 1);
    check(same_bits(alone, slice(result, last, qkv.size())), name + ": a token alone");
}

// Neighbours rotate as the same columns do in two halves; a norm of each head before or after.
void neighbours(const std::string& name, Heads h, bool with_norm, bool after) {
    const size_t tokens = 7;
    const auto qkv = random<float>(tokens * h.width(), 1);
    const auto weight = random<float>(h.size, 2);
    Rows<float> cos = random<float>(kPositions * h.half, 3);
    Rows<float> sin = random<float>(kPositions * h.half, 4);
    std::vector<std::int64_t> position(tokens, 5);
    const float* scale = with_norm ? weight.data() : nullptr;
    auto found = qkv;
    fastprune::rotary({found.data(), cos.data(), sin.data(), position.data(), scale, scale,
                       static_cast<long>(h.q), static_cast<long>(h.kv), static_cast<long>(h.size),
                       static_cast<long>(h.half), kEps, 1.0F, true, after},
                      static_cast<std::int64_t>(tokens), kPositions, Dtype::float32, 1);
    const size_t heads = h.q + 2 * h.kv;
    for (size_t head = 0; head < tokens * heads; ++head) {
        const size_t base = head * h.size;
        std::vector<double> x(qkv.begin() + static_cast<std::ptrdiff_t>(base),
                              qkv.begin() + static_cast<std::ptrdiff_t>(base + h.size));
        const auto norm = [&] {
            double squares = 0.0;
            for (const double value : x) squares += value * value;
            const double factor = 1.0 / std::sqrt(squares / static_cast<double>(h.size) + kEps);
            for (size_t i = 0; i < h.size; ++i) x[i] *= factor * (1.0 + weight[i]);
        };
        const bool rotates = head % heads < h.q + h.kv;
        if (rotates && with_norm && !after) norm();
        for (size_t i = 0; rotates && i < h.half; ++i) {
            const double c = cos[5 * h.half + i];
            const double s = sin[5 * h.half + i];
            const double first = x[2 * i] * c - x[2 * i + 1] * s;
            x[2 * i + 1] = x[2 * i + 1] * c + x[2 * i] * s;
            x[2 * i] = first;
        }
        if (rotates && with_norm && after) norm();
        for (size_t i = 0; i < h.size; ++i) check_close(found[base + i], x[i], 10.0, 8.0, name);
    }
}

void test_rotary() {
    for_each_set([](const std::string& set) {
        for (const Heads h : {Heads{4, 2, 16, 8}, Heads{2, 1, 20, 5}, Heads{1, 1, 80, 12}, Heads{1, 1, 2, 1}}) {
            neighbours("neighbours, " + set, h, false, false);
            neighbours("neighbours, norm, " + set, h, true, false);
            neighbours("neighbours, norm after, " + set, h, true, true);
        }
    });
    for_each_set([](const std::string& set) {
        for (const bool with_norm : {false, true}) {
            for (const Heads h :
                 {Heads{4, 2, 16, 8}, Heads{2, 1, 20, 5}, Heads{1, 1, 80, 12}, Heads{3, 3, 64, 32}}) {
                rotary<float>("rotary, " + set + ", float32", 63, h, with_norm);
                rotary<Bfloat16>("rotary, " + set + ", bfloat16", 1, h, with_norm);
            }
            rotary<Bfloat16>("rotary, " + set + ", many tokens", 1500, {4, 2, 16, 8}, with_norm);
        }
        const Rows<float> table(kPositions, 1.0F);
        // a NaN whose lowest bits are set, which rounding to bfloat16 would carry over into a number
        const std::uint32_t bits = 0x7fffffff;
        Rows<float> broken(kPositions);
        for (float& value : broken) std::memcpy(&value, &bits, sizeof bits);
        const Rows<Bfloat16> ones(6, from_float<Bfloat16>(1.0F));
        const auto result = rotated<Bfloat16>(ones, broken, table, {0}, {1, 1, 2, 1}, nullptr, 1);
        for (size_t i = 0; i < 4; ++i)
            check(std::isnan(to_float(result[i])), set + ": NaN stays NaN in bfloat16");
        for (const std::int64_t wrong : {std::int64_t{-1}, static_cast<std::int64_t>(kPositions)}) {
            bool thrown = false;
            try {
                rotated<float>(Rows<float>(6), table, table, {wrong}, {1, 1, 2, 1}, nullptr, 1);
            } catch (const std::invalid_argument&) {
                thrown = true;
            }
            check(thrown, "rotary: a position outside the tables is refused");
        }
    });
}

template <class T>
Rows<T> gated(const Rows<T>& gate_up, size_t columns, int threads,
              fastprune::Activation activation = fastprune::Activation::silu) {
    auto out = nans<T>(gate_up.size() / 2);
    fastprune::gated_mlp({gate_up.data(), out.data(), static_cast<long>(columns), activation},
                         static_cast<std::int64_t>(out.size() / columns), kDtype<T>, threads);
    return out;
}

template <class T>
void gated_mlp(const std::string& name, size_t rows, size_t columns) {
    const auto gate_up = random<T>(rows * 2 * columns, 1, 3.0F);
    const auto out = gated(gate_up, columns, 1);
    for (size_t i = 0; i < out.size(); ++i) {
        const size_t at = i / columns * 2 * columns + i % columns;
        const double gate = to_float(gate_up[at]);
        const double truth = gate / (1.0 + std::exp(-gate)) * to_float(gate_up[at + columns]);
        check_close(out[i], truth, 0.0, sizeof(T) == 4 ? 8.0 : 1.01, name);
    }
    check(same_bits(gated(gate_up, columns, 2), out), name + ": on 2 threads");
    const size_t last = (rows - 1) * columns;
    const auto alone = gated(slice(gate_up, 2 * last, gate_up.size()), columns, 1);
    check(same_bits(alone, slice(out, last, out.size())), name + ": a row alone");
}

void test_gated_mlp() {
    for_each_set([](const std::string& set) {
        for (const auto& [rows, columns] :
             {std::pair<size_t, size_t>{63, 60}, {1, 1}, {3, 129}, {1200, 60}}) {
            gated_mlp<float>("gated_mlp, " + set + ", float32", rows, columns);
            gated_mlp<Bfloat16>("gated_mlp, " + set + ", bfloat16", rows, columns);
        }
        // the exponential over its whole range: silu of the gate alone
        std::vector<float> gates;
        for (float x = -88.0F; x < 90.0F; x += 0.000917F) gates.push_back(x);
        const size_t count = gates.size();
        gates.resize(2 * count, 1.0F);
        const auto silu = gated(gates, count, 1);
        for (size_t i = 0; i < count; ++i) {
            const double gate = gates[i];
            check_close(silu[i], gate / (1.0 + std::exp(-gate)), 0.0, 5.0, set + ": silu");
        }
        const auto gelu = gated(gates, count, 1, fastprune::Activation::gelu_tanh);
        for (size_t i = 0; i < count; ++i) {
            const double gate = gates[i];
            const double twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate);
            if (twice < -87.0) {
                check(gelu[i] == 0.0F, set + ": gelu far below 0");
                continue;
            }
            // a rounding of the exponent counts as often as the exponent is large
            check_close(gelu[i], gate / (1.0 + std::exp(-twice)), 0.0, 5.0 + 5.0 * std::max(0.0, -twice),
                        set + ": gelu");
        }
        const auto ends =
            gated<float>({-kInf, -1e30F, -100.0F, 100.0F, 1e30F, kInf, kNan, 1, 1, 1, 1, 1, 1, 1}, 7, 1);
        check(std::isnan(ends[0]), set + ": silu of -inf is NaN, as in torch");
        for (size_t i = 1; i < 3; ++i) check(ends[i] == 0.0F, set + ": silu far below 0");
        check(ends[3] == 100.0F && ends[4] == 1e30F && ends[5] == kInf, set + ": silu far above 0");
        check(std::isnan(ends[6]), set + ": silu of NaN");
    });
}

template <class T>
Rows<float> log_sums(const Rows<T>& logits, size_t columns, size_t stride, size_t rows, int threads) {
    auto out = nans<float>(rows);
    fastprune::log_sum_exp({logits.data(), out.data(), static_cast<long>(columns), static_cast<long>(stride)},
                           static_cast<std::int64_t>(rows), kDtype<T>, threads);
    return out;
}

template <class T>
void log_sum_exp(const std::string& name, size_t rows, size_t columns, size_t stride) {
    const auto logits = random<T>((rows - 1) * stride + columns, 1, 5.0F);
    const auto out = log_sums(logits, columns, stride, rows, 1);
    for (size_t row = 0; row < rows; ++row) {
        double sum = 0.0;
        for (size_t c = 0; c < columns; ++c)
            sum += std::exp(static_cast<double>(to_float(logits[row * stride + c])));
        check_close(out[row], std::log(sum), 1.0, 8.0, name);
    }
    check(same_bits(log_sums(logits, columns, stride, rows, 2), out), name + ": on 2 threads");
    const auto alone = log_sums(slice(logits, (rows - 1) * stride, logits.size()), columns, columns, 1, 1);
    check(same_bits(alone, slice(out, rows - 1, rows)), name + ": a row alone");
}

struct Divergences {
    std::vector<double> sums, means;
};

template <class T>
Divergences divergences(const Rows<T>& logits, const Rows<T>& dense, const std::vector<double>& dense_sums,
                        size_t columns, size_t stride, size_t rows, int threads) {
    Divergences out{std::vector<double>(rows, kNan), std::vector<double>(rows, kNan)};
    fastprune::divergence({logits.data(), dense.empty() ? nullptr : dense.data(), dense_sums.data(),
                           out.sums.data(), out.means.data(), static_cast<long>(columns),
                           static_cast<long>(stride), static_cast<long>(columns)},
                          static_cast<std::int64_t>(rows), kDtype<T>, threads);
    return out;
}

// A float32 exponential and a sum of at most 16 of them in a lane, of which the errors even out.
constexpr double kSumRounding = 0x1p-22;

template <class T>
void divergence(const std::string& name, size_t rows, size_t columns, size_t stride) {
    const auto logits = random<T>((rows - 1) * stride + columns, 1, 5.0F);
    const auto dense = random<T>(rows * columns, 2, 5.0F);
    const auto dense_sums = divergences<T>(dense, {}, {}, columns, columns, rows, 1).sums;
    const auto out = divergences(logits, dense, dense_sums, columns, stride, rows, 1);
    for (size_t row = 0; row < rows; ++row) {
        double sum = 0.0;
        double mean = 0.0;
        double magnitude = 0.0;
        for (size_t c = 0; c < columns; ++c) {
            const double l = to_float(logits[row * stride + c]);
            const double d = to_float(dense[row * columns + c]);
            const double p = std::exp(d - static_cast<double>(static_cast<float>(dense_sums[row])));
            sum += std::exp(l);
            mean += p * (d - l);
            magnitude += p * (std::fabs(d - l) + 4.0);  // d - s, rounded, is up to 50
        }
        check(std::fabs(out.sums[row] - std::log(sum)) <= 2 * kSumRounding, name + ": a log-sum-exp");
        check(std::fabs(out.means[row] - mean) <= 4 * kSumRounding * magnitude, name + ": a mean");
    }
    const auto whole = divergences(dense, dense, dense_sums, columns, columns, rows, 1);
    check(same_bits(whole.sums, dense_sums), name + ": the sums of the dense model itself");
    for (const double mean : whole.means) check(mean == 0.0, name + ": the mean of the dense model itself");
    const auto two = divergences(logits, dense, dense_sums, columns, stride, rows, 2);
    check(same_bits(two.sums, out.sums) && same_bits(two.means, out.means), name + ": on 2 threads");
    const auto alone = divergences(slice(logits, (rows - 1) * stride, logits.size()),
                                   slice(dense, (rows - 1) * columns, dense.size()),
                                   {dense_sums[rows - 1]}, columns, columns, 1, 1);
    check(alone.sums[0] == out.sums[rows - 1] && alone.means[0] == out.means[rows - 1], name + ": a row alone");
}

void test_divergence() {
    for_each_set([](const std::string& set) {
        for (const size_t stride : {size_t{1021}, size_t{1500}}) {
            divergence<float>("divergence, " + set + ", float32", 63, 1021, stride);
            divergence<Bfloat16>("divergence, " + set + ", bfloat16", 63, 1021, stride);
        }
        divergence<float>("divergence, " + set, 1, 1, 1);
        divergence<float>("divergence, " + set + ", many logits", 2, 40001, 40001);
        for (const size_t columns : {size_t{3}, size_t{1025}}) {
            Rows<float> rows(columns, 0.0F);
            const auto of = [&](const Rows<float>& logits, const Rows<float>& dense) {
                const auto sums = divergences<float>(dense, {}, {}, columns, columns, 1, 1).sums;
                return divergences(logits, dense, sums, columns, columns, 1, 1);
            };
            auto changed = rows;
            changed.back() = kNan;
            check(std::isnan(of(changed, rows).sums[0]) && std::isnan(of(changed, rows).means[0]),
                  set + ": a logit that is no number");
            check(std::isnan(of(rows, changed).means[0]), set + ": a dense logit that is no number");
            changed.back() = -1e30F;
            check(of(changed, rows).means[0] > 1e26, set + ": a token lost");
            check(of(rows, changed).means[0] == 0.0, set + ": a token that was never there");
        }
    });
}

void test_log_sum_exp() {
    for_each_set([](const std::string& set) {
        for (const size_t stride : {size_t{1021}, size_t{1500}}) {
            log_sum_exp<float>("log_sum_exp, " + set + ", float32", 63, 1021, stride);
            log_sum_exp<Bfloat16>("log_sum_exp, " + set + ", bfloat16", 63, 1021, stride);
        }
        log_sum_exp<float>("log_sum_exp, " + set, 1, 1, 1);
        log_sum_exp<float>("log_sum_exp, " + set + ", many logits", 2, 40001, 40001);
        for (const size_t columns : {size_t{1}, size_t{3}, size_t{100}, size_t{1025}}) {
            for (const size_t at : {size_t{0}, columns / 2, columns - 1}) {
                const auto with = [=](float everywhere, float there) {
                    Rows<float> x(columns, everywhere);
                    x[at] = there;
                    return log_sums(x, columns, columns, 1, 1)[0];
                };
                check(std::isnan(with(0.0F, kNan)), set + ": NaN in, NaN out");
                check(std::isnan(with(-kInf, kNan)), set + ": NaN among -inf");
                check(columns == 1 || std::isnan(with(kInf, kNan)), set + ": NaN among inf");
                check(with(0.0F, kInf) == kInf && with(-kInf, kInf) == kInf, set + ": infinity");
                check(with(-kInf, -kInf) == -kInf, set + ": a row of -inf");
                check(with(-kInf, 3e38F) == 3e38F && with(-3e38F, -1e30F) == -1e30F, set + ": huge logits");
            }
        }
    });
}

using Seen = fastprune::Attention::Seen;

struct AttentionSize {
    size_t rows, length, heads, kv_heads, head_dim;
    size_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

std::vector<Seen> causal(size_t length) {
    std::vector<Seen> seen;
    for (std::int32_t i = 1; i <= static_cast<std::int32_t>(length); ++i) seen.push_back({0, i, i, i});
    return seen;
}

// Two runs of any length, of which one may be empty.
std::vector<Seen> random_runs(size_t rows, size_t length) {
    std::mt19937_64 rng(4);
    std::uniform_int_distribution<std::int32_t> place(0, static_cast<std::int32_t>(length));
    std::vector<Seen> seen;
    while (seen.size() < rows * length) {
        std::int32_t ends[4];
        for (auto& end : ends) end = place(rng);
        std::sort(ends, ends + 4);
        const Seen s{ends[0], ends[1], ends[2], ends[3]};
        if (s.first_begin < s.first_end || s.second_begin < s.second_end) seen.push_back(s);
    }
    return seen;
}

template <class T>
Rows<T> attended(const Rows<T>& qkv, const std::vector<Seen>& seen, const AttentionSize& a, int threads,
                 const Rows<T>* sinks = nullptr) {
    auto out = nans<T>(a.rows * a.length * a.heads * a.head_dim);
    const auto number = [](size_t n) { return static_cast<long>(n); };
    fastprune::attention({qkv.data(), out.data(), seen.data(), seen.size() > a.length, number(a.length),
                          number(a.heads), number(a.kv_heads), number(a.head_dim), 0.25F, 0.0F,
                          sinks == nullptr ? nullptr : sinks->data()},
                         static_cast<std::int64_t>(a.rows), kDtype<T>, threads);
    return out;
}

template <class T>
void attention(const std::string& name, const std::vector<Seen>& seen, const AttentionSize& a,
               const Rows<T>* sinks = nullptr) {
    const auto qkv = random<T>(a.rows * a.length * a.width(), 1);
    const auto out = attended(qkv, seen, a, 1, sinks);
    const auto dot = [&](size_t query, size_t key) {
        double sum = 0.0;
        for (size_t d = 0; d < a.head_dim; ++d)
            sum += static_cast<double>(to_float(qkv[query + d])) * to_float(qkv[key + d]);
        return 0.25 * sum;
    };
    for (size_t row = 0; row < a.rows; ++row) {
        for (size_t i = 0; i < a.length; ++i) {
            const Seen& s = seen[(seen.size() > a.length ? row * a.length : 0) + i];
            for (size_t head = 0; head < a.heads; ++head) {
                const size_t token = row * a.length * a.width();
                const size_t query = token + i * a.width() + head * a.head_dim;
                const size_t key = token + (a.heads + head / (a.heads / a.kv_heads)) * a.head_dim;
                const size_t value = key + a.kv_heads * a.head_dim;
                std::vector<double> sums(a.head_dim);
                std::vector<double> magnitudes(a.head_dim);
                double total = 0.0;
                double greatest = 0.0;
                if (sinks != nullptr) {
                    greatest = std::fabs(static_cast<double>(to_float((*sinks)[head])));
                    total = std::exp(static_cast<double>(to_float((*sinks)[head])));
                }
                for (size_t j = 0; j < a.length; ++j) {
                    const auto at = static_cast<std::int32_t>(j);
                    if (!(s.first_begin <= at && at < s.first_end) &&
                        !(s.second_begin <= at && at < s.second_end))
                        continue;
                    const double score = dot(query, key + j * a.width());
                    greatest = std::max(greatest, std::fabs(score));
                    total += std::exp(score);
                    for (size_t d = 0; d < a.head_dim; ++d) {
                        const double term = std::exp(score) * to_float(qkv[value + j * a.width() + d]);
                        sums[d] += term;
                        magnitudes[d] += std::fabs(term);
                    }
                }
                const size_t to = ((row * a.length + i) * a.heads + head) * a.head_dim;
                for (size_t d = 0; d < a.head_dim; ++d) {
                    // float32 roundings grow with the scores; in bfloat16 that of the result is all but alone
                    const double roundings = sizeof(T) == 4 ? 16.0 + 4.0 * greatest : 1.01;
                    check_close(out[to + d], sums[d] / total, magnitudes[d] / total, roundings, name);
                }
            }
        }
    }
    for (const int threads : {2, 3}) {
        check(same_bits(attended(qkv, seen, a, threads, sinks), out), name + ": on several threads");
    }
    const size_t last = (a.rows - 1) * a.length;
    const std::vector<Seen> own(seen.end() - static_cast<std::ptrdiff_t>(a.length), seen.end());
    const auto alone = attended(slice(qkv, last * a.width(), qkv.size()), own,
                                {1, a.length, a.heads, a.kv_heads, a.head_dim}, 1, sinks);
    check(same_bits(alone, slice(out, last * a.heads * a.head_dim, out.size())), name + ": a row alone");
}

void test_attention() {
    for_each_set([](const std::string& set) {
        for (const AttentionSize& a : {AttentionSize{3, 21, 4, 2, 16}, {1, 1, 1, 1, 1}, {2, 7, 3, 1, 5},
                                       {2, 130, 2, 2, 20}, {1, 65, 6, 2, 80}}) {
            for (const auto& seen : {causal(a.length), random_runs(a.rows, a.length)}) {
                attention<float>("attention, " + set + ", float32", seen, a);
                attention<Bfloat16>("attention, " + set + ", bfloat16", seen, a);
                const auto sinks = random<float>(a.heads, 3);
                attention<float>("attention, " + set + ", sinks", seen, a, &sinks);
            }
        }
        for (const Seen wrong : {Seen{-1, 1, 1, 1}, {1, 0, 1, 1}, {0, 2, 1, 2}, {0, 1, 2, 1}, {0, 1, 1, 3}}) {
            bool thrown = false;
            try {
                attended<float>(Rows<float>(6, 1.0F), {{0, 1, 1, 1}, wrong}, {1, 2, 1, 1, 1}, 1);
            } catch (const std::invalid_argument&) {
                thrown = true;
            }
            check(thrown, "attention: what is no two runs is refused");
        }
    });
}

}  // namespace

int main() {
    run("test_norm", test_norm);
    run("test_rotary", test_rotary);
    run("test_gated_mlp", test_gated_mlp);
    run("test_log_sum_exp", test_log_sum_exp);
    run("test_divergence", test_divergence);
    run("test_attention", test_attention);
    std::printf("all native operator tests passed (up to %s)\n", fastprune::instruction_set().name);
}
