// Attention in float32 over the keys that each query sees. For files that are compiled once per instruction set
// only.
//
// Keys and values of a head are copied once; keys are transposed into panels. Then each block of queries runs:
// its scores, their exponentials, and the weighted sums of values, in tiles of registers. A query's result
// depends only on the keys that it sees: places in the row decide the order of every sum, and a hidden key adds
// zero. (If a hidden value is not finite, it may show in the other queries of a tile.)
#pragma once

#include "cpu_kernels.hpp"
#include "vector.hpp"

namespace fastprune {
namespace FASTPRUNE_ISA {
namespace {

constexpr int kVectors = kWidth == 16 ? 4 : 2;      // of a tile: with kTile queries as many as registers hold
constexpr long kTile = 6;                           // queries of a tile
constexpr long kPanel = kVectors * kWidth;          // keys of a panel
constexpr long kChain = 256;                        // keys that are added up in one chain
constexpr long kTiles = Attention::kBlock / kTile;  // of a block, which passes each panel once
static_assert(Attention::kBlock % kTile == 0, "blocks of whole tiles");
static_assert(Attention::kPad % kPanel == 0, "scratch has room for whole panels");

// A thread's copy of the current head.
struct Copies {
    long columns;    // head_dim, up to whole vectors
    long padded;     // keys, up to whole panels
    float* keys;     // [padded / kPanel][head_dim][kPanel]
    float* values;   // [length][columns]
    float* queries;  // [kBlock][head_dim], scaled; zeros behind the last
    float* scores;   // [kBlock][padded], then weights

    Copies(const Attention& a, float* scratch)
        : columns((a.head_dim + kWidth - 1) / kWidth * kWidth),
          padded((a.length + kPanel - 1) / kPanel * kPanel),
          keys(scratch),
          values(keys + padded * a.head_dim),
          queries(values + a.length * columns),
          scores(queries + Attention::kBlock * a.head_dim) {}
};

// Up to kTile queries. The two runs, the first before the second, hold all keys that any of them sees.
struct Tile {
    long first = 0;  // in its block
    long count = 0;
    Attention::Seen runs{};

    Tile() = default;

    Tile(const Attention::Seen* seen, long first_query, long queries)
        : first(first_query), count(queries), runs(seen[0]) {
        for (long i = 1; i < count; ++i) {
            join(runs.first_begin, runs.first_end, seen[i].first_begin, seen[i].first_end);
            join(runs.second_begin, runs.second_end, seen[i].second_begin, seen[i].second_end);
        }
        if (runs.second_begin < runs.first_end) {  // one query's first run is another's second
            join(runs.first_begin, runs.first_end, runs.second_begin, runs.second_end);
            runs.second_begin = runs.second_end = runs.first_end;
        }
    }

    static void join(std::int32_t& begin, std::int32_t& end, std::int32_t other_begin, std::int32_t other_end) {
        if (other_begin == other_end) return;
        const bool empty = begin == end;
        begin = empty || other_begin < begin ? other_begin : begin;
        end = empty || other_end > end ? other_end : end;
    }

    long end() const { return runs.second_begin < runs.second_end ? runs.second_end : runs.first_end; }

    // The vectors of the panel from here on that hold keys up to the last; 0 if no key is seen.
    int vectors(long begin) const {
        const auto holds = [=](long from, long to) { return from < to && from < begin + kPanel && begin < to; };
        if (!holds(runs.first_begin, runs.first_end) && !holds(runs.second_begin, runs.second_end)) return 0;
        const long needed = (end() - begin + kWidth - 1) / kWidth;
        return needed < kVectors ? static_cast<int>(needed) : kVectors;
    }

    // body(i) for every vector of keys in the panels that are seen.
    template <class Body>
    void for_each_key_vector(Body body) const {
        for (long panel = 0; panel < end(); panel += kPanel) {
            const long stop = panel + vectors(panel) * kWidth;
            for (long i = panel; i < stop; i += kWidth) body(i);
        }
    }
};

template <int N>
struct Constant {
    static constexpr int value = N;
};

// run(constant) with a number from 1 to kVectors that the compiler knows inside.
template <class Run>
inline void with_constant(long vectors, Run run) {
    switch (vectors) {
        case 1: return run(Constant<1>{});
        case 2: return run(Constant<2>{});
        case 3: return run(Constant<kVectors < 3 ? kVectors : 3>{});
        default: return run(Constant<kVectors>{});
    }
}

// sums[r][n] += rows[r * stride + i] * columns[i * width + n * kWidth ...] for i from begin to end - 1.
template <int N>
inline void multiply(const float* rows, long stride, const float* columns, long width, long begin, long end,
                     Vec (&sums)[kTile][N]) {
    for (long i = begin; i < end; ++i) {
        Vec right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = load(columns + i * width + n * kWidth, All{});
#pragma GCC unroll 6
        for (int r = 0; r < kTile; ++r) {
            const Vec left = broadcast(rows[r * stride + i]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[r][n] += left * right[n];
        }
    }
}

template <class T>
void copy_keys_and_values(const Attention& a, const T* key, long stride, const Copies& copies) {
    const T* value = key + a.kv_heads * a.head_dim;
    float* values = copies.values;
    const auto column = [&](long j) { return copies.keys + j / kPanel * kPanel * a.head_dim + j % kPanel; };
    for (long j = 0; j < a.length; ++j, key += stride) {
        for (long d = 0; d < a.head_dim; ++d) column(j)[d * kPanel] = to_float(key[d]);
    }
    for (long j = a.length; j < copies.padded; ++j) {
        for (long d = 0; d < a.head_dim; ++d) column(j)[d * kPanel] = 0.0F;
    }
    for (long j = 0; j < a.length; ++j, value += stride, values += copies.columns) {
        for_each_vector(a.head_dim,
                        [=](long i, auto lanes) { store(values + i, load(value + i, lanes), All{}); });
    }
}

template <class T>
void copy_queries(const Attention& a, const T* query, long stride, long count, const Copies& copies) {
    float* to = copies.queries;
    for (long q = 0; q < count; ++q, query += stride, to += a.head_dim) {
        for_each_vector(a.head_dim,
                        [=](long i, auto lanes) { store(to + i, load(query + i, lanes) * a.scale, lanes); });
    }
    for (float* end = copies.queries + Attention::kBlock * a.head_dim; to < end; ++to) *to = 0.0F;
}

// The scores of a tile's queries and one panel's keys.
inline void score(const Attention& a, const Tile& tile, long panel, const Copies& copies) {
    with_constant(tile.vectors(panel), [&](auto vectors) {
        constexpr int n = decltype(vectors)::value;
        Vec sums[kTile][n] = {};
        multiply(copies.queries + tile.first * a.head_dim, a.head_dim, copies.keys + panel * a.head_dim, kPanel, 0,
                 a.head_dim, sums);
        for (long r = 0; r < kTile; ++r) {
            float* to = copies.scores + (tile.first + r) * copies.padded + panel;
            for (int v = 0; v < n; ++v) {
                const Vec sum = sums[r][v];
                store(to + v * kWidth, a.soft_cap > 0.0F ? tanh(sum / a.soft_cap) * a.soft_cap : sum, All{});
            }
        }
    });
}

// Turns the scores of one query into weights, exp(score - greatest), and returns their sum; keys that it does
// not see get 0. The sink is one more score of the sum, -inf without one.
inline float weigh(float* scores, const Tile& tile, const Attention::Seen& seen, float sink) {
    const Vec none = broadcast(-__builtin_inff());
    Ints lanes = {};
    for (int l = 0; l < kWidth; ++l) lanes[l] = l;
    Vec most = none;
    tile.for_each_key_vector([&](long i) {
        Vec v = load(scores + i, All{});
        const bool whole = (seen.first_begin <= i && i + kWidth <= seen.first_end) ||
                           (seen.second_begin <= i && i + kWidth <= seen.second_end);
        if (!whole) {
            const Ints at = lanes + static_cast<int>(i);
            v = ((at >= seen.first_begin) & (at < seen.first_end)) |
                        ((at >= seen.second_begin) & (at < seen.second_end))
                    ? v
                    : none;
            store(scores + i, v, All{});
        }
        most = greatest(v, most);
    });
    float top = most[0];
    for (int l = 1; l < kWidth; ++l) top = most[l] > top ? most[l] : top;
    top = sink > top ? sink : top;
    const Vec low = broadcast(-87.0F);  // what lies further below the greatest adds nothing
    Vec sums = {};
    tile.for_each_key_vector([&](long i) {
        const Vec below = load(scores + i, All{}) - top;
        const Vec weight = below < low ? Vec{} : exp(below);
        store(scores + i, weight, All{});
        sums += weight;
    });
    const float of_keys = sum(sums);
    if (sink == -__builtin_inff()) return of_keys;
    const Vec below = broadcast(sink - top);
    return of_keys + (below < low ? Vec{} : exp(below))[0];
}

// sums[r][v] += the values of the keys that are seen, times a tile's weights, one chain of keys after the other.
template <int N>
inline void add_values(const Tile& tile, const Copies& copies, long column, Vec (&sums)[kTile][N]) {
    const float* weights = copies.scores + tile.first * copies.padded;
    const long runs[2][2] = {{tile.runs.first_begin, tile.runs.first_end},
                             {tile.runs.second_begin, tile.runs.second_end}};
    for (long chain = 0; chain < tile.end(); chain += kChain) {
        Vec part[kTile][N] = {};
        for (const auto& run : runs) {
            const long from = run[0] > chain ? run[0] : chain;
            const long to = run[1] < chain + kChain ? run[1] : chain + kChain;
            multiply(weights, copies.padded, copies.values + column, copies.columns, from, to, part);
        }
        for (long r = 0; r < kTile; ++r) {
            for (int v = 0; v < N; ++v) sums[r][v] += part[r][v];
        }
    }
}

// One query's means; columns: the head's columns from here on.
template <int N, class T>
inline void store_means(const Vec (&sums)[N], float total, T* to, long columns) {
    for (int v = 0; v < N; ++v, columns -= kWidth) {
        if (columns >= kWidth) {
            store(to + v * kWidth, sums[v] / total, All{});
        } else {
            store(to + v * kWidth, sums[v] / total, First{columns});
        }
    }
}

// The values' weighted means of a tile's queries; out [.., stride] begins with the first of these.
template <class T>
void average(const Attention& a, const Tile& tile, const float (&totals)[kTile], const Copies& copies, T* out,
             long stride) {
    for (long column = 0; column < copies.columns; column += kPanel) {
        with_constant((copies.columns - column) / kWidth, [&](auto vectors) {
            Vec sums[kTile][decltype(vectors)::value] = {};
            add_values(tile, copies, column, sums);
            for (long r = 0; r < tile.count; ++r) {
                store_means(sums[r], totals[r], out + r * stride + column, a.head_dim - column);
            }
        });
    }
}

// The results of up to kBlock queries of one head; out begins with the first query.
template <class T>
void attend(const Attention& a, const Attention::Seen* seen, long count, const Copies& copies, float sink, T* out) {
    const long stride = a.heads * a.head_dim;
    Tile tiles[kTiles];
    for (long first = 0; first < count; first += kTile) {
        tiles[first / kTile] = Tile(seen + first, first, count - first < kTile ? count - first : kTile);
    }
    for (long panel = 0; panel < copies.padded; panel += kPanel) {
        for (const Tile& tile : tiles) {
            if (tile.vectors(panel) > 0) score(a, tile, panel, copies);
        }
    }
    for (const Tile& tile : tiles) {
        float totals[kTile];
        for (long r = 0; r < tile.count; ++r) {
            const long query = tile.first + r;
            totals[r] = weigh(copies.scores + query * copies.padded, tile, seen[query], sink);
        }
        average(a, tile, totals, copies, out + tile.first * stride, stride);
    }
}

template <class T>
void attention(const Attention& a, float* scratch, long begin, long end) {
    const long stride = (a.heads + 2 * a.kv_heads) * a.head_dim;
    const Copies copies(a, scratch);
    long copied = -1;
    for (long item = begin; item < end; ++item) {
        const long row = item / (a.heads * a.blocks());
        const long head = item / a.blocks() % a.heads;
        const long query = item % a.blocks() * Attention::kBlock;
        const long kv_head = head * a.kv_heads / a.heads;
        const T* tokens = static_cast<const T*>(a.qkv) + row * a.length * stride;
        if (copied != row * a.kv_heads + kv_head) {
            copied = row * a.kv_heads + kv_head;
            copy_keys_and_values(a, tokens + (a.heads + kv_head) * a.head_dim, stride, copies);
        }
        const Attention::Seen* seen = a.seen + (a.rows_differ ? row * a.length : 0);
        T* out = static_cast<T*>(a.out) + (row * a.length * a.heads + head) * a.head_dim;
        const long count = a.length - query < Attention::kBlock ? a.length - query : Attention::kBlock;
        copy_queries(a, tokens + query * stride + head * a.head_dim, stride, count, copies);
        const T* sinks = static_cast<const T*>(a.sinks);
        const float sink = sinks == nullptr ? -__builtin_inff() : to_float(sinks[head]);
        attend(a, seen + query, count, copies, sink, out + query * a.heads * a.head_dim);
    }
}

}  // namespace
}  // namespace FASTPRUNE_ISA
}  // namespace fastprune
