// A block of a matrix product, fp32 sums of bf16 or fp32 factors.
// torch has no product of bf16 matrices with an fp32 result on a CPU (its logits are rounded to
// bf16: off by .03 at a logit of 16).
#pragma once
#include "numbers.h"

// W floats in a register. A block is MR rows x NV registers of sums. Beside them stand NV registers
// of the right factor and one of the left: more than REGISTERS would go through memory at each step
#ifdef __AVX512F__
const int W = 16, REGISTERS = 32, MR = 8, NV = 3;
#else
const int W = 8, REGISTERS = 16, MR = 6, NV = 2;
#endif
static_assert(MR * NV + NV + 1 <= REGISTERS, "the sums of a block must stay in registers");
const int NR = NV * W;
typedef float vec __attribute__((vector_size(W * 4), aligned(4)));

#if defined(__AVX512BF16__) && defined(__AVX512F__)
typedef bf16 half_t;  // multiplied in hardware, two neighbours along K at a time
#else
typedef float half_t;  // widened while packing
#endif
template <class T>
using factor = typename std::conditional<std::is_same<T, bf16>::value, half_t, float>::type;

// neighbours along K that stand together in a packed panel
template <class C>
constexpr int unit() {
    return 4 / sizeof(C);
}

// asks the memory for sums that are added to when the products are done
template <int R, int M>
static inline void ask_for(const float* out, int64_t ld) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < R; v++) __builtin_prefetch(out + m * ld + v * W, 1);
}

// out[m, n] (+)= sum_k a[m, k] b[k, n] for m < M, n < R * W. a[m, k] stands at
// a[m * am + k / unit * ak + k % unit], b is packed as [K / unit][n][unit], K is a whole number of
// units
template <int R, int M = MR>
static void block(const float* a, int64_t am, int64_t ak, const float* b, int64_t K, float* out,
                  int64_t ld, bool add) {
    if (add) ask_for<R, M>(out, ld);
    vec sum[M][R];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < R; v++) sum[m][v] = vec{};
    for (int64_t k = 0; k < K; k++, a += ak, b += R * W)
        for (int m = 0; m < M; m++)
            for (int v = 0; v < R; v++) sum[m][v] += a[m * am] * *(const vec*)(b + v * W);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < R; v++) {
            vec& o = *(vec*)(out + m * ld + v * W);
            o = add ? o + sum[m][v] : sum[m][v];
        }
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <int R, int M = MR>
static void block(const bf16* a, int64_t am, int64_t ak, const bf16* b, int64_t K, float* out,
                  int64_t ld, bool add) {
    if (add) ask_for<R, M>(out, ld);
    __m512 sum[M][R];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < R; v++) sum[m][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2, a += ak, b += R * W * 2) {
        __m512bh row[R];
        for (int v = 0; v < R; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + v * W * 2);
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * am, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < R; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, row[v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < R; v++) {
            float* o = out + m * ld + v * W;
            _mm512_storeu_ps(o, add ? _mm512_add_ps(_mm512_loadu_ps(o), sum[m][v]) : sum[m][v]);
        }
}
#endif

// the same for 1 <= r <= NV registers of sums
template <int M = MR, class C>
static inline void block_of(int r, const C* a, int64_t am, int64_t ak, const C* b, int64_t K,
                            float* out, int64_t ld, bool add) {
    if (r == 1)
        block<1, M>(a, am, ak, b, K, out, ld, add);
    else if (r == 2)
        block<2, M>(a, am, ak, b, K, out, ld, add);
    else
        block<NV, M>(a, am, ak, b, K, out, ld, add);
}

// a strip of columns that a block computes at once
struct Strip {
    int64_t first;
    int registers;
    int64_t columns;  // those that exist
    int width() const { return registers * W; }
};

// D columns in strips as even as possible: 100 columns become 48 + 32 + 20
static std::vector<Strip> strips_of(int64_t D) {
    const int64_t all = (D + W - 1) / W, n = (all + NV - 1) / NV;
    std::vector<Strip> strips;
    for (int64_t i = 0, done = 0; i < n; i++) {
        const int64_t left = n - i, more = (all - done + left - 1) / left;  // rounded up
        strips.push_back({done * W, int(more), std::min(more * W, D - done * W)});
        done += more;
    }
    return strips;
}

// K in whole units
template <class C>
static int64_t padded(int64_t K) {
    return (K + unit<C>() - 1) / unit<C>() * unit<C>();
}

// MR rows x R registers of logits: rows of the head as they lie in memory (copied only where a
// whole block or unit is missing, or to widen them) times a packed panel of x. Summed in pieces of
// 256: shorter chains of additions round less
template <int R, class T, class C>
static void logit_block(const T* head, int64_t stride, int64_t rows, int64_t D, const C* panel,
                        C* room, float* out) {
    const int64_t K = padded<C>(D);
    const C* a = room;
    int64_t am = K;
    if (std::is_same<T, C>::value && rows >= MR && K == D) {
        a = (const C*)head;
        am = stride;
    } else {
        std::memset((void*)room, 0, sizeof(C) * MR * K);
        for (int64_t r = 0; r < std::min<int64_t>(rows, MR); r++) {
            if constexpr (std::is_same<T, fp16>::value)
                widened(head + r * stride, room + r * K, D);
            else
                for (int64_t d = 0; d < D; d++) put(head[r * stride + d], room[r * K + d]);
        }
    }
    for (int64_t k = 0; k < K; k += 256)
        block<R>(a + k, am, unit<C>(), panel + k * R * W, std::min<int64_t>(256, K - k), out, R * W,
                 k > 0);
}

// columns of a product's right side, which are rows of `in`, packed as [K / unit][width][unit];
// zeros where there is no column or k
template <class T, class C>
static void pack(const T* in, int64_t stride, int64_t columns, int64_t D, int width, C* panel) {
    const int u = unit<C>();
    std::memset((void*)panel, 0, sizeof(C) * padded<C>(D) * width);
    for (int64_t c = 0; c < columns; c++)
        for (int64_t k = 0; k < D; k++)
            put(in[c * stride + k], panel[(k / u * width + c) * u + k % u]);
}

// the same for columns of `in`, whose rows run along K
template <class T, class C>
static void pack_across(const T* in, int64_t stride, int64_t rows, int64_t columns, int width,
                        C* panel) {
    const int u = unit<C>();
    if (std::is_same<T, C>::value && u == 1 && columns == width) {
        for (int64_t k = 0; k < rows; k++)
            std::memcpy((void*)(panel + k * width), (const void*)(in + k * stride),
                        width * sizeof(C));
        return;
    }
    if (columns < width || rows % u)
        std::memset((void*)panel, 0, sizeof(C) * padded<C>(rows) * width);
    int64_t k = 0;
    if constexpr (std::is_same<T, bf16>::value && sizeof(C) == 2)
        for (; k + 2 <= rows; k += 2) {
            const T *row = in + k * stride, *next = row + stride;
            for (int64_t c = 0; c < columns; c++)
                put_pair(row[c], next[c], panel + k * width + 2 * c);
        }
    for (; k < rows; k++)
        for (int64_t c = 0; c < columns; c++)
            put(in[k * stride + c], panel[(k / u * width + c) * u + k % u]);
}
