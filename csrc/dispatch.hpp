// Which of the builds of the inner loops runs.
#pragma once

#include <string>
#include <vector>

#include "cpu_kernels.hpp"
#include "kernels.hpp"

namespace fastprune {

struct InstructionSet {
    const char* name;
    const Kernels& solver;
    const CpuKernels& cpu;
};

// Those that this processor runs, the fastest last.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the fastest, unless a test chose another.
const InstructionSet& instruction_set();

// For tests, while nothing else runs. Throws std::invalid_argument for one that this processor does not have.
void use_instruction_set(const std::string& name);

}  // namespace fastprune
