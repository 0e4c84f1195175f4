// Matrix products y = x W^T + b over a weight that was packed once: the fast twin of torch.nn.functional.linear.
//
// The packed weight (TILE outputs go together; a word is one float32, two bfloat16 or four 8-bit codes of neighbouring
// inputs):
//
//     [ tile 0                                        ][ tile 1 ...
//       [ word 0 of outputs 0 .. TILE ][ word 1 of outputs 0 .. TILE ] ...
//
// so that one output tile is one stream through memory, and a vector of it meets one word of x, the same for all lanes.
// Outputs beyond the last one and the inputs that fill up the last word are zeros. A gated matrix holds two in one: the
// first half of each tile are outputs of the gate, the second half the same outputs of the other, and y is
// silu(gate) * other (Shazeer, 2020).
//
// Pairs of bfloat16 can be kept in about three quarters of the room, without loss: shorts.h.
//
// 8-bit codes: W[o][i] = scale[o] * code[o][i], and x[i] = scale * code[i] with a scale for each row of x. Their
// products are added up as integers, which is exact, and scaled once. Where the machine multiplies unsigned by signed
// codes, those of x are kept with 128 added, and `offsets` takes out again what that adds to each output.
//
// A promise: each result is one fixed sequence of operations. In vector registers that is a chain of multiply-adds from
// the bias on, input by input; in tile registers sums of 16 words at a time, and the bias last; codes are summed as
// integers and scaled once. Its bits depend on its row of x, its row of W and its bias; not on the number of rows,
// their place, or the threads. Another instruction set may give other last bits.
#pragma once

#include "amx.h"
#include "rowwise.h"
#include "shorts.h"
#include "team.h"

#include <stddef.h>
#include <unistd.h>

#define MAX_ROWS (LANES == 16 ? 8 : 6)  // two sums for each: 6 fill 16 registers; 12 fit in 32, but are slower (LOG.md)
#define MAX_TMM_ROWS (2 * TMM_ROWS)      // what the tile registers hold
#define ROW_WORDS (HAS_AMX ? TMM_WORDS : 1)  // a weight's rows are filled up with zeros to multiples of so many words
#define MAX_TILES 2
#define AHEAD_BYTES 4096          // of the weight that a single block of rows goes along
#define START_BYTES 16384         // of a thread's share of the weight, to be there when its work begins

// What a matrix holds; the values are known to model/linear_native.py.
typedef enum { FLOATS, BF16S, CODES, SHORT_BF16S } Numbers;

// How words are multiplied. Without dots of a whole word, its two parts go one after the other: PAIRS as two float32,
// FOURS, of codes, as two pairs of 16-bit numbers. Then rows of x are widened before, and have two words for one.
typedef enum { FLOAT_WORDS, PAIRS, PAIR_DOTS, HALF_DOTS, FOURS, CODE_DOTS } Kind;

#define BF16_KIND (HAS_BF16_DOT ? PAIR_DOTS : PAIRS)
#define CODE_KIND (HAS_CODE_DOT ? CODE_DOTS : FOURS)

INLINE int num_parts(Kind kind) { return kind == PAIRS || kind == FOURS ? 2 : 1; }

INLINE int is_of_codes(Kind kind) { return kind == HALF_DOTS || kind == FOURS || kind == CODE_DOTS; }

typedef struct {
    const uint32_t *words;   // [num_tiles][num_words, filled up][TILE]; of shorts [num_tiles][groups][GROUP_BYTES]
    const float *bias;       // [num_tiles * TILE]
    const float *scales;     // [num_tiles * TILE], of codes
    const int32_t *offsets;  // [num_tiles * TILE], of codes
    Shorts shorts;
    int num_outputs;         // of y: of a gated matrix as many as each of the two has
    int num_words;           // of a row of x
    int numbers, is_gated;
} Matrix;

typedef struct {
    const uint32_t *x;     // [num_rows][num_words]
    const float *scales;   // [num_rows], of codes
    const void *residual;  // [num_rows][num_outputs] like y: added to the rounded product; or NULL
    void *y;               // [num_rows][num_outputs]
    int num_rows;
    int y_is_bf16;
} Product;

INLINE int tile_outputs(const Matrix *m) { return m->is_gated ? LANES : TILE; }

INLINE int num_tiles(const Matrix *m) { return ceil_div(m->num_outputs, tile_outputs(m)); }

INLINE int64_t tile_words(const Matrix *m) { return (int64_t)ceil_div(m->num_words, ROW_WORDS) * ROW_WORDS * TILE; }

INLINE int is_short(const Matrix *m) { return HAS_SHORTS && m->numbers == SHORT_BF16S; }

INLINE int64_t tile_bytes(const Matrix *m) {
    return is_short(m) ? tile_words(m) / TILE / GROUP_WORDS * GROUP_BYTES : 4 * tile_words(m);
}

// The start of a packed tile.
INLINE const char *tile_at(const Matrix *m, int tile) { return (const char *)m->words + tile * tile_bytes(m); }

INLINE Kind kind_of(const Matrix *m) {
    return m->numbers == FLOATS ? FLOAT_WORDS : m->numbers == CODES ? CODE_KIND : BF16_KIND;
}

// Words of a row of x as it meets the weight.
INLINE int64_t row_words(const Matrix *m) { return (int64_t)m->num_words * num_parts(kind_of(m)); }

// Whether the tile registers multiply it.
INLINE int fits_tmm(const Matrix *m) { return HAS_AMX && m->numbers != FLOATS; }

// Stores one vector of results, of which `num_lanes` exist, behind the residual that it is added to.
INLINE void store_results(const Product *p, int64_t index, vec v, int num_lanes) {
    if (p->residual != NULL)
        v = load_numbers(p->residual, index, num_lanes, p->y_is_bf16) + round_to(v, p->y_is_bf16);
    store_numbers(p->y, index, v, num_lanes, p->y_is_bf16);
}

INLINE void store_sums(const Matrix *m, const Product *p, int row, int tile, const vec sums[2]) {
    const int first = tile * tile_outputs(m), num_outputs = m->num_outputs - first;
    const int64_t index = (int64_t)row * m->num_outputs + first;
    if (m->is_gated) {
        store_results(p, index, gated(sums[0], sums[1], p->y_is_bf16), num_outputs);
        return;
    }
    store_results(p, index, sums[0], num_outputs);
    if (num_outputs > LANES) store_results(p, index + LANES, sums[1], num_outputs - LANES);
}

// What the sums of codes mean.
INLINE vec scaled_codes(const Matrix *m, const Product *p, int row, int output, ivec sums) {
    ivec offsets;
    memcpy(&offsets, m->offsets + output, sizeof offsets);
    const vec exact = __builtin_convertvector(sums - offsets, vec);
    return multiply_add(exact, splat(p->scales[row]) * load(m->scales + output), load(m->bias + output));
}

// Some rows that are held in registers together: block number `index` of `count` that meet a tile one after the other.
typedef struct {
    int row, index, count;
    const uint32_t *x;  // [rows][row_words], from `row` on
    // Room for the tile, or NULL: where the first block widens shorts for those after it, or codes were widened for all.
    // It holds one tile, so that blocks with room meet one tile at a time (num_tiles == 1).
    uint32_t *wide;
} Block;

// What memory is to fetch at each step of a block of rows along a tile: so many bytes from `ahead` on.
typedef struct {
    const char *ahead;
    int bytes;
} Fetch;

// A single block of rows fetches what it needs soon. Several share the next tile among them, so that memory is as busy
// during the last block, which finds its tile near, as during the first.
INLINE Fetch plan_fetch(const Matrix *m, int tile, Block block, int words_per_step) {
    const int64_t bytes = tile_bytes(m);
    const int step_bytes = (is_short(m) ? GROUP_BYTES / GROUP_WORDS : TILE * 4) * words_per_step;
    if (block.count == 1) return (Fetch){tile_at(m, tile) + AHEAD_BYTES, step_bytes};
    return (Fetch){tile_at(m, tile) + bytes + bytes * block.index / block.count, max_int(1, step_bytes / block.count)};
}

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
    const int num_groups = m->num_words / GROUP_WORDS;
    Walk walk = start_walk(m, block, tile, num_tiles);
    for (int group = 0;; group++) {
        const int escape = next_escape(&walk, num_tiles);
        for (; group < escape; group++) add_group(&walk, group, 0, num_rows, num_tiles, leaves_wide, sums);
        if (group == num_groups) return;
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

// With tile registers: 4 to 7 hold two sets of rows and two halves of a tile, 0 to 3 the sums of each pair of them.

// Shaping takes as long as a few products: it is left out where `*shaped_for`, in rows, is right already.
INLINE void shape_product(int num_rows, int *shaped_for) {
    if (*shaped_for == num_rows) return;
    *shaped_for = num_rows;
    const int upper = min_int(TMM_ROWS, num_rows);
    TmmShapes shapes = {.palette = 1};
    for (int tmm = 0; tmm < 6; tmm++) set_shape(&shapes, tmm, tmm % 2 ? num_rows - upper : upper, TMM_WORDS);
    set_shape(&shapes, 6, TMM_ROWS, TMM_WORDS);
    set_shape(&shapes, 7, TMM_ROWS, TMM_WORDS);
    shape_tmm(&shapes);
}

// The words that x's rows end with, filled up with zeros.
INLINE void copy_edge(const Matrix *m, const uint32_t *x, int num_rows, uint32_t edge[][TMM_WORDS]) {
    const int num_left = m->num_words % TMM_WORDS;
    if (num_left == 0) return;
    memset(edge, 0, sizeof *edge * num_rows);
    for (int i = 0; i < num_rows; i++) memcpy(edge[i], x + (i + 1) * m->num_words - num_left, 4 * num_left);
}

#define STEP_WORDS (TMM_WORDS * TILE)  // of a weight, that a set of rows meets at once

// The shorts of a tile on their way to where tile registers are loaded from, a step after the other.
typedef struct {
    const uint8_t *groups;
    uvec palette;
    Escapes escapes;
    int group;
} Widening;

INLINE void widen_step(Widening *widening, uint32_t *wide) {
    const int first_group = widening->group;
#pragma GCC unroll 16
    for (int i = 0; i < TMM_WORDS / GROUP_WORDS; i++, widening->groups += GROUP_BYTES, widening->group++) {
        uvec words[2 * GROUP_WORDS];
        widen(widening->groups, widening->palette, words, words + 2);
        for (int j = 0; j < 2 * GROUP_WORDS; j++)
            store_words(wide + i * GROUP_WORDS * TILE + j * LANES, words[j]);
    }
    for (; *widening->escapes.next < widening->group;
         widening->escapes.next++, widening->escapes.words += GROUP_WORDS * TILE)
        memcpy(wide + (*widening->escapes.next - first_group) * GROUP_WORDS * TILE, widening->escapes.words,
               4 * GROUP_WORDS * TILE);
}

INLINE void multiply_block_tmm(const Matrix *m, const Product *p, Block block, int tile, int num_rows, int has_lower,
                               int is_codes, int widens) {
    const uint32_t *x = block.x;
    uint32_t near[2 * STEP_WORDS] __attribute__((aligned(64)));  // two steps take turns: the next is widened in time
    uint32_t *wide = block.wide != NULL ? block.wide : near;
    const uint32_t *weights = widens || block.wide != NULL ? wide : (const uint32_t *)tile_at(m, tile);
    Widening widening = {0};
    if (widens)
        widening = (Widening){(const uint8_t *)tile_at(m, tile), load_palette(m->shorts.palettes + tile * SHORT_PALETTE),
                              escapes_of(&m->shorts, tile), 0};
    const int num_whole = m->num_words / TMM_WORDS * TMM_WORDS;
    // Memory is kept busy while sums are made and while they are stored, which take about so many cycles.
    const Fetch fetch = plan_fetch(m, tile, block, 1);
    const int num_steps = ceil_div(m->num_words, TMM_WORDS), num_lines = num_steps * TMM_WORDS * fetch.bytes / 64;
    const int64_t step_cycles = num_steps * (has_lower ? 128 : 64), row_cycles = num_rows * (m->is_gated ? 48 : 24);
    const int lines_per_step = ceil_div((int)(num_lines * step_cycles / (step_cycles + row_cycles)), num_steps);
    const int lines_per_row = ceil_div(max_int(0, num_lines - lines_per_step * num_steps), num_rows);
    const char *ahead = fetch.ahead;
    uint32_t edge[MAX_TMM_ROWS][TMM_WORDS];
    copy_edge(m, x, num_rows, edge);
    ZERO_TMM(0);
    ZERO_TMM(2);
    if (has_lower) ZERO_TMM(1);
    if (has_lower) ZERO_TMM(3);
    if (widens) widen_step(&widening, wide);
    for (int step = 0; step < num_steps; step++) {
        const int word = step * TMM_WORDS, turns = widens && block.wide == NULL;
        const uint32_t *w = weights + (turns ? step % 2 : step) * STEP_WORDS;
        if (widens && step + 1 < num_steps) widen_step(&widening, wide + (turns ? (step + 1) % 2 : step + 1) * STEP_WORDS);
        const uint32_t *rows = word < num_whole ? x + word : edge[0];
        const int64_t row_words = word < num_whole ? m->num_words : TMM_WORDS;
        for (int i = 0; i < lines_per_step; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        LOAD_TMM(4, rows, 4 * row_words);
        LOAD_TMM(6, w, 4 * TILE);
        LOAD_TMM(7, w + LANES, 4 * TILE);
        if (has_lower) LOAD_TMM(5, rows + TMM_ROWS * row_words, 4 * row_words);
        if (is_codes) {
            DOT_TMM_CODES(0, 4, 6);
            DOT_TMM_CODES(2, 4, 7);
            if (has_lower) DOT_TMM_CODES(1, 5, 6);
            if (has_lower) DOT_TMM_CODES(3, 5, 7);
        } else {
            DOT_TMM_BF16(0, 4, 6);
            DOT_TMM_BF16(2, 4, 7);
            if (has_lower) DOT_TMM_BF16(1, 5, 6);
            if (has_lower) DOT_TMM_BF16(3, 5, 7);
        }
    }
    float results[MAX_TMM_ROWS][TILE] __attribute__((aligned(64)));
    STORE_TMM(0, results[0], 4 * TILE);
    STORE_TMM(2, results[0] + LANES, 4 * TILE);
    if (has_lower) STORE_TMM(1, results[TMM_ROWS], 4 * TILE);
    if (has_lower) STORE_TMM(3, results[TMM_ROWS] + LANES, 4 * TILE);
    for (int i = 0; i < num_rows; i++) {
        vec sums[2];
        for (int j = 0; j < 2; j++) {
            const int output = tile * TILE + j * LANES;
            const vec result = load(results[i] + j * LANES);
            if (is_codes) sums[j] = scaled_codes(m, p, block.row + i, output, (ivec)result);
            else sums[j] = result + load(m->bias + output);
        }
        for (int j = 0; j < lines_per_row; j++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        store_sums(m, p, block.row + i, tile, sums);
    }
}

static void multiply_tmm(const Matrix *m, const Product *p, Block block, int from, int to, int num_rows,
                         int *shaped_for) {
    shape_product(num_rows, shaped_for);
    const int has_lower = num_rows > TMM_ROWS, widens = is_short(m) && (block.wide == NULL || block.index == 0);
    for (int tile = from; tile < to; tile++) {
        if (m->numbers == CODES && has_lower) multiply_block_tmm(m, p, block, tile, num_rows, 1, 1, 0);
        else if (m->numbers == CODES) multiply_block_tmm(m, p, block, tile, num_rows, 0, 1, 0);
        else if (widens && has_lower) multiply_block_tmm(m, p, block, tile, num_rows, 1, 0, 1);
        else if (widens) multiply_block_tmm(m, p, block, tile, num_rows, 0, 0, 1);
        else if (has_lower) multiply_block_tmm(m, p, block, tile, num_rows, 1, 0, 0);
        else multiply_block_tmm(m, p, block, tile, num_rows, 0, 0, 0);
    }
}

INLINE int max_rows(const Matrix *m) { return fits_tmm(m) ? MAX_TMM_ROWS : MAX_ROWS; }

// Blocks of about equal numbers of rows, from the first one to the row `last`, times the tiles [from, to).
static void multiply_blocks(const Matrix *m, const Product *p, Block first, int last, int from, int to,
                            int *shaped_for) {
    const int per_block = ceil_div(last - first.row, first.count);
    // All blocks of rows meet a tile while it is near; a single block goes along all tiles.
    const int step = first.count == 1 ? to - from : 1;
    for (int tile = from; tile < to; tile += step) {
        if (first.wide != NULL && m->numbers == CODES) widen_tile(m, tile, first.wide);
        for (Block block = first; block.row < last;
             block.index++, block.row += per_block, block.x += per_block * row_words(m)) {
            const int num_rows = min_int(per_block, last - block.row);
            if (fits_tmm(m)) multiply_tmm(m, p, block, tile, tile + step, num_rows, shaped_for);
            else switch (m->numbers) {
                case FLOATS: multiply_floats(m, p, block, tile, tile + step, num_rows); break;
                case BF16S: multiply_bf16s(m, p, block, tile, tile + step, num_rows); break;
                case SHORT_BF16S:
                    if (block.wide != NULL && block.index > 0)
                        multiply_bf16s(m, p, block, tile, tile + step, num_rows);
                    else multiply_shorts(m, p, block, tile, tile + step, num_rows);
                    break;
                default:
                    if (block.wide != NULL) multiply_halves(m, p, block, tile, tile + step, num_rows);
                    else multiply_codes(m, p, block, tile, tile + step, num_rows);
            }
        }
    }
}

#define MAX_WIDE_WORDS 3072  // of a widened tile that there is room for

// A function of its own, never inlined: some compilers have each page of a large frame touched at every call, and only
// these products need the room.
static __attribute__((noinline)) void multiply_blocks_in_room(const Matrix *m, const Product *p, Block first, int last,
                                                              int from, int to, int *shaped_for) {
    uint32_t room[MAX_WIDE_WORDS * TILE] __attribute__((aligned(64)));
    first.wide = room;
    multiply_blocks(m, p, first, last, from, to, shaped_for);
}

// The rows [first, last), which are at x, times the tiles [from, to).
static void multiply_panel(const Matrix *m, const Product *p, const uint32_t *x, int first, int last, int from, int to,
                           int *shaped_for) {
    const Block block = {first, 0, ceil_div(last - first, max_rows(m)), x, NULL};
    const int widens = is_short(m) ? block.count > 1 : m->numbers == CODES && !HAS_CODE_DOT && block.count > 2;
    if (widens && (is_short(m) ? m->num_words : row_words(m)) <= MAX_WIDE_WORDS)
        multiply_blocks_in_room(m, p, block, last, from, to, shaped_for);
    else multiply_blocks(m, p, block, last, from, to, shaped_for);
}

#define MOST_PANEL_BYTES (1 << 20)  // a panel that is widened lies on the stack

static int panel_bytes = 512 * 1024;  // of x, to stay in the second cache while the weight goes by: half of the cache

__attribute__((constructor)) static void learn_panel_bytes(void) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) panel_bytes = (int)(bytes / 2 < MOST_PANEL_BYTES ? bytes / 2 : MOST_PANEL_BYTES);
#endif
}

// About equal panels, of whole blocks of rows.
INLINE int rows_per_panel(const Matrix *m, int num_rows) {
    const int most = max_int(1, (int)(panel_bytes / (row_words(m) * 4) / max_rows(m))) * max_rows(m);
    const int num_blocks = ceil_div(num_rows, max_rows(m));
    return max_int(1, ceil_div(num_blocks, max_int(1, ceil_div(num_rows, most)))) * max_rows(m);
}

// Has memory fetch what this thread will read first of a weight, while there is something else to wait for.
static void fetch_start(const Matrix *m, int num_rows, int thread) {
    const int num_parts = num_tiles(m) * ceil_div(num_rows, rows_per_panel(m, num_rows));
    const int tile = share_start(thread, num_parts) % num_tiles(m);
    for (int byte = 0; byte < START_BYTES; byte += 64)
        __builtin_prefetch(tile_at(m, tile) + byte, 0, 2);
}

// Rows of words as parts.
static void widen_rows(const uint32_t *x, int64_t num_words, Kind kind, uint32_t *wide) {
    if (kind == PAIRS)
        for (int64_t i = 0; i < num_words; i++) wide[2 * i] = x[i] << 16, wide[2 * i + 1] = x[i] & 0xffff0000u;
    else
        for (int64_t i = 0; i < num_words; i++) {
            const int32_t even = (int32_t)(x[i] << 8), odd = (int32_t)x[i];
            wide[2 * i] = ((uint32_t)(even >> 8) & 0xffff0000u) | (uint16_t)((int16_t)even >> 8);
            wide[2 * i + 1] = ((uint32_t)(odd >> 8) & 0xffff0000u) | (uint16_t)((int16_t)odd >> 8);
        }
}

// A thread's part of a product. Parts are tiles, of one panel of rows after the other. `room` is for a panel of x where
// it is widened, which each thread does for itself.
static void multiply_part_in(const Matrix *m, const Product *p, int thread, uint32_t *room) {
    const int per_panel = rows_per_panel(m, p->num_rows);
    const int tiles = num_tiles(m), num_panels = ceil_div(p->num_rows, per_panel);
    int from, to, shaped_for = 0, widened = -1;
    while (take(thread, num_panels * tiles, MAX_TILES, &from, &to))
        while (from < to) {
            const int panel = from / tiles, until = min_int(to, (panel + 1) * tiles);
            const int first = panel * per_panel, last = min_int(first + per_panel, p->num_rows);
            const uint32_t *x = p->x + (int64_t)first * m->num_words;
            if (room != NULL && panel != widened)
                widen_rows(x, (int64_t)(last - first) * m->num_words, kind_of(m), room), widened = panel;
            multiply_panel(m, p, room != NULL ? room : x, first, last, from - panel * tiles, until - panel * tiles,
                           &shaped_for);
            from = until;
        }
    if (fits_tmm(m)) release_tmm();
}

static __attribute__((noinline)) void multiply_part_widened(const Matrix *m, const Product *p, int thread) {
    uint32_t room[min_int(rows_per_panel(m, p->num_rows), p->num_rows) * row_words(m)];
    multiply_part_in(m, p, thread, room);
}

static void multiply_part(const Matrix *m, const Product *p, int thread) {
    if (num_parts(kind_of(m)) > 1) multiply_part_widened(m, p, thread);
    else multiply_part_in(m, p, thread, NULL);
}

// About how long one thread would take for a row, in vectors of multiplications; reading the weight costs as much as 8.
INLINE int64_t effort(const Matrix *m, int num_rows) {
    return (int64_t)(num_rows + 8) * num_tiles(m) * m->num_words * 2;
}
