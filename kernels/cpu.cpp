// The verbalizer's loops on a CPU, called through ctypes by cpu.py. Plain pointers; everything is contiguous except that the head's rows
// stand `stride` elements apart. Shapes, dtypes and token ranges were checked in __init__.py.
// Every output is summed by one thread in a fixed order: the same numbers whatever the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#include <omp.h>
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

static inline float wide(float v) { return v; }
static inline float wide(bf16 v) { uint32_t u = uint32_t(v.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline float wide(fp16 v) {
#ifdef __F16C__
    return _cvtsh_ss(v.bits);
#else
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, e = (v.bits >> 10) & 31, m = v.bits & 1023;
    if (e == 0) return (sign ? -1 : 1) * std::ldexp(float(m), -24);
    const uint32_t u = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | (m << 13);
    float f;
    std::memcpy(&f, &u, 4);
    return f;
#endif
}
static inline void narrow(float v, float& out) { out = v; }
static inline void narrow(float v, bf16& out) {                 // to the nearest, ties to even; only finite v come here
    uint32_t u;
    std::memcpy(&u, &v, 4);
    out.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// ---------------------------------------------------------------- candidate scores

const int64_t BLOCK = 512;     // elements of a row at a time: four rows of the head and x stay in the first-level cache

template <class T> static inline const float* widened(const T* row, float* room, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    if constexpr (std::is_same<T, fp16>::value)
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + i))));
#endif
    for (; i < n; i++) room[i] = wide(row[i]);
    return room;
}

// f(a0, a1, a2, a3) on four rows of m elements, as they are where the compiler widens while it reads, else widened first
template <class T, class F> static inline void four_rows(const T* const* r, float* room, int64_t m, F f) {
    if constexpr (std::is_same<T, fp16>::value)
        f(widened(r[0], room, m), widened(r[1], room + BLOCK, m), widened(r[2], room + 2 * BLOCK, m), widened(r[3], room + 3 * BLOCK, m));
    else
        f(r[0], r[1], r[2], r[3]);
}

// score[b, c] = 1/n sum_{t<n} head[tok[b, c, t]] . x[b]. Four rows at a time: they share the loads of x and hide each other's latency
template <class T>
static void scores(const T* x_BD, const T* head_VD, int64_t stride, const int32_t* tok_BCT, const int32_t* n_BC, float* score_BC,
                   int64_t B, int64_t C, int64_t T_, int64_t D) {
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
                    for (int j = 0; j < 4; j++) r[j] = head_VD + int64_t(tok[std::min(t + j, n - 1)]) * stride + d0;
                    four_rows(r, room.data(), m, [&](auto a0, auto a1, auto a2, auto a3) {
                        #pragma omp simd reduction(+ : s0, s1, s2, s3)
                        for (int64_t d = 0; d < m; d++) {
                            s0 += xd[d] * wide(a0[d]); s1 += xd[d] * wide(a1[d]); s2 += xd[d] * wide(a2[d]); s3 += xd[d] * wide(a3[d]);
                        }
                    });
                }
                total += s0 + (t + 1 < n ? s1 : 0) + (t + 2 < n ? s2 : 0) + (t + 3 < n ? s3 : 0);
            }
            score_BC[bc] = n > 0 ? total / n : 0;
        }
    }
}

// pooled[b, c] = 1/n sum_{t<n} head[tok[b, c, t]] in fp32: the gradient of score[b, c] with respect to x[b], and score = pooled . x. Training
// keeps it: gathering the rows a second time in backward costs more than its B*C*D numbers
template <class T>
static void pool(const T* head_VD, int64_t stride, const int32_t* tok_NT, const int32_t* n_N, float* pooled_ND, int64_t N, int64_t T_, int64_t D) {
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
                    const T* r[4];
                    float w[4];                                  // the last of a title's rows stands in for those beyond it, weighing nothing
                    for (int j = 0; j < 4; j++) { r[j] = head_VD + int64_t(tok[std::min(t + j, n - 1)]) * stride + d0; w[j] = t + j < n ? 1.f / n : 0; }
                    four_rows(r, room.data(), m, [&](auto a0, auto a1, auto a2, auto a3) {
                        #pragma omp simd
                        for (int64_t d = 0; d < m; d++)
                            out[d] += (w[0] * wide(a0[d]) + w[1] * wide(a1[d])) + (w[2] * wide(a2[d]) + w[3] * wide(a3[d]));
                    });
                }
            }
        }
    }
}

// ---------------------------------------------------------------- a block of a matrix product, fp32 sums of bf16 or fp32 factors
// torch has no product of bf16 matrices with an fp32 result on a CPU (its logits are rounded to bf16: off by .03 at a logit of 16).

#ifdef __AVX512F__
const int W = 16;              // floats in a register
#else
const int W = 8;
#endif
const int MR = 8, NV = 3, NR = NV * W;     // a block is MR rows x NV registers: with AVX-512, 24 of the 32 registers are sums
typedef float vec __attribute__((vector_size(W * 4), aligned(4)));

#if defined(__AVX512BF16__) && defined(__AVX512F__)
typedef bf16 half_t;           // multiplied in hardware, two neighbours along K at a time
#else
typedef float half_t;          // widened while packing
#endif
template <class T> using factor = typename std::conditional<std::is_same<T, bf16>::value, half_t, float>::type;
template <class C> constexpr int unit() { return 4 / sizeof(C); }       // neighbours along K that stand together in a packed panel

// out[m, n] (+)= sum_k a[m, k] b[k, n] for m < MR, n < R * W. a[m, k] stands at a[m * am + k / unit * ak + k % unit], b is packed as
// [K / unit][n][unit], K is a whole number of units
template <int R> static void block(const float* a, int64_t am, int64_t ak, const float* b, int64_t K, float* out, int64_t ld, bool add) {
    vec sum[MR][R];
    for (int m = 0; m < MR; m++) for (int v = 0; v < R; v++) sum[m][v] = vec{};
    for (int64_t k = 0; k < K; k++, a += ak, b += R * W)
        for (int m = 0; m < MR; m++) for (int v = 0; v < R; v++) sum[m][v] += a[m * am] * *(const vec*)(b + v * W);
    for (int m = 0; m < MR; m++) for (int v = 0; v < R; v++) { vec& o = *(vec*)(out + m * ld + v * W); o = add ? o + sum[m][v] : sum[m][v]; }
}
#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <int R> static void block(const bf16* a, int64_t am, int64_t ak, const bf16* b, int64_t K, float* out, int64_t ld, bool add) {
    __m512 sum[MR][R];
    for (int m = 0; m < MR; m++) for (int v = 0; v < R; v++) sum[m][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2, a += ak, b += R * W * 2) {
        __m512bh row[R];
        for (int v = 0; v < R; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + v * W * 2);
        for (int m = 0; m < MR; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * am, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < R; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, row[v]);
        }
    }
    for (int m = 0; m < MR; m++) for (int v = 0; v < R; v++) {
        float* o = out + m * ld + v * W;
        _mm512_storeu_ps(o, add ? _mm512_add_ps(_mm512_loadu_ps(o), sum[m][v]) : sum[m][v]);
    }
}
#endif

static inline void put(float v, float& out) { out = v; }
static inline void put(bf16 v, bf16& out) { out = v; }
static inline void put(bf16 v, float& out) { out = wide(v); }
static inline void put(fp16 v, float& out) { out = wide(v); }

template <class C> static int64_t padded(int64_t K) { return (K + unit<C>() - 1) / unit<C>() * unit<C>(); }

// MR rows x R registers of logits: rows of the head as they lie in memory (copied only where a whole block or unit is missing, or to widen
// them) times a packed panel of x. Summed in pieces of 256: shorter chains of additions round less
template <int R, class T, class C> static void logit_block(const T* head, int64_t stride, int64_t rows, int64_t D, const C* panel, C* room, float* out) {
    const int64_t K = padded<C>(D);
    const C* a = room;
    int64_t am = K;
    if (std::is_same<T, C>::value && rows >= MR && K == D) {
        a = (const C*)head;
        am = stride;
    } else {
        std::memset((void*)room, 0, sizeof(C) * MR * K);
        for (int64_t r = 0; r < std::min<int64_t>(rows, MR); r++) {
            if constexpr (std::is_same<T, fp16>::value) widened(head + r * stride, room + r * K, D);
            else for (int64_t d = 0; d < D; d++) put(head[r * stride + d], room[r * K + d]);
        }
    }
    for (int64_t k = 0; k < K; k += 256) block<R>(a + k, am, unit<C>(), panel + k * R * W, std::min<int64_t>(256, K - k), out, R * W, k > 0);
}

// columns of a product's right side, which are rows of `in`, packed as [K / unit][width][unit]; zeros where there is no column or k
template <class T, class C> static void pack(const T* in, int64_t stride, int64_t columns, int64_t D, int width, C* panel) {
    const int u = unit<C>();
    std::memset((void*)panel, 0, sizeof(C) * padded<C>(D) * width);
    for (int64_t c = 0; c < columns; c++)
        for (int64_t k = 0; k < D; k++) put(in[c * stride + k], panel[(k / u * width + c) * u + k % u]);
}

// the same for columns of `in`, whose rows run along K
template <class T, class C> static void pack_across(const T* in, int64_t stride, int64_t rows, int64_t columns, int width, C* panel) {
    const int u = unit<C>();
    if (columns < width || rows % u) std::memset((void*)panel, 0, sizeof(C) * padded<C>(rows) * width);
    for (int64_t k = 0; k < rows; k++)
        for (int64_t c = 0; c < columns; c++) put(in[k * stride + c], panel[(k / u * width + c) * u + k % u]);
}

// ---------------------------------------------------------------- title likelihood

// e^x for x <= 0 to 2e-7 relative: x = k ln 2 + r with |r| <= ln 2 / 2, e^r by its series; 0 below -87
static inline float exp_(float x) {
    const float y = x < -87.f ? -87.f : x, big = 12582912.f;             // adding and taking 1.5 * 2^23 rounds to an integer
    const float k = (y * 1.44269504f + big) - big;
    const float r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720; p = p * r + 1.f / 120; p = p * r + 1.f / 24; p = p * r + 1.f / 6; p = p * r + 0.5f; p = p * r + 1; p = p * r + 1;
    const int32_t bits = (int32_t(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.f ? 0.f : p * power;
}

// logp[i] = l_i[tok[i]] - log sum_v e^{l_i[v]}, l_i = head x_i + bias; and if diff is wanted, diff[i] = head[tok[i]] - sum_v softmax(l_i)[v] head[v],
// the gradient of logp[i] with respect to x_i. One pass over the head in tiles of its rows, as attention passes over its keys: a running
// maximum m, sum s and weighted sum E of rows, rescaled when m grows. Of the N x V logits a thread holds TILE x NR, in its cache; the rows of
// x stand across the registers, so that the head is read as it lies and maxima and sums need no shuffling.
const int64_t TILE = 192, CHUNK = 4 * NR;      // rows of the head at a time; rows of x in a job
template <class T>
static void likelihood(const T* x_ND, const T* head_VD, int64_t stride, const float* bias_V, const int32_t* tok_N, float* logp_N, float* diff_ND,
                       int64_t N, int64_t V, int64_t D) {
    typedef factor<T> C;
    const int u = unit<C>();
    const int64_t K = padded<C>(D), wide_D = (D + NR - 1) / NR * NR, chunks = (N + CHUNK - 1) / CHUNK;
    const int64_t parts = std::max<int64_t>(1, std::min(16 / chunks, V / 1024));               // of the head, where the chunks alone are few
    const int64_t all = chunks * CHUNK;
    std::vector<float> m(parts * all, -INFINITY), s(parts * all, 0.f), pick(all, 0.f), E(diff_ND ? parts * all * wide_D : 0, 0.f);
    #pragma omp parallel
    {
        std::vector<float> l(TILE * NR);
        std::vector<C> x(CHUNK * K), room(MR * K), p(TILE * NR), values(diff_ND ? TILE * wide_D : 0);
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < chunks * parts; job++) {
            const int64_t part = job / chunks, n0 = job % chunks * CHUNK, last = V * (part + 1) / parts;
            for (int64_t i = n0; i < std::min(N, n0 + CHUNK); i += NR) pack(x_ND + i * D, D, std::min<int64_t>(NR, N - i), D, NR, x.data() + (i - n0) * K);
            for (int64_t v0 = V * part / parts; v0 < last; v0 += TILE) {
                const int64_t n = std::min(TILE, last - v0);
                if (diff_ND)
                    for (int64_t d = 0; d < D; d += NR) pack_across(head_VD + v0 * stride + d, stride, n, std::min<int64_t>(NR, D - d), NR, values.data() + d * TILE);
                for (int64_t i0 = n0; i0 < std::min(N, n0 + CHUNK); i0 += NR) {
                    for (int64_t v = 0; v < n; v += MR)
                        logit_block<NV>(head_VD + (v0 + v) * stride, stride, n - v, D, x.data() + (i0 - n0) * K, room.data(), l.data() + v * NR);
                    if (bias_V) for (int64_t v = 0; v < n; v++) for (int j = 0; j < NR; j++) l[v * NR + j] += bias_V[v0 + v];
                    for (int64_t i = i0; i < std::min(N, i0 + NR); i++) if (tok_N[i] >= v0 && tok_N[i] < v0 + n) pick[i] = l[(tok_N[i] - v0) * NR + i - i0];
                    float *mi = m.data() + part * all + i0, *si = s.data() + part * all + i0, top[NR], shrink[NR], sum[NR] = {};
                    std::copy(mi, mi + NR, top);
                    for (int64_t v = 0; v < n; v++) for (int j = 0; j < NR; j++) top[j] = l[v * NR + j] > top[j] ? l[v * NR + j] : top[j];
                    for (int64_t v = 0; v < n; v++)
                        for (int j = 0; j < NR; j++) { const float e = exp_(l[v * NR + j] - top[j]); l[v * NR + j] = e; sum[j] += e; }
                    for (int j = 0; j < NR; j++) { shrink[j] = exp_(mi[j] - top[j]); si[j] = si[j] * shrink[j] + sum[j]; }
                    if (diff_ND) {
                        float* Ei = E.data() + (part * all + i0) * wide_D;
                        for (int j = 0; j < NR; j++) if (top[j] > mi[j]) for (int64_t d = 0; d < D; d++) Ei[j * wide_D + d] *= shrink[j];
                        for (int64_t v = n; v < padded<C>(n); v++) for (int j = 0; j < NR; j++) l[v * NR + j] = 0;
                        for (int64_t v = 0; v < padded<C>(n); v++) for (int j = 0; j < NR; j++) narrow(l[v * NR + j], p[(v / u * NR + j) * u + v % u]);
                        for (int64_t d = 0; d < D; d += NR)
                            for (int j = 0; j < NR; j += MR)
                                block<NV>(p.data() + j * u, u, NR * u, values.data() + d * TILE, padded<C>(n), Ei + j * wide_D + d, wide_D, true);
                    }
                    std::copy(top, top + NR, mi);
                }
            }
        }
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < N; i++) {                                                      // the parts of the head together, in their order
            float top = -INFINITY, sum = 0;
            for (int64_t part = 0; part < parts; part++) top = std::max(top, m[part * all + i]);
            for (int64_t part = 0; part < parts; part++) sum += s[part * all + i] * exp_(m[part * all + i] - top);
            logp_N[i] = pick[i] - (top + std::log(sum));
            if (!diff_ND) continue;
            for (int64_t d = 0; d < D; d++) diff_ND[i * D + d] = wide(head_VD[int64_t(tok_N[i]) * stride + d]);
            for (int64_t part = 0; part < parts; part++) {
                const float w = exp_(m[part * all + i] - top) / sum, *Ei = E.data() + (part * all + i) * wide_D;
                for (int64_t d = 0; d < D; d++) diff_ND[i * D + d] -= w * Ei[d];
            }
        }
    }
}

// ---------------------------------------------------------------- the catalogue

const int LANES = 16;                  // users side by side: one cache line of logits for a token
const int TABLES = NR / LANES;         // tables of so many users that one pass over the head can fill

// table[v, lane] = head[v] . x[lane] + bias[v] for each LANES users, one table of V x LANES behind the other
template <int G, class T>
static void logits(const T* x_BD, const T* head_VD, int64_t stride, const float* bias_V, float* tables, int64_t users, int64_t V, int64_t D) {
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
            logit_block<G * LANES / W>(head_VD + v * stride, stride, V - v, D, x.data(), room.data(), out);
            for (int64_t r = 0; r < std::min<int64_t>(MR, V - v); r++)
                for (int g = 0; g < G; g++)
                    for (int j = 0; j < LANES; j++) tables[(g * V + v + r) * LANES + j] = out[(r * G + g) * LANES + j] + (bias_V ? bias_V[v + r] : 0.f);
        }
    }
}

// f(item, its mean logit for each lane) for the items of lo..hi that have a title
template <class F> static inline void each_item(const float* logit_VL, const int64_t* ptr, const int32_t* tok, int64_t lo, int64_t hi, F f) {
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

static void catalogue(const float* logit_VL, const int64_t* ptr, const int32_t* tok, int64_t items, int64_t users, float* score_BI) {
    #pragma omp parallel for schedule(static)
    for (int64_t lo = 0; lo < items; lo += 4096)
        each_item(logit_VL, ptr, tok, lo, std::min(items, lo + 4096), [&](int64_t i, int64_t, const float* sum) {
            for (int64_t j = 0; j < users; j++) score_BI[j * items + i] = sum[j];
        });
}

struct best { float score; int64_t id; };
static inline bool before(const best& a, const best& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// the k best of all titles for each user, best first, equal scores by lower id; -1 and -inf where fewer than k can be ranked. A thread
// walks its share of the items once and keeps k per user: whatever is not above a user's k-th best so far costs one comparison.
static void topk(const float* logit_VL, const int64_t* ptr, const int32_t* tok, int64_t items, int64_t users, int64_t k, const int64_t* seen_BS,
                 int64_t S, int64_t* id_Bk, float* score_Bk) {
    const int threads = omp_get_max_threads();
    std::vector<std::vector<best>> kept(threads * LANES);
    #pragma omp parallel for schedule(static)
    for (int share = 0; share < threads; share++) {
        float least[LANES];
        std::fill(least, least + LANES, -INFINITY);
        each_item(logit_VL, ptr, tok, items * share / threads, items * (share + 1) / threads, [&](int64_t i, int64_t n, const float* sum) {
            int any = 0;
            for (int j = 0; j < LANES; j++) any |= sum[j] > least[j];
            if (!any || n == 0) return;
            for (int64_t j = 0; j < users; j++) {
                if (!(sum[j] > least[j]) || std::find(seen_BS + j * S, seen_BS + (j + 1) * S, i) != seen_BS + (j + 1) * S) continue;
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
        for (int share = 0; share < threads; share++) all.insert(all.end(), kept[share * LANES + j].begin(), kept[share * LANES + j].end());
        std::sort(all.begin(), all.end(), before);
        for (int64_t r = 0; r < k; r++) {
            id_Bk[j * k + r] = r < int64_t(all.size()) ? all[r].id : -1;
            score_Bk[j * k + r] = r < int64_t(all.size()) ? all[r].score : -INFINITY;
        }
    }
}

// ---------------------------------------------------------------- a decoder's layer, forward only: what is not a matrix product of torch

// x += add (null: nothing to add), out = x / sqrt(mean x^2 + eps) * weight: a residual connection and the norm behind it
template <class T> static void rms_norm(T* x_MD, const T* add_MD, const T* weight_D, float eps, T* out_MD, int64_t M, int64_t D) {
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        T *x = x_MD + m * D, *out = out_MD + m * D;
        if (add_MD) for (int64_t d = 0; d < D; d++) narrow(wide(x[d]) + wide(add_MD[m * D + d]), x[d]);
        float squares[W] = {}, sum = 0;
        int64_t d = 0;
        for (; d + W <= D; d += W) for (int j = 0; j < W; j++) squares[j] += wide(x[d + j]) * wide(x[d + j]);
        for (; d < D; d++) squares[0] += wide(x[d]) * wide(x[d]);
        for (int j = 0; j < W; j++) sum += squares[j];
        const float scale = 1 / std::sqrt(sum / D + eps);
        for (d = 0; d < D; d++) narrow(wide(x[d]) * scale * wide(weight_D[d]), out[d]);
    }
}

// gate = gate / (1 + e^-gate) * up
template <class T> static void silu_mul(T* __restrict gate, const T* __restrict up, int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += 4096) {
        const int64_t last = std::min(n, first + 4096);
        for (int64_t i = first; i < last; i++) {
            const float g = wide(gate[i]), e = exp_(-std::fabs(g));              // e^-|g|: never overflows
            narrow(g * (g < 0 ? e : 1.f) / (1 + e) * wide(up[i]), gate[i]);
        }
    }
}

// out[j] = in[j] cos[j] - in[j + d/2] sin[j], out[j + d/2] = in[j + d/2] cos[j + d/2] + in[j] sin[j + d/2]   (rotary positions)
template <class T, class C> static inline void rotate(const T* in, const T* cos, const T* sin, int64_t d, C* out) {
    for (int64_t j = 0; j < d / 2; j++) {
        const float a = wide(in[j]), b = wide(in[j + d / 2]);
        narrow(a * wide(cos[j]) - b * wide(sin[j]), out[j]);
        narrow(b * wide(cos[j + d / 2]) + a * wide(sin[j + d / 2]), out[j + d / 2]);
    }
}

// Attention of rows that stand one behind the other. Token i of row b (ptr[b] <= i < ptr[b + 1]) sees the prefix (kept keys), its row's tokens of
// segment 0 up to itself if it is one of them (else all of them), and its own segment up to itself; segments come in order. q, k and v are as
// projected, (M, heads, d); positions are applied here. The H / G heads that share keys stand side by side as if they were more queries.
// A job keeps MR queries' scores of all its keys, so the softmax needs no running maximum.
template <class T>
static void attention(const T* q_MHd, const T* k_MGd, const T* v_MGd, const T* cos_Md, const T* sin_Md, const T* past_k, const T* past_v, int64_t kept,
                      const int32_t* seg_M, const int64_t* ptr, int64_t rows, int64_t H, int64_t G, int64_t d, float scale, T* out_MHd) {
    typedef factor<T> C;
    const int V2 = 2 * W;                                     // columns of v at a time
    const int u = unit<C>();
    const int64_t share = H / G, wide_d = (d + V2 - 1) / V2 * V2, K = padded<C>(d);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(8, 4 * omp_get_max_threads() / std::max<int64_t>(1, rows * G)));
    int64_t longest = 0;
    for (int64_t b = 0; b < rows; b++) longest = std::max(longest, ptr[b + 1] - ptr[b]);
    const int64_t room = (kept + longest + NR - 1) / NR * NR;
    #pragma omp parallel
    {
        std::vector<C> keys((longest + 1) * K), panel(room * K), own(room * K), values(room * wide_d), own_values(room * wide_d), q((MR * 2) * K), p(MR * 2 * room);
        std::vector<float> s(MR * 2 * room), o(MR * wide_d);
        #pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < rows * G * parts; job++) {
            const int64_t b = job / (G * parts), g = job / parts % G, part = job % parts, t0 = ptr[b], n = ptr[b + 1] - t0;
            int64_t m = 0;
            while (m < n && seg_M[t0 + m] == 0) m++;
            // the keys every token of a later segment sees, packed: the prefix, then segment 0
            for (int64_t t = 0; t < n; t++) rotate(k_MGd + ((t0 + t) * G + g) * d, cos_Md + (t0 + t) * d, sin_Md + (t0 + t) * d, d, keys.data() + t * K);
            const int64_t all = kept + m;
            auto key = [&](int64_t i, int64_t c, C* to) {      // one key into column c of a packed tile
                if (i < kept) for (int64_t j = 0; j < d; j++) put(past_k[(g * kept + i) * d + j], to[(j / u * NR + c) * u + j % u]);
                else for (int64_t j = 0; j < d; j++) to[(j / u * NR + c) * u + j % u] = keys[(i - kept) * K + j];
            };
            auto value = [&](int64_t i) { return i < kept ? past_v + (g * kept + i) * d : v_MGd + ((t0 + i - kept) * G + g) * d; };
            auto pack_keys = [&](int64_t from, int64_t to, C* out) {
                std::memset((void*)out, 0, sizeof(C) * ((to - from + NR - 1) / NR * NR) * K);
                for (int64_t i = from; i < to; i++) key(i, (i - from) % NR, out + (i - from) / NR * NR * K);
            };
            auto pack_values = [&](int64_t from, int64_t to, C* out) {           // [columns / V2][keys / unit][V2][unit]
                const int64_t high = (to - from + NR - 1) / NR * NR;
                std::memset((void*)out, 0, sizeof(C) * high * wide_d);
                for (int64_t i = 0; i < to - from; i++) {
                    const T* row = value(from + i);
                    for (int64_t j = 0; j < d; j++) put(row[j], out[j / V2 * V2 * high + (i / u * V2 + j % V2) * u + i % u]);
                }
                return high;
            };
            pack_keys(0, all, panel.data());
            const int64_t high = pack_values(0, all, values.data());
            for (int64_t from = 0; from < n;) {
                int64_t to = from;
                while (to < n && seg_M[t0 + to] == seg_M[t0 + from]) to++;
                const bool tail = from == 0 && m > 0;
                const int64_t first = from * share + ((to - from) * share * part / parts), last = from * share + ((to - from) * share * (part + 1) / parts);
                int64_t own_high = 0;
                if (!tail && first < last) { pack_keys(kept + from, kept + to, own.data()); own_high = pack_values(kept + from, kept + to, own_values.data()); }
                for (int64_t i0 = first; i0 < last; i0 += MR) {                   // MR queries: query i is token i / share, head i % share
                    const int64_t count = std::min<int64_t>(MR, last - i0), end = (i0 + count - 1) / share;
                    std::memset((void*)q.data(), 0, sizeof(C) * MR * K);
                    for (int64_t i = 0; i < count; i++) {
                        const int64_t t = t0 + (i0 + i) / share;
                        rotate(q_MHd + (t * H + g * share + (i0 + i) % share) * d, cos_Md + t * d, sin_Md + t * d, d, q.data() + i * K);
                    }
                    const int64_t seen = tail ? kept + end + 1 : all, wide_seen = (seen + NR - 1) / NR * NR;
                    const int64_t wide_own = tail ? 0 : (end + 1 - from + NR - 1) / NR * NR, ld = wide_seen + wide_own;
                    for (int64_t c = 0; c < wide_seen; c += NR) block<NV>(q.data(), K, u, panel.data() + c * K, K, s.data() + c, ld, false);
                    for (int64_t c = 0; c < wide_own; c += NR) block<NV>(q.data(), K, u, own.data() + c * K, K, s.data() + wide_seen + c, ld, false);
                    float total[MR];
                    for (int64_t i = 0; i < MR; i++) {
                        const int64_t t = (i0 + std::min(i, count - 1)) / share, until = tail ? kept + t + 1 : all, mine = tail ? 0 : t + 1 - from;
                        float *row = s.data() + i * ld, *behind = row + wide_seen, lanes[W], sum[W] = {};
                        C* pi = p.data() + i * ld;
                        for (int64_t c = until; c < wide_seen; c++) row[c] = -INFINITY;
                        for (int64_t c = mine; c < wide_own; c++) behind[c] = -INFINITY;
                        std::fill(lanes, lanes + W, -INFINITY);
                        for (int64_t c = 0; c < ld; c += W) for (int j = 0; j < W; j++) lanes[j] = row[c + j] > lanes[j] ? row[c + j] : lanes[j];
                        const float top = *std::max_element(lanes, lanes + W) * scale;
                        for (int64_t c = 0; c < ld; c += W)
                            for (int j = 0; j < W; j++) { const float e = exp_(row[c + j] * scale - top); sum[j] += e; narrow(e, pi[c + j]); }
                        total[i] = 0;
                        for (int j = 0; j < W; j++) total[i] += sum[j];
                    }
                    for (int64_t j = 0; j < wide_d; j += V2) {
                        block<2>(p.data(), ld, u, values.data() + j * high, wide_seen, o.data() + j, wide_d, false);
                        if (wide_own) block<2>(p.data() + wide_seen, ld, u, own_values.data() + j * own_high, wide_own, o.data() + j, wide_d, true);
                    }
                    for (int64_t i = 0; i < count; i++) {
                        T* out = out_MHd + ((t0 + (i0 + i) / share) * H + g * share + (i0 + i) % share) * d;
                        for (int64_t j = 0; j < d; j++) narrow(o[i * wide_d + j] / total[i], out[j]);
                    }
                }
                from = to;
            }
        }
    }
}

// ---------------------------------------------------------------- what ctypes sees; dtype: 0 fp32, 1 bf16, 2 fp16

#define BY_DTYPE(call) switch (dtype) { case 0: { typedef float T; call; break; } case 1: { typedef bf16 T; call; break; } default: { typedef fp16 T; call; } }

extern "C" {
void verbalizer_threads(int n) { omp_set_num_threads(n); }
void verbalizer_scores(int dtype, const void* x, const void* head, int64_t stride, const int32_t* tok, const int32_t* n, float* score,
                       int64_t B, int64_t C, int64_t T_, int64_t D) {
    BY_DTYPE(scores((const T*)x, (const T*)head, stride, tok, n, score, B, C, T_, D))
}
void verbalizer_pool(int dtype, const void* head, int64_t stride, const int32_t* tok, const int32_t* n, float* pooled, int64_t N, int64_t T_, int64_t D) {
    BY_DTYPE(pool((const T*)head, stride, tok, n, pooled, N, T_, D))
}
void verbalizer_likelihood(int dtype, const void* x, const void* head, int64_t stride, const float* bias, const int32_t* tok, float* logp, float* diff,
                           int64_t N, int64_t V, int64_t D) {
    BY_DTYPE(likelihood((const T*)x, (const T*)head, stride, bias, tok, logp, diff, N, V, D))
}
void verbalizer_logits(int dtype, const void* x, const void* head, int64_t stride, const float* bias, float* logit, int64_t users, int64_t V, int64_t D) {
    if (users <= LANES) BY_DTYPE(logits<1>((const T*)x, (const T*)head, stride, bias, logit, users, V, D))
    else if (users <= 2 * LANES) BY_DTYPE(logits<std::min(2, TABLES)>((const T*)x, (const T*)head, stride, bias, logit, users, V, D))
    else BY_DTYPE(logits<TABLES>((const T*)x, (const T*)head, stride, bias, logit, users, V, D))
}
void verbalizer_catalogue(const float* logit, const int64_t* ptr, const int32_t* tok, int64_t items, int64_t users, float* score) {
    catalogue(logit, ptr, tok, items, users, score);
}
void verbalizer_topk(const float* logit, const int64_t* ptr, const int32_t* tok, int64_t items, int64_t users, int64_t k, const int64_t* seen, int64_t S,
                     int64_t* id, float* score) {
    topk(logit, ptr, tok, items, users, k, seen, S, id, score);
}
void verbalizer_rms_norm(int dtype, void* x, const void* add, const void* weight, float eps, void* out, int64_t M, int64_t D) {
    if (dtype == 0) rms_norm((float*)x, (const float*)add, (const float*)weight, eps, (float*)out, M, D);
    else rms_norm((bf16*)x, (const bf16*)add, (const bf16*)weight, eps, (bf16*)out, M, D);
}
void verbalizer_silu_mul(int dtype, void* gate, const void* up, int64_t n) {
    if (dtype == 0) silu_mul((float*)gate, (const float*)up, n);
    else silu_mul((bf16*)gate, (const bf16*)up, n);
}
void verbalizer_attention(int dtype, const void* q, const void* k, const void* v, const void* cos, const void* sin, const void* past_k, const void* past_v,
                          int64_t kept, const int32_t* seg, const int64_t* ptr, int64_t rows, int64_t H, int64_t G, int64_t d, float scale, void* out) {
    if (dtype == 0) attention((const float*)q, (const float*)k, (const float*)v, (const float*)cos, (const float*)sin, (const float*)past_k,
                              (const float*)past_v, kept, seg, ptr, rows, H, G, d, scale, (float*)out);
    else attention((const bf16*)q, (const bf16*)k, (const bf16*)v, (const bf16*)cos, (const bf16*)sin, (const bf16*)past_k,
                   (const bf16*)past_v, kept, seg, ptr, rows, H, G, d, scale, (bf16*)out);
}
int verbalizer_titles_fit(const int32_t* tok, const int32_t* n, int64_t titles, int64_t T_, int64_t V) {
    for (int64_t i = 0; i < titles; i++) {
        if (n[i] < 0 || n[i] > T_) return 0;
        for (int32_t t = 0; t < n[i]; t++) if (tok[i * T_ + t] < 0 || tok[i * T_ + t] >= V) return 0;
    }
    return 1;
}
int verbalizer_lanes() { return LANES; }
int verbalizer_tables() { return TABLES; }
}
