// What a decoder computes between its matrix products, token by token: norm, gated activation, rotary positions, codes.
//
// The fast twins of model/operators.py. Everything is computed in float32 and rounded where torch rounds. A promise:
// each token's result is one fixed sequence of operations, whatever else is in the step and on any number of threads.
// Another instruction set may give other last bits.
#pragma once

#include "simd.h"

#include <stddef.h>

// The `num_lanes` numbers from `index` on, zeros behind them.
INLINE vec load_numbers(const void *p, int64_t index, int num_lanes, int is_bf16) {
    if (num_lanes >= LANES) return is_bf16 ? load_bf16((const uint16_t *)p + index) : load((const float *)p + index);
    uint32_t edge[LANES] = {0};
    if (is_bf16) {
        memcpy(edge, (const uint16_t *)p + index, sizeof(uint16_t) * num_lanes);
        return load_bf16((const uint16_t *)edge);
    }
    memcpy(edge, (const float *)p + index, sizeof(float) * num_lanes);
    return load((const float *)edge);
}

INLINE void store_numbers(void *p, int64_t index, vec v, int num_lanes, int is_bf16) {
    if (num_lanes >= LANES) {
        if (is_bf16) store_bf16((uint16_t *)p + index, v);
        else store((float *)p + index, v);
        return;
    }
    uint32_t edge[LANES];
    if (is_bf16) {
        store_bf16((uint16_t *)edge, v);
        memcpy((uint16_t *)p + index, edge, sizeof(uint16_t) * num_lanes);
    } else {
        store((float *)edge, v);
        memcpy((float *)p + index, edge, sizeof(float) * num_lanes);
    }
}

INLINE vec round_to(vec v, int is_bf16) { return is_bf16 ? round_bf16(v) : v; }

// Root mean square norm of one row, times the weight.
INLINE void norm_row(const void *x, const void *weight, void *y, int64_t row, int width, float epsilon, int is_bf16) {
    const int64_t start = row * width;
    vec squares[4] = {{0}};  // several chains, which do not wait for each other
    int i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const vec v = load_numbers(x, start + i + j * LANES, LANES, is_bf16);
            squares[j] = multiply_add(v, v, squares[j]);
        }
    for (; i < width; i += LANES) {
        const vec v = load_numbers(x, start + i, width - i, is_bf16);
        squares[0] = multiply_add(v, v, squares[0]);
    }
    const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const vec scale = splat(1.0f / sqrtf(sum / (float)width + epsilon));
    for (i = 0; i < width; i += LANES) {
        const vec v = round_to(load_numbers(x, start + i, width - i, is_bf16) * scale, is_bf16);
        store_numbers(y, start + i, load_numbers(weight, i, width - i, is_bf16) * v, width - i, is_bf16);
    }
}

// x / (1 + e^-x), by e^-|x| on either side, which cannot overflow; where that is rounded to bfloat16, by an e^-x that
// may: 200 is far enough, and infinity would be reduced to NaN.
INLINE vec silu(vec x, int is_bf16) {
    const vec zero = {0}, one = splat(1.0f);
    if (is_bf16 && LANES == 16) return x / (one + exp_coarse(minimum(splat(200.0f), zero - x)));
    const ivec is_negative = x < zero;
    const vec power = exp_fine(select_lanes(is_negative, x, zero - x));
    return x * select_lanes(is_negative, power, one) / (one + power);
}

// silu(gate) * up, each rounded before it is used.
INLINE vec gated(vec gate, vec up, int is_bf16) {
    return round_to(silu(round_to(gate, is_bf16), is_bf16), is_bf16) * round_to(up, is_bf16);
}

// One row as codes of 8 bits, x = scale * code with the largest |x| at 127: `num_bytes` of them, zeros behind the row's
// `width`. A row with a NaN or an infinity gets an infinite scale, and so results that are not finite.
INLINE void encode_row(const void *x, uint8_t *codes, float *scale, int64_t row, int width, int num_bytes,
                       int is_bf16) {
    const int64_t start = row * width;
    const vec zero = {0}, infinite = splat(INFINITY);
    vec largest = zero;
    for (int i = 0; i < width; i += LANES) {
        const vec v = load_numbers(x, start + i, width - i, is_bf16);
        largest = maximum(select_lanes(v == v, maximum(v, zero - v), infinite), largest);
    }
    *scale = max_lanes(largest) / 127.0f;
    const float reciprocal = 1.0f / *scale;  // infinite for a row of zeros, or of numbers next to nothing: codes of zero
    const vec inverse = splat(reciprocal < INFINITY ? reciprocal : 0.0f), most = splat(127.0f);
    uint8_t *bytes = codes + row * num_bytes;
    for (int i = 0; i < num_bytes; i += LANES) {
        vec v = (i < width ? load_numbers(x, start + i, width - i, is_bf16) : zero) * inverse;
        v = maximum(minimum(v, most), zero - most);  // 1 / (1 / x) may be a little more than x
        if (i + LANES <= num_bytes) {
            store_codes(bytes + i, v);
        } else {
            uint8_t edge[LANES];
            store_codes(edge, v);
            memcpy(bytes + i, edge, num_bytes - i);
        }
    }
}

// The largest of a row's numbers and the first place that has it; a NaN, wherever one is.
INLINE void find_peak(const float *x, int width, float *peak, int64_t *place) {
    vec largest = splat(-INFINITY);
    ivec places = {0}, now, is_nan = {0};
    for (int i = 0; i < LANES; i++) now[i] = i;
    int i = 0;
    for (; i + LANES <= width; i += LANES, now += LANES) {
        const vec v = load(x + i);
        const ivec is_larger = v > largest;
        largest = select_lanes(is_larger, v, largest);
        places = (now & is_larger) | (places & ~is_larger);
        is_nan |= v != v;
    }
    float lanes[LANES];
    store(lanes, largest);
    *peak = -INFINITY, *place = 0;
    int has_nan = 0;
    for (int lane = 0; lane < LANES; lane++) {
        has_nan |= is_nan[lane] != 0;
        if (lanes[lane] > *peak || (lanes[lane] == *peak && places[lane] < *place)) *peak = lanes[lane], *place = places[lane];
    }
    for (; i < width; i++) {
        has_nan |= x[i] != x[i];
        if (x[i] > *peak) *peak = x[i], *place = i;
    }
    if (has_nan) *peak = NAN;
}

// Queries, keys and values of a step, and where they go. Shapes as in model/operators.py; the cache's in attention.h.
typedef struct {
    const void *qkv;                  // [num_tokens][num_heads + 2 * num_kv_heads][head_dim]
    const float *cosines, *sines;     // [position or token][head_dim]; the sines of the left half are negated
    const int64_t *positions;         // [num_tokens]; NULL where cosines and sines are the tokens' own
    void *q;                          // [num_tokens][num_heads][head_dim]
    void *k_cache, *v_cache;
    const int64_t *blocks, *offsets;  // [num_tokens]: where each token's key and value are kept
    int num_tokens, num_heads, num_kv_heads, head_dim, block_size;
} Rotation;

// Turns the pairs (i, i + head_dim / 2) of one head.
INLINE void rotate_head(const void *x, int64_t from, void *y, int64_t to, const float *cosines, const float *sines,
                        int head_dim, int is_bf16) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; i += LANES) {
        const int n = half - i, j = half + i;
        const vec left = load_numbers(x, from + i, n, is_bf16), right = load_numbers(x, from + j, n, is_bf16);
        const vec turned_left = left * load_numbers(cosines, i, n, 0) + right * load_numbers(sines, i, n, 0);
        const vec turned_right = right * load_numbers(cosines, j, n, 0) + left * load_numbers(sines, j, n, 0);
        store_numbers(y, to + i, turned_left, n, is_bf16);
        store_numbers(y, to + j, turned_right, n, is_bf16);
    }
}
