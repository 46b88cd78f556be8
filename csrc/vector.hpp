// Vectors of floats in the width of the instruction set that the including file is compiled for: loads and
// stores of float and bfloat16, sums over lanes, exp. For files that are compiled once per instruction set
// only.
#pragma once

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

// How many lanes of a vector are elements: all, or at the end of a row the first few.
struct All {};
struct First {
    long count;
};

inline Vec broadcast(float x) {
    return x - Vec{};
}

inline Vec load(const float* p, All) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const Bfloat16* p, All) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec>(__builtin_convertvector(h, Bits) << 16);
}

inline void store(float* p, Vec v, All) {
    __builtin_memcpy(p, &v, sizeof v);
}

// To nearest, ties to even; NaN stays NaN.
inline void store(Bfloat16* p, Vec v, All) {
    const Bits b = reinterpret_cast<Bits>(v);
    const Bits nan = Bits{} + 0x7fc0U;
    const Bits rounded = (b + 0x7fffU + ((b >> 16) & 1U)) >> 16;
    const Halves h = __builtin_convertvector(v == v ? rounded : nan, Halves);
    __builtin_memcpy(p, &h, sizeof h);
}

template <class T>
inline Vec load(const T* p, First lanes) {
    T part[kWidth] = {};
    __builtin_memcpy(part, p, static_cast<unsigned long>(lanes.count) * sizeof(T));
    return load(part, All{});
}

template <class T>
inline void store(T* p, Vec v, First lanes) {
    T part[kWidth];
    store(part, v, All{});
    __builtin_memcpy(p, part, static_cast<unsigned long>(lanes.count) * sizeof(T));
}

// The value that an element takes when it is stored.
inline Vec rounded_to(const float*, Vec v) {
    return v;
}

inline Vec rounded_to(const Bfloat16*, Vec v) {
    Bfloat16 part[kWidth];
    store(part, v, All{});
    return load(part, All{});
}

// body(i, lanes) for the vectors of a row.
template <class Body>
inline void for_each_vector(long columns, Body body) {
    long i = 0;
    for (; i + kWidth <= columns; i += kWidth) body(i, All{});
    if (i < columns) body(i, First{columns - i});
}

template <int N>
inline float sum(const float* p) {
    float half[N / 2];
    for (int i = 0; i < N / 2; ++i) half[i] = p[i] + p[i + N / 2];
    return sum<N / 2>(half);
}

template <>
inline float sum<1>(const float* p) {
    return p[0];
}

inline float sum(Vec v) {
    float lanes[kWidth];
    store(lanes, v, All{});
    return sum<kWidth>(lanes);
}

// Error below 1.1 units in the last place; 0 and infinity beyond float32's range, NaN stays NaN.
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; 2^n in two factors, so that neither leaves the
// range.
inline Vec exp(Vec x) {
    const Vec low = broadcast(-104.0F);
    const Vec high = broadcast(89.0F);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shift = broadcast(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x * 1.44269504F + shift;
    const Vec n = shifted - shift;
    Vec r = x - n * 0.693359375F;
    r = r - n * -2.12194440e-4F;
    Vec p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + r + 1.0F;
    const Ints k = reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(shift);
    const Ints k1 = k >> 1;
    return p * reinterpret_cast<Vec>((k1 + 127) << 23) * reinterpret_cast<Vec>((k - k1 + 127) << 23);
}

}  // namespace
}  // namespace FASTPRUNE_ISA
}  // namespace fastprune
