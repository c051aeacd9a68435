// The gradient of a head: what its rows get from the rows of x, without the N x V logits.
//
// dhead[v] = sum_i w_i p_i[v] x_i and dbias[v] = sum_i w_i p_i[v], where p_i[v] = e^(l_i[v] - S_i),
// l_i = head x_i + bias and S_i = log sum_v e^{l_i[v]}, which likelihood.h finds. The logits are
// computed once more: a tile of the head at a time, which one thread sums over all rows of x.
#pragma once
#include <numeric>
#include "likelihood.h"

// the rows of x, as both products need them; all in whole chunks, behind N nothing counts
template <class T>
struct PackedX {
    typedef factor<T> C;
    std::vector<Strip> strips;   // of D
    int64_t all, K, wide_D;      // rows; D in whole units and in whole registers
    std::vector<C> for_logits;   // panels of NR rows
    std::vector<C> for_head;     // chunks of rows, packed across
    std::vector<float> log_sum;  // S; infinite behind N, so that p is 0 there
    std::vector<float> weight;   // w

    PackedX(const LogProbs<T>& in, const float* log_sum_N, const float* weight_N)
        : strips(strips_of(in.D)),
          all((in.N + CHUNK - 1) / CHUNK * CHUNK),
          K(padded<C>(in.D)),
          wide_D((in.D + W - 1) / W * W),
          for_logits(all * K),
          for_head(all * wide_D),
          log_sum(all, INFINITY),
          weight(all, 0.f) {
        std::copy(log_sum_N, log_sum_N + in.N, log_sum.begin());
        std::copy(weight_N, weight_N + in.N, weight.begin());
        for (int64_t i = 0; i < in.N; i += NR)
            pack(in.x_ND + i * in.D, in.D, std::min<int64_t>(NR, in.N - i), in.D, NR,
                 for_logits.data() + i * K);
        for (int64_t n0 = 0; n0 < in.N; n0 += CHUNK)
            for (const Strip& s : strips)
                pack_across(in.x_ND + n0 * in.D + s.first, in.D, std::min(CHUNK, in.N - n0),
                            s.columns, s.width(), for_head.data() + n0 * wide_D + s.first * CHUNK);
    }
};

// p[v, i] = w_i e^(l[v, i] - S_i) for n rows of the head and NR rows of x; `lanes` (TILE, W) sums
// them up, W side by side: one sum would wait for each addition
template <class C>
static inline void weigh(const float* l, int64_t n, const float* log_sum, const float* weight,
                         C* p_vi, float* lanes) {
    for (int64_t v = 0; v < n; v++) {
        float p[NR];
        for (int j = 0; j < NR; j++) p[j] = exp_negative(l[v * NR + j] - log_sum[j]) * weight[j];
        for (int j = 0; j < NR; j++) narrow(p[j], p_vi[v * CHUNK + j]);
        for (int r = 0; r < NV; r++)
            for (int j = 0; j < W; j++) lanes[v * W + j] += p[r * W + j];
    }
}

template <class T>
static void head_gradient(const LogProbs<T>& in, const float* log_sum_N, const float* weight_N,
                          float* dhead_VD, float* dbias_V) {
    typedef factor<T> C;
    const PackedX<T> x(in, log_sum_N, weight_N);
#pragma omp parallel
    {
        std::vector<float> l(TILE * NR), sums(TILE * x.wide_D), lanes(TILE * W);
        std::vector<C> copied(MR * x.K), p(TILE * CHUNK);
#pragma omp for schedule(dynamic)
        for (int64_t v0 = 0; v0 < in.V; v0 += TILE) {
            const int64_t n = std::min(TILE, in.V - v0);
            std::fill(sums.begin(), sums.end(), 0.f);
            std::fill(lanes.begin(), lanes.end(), 0.f);
            for (int64_t n0 = 0; n0 < x.all; n0 += CHUNK) {
                for (int64_t i = n0; i < n0 + CHUNK; i += NR) {
                    tile_logits(in, v0, n, x.for_logits.data() + i * x.K, copied.data(), l.data());
                    weigh(l.data(), n, x.log_sum.data() + i, x.weight.data() + i, p.data() + i - n0,
                          lanes.data());
                }
                for (const Strip& s : x.strips)
                    for (int64_t v = 0; v < n; v += MR)
                        block_of(s.registers, p.data() + v * CHUNK, CHUNK, unit<C>(),
                                 x.for_head.data() + n0 * x.wide_D + s.first * CHUNK, CHUNK,
                                 sums.data() + v * x.wide_D + s.first, x.wide_D, true);
            }
            for (int64_t v = 0; v < n; v++) {
                std::copy_n(sums.data() + v * x.wide_D, in.D, dhead_VD + (v0 + v) * in.D);
                dbias_V[v0 + v] = std::accumulate(&lanes[v * W], &lanes[v * W] + W, 0.f);
            }
        }
    }
}
