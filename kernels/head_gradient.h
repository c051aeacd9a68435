// The gradient of a head: what its rows get from the rows of x, without the N x V logits.
//
// dhead[v] = sum_i g_i[v] x_i and dbias[v] = sum_i g_i[v], where g_i[v] = w_i e^(l_i[v] - S_i) less
// the weights of those targets of row i that are v; l_i = head x_i + bias, S_i = log sum_v
// e^{l_i[v]}, which likelihood.h finds, w_i the sum of the weights. The logits are computed once
// more: a tile of the head at a time, which one thread sums over all rows of x. Targets are taken
// off before g is rounded: where the model is sure of one, g is small, and p alone is not.
#pragma once
#include <numeric>
#include "likelihood.h"

// what the rows of x shall say: K tokens of each, with weights
struct Targets {
    const int32_t* tok_NK;
    const float* weight_NK;
    int64_t K;
};

// the rows of x, as both products need them; those from N on are padding, of which p is 0
template <class T>
struct PackedX {
    typedef factor<T> C;
    std::vector<Strip> strips;   // of D
    int64_t rows, K, wide_D;     // N in whole panels; D in whole units and in whole registers
    std::vector<C> for_logits;   // panels of NR rows
    std::vector<C> for_head;     // chunks of rows, packed across
    std::vector<float> log_sum;  // S; infinite behind N, so that p is 0 there
    std::vector<float> weight;   // w

    PackedX(const LogProbs<T>& in, const float* log_sum_N, const Targets& targets)
        : strips(strips_of(in.D)),
          rows((in.N + NR - 1) / NR * NR),
          K(padded<C>(in.D)),
          wide_D((in.D + W - 1) / W * W),
          for_logits(rows * K),
          for_head((rows + CHUNK) * wide_D),
          log_sum(rows, INFINITY),
          weight(rows, 0.f) {
        std::copy(log_sum_N, log_sum_N + in.N, log_sum.begin());
        for (int64_t i = 0; i < in.N; i++)
            weight[i] = std::accumulate(targets.weight_NK + i * targets.K,
                                        targets.weight_NK + (i + 1) * targets.K, 0.f);
        for (int64_t i = 0; i < in.N; i += NR)
            pack(in.x_ND + i * in.D, in.D, std::min<int64_t>(NR, in.N - i), in.D, NR,
                 for_logits.data() + i * K);
        for (int64_t n0 = 0; n0 < in.N; n0 += CHUNK)
            for (const Strip& s : strips)
                pack_across(in.x_ND + n0 * in.D + s.first, in.D, std::min(CHUNK, in.N - n0),
                            s.columns, s.width(), for_head.data() + n0 * wide_D + s.first * CHUNK);
    }
};

// l[v, j] becomes w_j e^(l[v, j] - S_j), for n rows of the head and NR rows of x
static inline void weigh(float* l, int64_t n, const float* log_sum, const float* weight) {
    for (int64_t v = 0; v < n; v++)
        for (int j = 0; j < NR; j++)
            l[v * NR + j] = exp_negative(l[v * NR + j] - log_sum[j]) * weight[j];
}

// takes the weights of the rows' own targets off, where they stand in the tile
static inline void take_targets(const Targets& targets, int64_t N, int64_t v0, int64_t n,
                                int64_t i0, float* l) {
    for (int64_t i = i0; i < std::min(N, i0 + NR); i++)
        for (int64_t k = i * targets.K; k < (i + 1) * targets.K; k++) {
            const int64_t v = targets.tok_NK[k] - v0;
            if (v >= 0 && v < n) l[v * NR + i - i0] -= targets.weight_NK[k];
        }
}

// rounds g as the left factor of a product, and sums it up in W partial sums for each row of the
// head, so that additions need not wait for each other
template <class C>
static inline void keep(const float* g, int64_t n, C* g_vi, float* lanes) {
    for (int64_t v = 0; v < n; v++) {
        for (int j = 0; j < NR; j++) narrow(g[v * NR + j], g_vi[v * CHUNK + j]);
        for (int r = 0; r < NV; r++)
            for (int j = 0; j < W; j++) lanes[v * W + j] += g[v * NR + r * W + j];
    }
}

template <class T>
static void head_gradient(const LogProbs<T>& in, const float* log_sum_N, const Targets& targets,
                          float* dhead_VD, float* dbias_V) {
    typedef factor<T> C;
    const PackedX<T> x(in, log_sum_N, targets);
#pragma omp parallel
    {
        std::vector<float> l(TILE * NR), sums(TILE * x.wide_D), lanes(TILE * W);
        std::vector<C> copied(MR * x.K), g(TILE * CHUNK);
#pragma omp for schedule(dynamic)
        for (int64_t v0 = 0; v0 < in.V; v0 += TILE) {
            const int64_t n = std::min(TILE, in.V - v0);
            std::fill(sums.begin(), sums.end(), 0.f);
            std::fill(lanes.begin(), lanes.end(), 0.f);
            for (int64_t n0 = 0; n0 < x.rows; n0 += CHUNK) {
                const int64_t count = std::min(CHUNK, x.rows - n0);
                for (int64_t i = n0; i < n0 + count; i += NR) {
                    tile_logits(in, v0, n, x.for_logits.data() + i * x.K, copied.data(), l.data());
                    weigh(l.data(), n, x.log_sum.data() + i, x.weight.data() + i);
                    take_targets(targets, in.N, v0, n, i, l.data());
                    keep(l.data(), n, g.data() + i - n0, lanes.data());
                }
                for (const Strip& s : x.strips)
                    for (int64_t v = 0; v < n; v += MR)
                        block_of(s.registers, g.data() + v * CHUNK, CHUNK, unit<C>(),
                                 x.for_head.data() + n0 * x.wide_D + s.first * CHUNK, count,
                                 sums.data() + v * x.wide_D + s.first, x.wide_D, true);
            }
            for (int64_t v = 0; v < n; v++) {
                std::copy_n(sums.data() + v * x.wide_D, in.D, dhead_VD + (v0 + v) * in.D);
                dbias_V[v0 + v] = std::accumulate(&lanes[v * W], &lanes[v * W] + W, 0.f);
            }
        }
    }
}
