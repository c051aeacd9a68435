// A decoder's layer, forward only: what is neither attention nor one of torch's products.
#pragma once
#include "product.h"

// x += add (null: nothing to add), out = x / sqrt(mean x^2 + eps) * weight: a residual connection
// and the norm behind it
template <class T>
static void rms_norm(T* x_MD, const T* add_MD, const T* weight_D, float eps, T* out_MD, int64_t M,
                     int64_t D) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        T *x = x_MD + m * D, *out = out_MD + m * D;
        if (add_MD)
            for (int64_t d = 0; d < D; d++) narrow(wide(x[d]) + wide(add_MD[m * D + d]), x[d]);
        float squares[W] = {}, sum = 0;
        int64_t d = 0;
        for (; d + W <= D; d += W)
            for (int j = 0; j < W; j++) squares[j] += wide(x[d + j]) * wide(x[d + j]);
        for (; d < D; d++) squares[0] += wide(x[d]) * wide(x[d]);
        for (int j = 0; j < W; j++) sum += squares[j];
        const float scale = 1 / std::sqrt(sum / D + eps);
        for (d = 0; d < D; d++) narrow(wide(x[d]) * scale * wide(weight_D[d]), out[d]);
    }
}

// gate = gate / (1 + e^-gate) * up
template <class T>
static void silu_mul(T* __restrict gate, const T* __restrict up, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < n; first += 4096) {
        const int64_t last = std::min(n, first + 4096);
        for (int64_t i = first; i < last; i++) {
            const float g = wide(gate[i]);
            const float e = exp_negative(-std::fabs(g));  // e^-|g|: never overflows
            narrow(g * (g < 0 ? e : 1.f) / (1 + e) * wide(up[i]), gate[i]);
        }
    }
}
