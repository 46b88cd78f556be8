#include "kernels.hpp"

namespace fastprune {

const Kernels& kernels() {
#ifdef FASTPRUNE_X86_KERNELS
    static const Kernels& chosen = [&]() -> const Kernels& {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl")) {
            return avx512::table;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
        return generic::table;
    }();
    return chosen;
#else
    return generic::table;
#endif
}

}  // namespace fastprune
