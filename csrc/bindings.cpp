// The only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu_ops.hpp"
#include "dispatch.hpp"
#include "qubo.hpp"

namespace nb = nanobind;

namespace {

using Matrix = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Arguments are validated in fastprune/solver/subset.py; here only what would be unsafe to get wrong.
nb::tuple solve_subset(const Matrix& h, const Vector& linear, int k, std::size_t num_states,
                       double time_limit, int threads, double enumerate_up_to, bool exact_sums, bool symmetry,
                       bool subtree_diagonals) {
    const std::size_t n = h.shape(0);
    if (n < 1 || n > 128 || h.shape(1) != n || linear.shape(0) != n || k < 0 || k > static_cast<int>(n) ||
        num_states < 1) {
        throw nb::value_error("expected H [N, N], linear [N], N in 1..128, k in 0..N and num_states >= 1");
    }
    bool raised = false;
    fastprune::SolveOptions options;
    options.num_states = num_states;
    options.time_limit = time_limit;
    options.threads = threads;
    options.enumerate_up_to = enumerate_up_to;
    options.exact_sums = exact_sums;
    options.symmetry = symmetry;
    options.subtree_diagonals = subtree_diagonals;
    options.interrupted = [&raised] {
        if (raised) return true;
        const nb::gil_scoped_acquire acquire;
        raised = PyErr_CheckSignals() != 0;
        return raised;
    };
    fastprune::SolveResult result;
    {
        const nb::gil_scoped_release release;
        result = fastprune::solve_subset(static_cast<int>(n), k, h.data(), linear.data(), options);
    }
    if (raised) throw nb::python_error();

    auto energies = std::make_unique<double[]>(result.energies.size());
    std::copy(result.energies.begin(), result.energies.end(), energies.get());
    const double* data = energies.get();
    const nb::capsule owner(energies.release(), [](void* p) noexcept { delete[] static_cast<double*>(p); });
    return nb::make_tuple(
        result.subsets,
        nb::ndarray<nb::numpy, const double, nb::ndim<1>>(data, {result.energies.size()}, owner),
        result.proven, result.gap, result.nodes);
}

// The operators take the addresses of tensors, 0 for one that is left out: an array object per tensor would
// cost more than the checks, which stand in fastprune/models/native.py.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

fastprune::Dtype dtype_of(bool bfloat16) {
    return bfloat16 ? fastprune::Dtype::bfloat16 : fastprune::Dtype::float32;
}

void add_rms_norm(Address states, Address branch, Address weight, Address residual, Address normed,
                  Address bias, std::int64_t rows, std::int64_t columns, double eps, bool centered, float offset,
                  bool bfloat16, int threads) {
    fastprune::add_rms_norm({at<const void>(states), at<const void>(branch), at<const void>(weight),
                             at<void>(residual), at<void>(normed), columns, eps, centered, offset,
                             at<const void>(bias)},
                            rows, dtype_of(bfloat16), threads);
}

void rotary(Address qkv, Address cos, Address sin, Address position, Address q_weight, Address k_weight,
            std::int64_t rows, std::int64_t positions, std::int64_t heads, std::int64_t kv_heads,
            std::int64_t head_dim, std::int64_t half, double eps, float offset, bool interleaved,
            bool norm_after, bool bfloat16, int threads) {
    fastprune::rotary(
        {at<void>(qkv), at<const float>(cos), at<const float>(sin), at<const std::int64_t>(position),
         at<const void>(q_weight), at<const void>(k_weight), heads, kv_heads, head_dim, half, eps, offset,
         interleaved, norm_after},
        rows, positions, dtype_of(bfloat16), threads);
}

void gated_mlp(Address gate_up, Address out, std::int64_t rows, std::int64_t columns, bool gelu_tanh,
               bool bfloat16, int threads) {
    const auto activation = gelu_tanh ? fastprune::Activation::gelu_tanh : fastprune::Activation::silu;
    fastprune::gated_mlp({at<const void>(gate_up), at<void>(out), columns, activation}, rows, dtype_of(bfloat16),
                         threads);
}

void log_sum_exp(Address logits, Address out, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                 bool bfloat16, int threads) {
    fastprune::log_sum_exp({at<const void>(logits), at<float>(out), columns, stride}, rows,
                           dtype_of(bfloat16), threads);
}

void divergence(Address logits, Address dense, Address dense_sums, Address sums, Address means,
                std::int64_t rows, std::int64_t columns, std::int64_t stride, std::int64_t dense_stride,
                bool bfloat16, int threads) {
    fastprune::divergence({at<const void>(logits), at<const void>(dense), at<const double>(dense_sums),
                           at<double>(sums), at<double>(means), columns, stride, dense_stride},
                          rows, dtype_of(bfloat16), threads);
}

void attention(Address qkv, Address seen, Address out, Address sinks, std::int64_t rows, bool rows_differ, std::int64_t length,
               std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim, double scale, double soft_cap,
               bool bfloat16, int threads) {
    fastprune::attention({at<const void>(qkv), at<void>(out), at<const fastprune::Attention::Seen>(seen),
                          rows_differ, length, heads, kv_heads, head_dim, static_cast<float>(scale),
                          static_cast<float>(soft_cap), at<const void>(sinks)},
                         rows, dtype_of(bfloat16), threads);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& set : fastprune::instruction_sets()) names.emplace_back(set.name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Compiled part of fastprune; called by fastprune.solver and fastprune.models.native.";
    m.def("instruction_sets", &instruction_sets, "Those that this processor runs, the fastest last.");
    m.def("instruction_set", [] { return fastprune::instruction_set().name; });
    m.def("use_instruction_set", &fastprune::use_instruction_set, nb::arg("name"), "For tests.");
    m.def("solve_subset", &solve_subset, nb::arg("h"), nb::arg("linear"), nb::arg("k"), nb::arg("num_states"),
          nb::arg("time_limit") = 0.0, nb::arg("threads") = 0,
          nb::arg("enumerate_up_to") = fastprune::SolveOptions{}.enumerate_up_to,
          nb::arg("exact_sums") = true, nb::arg("symmetry") = true, nb::arg("subtree_diagonals") = true,
          "(subsets, energies, proven, gap, nodes); time_limit 0: none; threads 0: all.");
    using Free = nb::call_guard<nb::gil_scoped_release>;
    m.def("add_rms_norm", &add_rms_norm, Free());
    m.def("rotary", &rotary, Free());
    m.def("gated_mlp", &gated_mlp, Free());
    m.def("log_sum_exp", &log_sum_exp, Free());
    m.def("divergence", &divergence, Free());
    m.def("attention", &attention, Free());
}
