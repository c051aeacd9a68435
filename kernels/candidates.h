// Candidate scores: the mean logit of each title's tokens, from the rows of the head that these
// tokens own.
#pragma once
#include "numbers.h"

// elements of a row at a time: four rows of the head and x stay in the first-level cache
const int64_t BLOCK = 512;

// calls f(a0, a1, a2, a3) on four rows of m elements: as they are where the compiler can widen them
// while it reads, else widened first
template <class T, class F>
static inline void four_rows(const T* const* r, float* room, int64_t m, F f) {
    if constexpr (std::is_same<T, fp16>::value)
        f(widened(r[0], room, m), widened(r[1], room + BLOCK, m),
          widened(r[2], room + 2 * BLOCK, m), widened(r[3], room + 3 * BLOCK, m));
    else
        f(r[0], r[1], r[2], r[3]);
}

// score[b, c] = 1/n sum_{t<n} head[tok[b, c, t]] . x[b]. Four rows at a time: they share the loads
// of x and hide each other's latency
template <class T>
static void scores(const T* x_BD, const T* head_VD, int64_t stride, const int32_t* tok_BCT,
                   const int32_t* n_BC, float* score_BC, int64_t B, int64_t C, int64_t T_,
                   int64_t D) {
#pragma omp parallel
    {
        std::vector<float> x(D), room(4 * BLOCK);
        int64_t have = -1;
#pragma omp for schedule(static)
        for (int64_t bc = 0; bc < B * C; bc++) {
            if (have != bc / C) widened(x_BD + (have = bc / C) * D, x.data(), D);
            const int32_t n = n_BC[bc], *tok = tok_BCT + bc * T_;
            float total = 0;
            for (int32_t t = 0; t < n; t += 4) {
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
                for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
                    const int64_t m = std::min(BLOCK, D - d0);
                    const float* xd = x.data() + d0;
                    const T* r[4];
                    for (int j = 0; j < 4; j++)
                        r[j] = head_VD + int64_t(tok[std::min(t + j, n - 1)]) * stride + d0;
                    four_rows(r, room.data(), m, [&](auto a0, auto a1, auto a2, auto a3) {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                        for (int64_t d = 0; d < m; d++) {
                            s0 += xd[d] * wide(a0[d]);
                            s1 += xd[d] * wide(a1[d]);
                            s2 += xd[d] * wide(a2[d]);
                            s3 += xd[d] * wide(a3[d]);
                        }
                    });
                }
                total += s0 + (t + 1 < n ? s1 : 0) + (t + 2 < n ? s2 : 0) + (t + 3 < n ? s3 : 0);
            }
            score_BC[bc] = n > 0 ? total / n : 0;
        }
    }
}

// pooled[b, c] = 1/n sum_{t<n} head[tok[b, c, t]] in fp32: the gradient of score[b, c] with respect
// to x[b], and score = pooled . x. Training keeps it: gathering the rows a second time in backward
// costs more than its B*C*D numbers
template <class T>
static void pool(const T* head_VD, int64_t stride, const int32_t* tok_NT, const int32_t* n_N,
                 float* pooled_ND, int64_t N, int64_t T_, int64_t D) {
#pragma omp parallel
    {
        std::vector<float> room(4 * BLOCK);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; i++) {
            const int32_t n = n_N[i], *tok = tok_NT + i * T_;
            for (int64_t d0 = 0; d0 < D; d0 += BLOCK) {
                const int64_t m = std::min(BLOCK, D - d0);
                float* out = pooled_ND + i * D + d0;
                std::fill(out, out + m, 0.f);
                for (int32_t t = 0; t < n; t += 4) {
                    // behind the title's end its last row is read again, with weight 0
                    const T* r[4];
                    float w[4];
                    for (int j = 0; j < 4; j++) {
                        r[j] = head_VD + int64_t(tok[std::min(t + j, n - 1)]) * stride + d0;
                        w[j] = t + j < n ? 1.f / n : 0;
                    }
                    four_rows(r, room.data(), m, [&](auto a0, auto a1, auto a2, auto a3) {
#pragma omp simd
                        for (int64_t d = 0; d < m; d++)
                            out[d] += (w[0] * wide(a0[d]) + w[1] * wide(a1[d])) +
                                      (w[2] * wide(a2[d]) + w[3] * wide(a3[d]));
                    });
                }
            }
        }
    }
}
