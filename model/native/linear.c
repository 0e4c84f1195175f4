// Matrix products y = x W^T + b over a weight that was packed once: the fast twin of torch.nn.functional.linear.
//
// The packed weight (TILE outputs go together; a word is one float32, or two bfloat16 of neighbouring inputs):
//
//     [ tile 0                                        ][ tile 1 ...
//       [ word 0 of outputs 0 .. TILE ][ word 1 of outputs 0 .. TILE ] ...
//
// so that one output tile is one stream through memory, and a vector of it meets one word of x, the same for all lanes.
// Outputs beyond the last one and the odd input's partner are zeros.
//
// A promise: each result is one chain of multiply-adds from the bias on, input by input, in a register of its own. Its
// bits depend on its row of x, its row of W and its bias; not on the number of rows, their place, or the threads.
// Another instruction set may give other last bits.
#include "simd.h"

#include <stddef.h>

#define TILE (2 * LANES)
#define MAX_ROWS (LANES == 16 ? 12 : 6)  // what the registers hold: two sums for each row, and the operands
#define MAX_TILES 2
#define PANEL_BYTES (512 * 1024)  // of x: they stay in the second cache while the weight goes by
#define PREFETCH_BYTES 4096       // ahead in the weight
#define SHARES_PER_THREAD 4       // so that a thread that was held up leaves its part to the others

// Below this effort, some 15 microseconds, waking other threads takes longer than they save.
#define PARALLEL_EFFORT (1 << 21)

// How words are multiplied. WIDE: the weight is bfloat16 pairs, x is float32, for machines without bfloat16 dots.
typedef enum { FLOAT, WIDE, DOTS } Kind;

typedef struct {
    const uint32_t *words;  // [num_tiles][num_words][TILE]
    const float *bias;      // [num_tiles * TILE]
    int num_outputs, num_words, is_bf16;
} Matrix;

typedef struct {
    const uint32_t *x;     // [num_rows][num_words], of WIDE twice as many
    const void *residual;  // [num_rows][num_outputs]: added to the rounded product; or NULL
    void *y;               // [num_rows][num_outputs]
} Rows;

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

INLINE Kind kind_of(const Matrix *m) { return !m->is_bf16 ? FLOAT : HAS_BF16_DOT ? DOTS : WIDE; }

INLINE void store_vector(void *y, const void *residual, vec sums, int is_bf16) {
    if (is_bf16) {
        if (residual != NULL) sums = load_bf16(residual) + round_bf16(sums);
        store_bf16(y, sums);
    } else {
        if (residual != NULL) sums = load(residual) + sums;
        store(y, sums);
    }
}

// Stores one row's sums of one tile.
INLINE void store_tile(void *y, const void *residual, const vec sums[2], int is_bf16) {
    const int bytes = LANES * (is_bf16 ? 2 : 4);
    for (int j = 0; j < 2; j++)
        store_vector((char *)y + j * bytes, residual == NULL ? NULL : (const char *)residual + j * bytes, sums[j],
                     is_bf16);
}

INLINE void store_sums(const Matrix *m, const Rows *rows, int row, int tile, const vec sums[2]) {
    const int bytes = m->is_bf16 ? 2 : 4, num_outputs = min_int(TILE, m->num_outputs - tile * TILE);
    const int64_t offset = ((int64_t)row * m->num_outputs + tile * TILE) * bytes;
    char *y = (char *)rows->y + offset;
    const char *residual = rows->residual == NULL ? NULL : (const char *)rows->residual + offset;
    if (num_outputs == TILE) {
        store_tile(y, residual, sums, m->is_bf16);
        return;
    }
    char y_edge[4 * TILE], residual_edge[4 * TILE] = {0};  // the last tile may end early
    if (residual != NULL) memcpy(residual_edge, residual, num_outputs * bytes);
    store_tile(y_edge, residual == NULL ? NULL : residual_edge, sums, m->is_bf16);
    memcpy(y, y_edge, num_outputs * bytes);
}

// A few rows times a few tiles, held in registers while words go by.
INLINE void multiply_block(const Matrix *m, const Rows *rows, int row, int tile, int num_rows, int num_tiles,
                           Kind kind) {
    const int64_t stride = (int64_t)m->num_words * (kind == WIDE ? 2 : 1);
    const int64_t tile_words = (int64_t)m->num_words * TILE;
    const uint32_t *x = rows->x + row * stride, *w = m->words + tile * tile_words;
    vec sums[MAX_ROWS][2 * MAX_TILES];
#pragma GCC unroll 16
    for (int i = 0; i < num_rows; i++)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * num_tiles; j++) sums[i][j] = load(m->bias + tile * TILE + j * LANES);
    for (int word = 0; word < m->num_words; word++, w += TILE) {
        uvec weights[2 * MAX_TILES];
#pragma GCC unroll 16
        for (int j = 0; j < 2 * num_tiles; j++) weights[j] = load_words(w + (j / 2) * tile_words + (j % 2) * LANES);
#pragma GCC unroll 16
        for (int j = 0; j < num_tiles; j++)
            for (int byte = 0; byte < 4 * TILE; byte += 64)
                __builtin_prefetch((const char *)(w + j * tile_words) + PREFETCH_BYTES + byte);
#pragma GCC unroll 16
        for (int i = 0; i < num_rows; i++) {
            const uint32_t *at = x + i * stride + (kind == WIDE ? 2 * word : word);
            const uvec first = splat_word(at[0]);
            const uvec second = kind == WIDE ? splat_word(at[1]) : first;
#pragma GCC unroll 16
            for (int j = 0; j < 2 * num_tiles; j++) {
                if (kind == DOTS) sums[i][j] = dot_bf16(first, weights[j], sums[i][j]);
                else if (kind == FLOAT) sums[i][j] = multiply_add((vec)first, (vec)weights[j], sums[i][j]);
                else {
                    sums[i][j] = multiply_add((vec)first, first_bf16(weights[j]), sums[i][j]);
                    sums[i][j] = multiply_add((vec)second, second_bf16(weights[j]), sums[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < num_tiles; j++) store_sums(m, rows, row + i, tile + j, sums[i] + 2 * j);
}

// Few rows leave registers for a second tile: more chains at a time, and two streams for the memory to follow.
INLINE void multiply_tiles(const Matrix *m, const Rows *rows, int row, int from, int to, int num_rows, Kind kind) {
    const int at_once = num_rows <= 3 ? MAX_TILES : 1;
    int tile = from;
    for (; tile + at_once <= to; tile += at_once) multiply_block(m, rows, row, tile, num_rows, at_once, kind);
    if (tile < to) multiply_block(m, rows, row, tile, num_rows, 1, kind);
}

INLINE void multiply_rows(const Matrix *m, const Rows *rows, int row, int from, int to, int num_rows, Kind kind) {
    switch (num_rows) {
        case 1: multiply_tiles(m, rows, row, from, to, 1, kind); break;
        case 2: multiply_tiles(m, rows, row, from, to, 2, kind); break;
        case 3: multiply_tiles(m, rows, row, from, to, 3, kind); break;
        case 4: multiply_tiles(m, rows, row, from, to, 4, kind); break;
        case 5: multiply_tiles(m, rows, row, from, to, 5, kind); break;
        case 6: multiply_tiles(m, rows, row, from, to, 6, kind); break;
#if LANES == 16
        case 7: multiply_tiles(m, rows, row, from, to, 7, kind); break;
        case 8: multiply_tiles(m, rows, row, from, to, 8, kind); break;
        case 9: multiply_tiles(m, rows, row, from, to, 9, kind); break;
        case 10: multiply_tiles(m, rows, row, from, to, 10, kind); break;
        case 11: multiply_tiles(m, rows, row, from, to, 11, kind); break;
        case 12: multiply_tiles(m, rows, row, from, to, 12, kind); break;
#endif
    }
}

static void multiply_float(const Matrix *m, const Rows *rows, int row, int from, int to, int num_rows) {
    multiply_rows(m, rows, row, from, to, num_rows, FLOAT);
}

static void multiply_bf16(const Matrix *m, const Rows *rows, int row, int from, int to, int num_rows) {
    multiply_rows(m, rows, row, from, to, num_rows, HAS_BF16_DOT ? DOTS : WIDE);
}

// The rows [first, last) times the tiles [from, to), in blocks of about equal numbers of rows.
static void multiply_panel(const Matrix *m, const Rows *rows, int first, int last, int from, int to) {
    const int num_blocks = ceil_div(last - first, MAX_ROWS);
    const int per_block = ceil_div(last - first, num_blocks);
    // All blocks of rows meet a tile while it is near; a single block goes along all tiles.
    const int step = num_blocks == 1 ? to - from : 1;
    for (int tile = from; tile < to; tile += step)
        for (int row = first; row < last; row += per_block) {
            const int num_rows = min_int(per_block, last - row);
            if (m->is_bf16) multiply_bf16(m, rows, row, tile, tile + step, num_rows);
            else multiply_float(m, rows, row, tile, tile + step, num_rows);
        }
}

// About how long one thread would take, in multiplications of words: reading the weight costs as much as 4 rows where a
// cache holds it, as 16 where it comes from memory.
INLINE int64_t effort(const Matrix *m, int num_rows, int is_cached) {
    return (int64_t)(num_rows + (is_cached ? 4 : 16)) * m->num_outputs * m->num_words * 16 / LANES;
}

// Computes y for all rows, at least one. `num_threads` is at least 1; `is_cached` is a guess and does not change y.
__attribute__((visibility("default"))) void quire_linear(const Matrix *m, const void *x, const void *residual, void *y,
                                                         int num_rows, int is_cached, int num_threads) {
    const Rows rows = {x, residual, y};
    const int64_t row_bytes = (int64_t)m->num_words * (kind_of(m) == WIDE ? 8 : 4);
    const int per_panel = max_int(4, (int)(PANEL_BYTES / row_bytes) / MAX_ROWS) * MAX_ROWS;
    const int num_panels = ceil_div(num_rows, per_panel), num_tiles = ceil_div(m->num_outputs, TILE);
    const int is_parallel = num_threads > 1 && effort(m, num_rows, is_cached) >= PARALLEL_EFFORT;
    const int num_shares = is_parallel ? min_int(num_tiles, num_threads * SHARES_PER_THREAD) : 1;
#if defined(_OPENMP)
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(num_threads) if (is_parallel)
#endif
    for (int panel = 0; panel < num_panels; panel++)
        for (int share = 0; share < num_shares; share++)
            multiply_panel(m, &rows, panel * per_panel, min_int((panel + 1) * per_panel, num_rows),
                           (int)((int64_t)num_tiles * share / num_shares),
                           (int)((int64_t)num_tiles * (share + 1) / num_shares));
}

// How many outputs a tile of the packed weight holds at this level.
__attribute__((visibility("default"))) int quire_linear_tile(void) { return TILE; }

// Whether x of a bfloat16 weight must be widened to float32.
__attribute__((visibility("default"))) int quire_linear_widens(void) { return !HAS_BF16_DOT; }

// What this library was built from; the loader refuses a library that does not match its sources.
__attribute__((visibility("default"))) const char *quire_source_digest(void) { return QUIRE_SOURCE_DIGEST; }
