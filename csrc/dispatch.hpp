// Chooses the build of the inner loops that runs.
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

// The builds that this processor runs, the fastest last.
const std::vector<InstructionSet>& instruction_sets();

// The build in use: the fastest, unless a test chose another.
const InstructionSet& instruction_set();

// For tests, while no operator runs. Throws std::invalid_argument for a build that this processor lacks.
void use_instruction_set(const std::string& name);

}  // namespace fastprune
