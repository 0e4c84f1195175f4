// Products by vector registers: a few rows times a tile, whose sums stay in registers while words go by.
//
// One tile after the other, so that a thread reads one stream, which is what a processor fetches ahead best: two tiles at
// a time have more chains of sums, and were faster from a cache only.
#pragma once

#include "matrix.h"

// The sums of a block, of codes as integers; one array for both would have the compiler copy its vectors to and fro.
typedef vec Sums[MAX_ROWS][2];
typedef ivec CodeSums[MAX_ROWS][2];

INLINE void fetch_ahead(Fetch fetch) {
    for (int byte = 0; byte < fetch.bytes; byte += 64) __builtin_prefetch(fetch.ahead + byte, 0, 2);
}

// Part of a vector of words: of a pair one number, of codes two.
INLINE uvec part_of(uvec words, int part, Kind kind) {
    if (kind == PAIRS) return (uvec)(part ? second_bf16(words) : first_bf16(words));
    if (kind == FOURS) return part ? odd_codes(words) : even_codes(words);
    return words;
}

// Adds the products of one word of the weight; what the first row has for it is at `x`.
INLINE void add_word(const uint32_t *x, int64_t stride, const uvec weights[2], int num_rows, Kind kind, Sums sums,
                     CodeSums code_sums) {
#pragma GCC unroll 2
    for (int part = 0; part < num_parts(kind); part++) {
        const uvec parts[2] = {part_of(weights[0], part, kind), part_of(weights[1], part, kind)};
#pragma GCC unroll 16
        for (int i = 0; i < num_rows; i++) {
            const uvec all = splat_word(x[i * stride + part]);
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                if (kind == CODE_DOTS) code_sums[i][j] = dot_codes(all, parts[j], code_sums[i][j]);
                else if (is_of_codes(kind)) code_sums[i][j] = dot_halves(all, parts[j], code_sums[i][j]);
                else if (kind == PAIR_DOTS) sums[i][j] = dot_bf16(all, parts[j], sums[i][j]);
                else sums[i][j] = multiply_add((vec)all, (vec)parts[j], sums[i][j]);
            }
        }
    }
}

INLINE void add_words(const Matrix *m, Block block, int tile, int num_rows, Kind kind, Sums sums, CodeSums code_sums) {
    const int64_t stride = row_words(m);
    const char *words = block.wide != NULL ? (const char *)block.wide : tile_at(m, tile);
    const int num_words = kind == HALF_DOTS ? (int)stride : m->num_words;
    Fetch fetch = plan_fetch(m, tile, block, num_rows, 1);
    for (int word = 0; word < num_words; word++, words += 4 * TILE, fetch.ahead += fetch.bytes) {
        const uvec weights[2] = {load_words(words), load_words(words + 4 * LANES)};
        fetch_ahead(fetch);
        add_word(block.x + word * num_parts(kind), stride, weights, num_rows, kind, sums, code_sums);
    }
}

// A block of rows on its way along the shorts of a tile.
typedef struct {
    const uint32_t *x;  // its first row
    int64_t stride;
    const uint8_t *groups;  // from the one that is met next
    uvec palette;
    Escapes escapes;
    uint32_t *wide;  // of the block
    Fetch fetch;
} Walk;

INLINE Walk start_walk(const Matrix *m, Block block, int tile, int num_rows) {
    return (Walk){.x = block.x, .stride = row_words(m), .groups = (const uint8_t *)tile_at(m, tile),
                  .palette = load_palette(m->shorts.palettes + tile * SHORT_PALETTE),
                  .escapes = escapes_of(&m->shorts, tile), .wide = block.wide,
                  .fetch = plan_fetch(m, tile, block, num_rows, GROUP_WORDS)};
}

// Replaces what was widened for a group by what has escaped of it.
INLINE void take_escape(Walk *walk, uvec first[2], uvec second[2]) {
    for (int half = 0; half < 2; half++) {
        first[half] = load_words(walk->escapes.words + half * LANES);
        second[half] = load_words(walk->escapes.words + TILE + half * LANES);
    }
    walk->escapes.next++, walk->escapes.words += GROUP_WORDS * TILE;
}

// Adds the products of a group's two words, which may be left for other blocks: where there are others, a block has so
// many products that storing beside them costs nothing.
INLINE void add_group(Walk *walk, int group, int has_escaped, int num_rows, int leaves_wide, Sums sums) {
    uvec first[2], second[2];
    widen(walk->groups, walk->palette, first, second);
    if (has_escaped) take_escape(walk, first, second);
    fetch_ahead(walk->fetch);
    if (leaves_wide) {
        for (int half = 0; half < 2; half++) {
            store_words(walk->wide + half * LANES, first[half]);
            store_words(walk->wide + TILE + half * LANES, second[half]);
        }
        walk->wide += GROUP_WORDS * TILE;
    }
    const uint32_t *x = walk->x + GROUP_WORDS * group * num_parts(BF16_KIND);
    add_word(x, walk->stride, first, num_rows, BF16_KIND, sums, NULL);
    add_word(x + num_parts(BF16_KIND), walk->stride, second, num_rows, BF16_KIND, sums, NULL);
    walk->groups += GROUP_BYTES, walk->fetch.ahead += walk->fetch.bytes;
}

// Groups that have not escaped go by without a look at the list: from one that has to the next.
INLINE void add_shorts(const Matrix *m, Block block, int tile, int num_rows, int leaves_wide, Sums sums) {
    const int last = num_groups(m);
    Walk walk = start_walk(m, block, tile, num_rows);
    for (int group = 0;; group++) {
        const int escape = *walk.escapes.next;
        for (; group < escape; group++) add_group(&walk, group, 0, num_rows, leaves_wide, sums);
        if (group == last) return;
        add_group(&walk, group, 1, num_rows, leaves_wide, sums);
    }
}

// How a block of rows meets its tile: as it is packed, or as shorts that it widens, or widens and leaves in its room.
typedef enum { AS_PACKED, WIDENING, LEAVING_WIDE } Meeting;

// A few rows times a tile, held in registers while words go by.
INLINE void multiply_block(const Matrix *m, const Product *p, Block block, int tile, int num_rows, Kind kind,
                           Meeting meeting) {
    Sums sums;
    CodeSums code_sums;
#pragma GCC unroll 16
    for (int i = 0; i < num_rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            if (is_of_codes(kind)) code_sums[i][j] = (ivec){0};
            else sums[i][j] = load(m->bias + tile * TILE + j * LANES);
        }
    if (meeting == AS_PACKED) add_words(m, block, tile, num_rows, kind, sums, code_sums);
    else add_shorts(m, block, tile, num_rows, meeting == LEAVING_WIDE, sums);
    for (int i = 0; i < num_rows; i++) {
        if (is_of_codes(kind))
            for (int j = 0; j < 2; j++)
                sums[i][j] = scaled_codes(m, p, block.row + i, tile * TILE + j * LANES, code_sums[i][j]);
        store_sums(m, p, block.row + i, tile, sums[i]);
    }
}

INLINE void multiply_tiles(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows, Kind kind,
                           Meeting meeting) {
    for (int tile = from; tile < to; tile++) multiply_block(m, p, block, tile, num_rows, kind, meeting);
}

INLINE void multiply_rows(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows, Kind kind,
                          Meeting meeting) {
    switch (num_rows) {
        case 1: multiply_tiles(m, p, block, from, to, 1, kind, meeting); break;
        case 2: multiply_tiles(m, p, block, from, to, 2, kind, meeting); break;
        case 3: multiply_tiles(m, p, block, from, to, 3, kind, meeting); break;
        case 4: multiply_tiles(m, p, block, from, to, 4, kind, meeting); break;
        case 5: multiply_tiles(m, p, block, from, to, 5, kind, meeting); break;
        case 6: multiply_tiles(m, p, block, from, to, 6, kind, meeting); break;
#if LANES == 16
        case 7: multiply_tiles(m, p, block, from, to, 7, kind, meeting); break;
        case 8: multiply_tiles(m, p, block, from, to, 8, kind, meeting); break;
#endif
    }
}

static void multiply_floats(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows) {
    multiply_rows(m, p, block, from, to, num_rows, FLOAT_WORDS, AS_PACKED);
}

static void multiply_bf16s(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows) {
    multiply_rows(m, p, block, from, to, num_rows, BF16_KIND, AS_PACKED);
}

static void multiply_shorts(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows) {
    if (HAS_SHORTS && block.wide != NULL)
        multiply_rows(m, p, block, from, to, num_rows, BF16_KIND, LEAVING_WIDE);
    else if (HAS_SHORTS) multiply_rows(m, p, block, from, to, num_rows, BF16_KIND, WIDENING);
}

// Codes of a tile as halves, for all blocks.
static void widen_tile(const Matrix *m, int tile, uint32_t *room) {
    const char *words = tile_at(m, tile);
    for (int word = 0; word < m->num_words; word++, words += 4 * TILE, room += 2 * TILE)
        for (int lane = 0; lane < TILE; lane += LANES) {
            const uvec codes = load_words(words + 4 * lane);
            store_words(room + lane, even_codes(codes));
            store_words(room + TILE + lane, odd_codes(codes));
        }
}

static void multiply_halves(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows) {
    multiply_rows(m, p, block, from, to, num_rows, HALF_DOTS, AS_PACKED);
}

static void multiply_codes(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows) {
    multiply_rows(m, p, block, from, to, num_rows, CODE_KIND, AS_PACKED);
}
