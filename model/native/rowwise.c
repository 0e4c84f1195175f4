// What a decoder computes between its matrix products, token by token: norm, gated activation, rotary positions.
//
// The fast twins of model/operators.py. Everything is computed in float32 and rounded where torch rounds. A promise:
// each token's result is one fixed sequence of operations, whatever else is in the step and on any number of threads.
// Another instruction set may give other last bits.
#include "simd.h"

#include <stddef.h>

#define PARALLEL_NUMBERS (1 << 16)  // below so many, waking other threads takes longer than they save

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

INLINE void norm_row(const void *x, const void *weight, void *y, int64_t row, int width, float epsilon, int is_bf16) {
    const int64_t start = row * width;
    vec squares = {0};
    for (int i = 0; i < width; i += LANES) {
        const vec v = load_numbers(x, start + i, width - i, is_bf16);
        squares = multiply_add(v, v, squares);
    }
    const vec scale = splat(1.0f / sqrtf(sum_lanes(squares) / (float)width + epsilon));
    for (int i = 0; i < width; i += LANES) {
        const vec v = round_to(load_numbers(x, start + i, width - i, is_bf16) * scale, is_bf16);
        store_numbers(y, start + i, load_numbers(weight, i, width - i, is_bf16) * v, width - i, is_bf16);
    }
}

// x / (1 + e^-x), by e^-|x| on either side, which cannot overflow.
INLINE vec silu(vec x) {
    const vec zero = {0}, one = splat(1.0f);
    const ivec is_negative = x < zero;
    const vec power = exp_nonpositive(select_lanes(is_negative, x, zero - x));
    return x * select_lanes(is_negative, power, one) / (one + power);
}

INLINE void silu_mul_row(const void *gate_up, void *y, int64_t row, int width, int is_bf16) {
    const int64_t gate = 2 * row * width, up = gate + width;
    for (int i = 0; i < width; i += LANES) {
        const vec activated = round_to(silu(load_numbers(gate_up, gate + i, width - i, is_bf16)), is_bf16);
        const vec result = activated * load_numbers(gate_up, up + i, width - i, is_bf16);
        store_numbers(y, row * width + i, result, width - i, is_bf16);
    }
}

// Queries, keys and values of a step, and where they go. Shapes as in model/operators.py.
typedef struct {
    const void *qkv;                  // [num_tokens][num_heads + 2 * num_kv_heads][head_dim]
    const float *cosines, *sines;     // [num_tokens][head_dim]; the sines of the left half are negated
    void *q;                          // [num_tokens][num_heads][head_dim]
    void *k_cache, *v_cache;          // [num_blocks][num_kv_heads][block_size][head_dim]
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

INLINE void rotate_token(const Rotation *r, int64_t token, int is_bf16) {
    const int heads = r->num_heads, kv_heads = r->num_kv_heads, dim = r->head_dim, bytes = is_bf16 ? 2 : 4;
    const float *cosines = r->cosines + token * dim, *sines = r->sines + token * dim;
    const int64_t from = token * (heads + 2 * kv_heads) * dim;
    for (int head = 0; head < heads; head++)
        rotate_head(r->qkv, from + head * dim, r->q, (token * heads + head) * dim, cosines, sines, dim, is_bf16);
    for (int head = 0; head < kv_heads; head++) {
        const int64_t position = (r->blocks[token] * kv_heads + head) * r->block_size + r->offsets[token];
        const int64_t key = from + (heads + head) * dim, value = from + (heads + kv_heads + head) * dim;
        rotate_head(r->qkv, key, r->k_cache, position * dim, cosines, sines, dim, is_bf16);
        memcpy((char *)r->v_cache + position * dim * bytes, (const char *)r->qkv + value * bytes, dim * bytes);
    }
}

INLINE int worth_threads(int num_rows, int width) { return (int64_t)num_rows * width >= PARALLEL_NUMBERS; }

// A loop over rows, on several threads where `num_threads` and `is_parallel` of the function around it say so.
#if defined(_OPENMP)
#define FOR_ROWS(count) \
    _Pragma("omp parallel for num_threads(num_threads) if (is_parallel)") for (int64_t row = 0; row < (count); row++)
#else
#define FOR_ROWS(count) (void)num_threads, (void)is_parallel; for (int64_t row = 0; row < (count); row++)
#endif
#define EXPORTED __attribute__((visibility("default")))

// Root mean square norm of [num_rows][width], times the weight.
EXPORTED void quire_rms_norm(const void *x, const void *weight, void *y, int num_rows, int width, float epsilon,
                             int is_bf16, int num_threads) {
    const int is_parallel = worth_threads(num_rows, width);
    FOR_ROWS(num_rows) {
        if (is_bf16) norm_row(x, weight, y, row, width, epsilon, 1);
        else norm_row(x, weight, y, row, width, epsilon, 0);
    }
}

// silu(gate) * up of the halves of [num_rows][2 * width].
EXPORTED void quire_silu_mul(const void *gate_up, void *y, int num_rows, int width, int is_bf16, int num_threads) {
    const int is_parallel = worth_threads(num_rows, width);
    FOR_ROWS(num_rows) {
        if (is_bf16) silu_mul_row(gate_up, y, row, width, 1);
        else silu_mul_row(gate_up, y, row, width, 0);
    }
}

// Rotates queries and keys; keys and values go to the cache.
EXPORTED void quire_rotate(const Rotation *r, int is_bf16, int num_threads) {
    const int is_parallel = worth_threads(r->num_tokens, r->head_dim * (r->num_heads + r->num_kv_heads));
    FOR_ROWS(r->num_tokens) {
        if (is_bf16) rotate_token(r, row, 1);
        else rotate_token(r, row, 0);
    }
}

// What this library was built from; the loader refuses a library that does not match its sources.
EXPORTED const char *quire_source_digest(void) { return QUIRE_SOURCE_DIGEST; }
