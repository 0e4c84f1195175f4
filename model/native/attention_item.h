// One work item of paged attention: some queries of one row against one key/value head, from block table to output.
//
//     [ queries r, r + 1, ... ]  x  key tile [0, 64), [64, 128), ...   scores -> weights -> outputs += weight * value
//
// Softmax is computed online, tile after tile (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022): each
// query keeps a running maximum, a running sum, and its output so far, all float32. The promise of equal bits is kept
// here: key tiles start at multiples of KEY_TILE of the sequence's own positions; within one, each query goes through
// the same operations in the same order, whether its neighbours in registers are there or not; and a query never
// touches a position that it cannot see. It does not know how a step is cut into items, nor about threads.
#pragma once

#include "simd.h"

#define KEY_TILE 64
#define MAX_QUERIES 32
#define MAX_HEAD_DIM 256
#define QUERIES_AT_ONCE 4
#define VECTORS_AT_ONCE (LANES == 16 ? 4 : 2)

// Everything that is common to the items of a step. Shapes as in model/attention/base.py.
typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *query_starts, *context_lens, *block_tables;
    int64_t table_stride;
    int num_rows, num_heads, num_kv_heads, head_dim, block_size;
    float scale;
} Step;

// One item: queries of the tokens [first_token, first_token + num_tokens), heads [first_head, first_head + num_heads).
typedef struct {
    const int32_t *block_table;
    int first_token, num_tokens, first_head, num_heads, kv_head;
    int first_visible;  // positions that the first token sees; each next token sees one more
} Item;

// What a thread works on. Query r of the item is token r / num_heads, head r % num_heads.
typedef struct {
    uint32_t queries[MAX_QUERIES * MAX_HEAD_DIM];   // [query][word]: float32, or bfloat16 pairs where dots take those
    uint32_t keys[MAX_HEAD_DIM * KEY_TILE];         // [word][position]: the key tile, transposed
    float weights[MAX_QUERIES * KEY_TILE];          // [query][position]: scores, then softmax weights
    float outputs[MAX_QUERIES * MAX_HEAD_DIM];      // [query][head_dim]: not yet divided by the sums
    float maxima[MAX_QUERIES], sums[MAX_QUERIES];
} Scratch;

// Positions of the key tile at `start` that query r sees.
INLINE int visible_in_tile(const Item *item, int r, int start) {
    return max_int(0, min_int(KEY_TILE, item->first_visible + r / item->num_heads - start));
}

INLINE int64_t query_offset(const Step *step, const Item *item, int r) {
    const int64_t token = item->first_token + r / item->num_heads;
    return (token * step->num_heads + item->first_head + r % item->num_heads) * step->head_dim;
}

INLINE void load_queries(Scratch *s, const Step *step, const Item *item, int num_words, int is_bf16, int dots_bf16) {
    const int num_queries = item->num_tokens * item->num_heads;
    for (int r = 0; r < num_queries; r++) {
        const int64_t offset = query_offset(step, item, r);
        uint32_t *words = s->queries + r * num_words;
        if (!is_bf16) memcpy(words, (const float *)step->q + offset, sizeof(float) * num_words);
        else if (dots_bf16) memcpy(words, (const uint16_t *)step->q + offset, sizeof(uint32_t) * num_words);
        else
            for (int d = 0; d < num_words; d++) words[d] = (uint32_t)((const uint16_t *)step->q)[offset + d] << 16;
        s->maxima[r] = -INFINITY;
        s->sums[r] = 0.0f;
    }
    memset(s->outputs, 0, sizeof(float) * num_queries * step->head_dim);
}

// Copies LANES words from each of LANES keys into the transposed tile; fewer words at the end of a small head.
INLINE void transpose_square(uint32_t *tile, const char *keys, const int64_t offsets[], int word, int num_words,
                             int widens) {
    uvec rows[LANES];
    if (num_words == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = load_words(keys + offsets[i] + 4 * word);
    } else {
        for (int i = 0; i < LANES; i++) {
            rows[i] = (uvec){0};
            memcpy(&rows[i], keys + offsets[i] + 4 * word, 4 * num_words);
        }
    }
    transpose_words(rows);
    for (int i = 0; i < num_words; i++) {
        if (widens) {
            store_words(tile + (2 * (word + i)) * KEY_TILE, (uvec)first_bf16(rows[i]));
            store_words(tile + (2 * (word + i) + 1) * KEY_TILE, (uvec)second_bf16(rows[i]));
        } else store_words(tile + (word + i) * KEY_TILE, rows[i]);
    }
}

INLINE void transpose_keys(Scratch *s, const char *keys, const int64_t offsets[], int num_keys, int head_dim,
                           int is_bf16, int widens) {
    const int num_words = is_bf16 ? head_dim / 2 : head_dim;
    for (int first = 0; first < num_keys; first += LANES) {
        uint32_t *tile = s->keys + first;
        if (num_words < LANES) {
            transpose_square(tile, keys, offsets + first, 0, num_words, widens);
            continue;
        }
        // The last square overlaps the one before it where the head size is not a multiple of its width.
        for (int word = 0; word < num_words; word += LANES)
            transpose_square(tile, keys, offsets + first, min_int(word, num_words - LANES), LANES, widens);
    }
}

// Scores of a few queries against a few vectors of keys, which are held in registers while words go by.
INLINE void score_few(Scratch *s, int r, int num_queries, int key, int num_vectors, int num_words, vec scale,
                      int dots_bf16) {
    vec scores[QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++) scores[i][j] = (vec){0};
    for (int word = 0; word < num_words; word++) {
        uvec keys[VECTORS_AT_ONCE];
        for (int j = 0; j < num_vectors; j++) keys[j] = load_words(s->keys + word * KEY_TILE + key + j * LANES);
        for (int i = 0; i < num_queries; i++) {
            const uvec query = splat_word(s->queries[(r + i) * num_words + word]);
            for (int j = 0; j < num_vectors; j++)
                scores[i][j] = dots_bf16 ? dot_bf16(query, keys[j], scores[i][j])
                                         : multiply_add((vec)query, (vec)keys[j], scores[i][j]);
        }
    }
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++)
            store(s->weights + (r + i) * KEY_TILE + key + j * LANES, scores[i][j] * scale);
}

INLINE void score_vectors(Scratch *s, int first, int num_queries, int key, int num_vectors, int num_words, vec scale,
                          int dots_bf16) {
    for (int r = first; r < num_queries; r += QUERIES_AT_ONCE) switch (num_queries - r) {
            case 1: score_few(s, r, 1, key, num_vectors, num_words, scale, dots_bf16); break;
            case 2: score_few(s, r, 2, key, num_vectors, num_words, scale, dots_bf16); break;
            case 3: score_few(s, r, 3, key, num_vectors, num_words, scale, dots_bf16); break;
            default: score_few(s, r, QUERIES_AT_ONCE, key, num_vectors, num_words, scale, dots_bf16);
        }
}

INLINE void score(Scratch *s, int first, int num_queries, int num_keys, int num_words, vec scale, int dots_bf16) {
    int key = 0;
    for (; key + VECTORS_AT_ONCE * LANES <= num_keys; key += VECTORS_AT_ONCE * LANES)
        score_vectors(s, first, num_queries, key, VECTORS_AT_ONCE, num_words, scale, dots_bf16);
    for (; key < num_keys; key += LANES) score_vectors(s, first, num_queries, key, 1, num_words, scale, dots_bf16);
}

// Turns one query's scores into weights relative to the running maximum, and rescales what was summed before.
INLINE void soften(Scratch *s, int r, int num_visible, int head_dim) {
    float *weights = s->weights + r * KEY_TILE;
    for (int i = num_visible; i < KEY_TILE; i++) weights[i] = -INFINITY;
    vec maxima = load(weights);
    for (int i = LANES; i < KEY_TILE; i += LANES) maxima = maximum(maxima, load(weights + i));
    const float tile_maximum = max_lanes(maxima);
    const float maximum_now = tile_maximum > s->maxima[r] ? tile_maximum : s->maxima[r];
    vec sums = {0};
    for (int i = 0; i < KEY_TILE; i += LANES) {
        const vec weight = exp_nonpositive(load(weights + i) - splat(maximum_now));
        store(weights + i, weight);
        sums += weight;
    }
    float shrink[LANES];
    store(shrink, exp_nonpositive(splat(s->maxima[r] - maximum_now)));
    s->maxima[r] = maximum_now;
    s->sums[r] = s->sums[r] * shrink[0] + sum_lanes(sums);
    float *outputs = s->outputs + r * head_dim;
    for (int d = 0; d < head_dim; d++) outputs[d] *= shrink[0];
}

// LANES values of one position, or the `num_lanes` that a head ends with.
INLINE vec load_values(const char *values, int column, int num_lanes, int is_bf16) {
    if (num_lanes == LANES)
        return is_bf16 ? load_bf16((const uint16_t *)values + column) : load((const float *)values + column);
    float lanes[LANES] = {0};
    for (int i = 0; i < num_lanes; i++)
        lanes[i] = is_bf16 ? bf16_to_float(((const uint16_t *)values)[column + i])
                           : ((const float *)values)[column + i];
    return load(lanes);
}

// Adds the weighted values of the keys [from, to) to some columns of a few queries' outputs, held in registers.
INLINE void weigh_columns(Scratch *s, int r, int num_queries, const char *values, const int64_t offsets[], int from,
                          int to, int column, int num_vectors, int num_lanes, int head_dim, int is_bf16) {
    vec sums[QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    float *outputs = s->outputs + r * head_dim + column;
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++) {
            sums[i][j] = (vec){0};
            memcpy(&sums[i][j], outputs + i * head_dim + j * LANES, sizeof(float) * num_lanes);
        }
    for (int key = from; key < to; key++) {
        vec value[VECTORS_AT_ONCE];
        for (int j = 0; j < num_vectors; j++)
            value[j] = load_values(values + offsets[key], column + j * LANES, num_lanes, is_bf16);
        for (int i = 0; i < num_queries; i++) {
            const vec weight = splat(s->weights[(r + i) * KEY_TILE + key]);
            for (int j = 0; j < num_vectors; j++) sums[i][j] = multiply_add(weight, value[j], sums[i][j]);
        }
    }
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++)
            memcpy(outputs + i * head_dim + j * LANES, &sums[i][j], sizeof(float) * num_lanes);
}

INLINE void weigh_few(Scratch *s, int r, int num_queries, const char *values, const int64_t offsets[], int from, int to,
                      int head_dim, int is_bf16) {
    int column = 0;
    for (; column + VECTORS_AT_ONCE * LANES <= head_dim; column += VECTORS_AT_ONCE * LANES)
        weigh_columns(s, r, num_queries, values, offsets, from, to, column, VECTORS_AT_ONCE, LANES, head_dim, is_bf16);
    for (; column + LANES <= head_dim; column += LANES)
        weigh_columns(s, r, num_queries, values, offsets, from, to, column, 1, LANES, head_dim, is_bf16);
    if (column < head_dim)  // head sizes are multiples of 8
        weigh_columns(s, r, num_queries, values, offsets, from, to, column, 1, min_int(8, LANES), head_dim, is_bf16);
}

// What all queries of a group see is added for all at once, the rest query by query: the order is one and the same.
INLINE void weigh(Scratch *s, const Item *item, int first, int num_queries, const char *values,
                  const int64_t offsets[], int start, int head_dim, int is_bf16) {
    for (int r = first; r < num_queries; r += QUERIES_AT_ONCE) {
        const int group = min_int(QUERIES_AT_ONCE, num_queries - r);
        const int shared = visible_in_tile(item, r, start);
        switch (group) {
            case 1: weigh_few(s, r, 1, values, offsets, 0, shared, head_dim, is_bf16); break;
            case 2: weigh_few(s, r, 2, values, offsets, 0, shared, head_dim, is_bf16); break;
            case 3: weigh_few(s, r, 3, values, offsets, 0, shared, head_dim, is_bf16); break;
            default: weigh_few(s, r, QUERIES_AT_ONCE, values, offsets, 0, shared, head_dim, is_bf16);
        }
        for (int i = 1; i < group; i++) {
            const int visible = visible_in_tile(item, r + i, start);
            if (visible > shared) weigh_few(s, r + i, 1, values, offsets, shared, visible, head_dim, is_bf16);
        }
    }
}

INLINE void store_outputs(const Scratch *s, const Step *step, const Item *item, int is_bf16) {
    for (int r = 0; r < item->num_tokens * item->num_heads; r++) {
        const int64_t offset = query_offset(step, item, r);
        const float *outputs = s->outputs + r * step->head_dim;
        for (int d = 0; d < step->head_dim; d++) {
            const float value = outputs[d] / s->sums[r];
            if (is_bf16) ((uint16_t *)step->out)[offset + d] = float_to_bf16(value);
            else ((float *)step->out)[offset + d] = value;
        }
    }
}

// Finds the positions of the key tile at `start` through the block table: their byte offsets in either cache. Offsets
// past the item's last position repeat it; the scores that come of them are dropped.
INLINE void locate_tile(const Step *step, const Item *item, int start, int num_positions, int item_bytes,
                        int64_t offsets[]) {
    const int64_t position_bytes = (int64_t)step->head_dim * item_bytes;
    const int64_t head_bytes = step->block_size * position_bytes;
    int index = start / step->block_size, within = start % step->block_size;
    for (int i = 0; i < KEY_TILE; i++) {
        const int64_t block = item->block_table[index];
        offsets[i] = (block * step->num_kv_heads + item->kv_head) * head_bytes + within * position_bytes;
        if (start + i + 1 >= num_positions) continue;
        if (++within == step->block_size) index++, within = 0;
    }
}

INLINE void prefetch_tile(const void *cache, const int64_t offsets[], int position_bytes) {
    for (int i = 0; i < KEY_TILE; i++)
        for (int byte = 0; byte < position_bytes; byte += 64)
            __builtin_prefetch((const char *)cache + offsets[i] + byte);
}

INLINE void attend_item(Scratch *s, const Step *step, const Item *item, int is_bf16) {
    const int dots_bf16 = is_bf16 && HAS_BF16_DOT;
    const int head_dim = step->head_dim, num_words = dots_bf16 ? head_dim / 2 : head_dim;
    const int num_queries = item->num_tokens * item->num_heads;
    const int num_positions = item->first_visible + item->num_tokens - 1;
    const int item_bytes = is_bf16 ? 2 : 4;
    const vec scale = splat(step->scale);
    int64_t tiles[2][KEY_TILE];  // this tile and the next one
    load_queries(s, step, item, num_words, is_bf16, dots_bf16);
    locate_tile(step, item, 0, num_positions, item_bytes, tiles[0]);
    for (int start = 0, now = 0; start < num_positions; start += KEY_TILE, now ^= 1) {
        const int num_keys = min_int(KEY_TILE, num_positions - start);
        const int first = max_int(0, start + 1 - item->first_visible) * item->num_heads;  // sees this tile at all
        // Memory fetches the values while scores are computed, and the next keys while values are weighed.
        prefetch_tile(step->v_cache, tiles[now], head_dim * item_bytes);
        transpose_keys(s, step->k_cache, tiles[now], num_keys, head_dim, is_bf16, is_bf16 && !dots_bf16);
        score(s, first, num_queries, num_keys, num_words, scale, dots_bf16);
        if (start + KEY_TILE < num_positions) {
            locate_tile(step, item, start + KEY_TILE, num_positions, item_bytes, tiles[now ^ 1]);
            prefetch_tile(step->k_cache, tiles[now ^ 1], head_dim * item_bytes);
        }
        for (int r = first; r < num_queries; r++) soften(s, r, visible_in_tile(item, r, start), head_dim);
        weigh(s, item, first, num_queries, step->v_cache, tiles[now], start, head_dim, is_bf16);
    }
    store_outputs(s, step, item, is_bf16);
}
