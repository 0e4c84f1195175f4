// Paged causal attention: how keys and values lie in the cache, and one work item from block table to output.
//
// The cache of one layer is cut into blocks, a block into key/value heads, and a head of S positions lies in the order
// in which dot products read it (D head size; a word is one float32, or two bfloat16):
//
//     keys      [ positions 0 .. 16                                      ][ positions 16 .. 32  ...    S / 16 groups
//                 [ word 0 of the 16 ][ word 1 of the 16 ] ...                        words: neighbours of one key
//     values    [ D words of positions 0 and 1 ][ D words of positions 2 and 3 ] ...  words: the same number of two
//                                                                                     positions; float32: of one
//
// so that a vector of a group's keys meets one word of a query, and a vector of values one word of weights. Position p
// of a sequence is in block block_table[p / S], at offset p % S; S is a multiple of 16. Of a pair of values of which
// only the first is there, the second is zero: it is read, with weight zero.
//
// An item is some queries of one row against one key/value head:
//
//     [ queries r, r + 1, ... ]  x  key tile [0, 64), [64, 128), ...   scores -> weights -> outputs += weight * value
//
// Softmax is computed online, tile after tile (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022): each
// query keeps a running maximum, a running sum, and its output so far, all float32; bfloat16 values are weighed with
// weights rounded to bfloat16. A promise: key tiles start at multiples of KEY_TILE of the sequence's own positions, and
// each query goes through the same operations in the same order, whether its neighbours in registers are there or not;
// what it must not see has weight zero and changes no bit as long as it is finite. (A value that is not may spoil the
// queries before it in the same item; those of other sequences it does not reach, unless they share its block.) Another
// instruction set may give other last bits.
#pragma once

#include "amx.h"
#include "rowwise.h"

#define GROUP 16
#define KEY_TILE 64
#define TILE_GROUPS (KEY_TILE / GROUP)
#define TILES_AHEAD 2         // fetched before they are needed
#define MAXIMUM_SLACK 4.0f    // see soften
#define MAX_QUERIES 32
#define MAX_HEAD_DIM 256
#define QUERIES_AT_ONCE 4
#define VECTORS_AT_ONCE (LANES == 16 ? 4 : 2)

// One layer's attention in one step. Shapes as in model/attention/base.py.
typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *query_starts, *context_lens, *block_tables;
    const int32_t *slots;                  // [num_rows]: which block table is a row's; NULL where row r has table r
    int32_t *tile_rows, *tile_firsts;  // [num_tokens]: see list_tiles
    int64_t table_stride;
    int num_rows, num_heads, num_kv_heads, head_dim, block_size;
    float scale;
} Attention;

// One item: queries of the tokens [first_token, first_token + num_tokens), heads [first_head, first_head + num_heads).
typedef struct {
    const int32_t *block_table;
    int first_token, num_tokens, first_head, num_heads, kv_head;
    int first_visible;  // positions that the first token sees; each next token sees one more
} Item;

// What a thread works on. Query r of the item is token r / num_heads, head r % num_heads.
typedef struct {
    uint32_t queries[MAX_QUERIES * MAX_HEAD_DIM];  // [query][word]
    float scores[MAX_QUERIES * KEY_TILE];          // [query][position]: not yet scaled
    uint32_t weights[MAX_QUERIES * KEY_TILE];      // [query][word of one position, or of two]
    float outputs[MAX_QUERIES * MAX_HEAD_DIM];     // [query][head_dim]: not yet divided by the sums
    uint32_t last_values[GROUP / 2 * MAX_HEAD_DIM];  // see complete_values
    float maxima[MAX_QUERIES], sums[MAX_QUERIES];
    TmmShapes shapes;
} Scratch;

// ---- the cache ----

INLINE int64_t head_offset(int64_t block, int kv_head, int num_kv_heads, int block_size, int head_dim, int is_bf16) {
    return (block * num_kv_heads + kv_head) * block_size * head_dim * (is_bf16 ? 2 : 4);
}

INLINE void write_key(char *head, int offset, const void *key, int head_dim, int is_bf16) {
    const int num_words = is_bf16 ? head_dim / 2 : head_dim;
    uint32_t *group = (uint32_t *)head + offset / GROUP * num_words * GROUP + offset % GROUP;
    for (int word = 0; word < num_words; word++) memcpy(group + word * GROUP, (const char *)key + 4 * word, 4);
}

INLINE void write_value(char *head, int offset, const void *value, int head_dim, int is_bf16, int is_last) {
    if (!is_bf16) {
        memcpy((float *)head + offset * head_dim, value, sizeof(float) * head_dim);
        return;
    }
    uint16_t *pairs = (uint16_t *)head + offset / 2 * 2 * head_dim;
    const int second = offset % 2;
    for (int d = 0; d < head_dim; d++) {
        memcpy(pairs + 2 * d + second, (const uint16_t *)value + d, 2);
        if (is_last && !second) pairs[2 * d + 1] = 0;
    }
}

// Has memory fetch where a token's key and value of one head will go.
INLINE void fetch_place(const Rotation *r, int64_t token, int kv_head, int is_bf16) {
    const int dim = r->head_dim, bytes = is_bf16 ? 2 : 4, offset = (int)r->offsets[token];
    const int64_t start = head_offset(r->blocks[token], kv_head, r->num_kv_heads, r->block_size, dim, is_bf16);
    const char *group = (const char *)r->k_cache + start + offset / GROUP * GROUP * dim * bytes;
    for (int byte = 0; byte < GROUP * dim * bytes; byte += 64) __builtin_prefetch(group + byte, 1);
    const char *value = (const char *)r->v_cache + start + (is_bf16 ? offset / 2 : offset) * dim * 4;
    for (int byte = 0; byte < dim * 4; byte += 64) __builtin_prefetch(value + byte, 1);
}

// Whether a token's key goes to the same lines of memory as the one before.
INLINE int joins_group(const Rotation *r, int64_t token) {
    return r->blocks[token] == r->blocks[token - 1] && r->offsets[token] / GROUP == r->offsets[token - 1] / GROUP;
}

// Whether the next token of the step is not the next position of this one's block.
INLINE int is_last_written(const Rotation *r, int64_t token) {
    return token + 1 == r->num_tokens || r->blocks[token + 1] != r->blocks[token] ||
           r->offsets[token + 1] != r->offsets[token] + 1;
}

// Rotates some of a token's queries, and the key of one head; that key and its value go to the cache.
INLINE void rotate_heads(const Rotation *r, int64_t token, int first_head, int num_heads, int kv_head, int is_bf16) {
    const int heads = r->num_heads, kv_heads = r->num_kv_heads, dim = r->head_dim, bytes = is_bf16 ? 2 : 4;
    const int64_t place = r->positions == NULL ? token : r->positions[token];
    const float *cosines = r->cosines + place * dim, *sines = r->sines + place * dim;
    const int64_t from = token * (heads + 2 * kv_heads) * dim;
    const int offset = (int)r->offsets[token], is_last = is_last_written(r, token);
    for (int head = first_head; head < first_head + num_heads; head++)
        rotate_head(r->qkv, from + head * dim, r->q, (token * heads + head) * dim, cosines, sines, dim, is_bf16);
    const int64_t start = head_offset(r->blocks[token], kv_head, kv_heads, r->block_size, dim, is_bf16);
    const int64_t key = from + (heads + kv_head) * dim, value = from + (heads + kv_heads + kv_head) * dim;
    float rotated[MAX_HEAD_DIM];
    rotate_head(r->qkv, key, rotated, 0, cosines, sines, dim, is_bf16);
    write_key((char *)r->k_cache + start, offset, rotated, dim, is_bf16);
    write_value((char *)r->v_cache + start, offset, (const char *)r->qkv + value * bytes, dim, is_bf16, is_last);
}

INLINE void rotate_token(const Rotation *r, int64_t token, int is_bf16) {
    const int group = r->num_heads / r->num_kv_heads;
    const int fetches_next = token + 1 < r->num_tokens && !joins_group(r, token + 1);
    for (int head = 0; head < r->num_kv_heads; head++) {
        if (fetches_next) fetch_place(r, token + 1, head, is_bf16);
        rotate_heads(r, token, head * group, group, head, is_bf16);
    }
}

// ---- one item ----

// Positions of the key tile at `start` that query r sees.
INLINE int visible_in_tile(const Item *item, int r, int start) {
    return max_int(0, min_int(KEY_TILE, item->first_visible + r / item->num_heads - start));
}

INLINE int num_positions_of(const Item *item) { return item->first_visible + item->num_tokens - 1; }

INLINE int64_t query_offset(const Attention *a, const Item *item, int r) {
    const int64_t token = item->first_token + r / item->num_heads;
    return (token * a->num_heads + item->first_head + r % item->num_heads) * a->head_dim;
}

INLINE void load_queries(Scratch *s, const Attention *a, const Item *item, int is_bf16) {
    const int num_queries = item->num_tokens * item->num_heads, bytes = a->head_dim * (is_bf16 ? 2 : 4);
    for (int r = 0; r < num_queries; r++) {
        memcpy((char *)s->queries + r * bytes, (const char *)a->q + query_offset(a, item, r) * (is_bf16 ? 2 : 4), bytes);
        s->maxima[r] = -INFINITY;
        s->sums[r] = 0.0f;
    }
    memset(s->outputs, 0, sizeof(float) * num_queries * a->head_dim);
}

// c plus the product of one float32 per lane, or of two bfloat16.
INLINE vec dot_words(uvec a, uvec b, vec c, int is_bf16) {
    if (!is_bf16) return multiply_add((vec)a, (vec)b, c);
    if (HAS_BF16_DOT) return dot_bf16(a, b, c);
    return multiply_add(second_bf16(a), second_bf16(b), multiply_add(first_bf16(a), first_bf16(b), c));
}

// Where vector j of a word lies of the key tile whose groups are at `groups`.
INLINE const char *place_of_keys(const char *const groups[], int64_t word, int j) {
    const int lane = j * LANES;
    return groups[lane / GROUP] + 4 * (word * GROUP + lane % GROUP);
}

// Scores of a few queries against a few vectors of keys, which are held in registers while words go by. Memory is to
// fetch the same places of the groups `ahead` meanwhile, unless NULL.
INLINE void score_few(Scratch *s, int r, int num_queries, const char *const groups[], const char *const ahead[],
                      int first, int num_vectors, int num_words, int is_bf16) {
    vec scores[QUERIES_AT_ONCE][VECTORS_AT_ONCE];
#pragma GCC unroll 16
    for (int i = 0; i < num_queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < num_vectors; j++) scores[i][j] = (vec){0};
    for (int word = 0; word < num_words; word++) {
        uvec keys[VECTORS_AT_ONCE];
#pragma GCC unroll 16
        for (int j = 0; j < num_vectors; j++) keys[j] = load_words(place_of_keys(groups, word, first + j));
        if (ahead != NULL)
#pragma GCC unroll 16
            for (int j = 0; j < num_vectors; j++) __builtin_prefetch(place_of_keys(ahead, word, first + j), 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < num_queries; i++) {
            const uvec query = splat_word(s->queries[(r + i) * num_words + word]);
#pragma GCC unroll 16
            for (int j = 0; j < num_vectors; j++) scores[i][j] = dot_words(query, keys[j], scores[i][j], is_bf16);
        }
    }
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++)
            store(s->scores + (r + i) * KEY_TILE + (first + j) * LANES, scores[i][j]);
}

INLINE void score_vectors(Scratch *s, int r, int num_queries, const char *const groups[], const char *const ahead[],
                          int first, int num_vectors, int num_words, int is_bf16) {
    for (; r < num_queries; r += QUERIES_AT_ONCE, ahead = NULL) switch (num_queries - r) {
            case 1: score_few(s, r, 1, groups, ahead, first, num_vectors, num_words, is_bf16); break;
            case 2: score_few(s, r, 2, groups, ahead, first, num_vectors, num_words, is_bf16); break;
            case 3: score_few(s, r, 3, groups, ahead, first, num_vectors, num_words, is_bf16); break;
            default: score_few(s, r, QUERIES_AT_ONCE, groups, ahead, first, num_vectors, num_words, is_bf16);
        }
}

INLINE void score(Scratch *s, int r, int num_queries, const char *const groups[], const char *const ahead[],
                  int num_keys, int num_words, int is_bf16) {
    const int num_vectors = (num_keys + LANES - 1) / LANES;
    int first = 0;
    for (; first + VECTORS_AT_ONCE <= num_vectors; first += VECTORS_AT_ONCE)
        score_vectors(s, r, num_queries, groups, ahead, first, VECTORS_AT_ONCE, num_words, is_bf16);
    for (; first < num_vectors; first++)
        score_vectors(s, r, num_queries, groups, ahead, first, 1, num_words, is_bf16);
}

// Turns one query's scores into weights relative to a running maximum. What was summed before is rescaled only where the
// maximum has grown by more than a slack, up to which weights are above 1: that is seldom (FlashAttention 4, 2025).
INLINE void soften(Scratch *s, int r, int num_visible, float scale, int head_dim, int is_bf16) {
    vec scores[KEY_TILE / LANES];
    ivec position;
    for (int i = 0; i < LANES; i++) position[i] = i;
    vec maxima = splat(-INFINITY);
#pragma GCC unroll 16
    for (int i = 0; i < KEY_TILE / LANES; i++, position += LANES) {
        scores[i] = load(s->scores + r * KEY_TILE + i * LANES) * splat(scale);
        if (num_visible < KEY_TILE) scores[i] = select_lanes(position < num_visible, scores[i], splat(-INFINITY));
        maxima = maximum(maxima, scores[i]);
    }
    const float tile_maximum = max_lanes(maxima), maximum_before = s->maxima[r];
    const float maximum_now = tile_maximum > maximum_before + MAXIMUM_SLACK ? tile_maximum : maximum_before;
    char *weights = (char *)(s->weights + r * KEY_TILE);
    vec sums = {0};
#pragma GCC unroll 16
    for (int i = 0; i < KEY_TILE / LANES; i++) {
        const vec below = scores[i] - splat(maximum_now);
        const vec weight = is_bf16 ? exp_coarse(below) : exp_fine(below);
        store_numbers(weights, i * LANES, weight, LANES, is_bf16);
        sums += weight;
    }
    if (maximum_now == maximum_before) {
        s->sums[r] += sum_lanes(sums);
        return;
    }
    s->maxima[r] = maximum_now;
    const vec below = splat(maximum_before - maximum_now);
    const vec shrink = is_bf16 ? exp_coarse(below) : exp_fine(below);
    s->sums[r] = s->sums[r] * shrink[0] + sum_lanes(sums);
    float *outputs = s->outputs + r * head_dim;
    for (int d = 0; d < head_dim; d++) outputs[d] *= shrink[0];
}

// LANES words of values, or the `num_lanes` that a head ends with.
INLINE uvec load_values(const char *words, int num_lanes) {
    if (num_lanes == LANES) return load_words(words);
    uvec v = {0};
    memcpy(&v, words, sizeof(uint32_t) * num_lanes);
    return v;
}

// Adds the weighted values of `num_words` words of positions to some columns of a few queries' outputs, in registers;
// `ahead` as above.
INLINE void weigh_columns(Scratch *s, int r, int num_queries, const char *const groups[], const char *const ahead[],
                          int num_words, int column, int num_vectors, int num_lanes, int head_dim, int is_bf16) {
    const int group_words = is_bf16 ? GROUP / 2 : GROUP;
    vec sums[QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    float *outputs = s->outputs + r * head_dim + column;
#pragma GCC unroll 16
    for (int i = 0; i < num_queries; i++)
#pragma GCC unroll 16
        for (int j = 0; j < num_vectors; j++) {
            sums[i][j] = (vec){0};
            memcpy(&sums[i][j], outputs + i * head_dim + j * LANES, sizeof(float) * num_lanes);
        }
    for (int word = 0; word < num_words; word++) {
        const int64_t place = 4 * ((int64_t)(word % group_words) * head_dim + column);
        const char *values = groups[word / group_words] + place;
        uvec value[VECTORS_AT_ONCE];
#pragma GCC unroll 16
        for (int j = 0; j < num_vectors; j++) value[j] = load_values(values + 4 * j * LANES, num_lanes);
        if (ahead != NULL)
#pragma GCC unroll 16
            for (int j = 0; j < num_vectors; j++)
                __builtin_prefetch(ahead[word / group_words] + place + 4 * j * LANES, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < num_queries; i++) {
            const uvec weight = splat_word(s->weights[(r + i) * KEY_TILE + word]);
#pragma GCC unroll 16
            for (int j = 0; j < num_vectors; j++) sums[i][j] = dot_words(weight, value[j], sums[i][j], is_bf16);
        }
    }
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++)
            memcpy(outputs + i * head_dim + j * LANES, &sums[i][j], sizeof(float) * num_lanes);
}

INLINE void weigh_few(Scratch *s, int r, int num_queries, const char *const groups[], const char *const ahead[],
                      int num_words, int head_dim, int is_bf16) {
    int column = 0;
    for (; column + VECTORS_AT_ONCE * LANES <= head_dim; column += VECTORS_AT_ONCE * LANES)
        weigh_columns(s, r, num_queries, groups, ahead, num_words, column, VECTORS_AT_ONCE, LANES, head_dim, is_bf16);
    for (; column + LANES <= head_dim; column += LANES)
        weigh_columns(s, r, num_queries, groups, ahead, num_words, column, 1, LANES, head_dim, is_bf16);
    if (column < head_dim)  // head sizes are multiples of 8
        weigh_columns(s, r, num_queries, groups, ahead, num_words, column, 1, min_int(8, LANES), head_dim, is_bf16);
}

// A few queries go as far as the last of them sees: the others have weight zero there.
INLINE void weigh(Scratch *s, const Item *item, int r, int num_queries, const char *const groups[],
                  const char *const ahead[], int start, int head_dim, int is_bf16) {
    for (; r < num_queries; r += QUERIES_AT_ONCE, ahead = NULL) {
        const int count = min_int(QUERIES_AT_ONCE, num_queries - r);
        const int num_visible = visible_in_tile(item, r + count - 1, start);
        const int num_words = is_bf16 ? (num_visible + 1) / 2 : num_visible;
        switch (count) {
            case 1: weigh_few(s, r, 1, groups, ahead, num_words, head_dim, is_bf16); break;
            case 2: weigh_few(s, r, 2, groups, ahead, num_words, head_dim, is_bf16); break;
            case 3: weigh_few(s, r, 3, groups, ahead, num_words, head_dim, is_bf16); break;
            default: weigh_few(s, r, QUERIES_AT_ONCE, groups, ahead, num_words, head_dim, is_bf16);
        }
    }
}

// With tile registers, whole groups of keys and of values meet up to 16 queries at a time.

// Whether a head's numbers fill whole registers.
INLINE int fits_amx(int head_dim, int is_bf16) { return HAS_AMX && is_bf16 && head_dim % (2 * TMM_WORDS) == 0; }

// Registers 0 to 3 hold sums, 4 queries, 5 weights, 6 keys, 7 values.
INLINE void shape_attention(Scratch *s, int num_queries) {
    const int num_rows = min_int(TMM_ROWS, num_queries);
    s->shapes = (TmmShapes){.palette = 1};
    for (int tmm = 0; tmm < 5; tmm++) set_shape(&s->shapes, tmm, num_rows, TMM_WORDS);
    set_shape(&s->shapes, 5, num_rows, GROUP / 2);
    set_shape(&s->shapes, 6, TMM_ROWS, TMM_WORDS);
    set_shape(&s->shapes, 7, GROUP / 2, TMM_WORDS);
    shape_tmm(&s->shapes);
}

// The last group of an item may go on with whatever a block held before: a copy of it with zeros instead.
INLINE const char *complete_values(Scratch *s, const char *group, int num_positions, int head_dim) {
    const int num_words = (num_positions + 1) / 2 * head_dim;
    memcpy(s->last_values, group, sizeof(uint32_t) * num_words);
    memset(s->last_values + num_words, 0, sizeof(uint32_t) * (GROUP / 2 * head_dim - num_words));
    return (const char *)s->last_values;
}

INLINE void score_amx(Scratch *s, int r, int num_queries, const char *const groups[], int num_groups, int num_words) {
    const int query_bytes = 4 * num_words, score_bytes = 4 * KEY_TILE;
    for (r -= r % TMM_ROWS; r < num_queries; r += TMM_ROWS) {
        const uint32_t *queries = s->queries + r * num_words;
        float *scores = s->scores + r * KEY_TILE;
        ZERO_TMM(0);
        ZERO_TMM(1);
        ZERO_TMM(2);
        ZERO_TMM(3);
#define SCORE_GROUP(i)                                                                    \
    if (num_groups > i) {                                                                 \
        LOAD_TMM(6, groups[i] + 4 * word * GROUP, 4 * GROUP);                             \
        DOT_TMM_BF16(i, 4, 6);                                                            \
        if (word + TMM_WORDS == num_words) STORE_TMM(i, scores + i * GROUP, score_bytes); \
    }
        for (int64_t word = 0; word < num_words; word += TMM_WORDS) {
            LOAD_TMM(4, queries + word, query_bytes);
            SCORE_GROUP(0);
            SCORE_GROUP(1);
            SCORE_GROUP(2);
            SCORE_GROUP(3);
        }
#undef SCORE_GROUP
    }
}

INLINE void weigh_amx(Scratch *s, int r, int num_queries, const char *const groups[], int num_groups, int head_dim) {
    const int output_bytes = 4 * head_dim;
    for (r -= r % TMM_ROWS; r < num_queries; r += TMM_ROWS)
        for (int column = 0; column < head_dim; column += 2 * TMM_WORDS) {
            float *outputs = s->outputs + r * head_dim + column;
            LOAD_TMM(0, outputs, output_bytes);
            LOAD_TMM(1, outputs + TMM_WORDS, output_bytes);
            for (int group = 0; group < num_groups; group++) {
                const char *values = groups[group] + 4 * column;
                LOAD_TMM(5, s->weights + r * KEY_TILE + group * GROUP / 2, 4 * KEY_TILE);
                LOAD_TMM(7, values, output_bytes);
                DOT_TMM_BF16(0, 5, 7);
                LOAD_TMM(7, values + 4 * TMM_WORDS, output_bytes);
                DOT_TMM_BF16(1, 5, 7);
            }
            STORE_TMM(0, outputs, output_bytes);
            STORE_TMM(1, outputs + TMM_WORDS, output_bytes);
        }
}

INLINE void store_outputs(const Scratch *s, const Attention *a, const Item *item, int is_bf16) {
    for (int r = 0; r < item->num_tokens * item->num_heads; r++) {
        const int64_t offset = query_offset(a, item, r);
        const float *outputs = s->outputs + r * a->head_dim;
        const vec sum = splat(s->sums[r]);
        for (int d = 0; d < a->head_dim; d += LANES) {
            const int num_lanes = min_int(LANES, a->head_dim - d);
            store_numbers(a->out, offset + d, load_numbers(outputs, d, num_lanes, 0) / sum, num_lanes, is_bf16);
        }
    }
}

// The groups of a key tile.
typedef struct {
    const char *keys[TILE_GROUPS], *values[TILE_GROUPS];
    int num_groups;
} Tile;

// Finds the key tile at `start` through the block table; there may be none.
INLINE Tile locate_tile(const Attention *a, const Item *item, int start, int is_bf16) {
    const int group_bytes = GROUP * a->head_dim * (is_bf16 ? 2 : 4);
    Tile tile = {.num_groups = 0};
    for (int position = start; position < min_int(start + KEY_TILE, num_positions_of(item)); position += GROUP) {
        const int block = item->block_table[position / a->block_size], within = position % a->block_size;
        const int64_t head = head_offset(block, item->kv_head, a->num_kv_heads, a->block_size, a->head_dim, is_bf16);
        tile.keys[tile.num_groups] = (const char *)a->k_cache + head + (int64_t)(within / GROUP) * group_bytes;
        tile.values[tile.num_groups++] = (const char *)a->v_cache + head + (int64_t)(within / GROUP) * group_bytes;
    }
    return tile;
}

// The key tile that is TILES_AHEAD from the one at `start` on, `next` being the item that follows.
INLINE Tile locate_ahead(const Attention *a, const Item *item, const Item *next, int start, int is_bf16) {
    const int end = ceil_div(num_positions_of(item), KEY_TILE) * KEY_TILE;
    const int ahead = start + TILES_AHEAD * KEY_TILE;
    return ahead < end ? locate_tile(a, item, ahead, is_bf16) : locate_tile(a, next, ahead - end, is_bf16);
}

// Has memory fetch a key tile at once.
INLINE void fetch_tile(const Attention *a, const Tile *tile, int is_bf16) {
    const int group_bytes = GROUP * a->head_dim * (is_bf16 ? 2 : 4);
    for (int i = 0; i < tile->num_groups; i++)
        for (int byte = 0; byte < group_bytes; byte += 64) {
            __builtin_prefetch(tile->keys[i] + byte, 0, 2);
            __builtin_prefetch(tile->values[i] + byte, 0, 2);
        }
}

// Has memory fetch so many tiles that an item begins with.
INLINE void fetch_item(const Attention *a, const Item *item, int num_tiles, int is_bf16) {
    for (int i = 0; i < num_tiles; i++) {
        const Tile tile = locate_tile(a, item, i * KEY_TILE, is_bf16);
        fetch_tile(a, &tile, is_bf16);
    }
}

// Computes an item, best when its first tiles were fetched before, and has those of the `next` one fetched.
INLINE void attend_item(Scratch *s, const Attention *a, const Item *item, const Item *next, int is_bf16) {
    const int head_dim = a->head_dim, num_words = is_bf16 ? head_dim / 2 : head_dim;
    const int num_queries = item->num_tokens * item->num_heads, num_positions = num_positions_of(item);
    const int has_amx = fits_amx(head_dim, is_bf16);
    fetch_item(a, next, max_int(0, TILES_AHEAD - ceil_div(num_positions, KEY_TILE)), is_bf16);  // those skipped below
    load_queries(s, a, item, is_bf16);
    if (has_amx) shape_attention(s, num_queries);
    for (int start = 0; start < num_positions; start += KEY_TILE) {
        const int num_keys = min_int(KEY_TILE, num_positions - start);
        const int first = max_int(0, start + 1 - item->first_visible) * item->num_heads;  // sees this tile at all
        Tile tile = locate_tile(a, item, start, is_bf16), ahead = locate_ahead(a, item, next, start, is_bf16);
        // A whole tile leaves time to fetch line by line, while its own go by.
        const int by_line = !has_amx && num_keys == KEY_TILE;
        if (!by_line) fetch_tile(a, &ahead, is_bf16);
        for (int i = ahead.num_groups; by_line && i < TILE_GROUPS; i++)  // in place of missing ones some that are near
            ahead.keys[i] = tile.keys[i], ahead.values[i] = tile.values[i];
        if (has_amx) score_amx(s, first, num_queries, tile.keys, tile.num_groups, num_words);
        else score(s, first, num_queries, tile.keys, by_line ? ahead.keys : NULL, num_keys, num_words, is_bf16);
        // Whoever shares a register with a query that sees something gets weights too: zeros.
        for (int r = has_amx ? first - first % TMM_ROWS : first; r < num_queries; r++)
            soften(s, r, visible_in_tile(item, r, start), a->scale, head_dim, is_bf16);
        if (has_amx && num_keys % GROUP) {
            const char **last = tile.values + tile.num_groups - 1;
            *last = complete_values(s, *last, num_keys % GROUP, head_dim);
        }
        if (has_amx) weigh_amx(s, first, num_queries, tile.values, tile.num_groups, head_dim);
        else weigh(s, item, first, num_queries, tile.values, by_line ? ahead.values : NULL, start, head_dim, is_bf16);
    }
    if (has_amx) release_tmm();
    store_outputs(s, a, item, is_bf16);
}

// ---- a step's items ----

// How rows are cut into items: so many tokens and so many heads of one key/value head's group at a time.
typedef struct {
    int group, heads, head_parts, tokens;
} Cut;

INLINE Cut cut_heads(const Attention *a) {
    const int group = a->num_heads / a->num_kv_heads;
    const int heads = min_int(group, MAX_QUERIES);
    return (Cut){group, heads, (group + heads - 1) / heads, MAX_QUERIES / heads};
}

// Lists the token tiles of all rows and returns their number. The last tiles of a prompt, which cost most, come first.
INLINE int list_tiles(const Attention *a) {
    const Cut cut = cut_heads(a);
    int num_tiles = 0;
    for (int row = 0; row < a->num_rows; row++) {
        const int begin = a->query_starts[row], num_tokens = a->query_starts[row + 1] - begin;
        for (int tile = (num_tokens + cut.tokens - 1) / cut.tokens - 1; tile >= 0; tile--, num_tiles++) {
            a->tile_rows[num_tiles] = row;
            a->tile_firsts[num_tiles] = begin + tile * cut.tokens;
        }
    }
    return num_tiles;
}

INLINE int num_items(const Attention *a, int num_tiles) { return num_tiles * a->num_kv_heads * cut_heads(a).head_parts; }

INLINE Item make_item(const Attention *a, int i) {
    const Cut cut = cut_heads(a);
    const int per_tile = a->num_kv_heads * cut.head_parts;
    const int tile = i / per_tile, kv_head = i % per_tile / cut.head_parts, part = i % cut.head_parts;
    const int row = a->tile_rows[tile], first_token = a->tile_firsts[tile], end = a->query_starts[row + 1];
    return (Item){
        .block_table = a->block_tables + (a->slots == NULL ? row : a->slots[row]) * a->table_stride,
        .first_token = first_token,
        .num_tokens = min_int(cut.tokens, end - first_token),
        .first_head = kv_head * cut.group + part * cut.heads,
        .num_heads = min_int(cut.heads, cut.group - part * cut.heads),
        .kv_head = kv_head,
        .first_visible = a->context_lens[row] - (end - first_token) + 1,
    };
}
