// The few vector operations that the kernels need, at the width of the instruction set they are compiled for.
//
// Every operation goes lane by lane, and multiply-add is fused or not by decision, never by the optimiser (the build
// forbids contraction): a number depends on its operands only, not on the loop it stands in. All are exact or correctly
// rounded but for the exponentials, and instructions on bfloat16, which take numbers below 2^-126 for zero.
// Needs GCC or clang vector extensions and a little-endian machine. Knows nothing about attention.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#endif

#define TILE (2 * LANES)  // outputs of a matrix that are packed together; see matrix.h

#define INLINE static inline __attribute__((always_inline))

INLINE int min_int(int a, int b) { return a < b ? a : b; }

INLINE int max_int(int a, int b) { return a > b ? a : b; }

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE uvec load_words(const void *p) {
    uvec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE void store_words(uint32_t *p, uvec v) { memcpy(p, &v, sizeof v); }

// Subtracting zero keeps every value, the sign of zero included.
INLINE vec splat(float x) { return x - (vec){0}; }

INLINE uvec splat_word(uint32_t x) { return x - (uvec){0}; }

INLINE vec select_lanes(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

// a * b + c: one rounding where the machine has a fused instruction, two where it has not.
INLINE vec multiply_add(vec a, vec b, vec c) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vec maximum(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

INLINE vec minimum(vec a, vec b) {
#if LANES == 16
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select_lanes(a < b, a, b);
#endif
}

// c plus two products of bfloat16 per lane, rounded to float32; for code that asked HAS_BF16_DOT before.
#if defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
INLINE vec dot_bf16(uvec a, uvec b, vec c) { return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#else
#define HAS_BF16_DOT 0
INLINE vec dot_bf16(uvec a, uvec b, vec c) {
    (void)a, (void)b;
    return c;
}
#endif

// c plus four products of 8-bit codes per lane, exactly: those of a with CODE_OFFSET added, those of b signed; for code
// that asked HAS_CODE_DOT before. CODE_OFFSET is added to all codes of x: see matrix.h.
#if defined(__AVX512VNNI__)
#define HAS_CODE_DOT 1
#define CODE_OFFSET 128
INLINE ivec dot_codes(uvec a, uvec b, ivec c) { return (ivec)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }
#else
#define HAS_CODE_DOT 0
#define CODE_OFFSET 0
INLINE ivec dot_codes(uvec a, uvec b, ivec c) {
    (void)a, (void)b;
    return c;
}
#endif

typedef int16_t halves __attribute__((vector_size(4 * LANES)));

// c plus the two products of signed 16-bit numbers in each lane.
INLINE ivec dot_halves(uvec a, uvec b, ivec c) {
#if LANES == 16
    return c + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8
    return c + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const ivec first = (((ivec)a << 16) >> 16) * (((ivec)b << 16) >> 16);
    return c + first + ((ivec)a >> 16) * ((ivec)b >> 16);
#endif
}

// A 32-bit word holds four signed codes: the first and the third of them, and the others, as 16-bit numbers.
INLINE uvec even_codes(uvec codes) { return (uvec)(((halves)codes << 8) >> 8); }

INLINE uvec odd_codes(uvec codes) { return (uvec)((halves)codes >> 8); }

// A 32-bit word holds two bfloat16: the first in its low half.
INLINE vec first_bf16(uvec pairs) { return (vec)(pairs << 16); }

INLINE vec second_bf16(uvec pairs) { return (vec)(pairs & 0xffff0000u); }

#if LANES == 16
typedef uint16_t half_words __attribute__((vector_size(32)));
#elif LANES == 8
typedef uint16_t half_words __attribute__((vector_size(16)));
#else
typedef uint16_t half_words __attribute__((vector_size(8)));
#endif

INLINE vec load_bf16(const uint16_t *p) {
    half_words halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, uvec) << 16);
}

// Each lane rounded to bfloat16, to nearest, ties to even; a NaN stays one. (The machine's own instruction takes numbers
// below 2^-126 for zero.)
INLINE vec round_bf16(vec v) {
#if HAS_BF16_DOT
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#endif
    const uvec bits = (uvec)v;
    const uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return select_lanes(v == v, (vec)rounded, (vec)splat_word(0x7fc00000u));
}

INLINE void store_bf16(uint16_t *p, vec v) {
#if HAS_BF16_DOT
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const half_words halves = __builtin_convertvector((uvec)round_bf16(v) >> 16, half_words);
#endif
    memcpy(p, &halves, sizeof halves);
}

#if LANES == 16
typedef uint8_t code_bytes __attribute__((vector_size(16)));
#elif LANES == 8
typedef uint8_t code_bytes __attribute__((vector_size(8)));
#else
typedef uint8_t code_bytes __attribute__((vector_size(4)));
#endif

// Rounds to nearest, ties to even, numbers within +-127 to codes.
INLINE void store_codes(uint8_t *p, vec v) {
    const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const code_bytes codes = __builtin_convertvector((uvec)(v + rounder) + CODE_OFFSET, code_bytes);
    memcpy(p, &codes, sizeof codes);
}

// Halves are added to each other until one number is left. (Clang does not promise an order for the intrinsic.)
INLINE float sum_lanes(vec v) {
#if LANES == 16 && !defined(__clang__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float max_lanes(vec v) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// e^x for x up to 80, within 2 units in the last place; 0 below -87; NaN stays NaN. Cody and Waite's reduction
// x = n ln 2 + r with |r| <= ln 2 / 2, then the degree-6 polynomial of the Cephes library (Moshier) for e^r.
INLINE vec exp_fine(vec x) {
    const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const ivec is_tiny = x < splat(-87.0f);
    x = select_lanes(is_tiny, splat(-87.0f), x);
    const vec shifted = multiply_add(x, splat(1.44269504088896341f), rounder);
    const vec n = shifted - rounder;
    vec r = multiply_add(n, splat(-0.693359375f), x);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(p * r, r, r + splat(1.0f));
    const vec power_of_two = (vec)(((ivec)shifted - (ivec)rounder + 127) << 23);
    return select_lanes(is_tiny, splat(0.0f), p * power_of_two);
}

// e^x to a few millionths, for results that are rounded to bfloat16; 0 below -87; NaN stays NaN. 2^t = 2^n 2^f with n
// the integer nearest to t, and a polynomial of the least relative error for 2^f, |f| <= 1/2, that is 1 at f = 0.
INLINE vec exp_coarse(vec x) {
#if LANES == 16
    const __m512 t = (__m512)(x * splat(1.44269504088896341f));
    const __mmask16 is_tiny = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-125.0f), _CMP_LT_OQ);
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec f = (vec)t - (vec)n;
    vec p = splat(9.582852944731712e-3f);
    p = multiply_add(p, f, splat(5.5906426161527634e-2f));
    p = multiply_add(p, f, splat(0.24024099111557007f));
    p = multiply_add(p, f, splat(0.6931241750717163f));
    p = multiply_add(p, f, splat(1.0f));
    return (vec)_mm512_mask_scalef_ps(_mm512_setzero_ps(), (__mmask16)~is_tiny, (__m512)p, n);
#else
    return exp_fine(x);
#endif
}
