// Title likelihood: log probabilities of tokens, and their gradients, without the N x V logits.
//
// logp[i] = l_i[tok[i]] - log sum_v e^{l_i[v]}, l_i = head x_i + bias; and if diff is wanted,
// diff[i] = head[tok[i]] - sum_v softmax(l_i)[v] head[v], the gradient of logp[i] with respect to
// x_i. One pass over the head in tiles of its rows, as attention passes over its keys: a running
// maximum m, sum s and weighted sum E of rows, rescaled when m grows. Of the N x V logits a thread
// holds TILE x NR, in its cache; the rows of x stand across the registers, so that the head is read
// as it lies and maxima and sums need no shuffling.
#pragma once
#include "product.h"

// rows of the head at a time, in whole blocks: two panels of so many stay in the first cache
const int64_t TILE = W == 16 ? 192 : 96;
static_assert(TILE % MR == 0, "a tile's last block would write behind it");
const int64_t CHUNK = 192;  // rows of x in a job, in whole panels
static_assert(CHUNK % NR == 0, "a chunk's last panel would write behind it");
const int64_t STRIPS_PACKED = 8;  // strips of the head's columns that are packed at a time

// the inputs
template <class T>
struct LogProbs {
    const T* x_ND;
    const T* head_VD;
    int64_t stride;        // elements from a row of the head to the next
    const float* bias_V;   // null where there is none
    const int32_t* tok_N;  // the token whose log probability is asked, for each row of x; null:
                           // none, and logp is - log sum_v e^{l_i[v]}
    int64_t N, V, D;
    bool gradient;  // is diff wanted?
};

// what was summed so far, over each part of the head, for every row of x
struct Running {
    std::vector<Strip> strips;  // of D
    int64_t all;                // rows of x in whole chunks
    int64_t wide_D;             // D in whole registers
    std::vector<float> m;       // (parts, all): the largest logit
    std::vector<float> s;       // (parts, all): the sum of e^(l - m)
    std::vector<float> E;  // (parts, all, wide_D): the sum of e^(l - m) head, with gradients only
    std::vector<float> pick;  // (all): the logit of the row's own token

    Running(int64_t parts, int64_t all, int64_t D, bool gradient)
        : strips(strips_of(D)),
          all(all),
          wide_D((D + W - 1) / W * W),
          m(parts * all, -INFINITY),
          s(parts * all, 0.f),
          E(gradient ? parts * all * wide_D : 0, 0.f),
          pick(all, 0.f) {}
};

// a thread's own memory
template <class T>
struct LikelihoodRoom {
    typedef factor<T> C;
    std::vector<float> l;   // the logits of a tile: TILE x NR
    std::vector<C> x;       // the rows of x of a job, packed
    std::vector<C> rows;    // rows of the head that are copied
    std::vector<C> p;       // e^(l - m) of a tile and a job, packed, with gradients only
    std::vector<C> values;  // a strip of a tile of the head, packed across, with gradients only

    LikelihoodRoom(int64_t K, bool gradient)
        : l(TILE * NR),
          x(CHUNK * K),
          rows(MR * K),
          p(gradient ? TILE * CHUNK : 0),
          values(gradient ? TILE * STRIPS_PACKED * NR : 0) {}
};

// l[v, j] for n rows of the head from v0 on and NR rows of x, packed; `copied` has room for MR rows
template <class T, class C>
static inline void tile_logits(const LogProbs<T>& in, int64_t v0, int64_t n, const C* x, C* copied,
                               float* l) {
    for (int64_t v = 0; v < n; v += MR)
        logit_block<NV>(in.head_VD + (v0 + v) * in.stride, in.stride, n - v, in.D, x, copied,
                        l + v * NR);
    if (in.bias_V)
        for (int64_t v = 0; v < n; v++)
            for (int j = 0; j < NR; j++) l[v * NR + j] += in.bias_V[v0 + v];
}

// the logits of the rows' own tokens, where they stand in the tile
template <class T>
static inline void pick_own(const LogProbs<T>& in, int64_t v0, int64_t n, int64_t i0,
                            const float* l, float* pick) {
    if (!in.tok_N) return;
    for (int64_t i = i0; i < std::min(in.N, i0 + NR); i++)
        if (in.tok_N[i] >= v0 && in.tok_N[i] < v0 + n)
            pick[i] = l[(in.tok_N[i] - v0) * NR + i - i0];
}

// for NR rows of x: the largest logit now, and what the sums so far are multiplied by
struct Grown {
    float top[NR], shrink[NR];
};

// adds n x NR logits to the sums s of NR rows of x, whose maxima were m; l becomes e^(l - top)
static inline Grown absorb(float* l, int64_t n, const float* m, float* s) {
    float top[NR], shrink[NR], sum[NR] = {};
    std::copy(m, m + NR, top);
    for (int64_t v = 0; v < n; v++)
        for (int j = 0; j < NR; j++) top[j] = l[v * NR + j] > top[j] ? l[v * NR + j] : top[j];
    for (int64_t v = 0; v < n; v++)
        for (int j = 0; j < NR; j++) {
            const float e = exp_negative(l[v * NR + j] - top[j]);
            l[v * NR + j] = e;
            sum[j] += e;
        }
    for (int j = 0; j < NR; j++) {
        shrink[j] = exp_negative(m[j] - top[j]);
        s[j] = s[j] * shrink[j] + sum[j];
    }
    Grown grown;
    std::copy(top, top + NR, grown.top);
    std::copy(shrink, shrink + NR, grown.shrink);
    return grown;
}

// rescales the sums E of NR rows of x, and packs the weights room.l of n rows of the head in p
template <class T, class C>
static inline void keep_weights(const Grown& grown, const float* m, int64_t n, int64_t wide_D,
                                LikelihoodRoom<T>& room, C* p, float* E) {
    constexpr int u = unit<C>();
    const int64_t high = padded<C>(n);
    float* l = room.l.data();
    for (int j = 0; j < NR; j++)
        if (grown.top[j] > m[j]) {
            const float shrink = grown.shrink[j];
            for (int64_t d = 0; d < wide_D; d++) E[j * wide_D + d] *= shrink;
        }
    for (int64_t v = n; v < high; v++)
        for (int j = 0; j < NR; j++) l[v * NR + j] = 0;
    if constexpr (u == 2)
        for (int64_t v = 0; v < high; v += 2)
            for (int j = 0; j < NR; j++)
                narrow_pair(l[v * NR + j], l[(v + 1) * NR + j], p + v * NR + 2 * j);
    else
        for (int64_t at = 0; at < high * NR; at++) narrow(l[at], p[at]);
}

// adds n rows of the head from v0 on, weighted by room.p, to the sums E of `count` rows of x: a
// few strips of columns at a time, which stay in the cache for all of these rows
template <class T>
static inline void absorb_rows(const LogProbs<T>& in, const std::vector<Strip>& strips, int64_t v0,
                               int64_t n, int64_t count, LikelihoodRoom<T>& room, int64_t wide_D,
                               float* E) {
    typedef factor<T> C;
    constexpr int left = NR % MR;  // of NR rows of x, behind the whole blocks
    const int u = unit<C>();
    const int64_t high = padded<C>(n), n_strips = strips.size();
    for (int64_t s0 = 0; s0 < n_strips; s0 += STRIPS_PACKED) {
        const int64_t s1 = std::min(n_strips, s0 + STRIPS_PACKED), d0 = strips[s0].first;
        C* values = room.values.data();
        for (int64_t s = s0; s < s1; s++)
            pack_across(in.head_VD + v0 * in.stride + strips[s].first, in.stride, n,
                        strips[s].columns, strips[s].width(),
                        values + (strips[s].first - d0) * TILE);
        for (int64_t i = 0; i < count; i += NR)
            for (int64_t s = s0; s < s1; s++) {
                const C* b = values + (strips[s].first - d0) * TILE;
                const C* p = room.p.data() + i * TILE;
                float* sums = E + i * wide_D + strips[s].first;
                for (int j = 0; j + MR <= NR; j += MR)
                    block_of(strips[s].registers, p + j * u, u, NR * u, b, high, sums + j * wide_D,
                             wide_D, true);
                if constexpr (left > 0)
                    block_of<left>(strips[s].registers, p + (NR - left) * u, u, NR * u, b, high,
                                   sums + (NR - left) * wide_D, wide_D, true);
            }
    }
}

// the rows n0 .. n0 + CHUNK of x over the rows first .. last of the head
template <class T>
static void sum_part(const LogProbs<T>& in, int64_t part, int64_t n0, int64_t first, int64_t last,
                     LikelihoodRoom<T>& room, Running& to) {
    typedef factor<T> C;
    const int64_t D = in.D, K = padded<C>(D), end = std::min(in.N, n0 + CHUNK);
    for (int64_t i = n0; i < end; i += NR)
        pack(in.x_ND + i * D, D, std::min<int64_t>(NR, in.N - i), D, NR,
             room.x.data() + (i - n0) * K);
    for (int64_t v0 = first; v0 < last; v0 += TILE) {
        const int64_t n = std::min(TILE, last - v0);
        for (int64_t i0 = n0; i0 < end; i0 += NR) {
            const int64_t at = part * to.all + i0;
            float* m = to.m.data() + at;
            tile_logits(in, v0, n, room.x.data() + (i0 - n0) * K, room.rows.data(), room.l.data());
            pick_own(in, v0, n, i0, room.l.data(), to.pick.data());
            const Grown grown = absorb(room.l.data(), n, m, to.s.data() + at);
            if (in.gradient)
                keep_weights(grown, m, n, to.wide_D, room, room.p.data() + (i0 - n0) * TILE,
                             to.E.data() + at * to.wide_D);
            std::copy(grown.top, grown.top + NR, m);
        }
        if (in.gradient)
            absorb_rows(in, to.strips, v0, n, end - n0, room, to.wide_D,
                        to.E.data() + (part * to.all + n0) * to.wide_D);
    }
}

// writes row i of the results: joins the parts of the head, in their order
template <class T>
static void join_parts(const LogProbs<T>& in, int64_t i, int64_t parts, const Running& from,
                       float* logp_N, float* diff_ND) {
    const int64_t D = in.D, all = from.all;
    const std::vector<float>&m = from.m, &s = from.s;
    float top = -INFINITY, sum = 0;
    for (int64_t part = 0; part < parts; part++) top = std::max(top, m[part * all + i]);
    for (int64_t part = 0; part < parts; part++)
        sum += s[part * all + i] * exp_negative(m[part * all + i] - top);
    logp_N[i] = from.pick[i] - (top + std::log(sum));
    if (!in.gradient) return;
    const T* own = in.tok_N ? in.head_VD + int64_t(in.tok_N[i]) * in.stride : nullptr;
    for (int64_t d = 0; d < D; d++) diff_ND[i * D + d] = own ? wide(own[d]) : 0.f;
    for (int64_t part = 0; part < parts; part++) {
        const float w = exp_negative(m[part * all + i] - top) / sum;
        const float* E = from.E.data() + (part * all + i) * from.wide_D;
        for (int64_t d = 0; d < D; d++) diff_ND[i * D + d] -= w * E[d];
    }
}

template <class T>
static void likelihood(const LogProbs<T>& in, float* logp_N, float* diff_ND) {
    const int64_t N = in.N, V = in.V, chunks = (N + CHUNK - 1) / CHUNK;
    // of the head: more than one only where chunks are few
    const int64_t parts =
        std::max<int64_t>(1, std::min(16 / std::max<int64_t>(1, chunks), V / 1024));
    const int64_t K = padded<factor<T>>(in.D);
    Running sums(parts, chunks * CHUNK, in.D, in.gradient);
#pragma omp parallel
    {
        LikelihoodRoom<T> room(K, in.gradient);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < chunks * parts; job++) {
            const int64_t part = job / chunks;
            sum_part(in, part, job % chunks * CHUNK, V * part / parts, V * (part + 1) / parts, room,
                     sums);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; i++) join_parts(in, i, parts, sums, logp_N, diff_ND);
    }
}
