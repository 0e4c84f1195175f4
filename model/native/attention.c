// Paged causal attention over one layer's cache: the fast twin of model/attention/reference.py.
//
// The cache, for keys and for values alike (B blocks, K key/value heads, S positions a block, D head size):
//
//     [ block 0                                   ][ block 1 ...
//       [ head 0                    ][ head 1 ...
//         [ position 0: D numbers ][ position 1 ] ...            position p of a sequence is in block
//                                                                block_table[p / S], at offset p % S
//
// Work is cut into items that share nothing: some tokens of one row, and the query heads that read one key/value head.
//
//     item     query rows (token t, head h), t outer, at most MAX_QUERIES      running maximum, running sum, output
//        x     key tiles: positions [0, 64), [64, 128), ...                    scores -> weights -> output += w * v
//
// Softmax is computed online, tile after tile (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).
//
// A promise: the result of a (token, query head) is the same bits whatever else is in the step. Key tiles start at
// multiples of KEY_TILE of the sequence's own positions; within one, each query goes through the same operations in the
// same order, whether its neighbours in registers are there or not; a query never touches a position that it cannot
// see. Threads take whole items.
#include "simd.h"

#include <stdlib.h>

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

INLINE int min_int(int a, int b) { return a < b ? a : b; }

INLINE int max_int(int a, int b) { return a > b ? a : b; }

// Positions of the key tile at `start` that query r sees.
INLINE int visible_in_tile(const Item *item, int r, int start) {
    return max_int(0, min_int(KEY_TILE, item->first_visible + r / item->num_heads - start));
}

INLINE int64_t query_offset(const Step *step, const Item *item, int r) {
    const int64_t token = item->first_token + r / item->num_heads;
    return (token * step->num_heads + item->first_head + r % item->num_heads) * step->head_dim;
}

INLINE int64_t position_offset(const Step *step, const Item *item, int position) {
    const int64_t block = item->block_table[position / step->block_size];
    return ((block * step->num_kv_heads + item->kv_head) * step->block_size + position % step->block_size) *
           step->head_dim;
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
INLINE void transpose_square(uint32_t *tile, const char *const keys[], int word, int num_words, int widens) {
    uvec rows[LANES];
    if (num_words == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = load_words(keys[i] + 4 * word);
    } else {
        for (int i = 0; i < LANES; i++) {
            rows[i] = (uvec){0};
            memcpy(&rows[i], keys[i] + 4 * word, 4 * num_words);
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

INLINE void transpose_keys(Scratch *s, const char *const keys[], int num_keys, int head_dim, int is_bf16, int widens) {
    const int num_words = is_bf16 ? head_dim / 2 : head_dim;
    for (int first = 0; first < num_keys; first += LANES) {
        uint32_t *tile = s->keys + first;
        if (num_words < LANES) {
            transpose_square(tile, keys + first, 0, num_words, widens);
            continue;
        }
        // The last square overlaps the one before it where the head size is not a multiple of its width.
        for (int word = 0; word < num_words; word += LANES)
            transpose_square(tile, keys + first, min_int(word, num_words - LANES), LANES, widens);
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
        lanes[i] = is_bf16 ? bf16_to_float(((const uint16_t *)values)[column + i]) : ((const float *)values)[column + i];
    return load(lanes);
}

// Adds the weighted values of the keys [from, to) to some columns of a few queries' outputs, held in registers.
INLINE void weigh_columns(Scratch *s, int r, int num_queries, const char *const values[], int from, int to, int column,
                          int num_vectors, int num_lanes, int head_dim, int is_bf16) {
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
            value[j] = load_values(values[key], column + j * LANES, num_lanes, is_bf16);
        for (int i = 0; i < num_queries; i++) {
            const vec weight = splat(s->weights[(r + i) * KEY_TILE + key]);
            for (int j = 0; j < num_vectors; j++) sums[i][j] = multiply_add(weight, value[j], sums[i][j]);
        }
    }
    for (int i = 0; i < num_queries; i++)
        for (int j = 0; j < num_vectors; j++)
            memcpy(outputs + i * head_dim + j * LANES, &sums[i][j], sizeof(float) * num_lanes);
}

INLINE void weigh_few(Scratch *s, int r, int num_queries, const char *const values[], int from, int to, int head_dim,
                      int is_bf16) {
    int column = 0;
    for (; column + VECTORS_AT_ONCE * LANES <= head_dim; column += VECTORS_AT_ONCE * LANES)
        weigh_columns(s, r, num_queries, values, from, to, column, VECTORS_AT_ONCE, LANES, head_dim, is_bf16);
    for (; column + LANES <= head_dim; column += LANES)
        weigh_columns(s, r, num_queries, values, from, to, column, 1, LANES, head_dim, is_bf16);
    if (column < head_dim)  // head sizes are multiples of 8
        weigh_columns(s, r, num_queries, values, from, to, column, 1, min_int(8, LANES), head_dim, is_bf16);
}

// What all queries of a group see is added for all at once, the rest query by query: the order is one and the same.
INLINE void weigh(Scratch *s, const Item *item, int first, int num_queries, const char *const values[], int start,
                  int head_dim, int is_bf16) {
    for (int r = first; r < num_queries; r += QUERIES_AT_ONCE) {
        const int group = min_int(QUERIES_AT_ONCE, num_queries - r);
        const int shared = visible_in_tile(item, r, start);
        switch (group) {
            case 1: weigh_few(s, r, 1, values, 0, shared, head_dim, is_bf16); break;
            case 2: weigh_few(s, r, 2, values, 0, shared, head_dim, is_bf16); break;
            case 3: weigh_few(s, r, 3, values, 0, shared, head_dim, is_bf16); break;
            default: weigh_few(s, r, QUERIES_AT_ONCE, values, 0, shared, head_dim, is_bf16);
        }
        for (int i = 1; i < group; i++) {
            const int visible = visible_in_tile(item, r + i, start);
            if (visible > shared) weigh_few(s, r + i, 1, values, shared, visible, head_dim, is_bf16);
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

INLINE void attend_item(Scratch *s, const Step *step, const Item *item, int is_bf16) {
    const int dots_bf16 = is_bf16 && HAS_BF16_DOT;
    const int head_dim = step->head_dim, num_words = dots_bf16 ? head_dim / 2 : head_dim;
    const int num_queries = item->num_tokens * item->num_heads;
    const int num_positions = item->first_visible + item->num_tokens - 1;
    const int item_bytes = is_bf16 ? 2 : 4;
    const char *keys[KEY_TILE], *values[KEY_TILE];
    load_queries(s, step, item, num_words, is_bf16, dots_bf16);
    for (int start = 0; start < num_positions; start += KEY_TILE) {
        const int num_keys = min_int(KEY_TILE, num_positions - start);
        for (int i = 0; i < KEY_TILE; i++) {  // lanes past the end repeat a key that exists; their scores are dropped
            const int64_t offset = position_offset(step, item, start + min_int(i, num_keys - 1)) * item_bytes;
            keys[i] = (const char *)step->k_cache + offset;
            values[i] = (const char *)step->v_cache + offset;
        }
        const int first = max_int(0, start + 1 - item->first_visible) * item->num_heads;  // sees this tile at all
        transpose_keys(s, keys, num_keys, head_dim, is_bf16, is_bf16 && !dots_bf16);
        score(s, first, num_queries, num_keys, num_words, splat(step->scale), dots_bf16);
        for (int r = first; r < num_queries; r++) soften(s, r, visible_in_tile(item, r, start), head_dim);
        weigh(s, item, first, num_queries, values, start, head_dim, is_bf16);
    }
    store_outputs(s, step, item, is_bf16);
}

static void attend_item_bf16(Scratch *s, const Step *step, const Item *item) { attend_item(s, step, item, 1); }

static void attend_item_float(Scratch *s, const Step *step, const Item *item) { attend_item(s, step, item, 0); }

// How rows are cut into items: so many tokens and so many heads of one key/value head's group at a time.
typedef struct {
    int group, heads, head_parts, tokens;
} Cut;

static Cut cut_heads(const Step *step) {
    const int group = step->num_heads / step->num_kv_heads;
    const int heads = min_int(group, MAX_QUERIES);
    return (Cut){group, heads, (group + heads - 1) / heads, MAX_QUERIES / heads};
}

static Item make_item(const Step *step, const Cut *cut, const int32_t *tile_rows, const int32_t *tile_firsts, int64_t i) {
    const int per_tile = step->num_kv_heads * cut->head_parts;
    const int tile = (int)(i / per_tile), kv_head = (int)(i % per_tile) / cut->head_parts;
    const int part = (int)(i % cut->head_parts);
    const int row = tile_rows[tile], first_token = tile_firsts[tile], end = step->query_starts[row + 1];
    return (Item){
        .block_table = step->block_tables + row * step->table_stride,
        .first_token = first_token,
        .num_tokens = min_int(cut->tokens, end - first_token),
        .first_head = kv_head * cut->group + part * cut->heads,
        .num_heads = min_int(cut->heads, cut->group - part * cut->heads),
        .kv_head = kv_head,
        .first_visible = step->context_lens[row] - (end - first_token) + 1,
    };
}

// Lists the token tiles of all rows; the last tiles of a long prompt, which cost most, come first. Returns their number.
static int list_tiles(const Step *step, const Cut *cut, int32_t *rows, int32_t *firsts) {
    int num_tiles = 0;
    for (int row = 0; row < step->num_rows; row++) {
        const int begin = step->query_starts[row], num_tokens = step->query_starts[row + 1] - begin;
        for (int tile = (num_tokens + cut->tokens - 1) / cut->tokens - 1; tile >= 0; tile--, num_tiles++) {
            rows[num_tiles] = row;
            firsts[num_tiles] = begin + tile * cut->tokens;
        }
    }
    return num_tiles;
}

// Computes a whole step; returns 0, or 1 when memory for the list of tiles is refused. `num_threads` is at least 1.
__attribute__((visibility("default"))) int quire_attend(const Step *step, int is_bf16, int num_threads) {
    const Cut cut = cut_heads(step);
    const int32_t num_tokens = step->query_starts[step->num_rows];
    int32_t *rows = malloc(sizeof(int32_t) * 2 * (size_t)(num_tokens + 1));
    if (rows == NULL) return 1;
    int32_t *firsts = rows + num_tokens + 1;
    const int64_t num_items = (int64_t)list_tiles(step, &cut, rows, firsts) * step->num_kv_heads * cut.head_parts;
#if defined(_OPENMP)
#pragma omp parallel num_threads(num_threads) if (num_items > 1)
#else
    (void)num_threads;
#endif
    {
        Scratch scratch;
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = 0; i < num_items; i++) {
            const Item item = make_item(step, &cut, rows, firsts, i);
            if (is_bf16) attend_item_bf16(&scratch, step, &item);
            else attend_item_float(&scratch, step, &item);
        }
    }
    free(rows);
    return 0;
}

// What this library was built from; the loader refuses a library that does not match its sources.
__attribute__((visibility("default"))) const char *quire_source_digest(void) { return QUIRE_SOURCE_DIGEST; }
