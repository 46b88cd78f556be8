#include "dispatch.hpp"

#include <atomic>
#include <stdexcept>

namespace fastprune {

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found{{"generic", generic::table, generic::cpu_table}};
#ifdef FASTPRUNE_X86_KERNELS
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found.push_back({"avx2", avx2::table, avx2::cpu_table});
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl")) {
                found.push_back({"avx512", avx512::table, avx512::cpu_table});
            }
        }
#endif
        return found;
    }();
    return sets;
}

namespace {

std::atomic<const InstructionSet*>& chosen() {
    static std::atomic<const InstructionSet*> set{&instruction_sets().back()};
    return set;
}

}  // namespace

const InstructionSet& instruction_set() {
    return *chosen().load(std::memory_order_relaxed);
}

void use_instruction_set(const std::string& name) {
    for (const InstructionSet& set : instruction_sets()) {
        if (name == set.name) {
            chosen() = &set;
            return;
        }
    }
    throw std::invalid_argument("this processor does not run the kernels '" + name + "'");
}

}  // namespace fastprune
