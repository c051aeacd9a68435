// The verbalizer's loops on a CPU, called through ctypes by cpu.py. Plain pointers; everything is
// contiguous except that the head's rows stand `stride` elements apart. Shapes, dtypes and token
// ranges were checked by checks.py. Every output is summed by one thread in a fixed order: the
// same numbers whatever the number of threads.
//
// One translation unit; each topic has a header. This file holds what ctypes calls.
#include "numbers.h"
#include "product.h"
#include "candidates.h"
#include "likelihood.h"
#include "head_gradient.h"
#include "catalogue.h"
#include "decoder_layer.h"
#include "attention.h"

// f(a number of the dtype): 0 fp32, 1 bf16, 2 fp16
template <class F>
static void by_dtype(int dtype, F f) {
    if (dtype == 0)
        f(float());
    else if (dtype == 1)
        f(bf16());
    else
        f(fp16());
}

// the same where there is no fp16
template <class F>
static void by_dtype_of_layers(int dtype, F f) {
    if (dtype == 0)
        f(float());
    else
        f(bf16());
}

extern "C" {
void verbalizer_threads(int n) { omp_set_num_threads(n); }

int verbalizer_lanes() { return LANES; }

int verbalizer_tables() { return TABLES; }

// mean: null where no gradient is wanted
void verbalizer_scores(int dtype, const void* x, const void* head, int64_t stride,
                       const int32_t* tok, const int32_t* n, float* score, float* mean, int64_t B,
                       int64_t C, int64_t T_, int64_t D) {
    by_dtype(dtype, [&](auto number) {
        typedef decltype(number) T;
        scores(Titles<T>{(const T*)head, stride, tok, n, B, C, T_, D}, (const T*)x, score, mean);
    });
}

void verbalizer_scores_dx(const float* g, const float* mean, float* dx, int64_t B, int64_t C,
                          int64_t D) {
    scores_dx(g, mean, dx, B, C, D);
}

void verbalizer_likelihood(int dtype, const void* x, const void* head, int64_t stride,
                           const float* bias, const int32_t* tok, float* logp, float* diff,
                           int64_t N, int64_t V, int64_t D) {
    by_dtype(dtype, [&](auto number) {
        typedef decltype(number) T;
        const bool gradient = diff != nullptr;
        const LogProbs<T> in{(const T*)x, (const T*)head, stride, bias, tok, N, V, D, gradient};
        likelihood(in, logp, diff);
    });
}

// tok and weight: K targets of each row
void verbalizer_head_gradient(int dtype, const void* x, const void* head, int64_t stride,
                              const float* bias, const float* log_sum, const int32_t* tok,
                              const float* weight, float* dhead, float* dbias, int64_t N, int64_t K,
                              int64_t V, int64_t D) {
    by_dtype(dtype, [&](auto number) {
        typedef decltype(number) T;
        const LogProbs<T> in{(const T*)x, (const T*)head, stride, bias, nullptr, N, V, D, true};
        head_gradient(in, log_sum, Targets{tok, weight, K}, dhead, dbias);
    });
}

void verbalizer_logits(int dtype, const void* x, const void* head, int64_t stride,
                       const float* bias, float* logit, int64_t users, int64_t V, int64_t D) {
    by_dtype(dtype, [&](auto number) {
        typedef decltype(number) T;
        const T *rows = (const T*)x, *of = (const T*)head;
        if (users <= LANES)
            logits<1>(rows, of, stride, bias, logit, users, V, D);
        else if (users <= 2 * LANES)
            logits<std::min(2, TABLES)>(rows, of, stride, bias, logit, users, V, D);
        else
            logits<TABLES>(rows, of, stride, bias, logit, users, V, D);
    });
}

void verbalizer_catalogue(const float* logit, const int64_t* ptr, const int32_t* tok, int64_t items,
                          int64_t users, float* score) {
    catalogue(logit, ptr, tok, items, users, score);
}

void verbalizer_topk(const float* logit, const int64_t* ptr, const int32_t* tok, int64_t items,
                     int64_t users, int64_t k, const int64_t* seen, int64_t S, int64_t* id,
                     float* score) {
    topk(logit, ptr, tok, items, users, k, seen, S, id, score);
}

void verbalizer_rms_norm(int dtype, void* x, const void* add, const void* weight, float eps,
                         void* out, int64_t M, int64_t D) {
    by_dtype_of_layers(dtype, [&](auto number) {
        typedef decltype(number) T;
        rms_norm((T*)x, (const T*)add, (const T*)weight, eps, (T*)out, M, D);
    });
}

void verbalizer_silu_mul(int dtype, void* gate, const void* up, int64_t n) {
    by_dtype_of_layers(dtype, [&](auto number) {
        typedef decltype(number) T;
        silu_mul((T*)gate, (const T*)up, n);
    });
}

void verbalizer_attention(int dtype, const void* q, const void* k, const void* v, const void* cos,
                          const void* sin, const void* past_k, const void* past_v, int64_t kept,
                          const int32_t* seg, const int64_t* ptr, int64_t rows, int64_t H,
                          int64_t G, int64_t d, float scale, void* out) {
    by_dtype_of_layers(dtype, [&](auto number) {
        typedef decltype(number) T;
        const PackedRows<T> in{(const T*)q,
                               (const T*)k,
                               (const T*)v,
                               (const T*)cos,
                               (const T*)sin,
                               (const T*)past_k,
                               (const T*)past_v,
                               kept,
                               seg,
                               ptr,
                               rows,
                               H,
                               G,
                               d,
                               scale};
        attention(in, (T*)out);
    });
}

// 1 if every length is in 0..T and every token before a title's end in 0..V-1
int verbalizer_titles_fit(const int32_t* tok, const int32_t* n, int64_t titles, int64_t T_,
                          int64_t V) {
    for (int64_t i = 0; i < titles; i++) {
        if (n[i] < 0 || n[i] > T_) return 0;
        for (int32_t t = 0; t < n[i]; t++)
            if (tok[i * T_ + t] < 0 || tok[i * T_ + t] >= V) return 0;
    }
    return 1;
}
}
