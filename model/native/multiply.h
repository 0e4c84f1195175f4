// All rows of a product times all tiles of a matrix: threads take parts of it, each for the rows that a cache holds.
#pragma once

#include <unistd.h>

#include "multiply_tmm.h"
#include "multiply_vectors.h"
#include "team.h"

#define START_BYTES 16384  // of a thread's share of the weight, to be there when its work begins

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
_Static_assert(MAX_WIDE_WORDS % ROW_WORDS == 0, "a row that is filled up has room, too");

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
    while (take(thread, num_panels * tiles, 1, &from, &to))
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
