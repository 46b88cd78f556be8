// What the native tests share.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace fastprune_tests {

// Exits with a message at the first failure.
inline void check(bool ok, const std::string& what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

inline void run(const char* name, void (*test)()) {
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%-45s %.2f s\n", name, elapsed.count());
    std::fflush(stdout);
}

}  // namespace fastprune_tests
