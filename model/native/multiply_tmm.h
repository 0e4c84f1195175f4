// Products by tile registers: 4 to 7 hold two sets of rows and two halves of a tile, 0 to 3 the sums of each pair.
#pragma once

#include "matrix.h"

#define MAX_TMM_ROWS (2 * TMM_ROWS)

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

#define STEP_WORDS (TMM_WORDS * TILE)  // of a tile, which a set of rows meets at once
#define STEP_GROUPS (TMM_WORDS / GROUP_WORDS)
#define STEPS_NEAR 2  // a power of two: one is widened ahead, so that stores have ended before registers are loaded

// The shorts of a tile on their way to where registers are loaded from.
typedef struct {
    const uint8_t *groups;
    uvec palette;
    Escapes escapes;
    uint32_t *room;
    int last_room;  // of as many as a power of two, for a step each, which take turns
} Widening;

INLINE uint32_t *room_of(const Widening *w, int step) { return w->room + (step & w->last_room) * STEP_WORDS; }

// To be called for one step after the other.
INLINE void widen_step(Widening *w, int step) {
    const int first_group = step * STEP_GROUPS;
    uint32_t *room = room_of(w, step);
#pragma GCC unroll 16
    for (int group = 0; group < STEP_GROUPS; group++) {
        uvec first[2], second[2];
        widen(w->groups + (int64_t)(first_group + group) * GROUP_BYTES, w->palette, first, second);
        uint32_t *words = room + group * GROUP_WORDS * TILE;
        for (int half = 0; half < 2; half++) {
            store_words(words + half * LANES, first[half]);
            store_words(words + TILE + half * LANES, second[half]);
        }
    }
    for (; *w->escapes.next < first_group + STEP_GROUPS; w->escapes.next++, w->escapes.words += GROUP_WORDS * TILE)
        memcpy(room + (*w->escapes.next - first_group) * GROUP_WORDS * TILE, w->escapes.words, 4 * GROUP_WORDS * TILE);
}

// Lines of memory that are asked for while sums are made and while they are stored, which take about so many cycles.
typedef struct {
    const char *ahead;
    int lines_per_step, lines_per_row;
} Prefetch;

INLINE Prefetch plan_prefetch(const Matrix *m, int tile, Block block, int num_rows, int num_steps) {
    const Fetch fetch = plan_fetch(m, tile, block, num_rows, 1);
    const int num_lines = num_steps * TMM_WORDS * fetch.bytes / 64;
    const int64_t step_cycles = num_steps * (num_rows > TMM_ROWS ? 128 : 64);
    const int64_t row_cycles = num_rows * (m->is_gated ? 48 : 24);
    const int per_step = ceil_div((int)(num_lines * step_cycles / (step_cycles + row_cycles)), num_steps);
    return (Prefetch){fetch.ahead, per_step, ceil_div(max_int(0, num_lines - per_step * num_steps), num_rows)};
}

INLINE void prefetch(Prefetch *p, int num_lines) {
    for (int i = 0; i < num_lines; i++, p->ahead += 64) __builtin_prefetch(p->ahead, 0, 2);
}

INLINE void store_tmm_sums(const Matrix *m, const Product *p, Block block, int tile, int num_rows, int has_lower,
                           int is_codes, Prefetch *memory) {
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
        prefetch(memory, memory->lines_per_row);
        store_sums(m, p, block.row + i, tile, sums);
    }
}

// A set of rows or two times a tile: as it is packed, as another block has left it in the room, or, where it `widens`,
// of shorts.
INLINE void multiply_block_tmm(const Matrix *m, const Product *p, Block block, int tile, int num_rows, int has_lower,
                               int is_codes, int widens) {
    const int num_steps = ceil_div(m->num_words, TMM_WORDS), num_whole = m->num_words / TMM_WORDS;
    const uint32_t *packed = block.wide != NULL ? block.wide : (const uint32_t *)tile_at(m, tile);
    Prefetch memory = plan_prefetch(m, tile, block, num_rows, num_steps);
    uint32_t edge[MAX_TMM_ROWS][TMM_WORDS], near[STEPS_NEAR * STEP_WORDS] __attribute__((aligned(64)));
    Widening widening;
    if (widens) {
        widening.groups = (const uint8_t *)tile_at(m, tile);
        widening.palette = load_palette(m->shorts.palettes + tile * SHORT_PALETTE);
        widening.escapes = escapes_of(&m->shorts, tile);
        widening.room = block.wide != NULL ? block.wide : near;
        widening.last_room = block.wide != NULL ? INT32_MAX : STEPS_NEAR - 1;
        widen_step(&widening, 0);
    }
    copy_edge(m, block.x, num_rows, edge);
    ZERO_TMM(0);
    ZERO_TMM(2);
    if (has_lower) ZERO_TMM(1);
    if (has_lower) ZERO_TMM(3);
    for (int step = 0; step < num_steps; step++) {
        if (widens && step + 1 < num_steps) widen_step(&widening, step + 1);
        const uint32_t *words = widens ? room_of(&widening, step) : packed + step * STEP_WORDS;
        const uint32_t *rows = step < num_whole ? block.x + step * TMM_WORDS : edge[0];
        const int64_t row_words = step < num_whole ? m->num_words : TMM_WORDS;
        prefetch(&memory, memory.lines_per_step);
        LOAD_TMM(4, rows, 4 * row_words);
        LOAD_TMM(6, words, 4 * TILE);
        LOAD_TMM(7, words + LANES, 4 * TILE);
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
    store_tmm_sums(m, p, block, tile, num_rows, has_lower, is_codes, &memory);
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
