// 16-bit numbers, and what all loops need: widening, rounding, e^x.
#pragma once
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

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

static inline float wide(float v) { return v; }
static inline float wide(bf16 v) {
    uint32_t u = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline float wide(fp16 v) {
#ifdef __F16C__
    return _cvtsh_ss(v.bits);
#else
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, e = (v.bits >> 10) & 31,
                   m = v.bits & 1023;
    if (e == 0) return (sign ? -1 : 1) * std::ldexp(float(m), -24);
    const uint32_t u = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | (m << 13);
    float f;
    std::memcpy(&f, &u, 4);
    return f;
#endif
}
static inline void narrow(float v, float& out) { out = v; }
// rounds to the nearest, ties to even; v is finite
static inline void narrow(float v, bf16& out) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    out.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// stores a number in a place that is at least as wide
static inline void put(float v, float& out) { out = v; }
static inline void put(bf16 v, bf16& out) { out = v; }
static inline void put(bf16 v, float& out) { out = wide(v); }
static inline void put(fp16 v, float& out) { out = wide(v); }

// two neighbours at once: compilers then work on whole registers of them
static inline void put_pair(bf16 first, bf16 second, bf16* out) {
    const uint32_t both = uint32_t(second.bits) << 16 | first.bits;
    std::memcpy((void*)out, &both, 4);
}
static inline void narrow_pair(float first, float second, bf16* out) {
    bf16 a, b;
    narrow(first, a), narrow(second, b);
    put_pair(a, b, out);
}

// e^x for x <= 0 to 2e-7 relative: x = k ln 2 + r with |r| <= ln 2 / 2, e^r by its series;
// 0 below -87
static inline float exp_negative(float x) {
    const float y = x < -87.f ? -87.f : x;
    const float big = 12582912.f;  // adding and taking 1.5 * 2^23 rounds to an integer
    const float k = (y * 1.44269504f + big) - big;
    const float r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    const int32_t bits = (int32_t(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.f ? 0.f : p * power;
}

// a row of n elements in fp32, in `room`
template <class T>
static inline const float* widened(const T* row, float* room, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    if constexpr (std::is_same<T, fp16>::value)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + i))));
#endif
    for (; i < n; i++) room[i] = wide(row[i]);
    return room;
}
