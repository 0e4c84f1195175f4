// Products by vector registers: a few rows times a few tiles, whose sums stay in registers while words go by.
#pragma once

#include "matrix.h"

// The sums of a block, of codes as integers; one array for both would have the compiler copy its vectors to and fro.
typedef vec Sums[MAX_ROWS][2 * MAX_TILES];
typedef ivec CodeSums[MAX_ROWS][2 * MAX_TILES];

INLINE void fetch_ahead(Fetch fetch, int64_t to_next_tile, int num_tiles) {
#pragma GCC unroll 16
    for (int j = 0; j < num_tiles; j++)
        for (int byte = 0; byte < fetch.bytes; byte += 64)
            __builtin_prefetch(fetch.ahead + j * to_next_tile + byte, 0, 2);
}

// Part of a vector of words: of a pair one number, of codes two.
INLINE uvec part_of(uvec words, int part, Kind kind) {
    if (kind == PAIRS) return (uvec)(part ? second_bf16(words) : first_bf16(words));
    if (kind == FOURS) return part ? odd_codes(words) : even_codes(words);
    return words;
}

// Adds the products of one word of the weight; what the first row has for it is at `x`.
INLINE void add_word(const uint32_t *x, int64_t stride, const uvec *weights, int num_rows, int num_tiles, Kind kind,
                     Sums sums, CodeSums code_sums) {
#pragma GCC unroll 2
    for (int part = 0; part < num_parts(kind); part++) {
        uvec parts[2 * MAX_TILES];
#pragma GCC unroll 16
        for (int j = 0; j < 2 * num_tiles; j++) parts[j] = part_of(weights[j], part, kind);
#pragma GCC unroll 16
        for (int i = 0; i < num_rows; i++) {
            const uvec all = splat_word(x[i * stride + part]);
#pragma GCC unroll 16
            for (int j = 0; j < 2 * num_tiles; j++) {
                if (kind == CODE_DOTS) code_sums[i][j] = dot_codes(all, parts[j], code_sums[i][j]);
                else if (is_of_codes(kind)) code_sums[i][j] = dot_halves(all, parts[j], code_sums[i][j]);
                else if (kind == PAIR_DOTS) sums[i][j] = dot_bf16(all, parts[j], sums[i][j]);
                else sums[i][j] = multiply_add((vec)all, (vec)parts[j], sums[i][j]);
            }
        }
    }
}

INLINE void add_words(const Matrix *m, Block block, int tile, int num_rows, int num_tiles, Kind kind, Sums sums,
                      CodeSums code_sums) {
    const int64_t stride = row_words(m), to_next_tile = tile_bytes(m);
    const char *words = block.wide != NULL ? (const char *)block.wide : tile_at(m, tile);
    const int num_words = kind == HALF_DOTS ? (int)stride : m->num_words;
    Fetch fetch = plan_fetch(m, tile, block, 1);
    for (int word = 0; word < num_words; word++, words += 4 * TILE, fetch.ahead += fetch.bytes) {
        uvec weights[2 * MAX_TILES];
#pragma GCC unroll 16
        for (int j = 0; j < 2 * num_tiles; j++)
            weights[j] = load_words(words + (j / 2) * to_next_tile + (j % 2) * 4 * LANES);
        fetch_ahead(fetch, to_next_tile, num_tiles);
        add_word(block.x + word * num_parts(kind), stride, weights, num_rows, num_tiles, kind, sums, code_sums);
    }
}

// A block of rows on its way along the shorts of a tile or two.
typedef struct {
    const uint32_t *x;  // its first row
    int64_t stride, to_next_tile;
    const uint8_t *groups;  // from the one that is met next
    uvec palettes[MAX_TILES];
    Escapes escapes[MAX_TILES];
    uint32_t *wide;  // of the block
    Fetch fetch;
} Walk;

INLINE Walk start_walk(const Matrix *m, Block block, int tile, int num_tiles) {
    Walk walk = {.x = block.x, .stride = row_words(m), .to_next_tile = tile_bytes(m),
                 .groups = (const uint8_t *)tile_at(m, tile), .wide = block.wide,
                 .fetch = plan_fetch(m, tile, block, GROUP_WORDS)};
#pragma GCC unroll 16
    for (int j = 0; j < num_tiles; j++) {
        walk.palettes[j] = load_palette(m->shorts.palettes + (tile + j) * SHORT_PALETTE);
        walk.escapes[j] = escapes_of(&m->shorts, tile + j);
    }
    return walk;
}

// The next group that has escaped from one of the tiles, or their number of groups.
INLINE int next_escape(const Walk *walk, int num_tiles) {
    int group = *walk->escapes[0].next;
#pragma GCC unroll 16
    for (int j = 1; j < num_tiles; j++) group = min_int(group, *walk->escapes[j].next);
    return group;
}

// Replaces what was widened for a group by what has escaped of it.
INLINE void take_escapes(Walk *walk, int group, int num_tiles, uvec *first, uvec *second) {
#pragma GCC unroll 16
    for (int j = 0; j < num_tiles; j++) {
        Escapes *escapes = &walk->escapes[j];
        if (*escapes->next != group) continue;
        for (int half = 0; half < 2; half++) {
            first[2 * j + half] = load_words(escapes->words + half * LANES);
            second[2 * j + half] = load_words(escapes->words + TILE + half * LANES);
        }
        escapes->next++, escapes->words += GROUP_WORDS * TILE;
    }
}

// Adds the products of a group's two words, which may be left for other blocks: where there are others, a block has so
// many products that storing beside them costs nothing.
INLINE void add_group(Walk *walk, int group, int has_escaped, int num_rows, int num_tiles, int leaves_wide, Sums sums) {
    uvec first[2 * MAX_TILES], second[2 * MAX_TILES];
#pragma GCC unroll 16
    for (int j = 0; j < num_tiles; j++)
        widen(walk->groups + j * walk->to_next_tile, walk->palettes[j], first + 2 * j, second + 2 * j);
    if (has_escaped) take_escapes(walk, group, num_tiles, first, second);
    fetch_ahead(walk->fetch, walk->to_next_tile, num_tiles);
    if (leaves_wide) {
        for (int half = 0; half < 2; half++) {
            store_words(walk->wide + half * LANES, first[half]);
            store_words(walk->wide + TILE + half * LANES, second[half]);
        }
        walk->wide += GROUP_WORDS * TILE;
    }
    const uint32_t *x = walk->x + GROUP_WORDS * group * num_parts(BF16_KIND);
    add_word(x, walk->stride, first, num_rows, num_tiles, BF16_KIND, sums, NULL);
    add_word(x + num_parts(BF16_KIND), walk->stride, second, num_rows, num_tiles, BF16_KIND, sums, NULL);
    walk->groups += GROUP_BYTES, walk->fetch.ahead += walk->fetch.bytes;
}

// Groups that have not escaped go by without a look at the list: from one that has to the next.
INLINE void add_shorts(const Matrix *m, Block block, int tile, int num_rows, int num_tiles, int leaves_wide,
                       Sums sums) {
    const int last = num_groups(m);
    Walk walk = start_walk(m, block, tile, num_tiles);
    for (int group = 0;; group++) {
        const int escape = next_escape(&walk, num_tiles);
        for (; group < escape; group++) add_group(&walk, group, 0, num_rows, num_tiles, leaves_wide, sums);
        if (group == last) return;
        add_group(&walk, group, 1, num_rows, num_tiles, leaves_wide, sums);
    }
}

// How a block of rows meets its tile: as it is packed, or as shorts that it widens, or widens and leaves in its room.
typedef enum { AS_PACKED, WIDENING, LEAVING_WIDE } Meeting;

// A few rows times a few tiles, held in registers while words go by.
INLINE void multiply_block(const Matrix *m, const Product *p, Block block, int tile, int num_rows, int num_tiles,
                           Kind kind, Meeting meeting) {
    Sums sums;
    CodeSums code_sums;
#pragma GCC unroll 16
    for (int i = 0; i < num_rows; i++)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * num_tiles; j++) {
            if (is_of_codes(kind)) code_sums[i][j] = (ivec){0};
            else sums[i][j] = load(m->bias + tile * TILE + j * LANES);
        }
    if (meeting == AS_PACKED) add_words(m, block, tile, num_rows, num_tiles, kind, sums, code_sums);
    else add_shorts(m, block, tile, num_rows, num_tiles, meeting == LEAVING_WIDE, sums);
    for (int i = 0; i < num_rows; i++) {
        if (is_of_codes(kind))
            for (int j = 0; j < 2 * num_tiles; j++)
                sums[i][j] = scaled_codes(m, p, block.row + i, tile * TILE + j * LANES, code_sums[i][j]);
        for (int j = 0; j < num_tiles; j++) store_sums(m, p, block.row + i, tile + j, sums[i] + 2 * j);
    }
}

// Few rows leave registers for a second tile: more chains at a time, and two streams for the memory to follow.
INLINE void multiply_tiles(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows, Kind kind,
                           Meeting meeting) {
    const int at_once = num_rows <= 3 ? MAX_TILES : 1;
    int tile = from;
    for (; tile + at_once <= to; tile += at_once) multiply_block(m, p, block, tile, num_rows, at_once, kind, meeting);
    if (tile < to) multiply_block(m, p, block, tile, num_rows, 1, kind, meeting);
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
