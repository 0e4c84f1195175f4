// Paged causal attention over one layer's cache: the fast twin of model/attention/reference.py.
//
// The cache, for keys and for values alike (B blocks, K key/value heads, S positions a block, D head size):
//
//     [ block 0                                   ][ block 1 ...
//       [ head 0                    ][ head 1 ...
//         [ position 0: D numbers ][ position 1 ] ...            position p of a sequence is in block
//                                                                block_table[p / S], at offset p % S
//
// A step is cut into items that share nothing (attention_item.h): some tokens of one row, and the query heads that read
// one key/value head. Threads take whole items, in any order.
//
// A promise: the result of a (token, query head) is the same bits whatever else is in the step, however the prompt was
// chunked, wherever its blocks lie, and on any number of threads. Another instruction set may give other last bits.
#include "attention_item.h"

#include <stdlib.h>

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

static Item make_item(const Step *step, const Cut *cut, const int32_t *tile_rows, const int32_t *tile_firsts,
                      int64_t i) {
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

// Lists the token tiles of all rows and returns their number. The last tiles of a prompt, which cost most, come first.
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
