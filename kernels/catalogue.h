// The catalogue: the mean logits of all its titles, or the k best of them, for a few users at a
// time.
#pragma once
#include "product.h"

const int LANES = 16;           // users side by side: one cache line of logits for a token
const int TABLES = NR / LANES;  // tables of so many users that one pass over the head can fill

// table[v, lane] = head[v] . x[lane] + bias[v] for each LANES users; the tables, V x LANES each,
// stand one behind the other
template <int G, class T>
static void logits(const T* x_BD, const T* head_VD, int64_t stride, const float* bias_V,
                   float* tables, int64_t users, int64_t V, int64_t D) {
    typedef factor<T> C;
    const int64_t K = padded<C>(D);
    std::vector<C> x(K * G * LANES);
    pack(x_BD, D, users, D, G * LANES, x.data());
#pragma omp parallel
    {
        std::vector<C> room(MR * K);
        float out[MR * G * LANES];
#pragma omp for schedule(static)
        for (int64_t v = 0; v < V; v += MR) {
            logit_block<G * LANES / W>(head_VD + v * stride, stride, V - v, D, x.data(),
                                       room.data(), out);
            for (int64_t r = 0; r < std::min<int64_t>(MR, V - v); r++)
                for (int g = 0; g < G; g++)
                    for (int j = 0; j < LANES; j++)
                        tables[(g * V + v + r) * LANES + j] =
                            out[(r * G + g) * LANES + j] + (bias_V ? bias_V[v + r] : 0.f);
        }
    }
}

// f(item, its mean logit for each lane) for the items of lo..hi that have a title
template <class F>
static inline void each_item(const float* logit_VL, const int64_t* ptr, const int32_t* tok,
                             int64_t lo, int64_t hi, F f) {
    for (int64_t i = lo; i < hi; i++) {
        const int64_t n = ptr[i + 1] - ptr[i];
        float sum[LANES] = {};
        for (int64_t t = ptr[i]; t < ptr[i + 1]; t++) {
            const float* row = logit_VL + int64_t(tok[t]) * LANES;
#pragma omp simd
            for (int j = 0; j < LANES; j++) sum[j] += row[j];
        }
        for (int j = 0; j < LANES; j++) sum[j] /= float(std::max<int64_t>(n, 1));
        f(i, n, sum);
    }
}

// the mean logit of every title for each user
static void catalogue(const float* logit_VL, const int64_t* ptr, const int32_t* tok, int64_t items,
                      int64_t users, float* score_BI) {
#pragma omp parallel for schedule(static)
    for (int64_t lo = 0; lo < items; lo += 4096)
        each_item(logit_VL, ptr, tok, lo, std::min(items, lo + 4096),
                  [&](int64_t i, int64_t, const float* sum) {
                      for (int64_t j = 0; j < users; j++) score_BI[j * items + i] = sum[j];
                  });
}

struct best {
    float score;
    int64_t id;
};

// is a ranked before b?
static inline bool before(const best& a, const best& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// the k best of all titles for each user, best first, equal scores by lower id; -1 and -inf where
// fewer than k can be ranked. A thread walks its share of the items once and keeps k per user:
// whatever is not above a user's k-th best so far costs one comparison.
static void topk(const float* logit_VL, const int64_t* ptr, const int32_t* tok, int64_t items,
                 int64_t users, int64_t k, const int64_t* seen_BS, int64_t S, int64_t* id_Bk,
                 float* score_Bk) {
    const int threads = omp_get_max_threads();
    std::vector<std::vector<best>> kept(threads * LANES);
#pragma omp parallel for schedule(static)
    for (int share = 0; share < threads; share++) {
        float least[LANES];
        std::fill(least, least + LANES, -INFINITY);
        each_item(logit_VL, ptr, tok, items * share / threads, items * (share + 1) / threads,
                  [&](int64_t i, int64_t n, const float* sum) {
                      int any = 0;
                      for (int j = 0; j < LANES; j++) any |= sum[j] > least[j];
                      if (!any || n == 0) return;
                      for (int64_t j = 0; j < users; j++) {
                          if (!(sum[j] > least[j]) ||
                              std::find(seen_BS + j * S, seen_BS + (j + 1) * S, i) !=
                                  seen_BS + (j + 1) * S)
                              continue;
                          auto& list = kept[share * LANES + j];
                          const best now = {sum[j], i};
                          list.insert(std::upper_bound(list.begin(), list.end(), now, before), now);
                          if (int64_t(list.size()) > k) list.pop_back();
                          if (int64_t(list.size()) == k) least[j] = list.back().score;
                      }
                  });
    }
    for (int64_t j = 0; j < users; j++) {
        std::vector<best> all;
        for (int share = 0; share < threads; share++)
            all.insert(all.end(), kept[share * LANES + j].begin(), kept[share * LANES + j].end());
        std::sort(all.begin(), all.end(), before);
        for (int64_t r = 0; r < k; r++) {
            id_Bk[j * k + r] = r < int64_t(all.size()) ? all[r].id : -1;
            score_Bk[j * k + r] = r < int64_t(all.size()) ? all[r].score : -INFINITY;
        }
    }
}
