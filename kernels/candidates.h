// Candidate scores: the mean logit of each title's tokens, from the rows of the head that these
// tokens own, and their gradient. Both are weighted sums of rows that lie far apart in memory, so
// the time goes into waiting for rows: the next ones are asked for while these are summed.
#pragma once
#include "product.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

// rows that are read side by side: more of them, each a little at a time, arrive more slowly
const int SIDE = 4;

// W elements in fp32
static inline vec wide_vec(const float* from) { return *(const vec*)from; }
static inline vec wide_vec(const bf16* from) {
    typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2)));
    typedef uint32_t words __attribute__((vector_size(W * 4)));
    return (vec)(__builtin_convertvector(*(const halves*)from, words) << 16);
}
static inline vec wide_vec(const fp16* from) {
    float room[W];
    return *(const vec*)widened(from, room, W);
}

// the rows of a sum, each with its weight
template <class T>
struct Rows {
    std::vector<const T*> at;
    std::vector<float> weight;
    int64_t n = 0;

    explicit Rows(int64_t most) : at(most + SIDE), weight(most + SIDE) {}

    void add(const T* row, float times) {
        at[n] = row;
        weight[n++] = times;
    }
    // a whole number of SIDE: the last row again, with weight 0
    void fill_up() {
        while (n % SIDE) add(at[n - 1], 0.f);
    }
};

// sum[d] = sum_i weight[i] row[i][d] in fp32, for rows filled up: SIDE of them from end to end, as
// they lie in memory, then the next SIDE; sum stays in the cache. Behind these rows come `next`
template <class T>
static inline void weighted_sum(const Rows<T>& rows, const Rows<T>& next, int64_t D, float* sum) {
    const int64_t line = 64 / sizeof(T);
    if (rows.n == 0) std::fill(sum, sum + D, 0.f);
    for (int64_t i = 0; i < rows.n; i += SIDE) {
        const bool first = i == 0;
        const T* const* row = &rows.at[i];
        const T* const* soon = i + SIDE < rows.n ? row + SIDE : next.n ? &next.at[0] : row;
        const float* weight = &rows.weight[i];
        int64_t d = 0;
        for (; d + line <= D; d += line) {
            for (int r = 0; r < SIDE; r++) __builtin_prefetch(soon[r] + d);
            for (int64_t j = d; j < d + line; j += W) {
                vec total = first ? vec{} : *(const vec*)(sum + j);
                for (int r = 0; r < SIDE; r++) total += weight[r] * wide_vec(row[r] + j);
                *(vec*)(sum + j) = total;
            }
        }
        for (; d < D; d++) {
            float total = first ? 0 : sum[d];
            for (int r = 0; r < SIDE; r++) total += weight[r] * wide(row[r][d]);
            sum[d] = total;
        }
    }
}

// a . b, in four chains of additions that do not wait for each other
static inline float dot(const float* a, const float* b, int64_t D) {
    vec chain[4] = {};
    int64_t d = 0;
    for (; d + 4 * W <= D; d += 4 * W)
        for (int r = 0; r < 4; r++)
            chain[r] += *(const vec*)(a + d + r * W) * *(const vec*)(b + d + r * W);
    const vec lanes = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    float sum = 0;
    for (int j = 0; j < W; j++) sum += lanes[j];
    for (; d < D; d++) sum += a[d] * b[d];
    return sum;
}

// the first write into each page of new memory costs a fault, and one of a page of 2 MB costs far
// less than 512 of 4 KB
static void in_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21;
    const uintptr_t from = (uintptr_t(memory) + page - 1) / page * page;
    const uintptr_t to = (uintptr_t(memory) + bytes) / page * page;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

// the titles of B prompts' candidates
template <class T>
struct Titles {
    const T* head_VD;
    int64_t stride;  // elements from a row of the head to the next
    const int32_t *tok_BCT, *n_BC;
    int64_t B, C, most, D;  // most: T, the tokens that a title has room for

    // the rows of a title, whose mean is their weighted sum; none behind the last title
    void put_rows(int64_t bc, Rows<T>& rows) const {
        rows.n = 0;
        const int32_t n = bc < B * C ? n_BC[bc] : 0;
        for (int32_t t = 0; t < n; t++)
            rows.add(head_VD + tok_BCT[bc * most + t] * stride, 1.f / n);
        rows.fill_up();
    }
};

// score[b, c] = mean[b, c] . x[b], where mean[b, c] is the mean of the title's rows in fp32.
// Training keeps the means (else null): they are the gradient of score[b, c] with respect to x[b],
// and gathering the rows a second time in backward costs more than these B*C*D numbers
template <class T>
static void scores(const Titles<T>& in, const T* x_BD, float* score_BC, float* mean_BCD) {
    const int64_t D = in.D, titles = in.B * in.C;
    if (mean_BCD) in_large_pages(mean_BCD, sizeof(float) * titles * D);
#pragma omp parallel
    {
        std::vector<float> x(D), room(mean_BCD ? 0 : D);
        Rows<T> rows(in.most), next(in.most);
        int64_t have = -1;
#pragma omp for schedule(static)
        for (int64_t bc = 0; bc < titles; bc++) {
            if (have != bc / in.C) widened(x_BD + (have = bc / in.C) * D, x.data(), D);
            float* mean = mean_BCD ? mean_BCD + bc * D : room.data();
            in.put_rows(bc, rows);
            in.put_rows(bc + 1, next);
            weighted_sum(rows, next, D, mean);
            score_BC[bc] = dot(mean, x.data(), D);
        }
    }
}

// dx[b] = sum_c g[b, c] mean[b, c]
static void scores_dx(const float* g_BC, const float* mean_BCD, float* dx_BD, int64_t B, int64_t C,
                      int64_t D) {
    const auto put_rows = [&](int64_t b, Rows<float>& rows) {
        rows.n = 0;
        for (int64_t c = 0; c < C && b < B; c++)
            rows.add(mean_BCD + (b * C + c) * D, g_BC[b * C + c]);
        rows.fill_up();
    };
#pragma omp parallel
    {
        Rows<float> rows(C), next(C);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            put_rows(b, rows);
            put_rows(b + 1, next);
            weighted_sum(rows, next, D, dx_BD + b * D);
        }
    }
}
