// Vectors of floats in the width of the instruction set that the including file is compiled for: loads and
// stores of float and bfloat16, sums over lanes, exp. For files that are compiled once per instruction set
// only.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastprune {
namespace FASTPRUNE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int Ints __attribute__((vector_size(4 * kWidth)));
typedef unsigned Bits __attribute__((vector_size(4 * kWidth)));
typedef unsigned short Halves __attribute__((vector_size(2 * kWidth)));

struct Bfloat16 {
    unsigned short bits;
};

inline float to_float(float x) {
    return x;
}

inline float to_float(Bfloat16 x) {
    const unsigned wide = static_cast<unsigned>(x.bits) << 16;
    float result;
    __builtin_memcpy(&result, &wide, sizeof result);
    return result;
}

// The number of lanes that hold elements: all, or at the end of a row the first few.
struct All {};
struct First {
    long count;
};

inline Vec broadcast(float x) {
    return x - Vec{};
}

// The least of each pair; the second where either is NaN.
inline Vec least(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

inline Vec greatest(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Vec load(const float* p, All) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const Bfloat16* p, All) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    const Bits wide = reinterpret_cast<Bits>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
    const Bits wide = reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
#else
    const Bits wide = __builtin_convertvector(h, Bits);
#endif
    return reinterpret_cast<Vec>(wide << 16);
}

// The value that an element takes when it is stored: to nearest, ties to even; NaN stays NaN.
inline Vec rounded_to(const float*, Vec v) {
    return v;
}

inline Vec rounded_to(const Bfloat16*, Vec v) {
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits nan = Bits{} + 0x7fc00000U;
    return reinterpret_cast<Vec>(v == v ? (b + 0x7fffU + ((b >> 16) & 1U)) & 0xffff0000U : nan);
}

// Stores values that rounding does not change.
inline void store_rounded(float* p, Vec v, All) {
    __builtin_memcpy(p, &v, sizeof v);
}

inline void store_rounded(Bfloat16* p, Vec v, All) {
    const Bits b = reinterpret_cast<Bits>(v) >> 16;
#if defined(__AVX512F__)
    const auto h = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(b));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_packus_epi32(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(b));
    const __m128i h = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8));
#else
    const Halves h = __builtin_convertvector(b, Halves);
#endif
    __builtin_memcpy(p, &h, sizeof h);
}

template <class T>
inline Vec load(const T* p, First lanes) {
    T part[kWidth] = {};
    __builtin_memcpy(part, p, static_cast<unsigned long>(lanes.count) * sizeof(T));
    return load(part, All{});
}

template <class T>
inline void store_rounded(T* p, Vec v, First lanes) {
    T part[kWidth];
    store_rounded(part, v, All{});
    __builtin_memcpy(p, part, static_cast<unsigned long>(lanes.count) * sizeof(T));
}

template <class T, class Lanes>
inline void store(T* p, Vec v, Lanes lanes) {
    store_rounded(p, rounded_to(p, v), lanes);
}

// body(i, lanes) for the vectors of a row.
template <class Body>
inline void for_each_vector(long columns, Body body) {
    long i = 0;
    for (; i + kWidth <= columns; i += kWidth) body(i, All{});
    if (i < columns) body(i, First{columns - i});
}

typedef float Quarter __attribute__((vector_size(16)));

inline float sum(Vec v) {
    Quarter quarters[kWidth / 4];
    __builtin_memcpy(quarters, &v, sizeof v);
    for (int n = kWidth / 8; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) quarters[i] += quarters[i + n];
    }
    const Quarter q = quarters[0];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// For x in -87..88, with an error of about a unit in the last place; NaN stays NaN. The result for other x is
// undefined. exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2.
inline Vec exp(Vec x) {
    const Vec shift =
        broadcast(12583039.0F);  // 1.5 * 2^23 + 127: adding it rounds, and leaves n + 127 in the low bits
    const Vec shifted = x * 1.44269504F + shift;
    const Vec n = shifted - shift;
    Vec r = x - n * 0.693359375F;
    r = r - n * -2.12194440e-4F;
    // minimax for the relative error, 3.1e-9
    Vec p = r * 0.0013814321F + 0.0083688509F;
    p = p * r + 0.0416684002F;
    p = p * r + 0.1666651964F;
    p = p * r + 0.4999999404F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    return p * reinterpret_cast<Vec>(reinterpret_cast<Bits>(shifted) << 23);
}

// Within a few roundings everywhere; NaN stays NaN. Near 0, where the quotient would cancel, it is a series.
inline Vec tanh(Vec x) {
    const Vec square = x * x;
    Vec tail = square * (62.0F / 2835.0F) - 17.0F / 315.0F;
    tail = tail * square + 2.0F / 15.0F;
    tail = tail * square - 1.0F / 3.0F;
    const Vec size = x < Vec{} ? -x : x;
    const Vec e = exp(greatest(broadcast(-87.0F), size * -2.0F));
    const Vec large = (1.0F - e) / (1.0F + e);
    return square < 0.0625F ? x + x * square * tail : (x < Vec{} ? -large : large);
}

}  // namespace
}  // namespace FASTPRUNE_ISA
}  // namespace fastprune
