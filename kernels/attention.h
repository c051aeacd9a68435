// Attention of a decoder's packed rows, forward only.
//
// Rows stand one behind the other. Token i of row b (ptr[b] <= i < ptr[b + 1]) sees
//   the prefix (`kept` keys),
//   its row's segment 0: up to itself if it belongs to it, else all of it,
//   its own segment up to itself.
// Segments come in order. The H / G heads that share keys stand side by side, like more queries. A
// job keeps the scores of MR queries with all their keys, so the softmax needs no running maximum.
#pragma once
#include "product.h"

const int V2 = 2 * W;  // columns of v at a time

// the inputs
template <class T>
struct PackedRows {
    const T *q_MHd, *k_MGd, *v_MGd;  // as projected: positions are applied here
    const T *cos_Md, *sin_Md;        // of the tokens' positions
    const T *past_k, *past_v;        // (G, kept, d): the prefix's
    int64_t kept;                    // tokens of the prefix
    const int32_t* seg_M;
    const int64_t* ptr;
    int64_t rows, H, G, d;
    float scale;  // of q . k
};

// out[j] = in[j] cos[j] - in[j + d/2] sin[j], and
// out[j + d/2] = in[j + d/2] cos[j + d/2] + in[j] sin[j + d/2]   (rotary positions)
template <class T, class C>
static inline void rotate(const T* in, const T* cos, const T* sin, int64_t d, C* out) {
    for (int64_t j = 0; j < d / 2; j++) {
        const float a = wide(in[j]), b = wide(in[j + d / 2]);
        narrow(a * wide(cos[j]) - b * wide(sin[j]), out[j]);
        narrow(b * wide(cos[j + d / 2]) + a * wide(sin[j + d / 2]), out[j + d / 2]);
    }
}

// a number of keys in whole registers
static inline int64_t in_blocks(int64_t keys) { return (keys + NR - 1) / NR * NR; }

// a thread's own memory; `most`: keys that a query can see, in whole blocks
template <class T>
struct AttentionRoom {
    typedef factor<T> C;
    std::vector<C> turned;              // the keys of a row, rotated
    std::vector<C> keys, own_keys;      // packed: those that all see, those of a segment
    std::vector<C> values, own_values;  // packed likewise
    std::vector<C> q, p;                // MR queries, rotated, and their softmax
    std::vector<float> s, o;            // their scores, and what they attend to

    AttentionRoom(int64_t longest, int64_t most, int64_t K, int64_t wide_d)
        : turned((longest + 1) * K),
          keys(most * K),
          own_keys(most * K),
          values(most * wide_d),
          own_values(most * wide_d),
          q(MR * 2 * K),
          p(MR * 2 * most),
          s(MR * 2 * most),
          o(MR * wide_d) {}
};

// one row's tokens and one group of heads that share keys
template <class T>
struct RowOfHeads {
    typedef factor<T> C;
    const PackedRows<T>& in;
    AttentionRoom<T>& room;
    int64_t g;       // the group
    int64_t t0, n;   // the row's first token, and how many it has
    int64_t tail;    // tokens of segment 0
    int64_t all;     // keys that every token of a later segment sees: the prefix, then segment 0
    int64_t share;   // heads of the group
    int64_t K;       // d in whole units
    int64_t wide_d;  // d in whole blocks of columns

    void rotate_keys() {
        const int64_t d = in.d;
        for (int64_t t = 0; t < n; t++)
            rotate(in.k_MGd + ((t0 + t) * in.G + g) * d, in.cos_Md + (t0 + t) * d,
                   in.sin_Md + (t0 + t) * d, d, room.turned.data() + t * K);
    }

    // key i, counted from the prefix's first, into column c of a packed tile
    void put_key(int64_t i, int64_t c, C* to) const {
        const int u = unit<C>();
        const int64_t d = in.d;
        if (i < in.kept)
            for (int64_t j = 0; j < d; j++)
                put(in.past_k[(g * in.kept + i) * d + j], to[(j / u * NR + c) * u + j % u]);
        else
            for (int64_t j = 0; j < d; j++)
                to[(j / u * NR + c) * u + j % u] = room.turned[(i - in.kept) * K + j];
    }

    const T* value(int64_t i) const {
        if (i < in.kept) return in.past_v + (g * in.kept + i) * in.d;
        return in.v_MGd + ((t0 + i - in.kept) * in.G + g) * in.d;
    }

    void pack_keys(int64_t from, int64_t to, C* out) const {
        std::memset((void*)out, 0, sizeof(C) * in_blocks(to - from) * K);
        for (int64_t i = from; i < to; i++)
            put_key(i, (i - from) % NR, out + (i - from) / NR * NR * K);
    }

    // packed as [columns / V2][keys / unit][V2][unit]
    void pack_values(int64_t from, int64_t to, C* out) const {
        const int u = unit<C>();
        const int64_t high = in_blocks(to - from);
        std::memset((void*)out, 0, sizeof(C) * high * wide_d);
        for (int64_t i = 0; i < to - from; i++) {
            const T* row = value(from + i);
            for (int64_t j = 0; j < in.d; j++)
                put(row[j], out[j / V2 * V2 * high + (i / u * V2 + j % V2) * u + i % u]);
        }
    }

    // query i of the row: token i / share, head i % share of the group; its place in q and out
    int64_t place(int64_t i) const {
        return ((t0 + i / share) * in.H + g * share + i % share) * in.d;
    }

    void pack_queries(int64_t i0, int64_t count) {
        std::memset((void*)room.q.data(), 0, sizeof(C) * MR * K);
        for (int64_t i = 0; i < count; i++) {
            const int64_t t = t0 + (i0 + i) / share;
            rotate(in.q_MHd + place(i0 + i), in.cos_Md + t * in.d, in.sin_Md + t * in.d, in.d,
                   room.q.data() + i * K);
        }
    }
};

// p = e^(scale s - its maximum) of a row of n scores; those from `until` to `wide_seen` and from
// `wide_seen + mine` on count as -inf. Returns the sum of p
template <class C>
static inline float softmax_sum(float* s, C* p, int64_t n, int64_t until, int64_t wide_seen,
                                int64_t mine, float scale) {
    float lanes[W], sum[W] = {};
    for (int64_t c = until; c < wide_seen; c++) s[c] = -INFINITY;
    for (int64_t c = wide_seen + mine; c < n; c++) s[c] = -INFINITY;
    std::fill(lanes, lanes + W, -INFINITY);
    for (int64_t c = 0; c < n; c += W)
        for (int j = 0; j < W; j++) lanes[j] = s[c + j] > lanes[j] ? s[c + j] : lanes[j];
    const float top = *std::max_element(lanes, lanes + W) * scale;
    for (int64_t c = 0; c < n; c += W)
        for (int j = 0; j < W; j++) {
            const float e = exp_negative(s[c + j] * scale - top);
            sum[j] += e;
            narrow(e, p[c + j]);
        }
    float total = 0;
    for (int j = 0; j < W; j++) total += sum[j];
    return total;
}

// some queries of one segment
struct Queries {
    int64_t from, to;     // the segment's tokens, counted in their row
    bool tail;            // is it segment 0?
    int64_t first, last;  // the queries
};

// what these queries attend to
template <class T>
static void attend(RowOfHeads<T>& row, const Queries& of, T* out_MHd) {
    typedef factor<T> C;
    const int u = unit<C>();
    const PackedRows<T>& in = row.in;
    AttentionRoom<T>& room = row.room;
    const int64_t kept = in.kept, share = row.share, K = row.K, wide_d = row.wide_d;
    const int64_t high = in_blocks(row.all), own_high = in_blocks(of.to - of.from);
    const bool tail = of.tail;
    float *s = room.s.data(), *o = room.o.data();
    C *q = room.q.data(), *p = room.p.data();
    for (int64_t i0 = of.first; i0 < of.last; i0 += MR) {
        const int64_t count = std::min<int64_t>(MR, of.last - i0), end = (i0 + count - 1) / share;
        row.pack_queries(i0, count);
        const int64_t wide_seen = in_blocks(tail ? kept + end + 1 : row.all);
        const int64_t wide_own = tail ? 0 : in_blocks(end + 1 - of.from), ld = wide_seen + wide_own;
        for (int64_t c = 0; c < wide_seen; c += NR)
            block<NV>(q, K, u, room.keys.data() + c * K, K, s + c, ld, false);
        for (int64_t c = 0; c < wide_own; c += NR)
            block<NV>(q, K, u, room.own_keys.data() + c * K, K, s + wide_seen + c, ld, false);
        float total[MR];
        for (int64_t i = 0; i < MR; i++) {
            const int64_t t = (i0 + std::min(i, count - 1)) / share;
            const int64_t until = tail ? kept + t + 1 : row.all, mine = tail ? 0 : t + 1 - of.from;
            total[i] = softmax_sum(s + i * ld, p + i * ld, ld, until, wide_seen, mine, in.scale);
        }
        for (int64_t j = 0; j < wide_d; j += V2) {
            block<2>(p, ld, u, room.values.data() + j * high, wide_seen, o + j, wide_d, false);
            if (wide_own)
                block<2>(p + wide_seen, ld, u, room.own_values.data() + j * own_high, wide_own,
                         o + j, wide_d, true);
        }
        for (int64_t i = 0; i < count; i++) {
            T* out = out_MHd + row.place(i0 + i);
            for (int64_t j = 0; j < in.d; j++) narrow(o[i * wide_d + j] / total[i], out[j]);
        }
    }
}

// the queries of part `part` of `parts` of each segment of the row
template <class T>
static void attend_row(RowOfHeads<T>& row, int64_t part, int64_t parts, T* out_MHd) {
    const PackedRows<T>& in = row.in;
    AttentionRoom<T>& room = row.room;
    row.rotate_keys();
    row.pack_keys(0, row.all, room.keys.data());
    row.pack_values(0, row.all, room.values.data());
    for (int64_t from = 0; from < row.n;) {
        int64_t to = from;
        while (to < row.n && in.seg_M[row.t0 + to] == in.seg_M[row.t0 + from]) to++;
        const bool tail = from == 0 && row.tail > 0;
        const int64_t queries = (to - from) * row.share;
        const int64_t first = from * row.share + queries * part / parts;
        const int64_t last = from * row.share + queries * (part + 1) / parts;
        if (!tail && first < last) {
            row.pack_keys(in.kept + from, in.kept + to, room.own_keys.data());
            row.pack_values(in.kept + from, in.kept + to, room.own_values.data());
        }
        attend(row, Queries{from, to, tail, first, last}, out_MHd);
        from = to;
    }
}

template <class T>
static void attention(const PackedRows<T>& in, T* out_MHd) {
    const int64_t jobs = in.rows * in.G, share = in.H / in.G;
    const int64_t wide_d = (in.d + V2 - 1) / V2 * V2, K = padded<factor<T>>(in.d);
    // of a row's queries: more than one only where rows and groups are few
    const int64_t wanted = 4 * omp_get_max_threads() / std::max<int64_t>(1, jobs);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(8, wanted));
    int64_t longest = 0;
    for (int64_t b = 0; b < in.rows; b++) longest = std::max(longest, in.ptr[b + 1] - in.ptr[b]);
#pragma omp parallel
    {
        AttentionRoom<T> room(longest, in_blocks(in.kept + longest), K, wide_d);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < jobs * parts; job++) {
            const int64_t b = job / (in.G * parts), g = job / parts % in.G;
            const int64_t t0 = in.ptr[b], n = in.ptr[b + 1] - t0;
            int64_t tail = 0;
            while (tail < n && in.seg_M[t0 + tail] == 0) tail++;
            RowOfHeads<T> row{in, room, g, t0, n, tail, in.kept + tail, share, K, wide_d};
            attend_row(row, job % parts, parts, out_MHd);
        }
    }
}
