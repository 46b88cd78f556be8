// The only file of the solver that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <memory>

#include "kernels.hpp"
#include "qubo.hpp"

namespace nb = nanobind;

namespace {

using Matrix = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Arguments are validated in fastprune/qubo.py; here only what would be unsafe to get wrong.
nb::tuple solve_subset(const Matrix& h, const Vector& linear, int k, std::size_t num_states,
                       double time_limit, int threads, double enumerate_up_to) {
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

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Compiled part of fastprune; called by fastprune.qubo.";
    m.attr("kernels") = fastprune::kernels().name;
    m.def("solve_subset", &solve_subset, nb::arg("h"), nb::arg("linear"), nb::arg("k"), nb::arg("num_states"),
          nb::arg("time_limit") = 0.0, nb::arg("threads") = 0,
          nb::arg("enumerate_up_to") = fastprune::SolveOptions{}.enumerate_up_to,
          "(subsets, energies, proven, gap, nodes); time_limit 0: none; threads 0: all.");
}
