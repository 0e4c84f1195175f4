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
//
// Here is what all of it shares; multiply_vectors.h and multiply_tmm.h have a few rows meet a few tiles in registers of
// either kind, multiply.h all rows all tiles.
#pragma once

#include "amx.h"
#include "rowwise.h"
#include "shorts.h"

#include <stddef.h>

#define MAX_ROWS (LANES == 16 ? 8 : 6)  // two sums for each: 6 fill 16 registers; 12 fit in 32, but are slower (LOG.md)
#define ROW_WORDS (HAS_AMX ? TMM_WORDS : 1)  // a weight's rows are filled up with zeros to multiples of so many words
#define AHEAD_BYTES (HAS_AMX ? 8192 : 4096)  // of the weight that a single block of rows goes along
#define UNTOLD_ROWS (HAS_AMX ? 0 : 4)  // so few rows are soon done: then what the processor fetches by itself is faster

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

// Of each tile of shorts.
INLINE int num_groups(const Matrix *m) { return (int)(tile_words(m) / TILE / GROUP_WORDS); }

INLINE int64_t tile_bytes(const Matrix *m) {
    return is_short(m) ? (int64_t)num_groups(m) * GROUP_BYTES : 4 * tile_words(m);
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
    uint32_t *wide;
} Block;

// What memory is to fetch at each step of a block of rows along a tile: so many bytes from `ahead` on.
typedef struct {
    const char *ahead;
    int bytes;
} Fetch;

// A single block of rows fetches what it needs soon, or leaves it to the processor. Several share the next tile among them, so that memory is as busy
// during the last block, which finds its tile near, as during the first.
INLINE Fetch plan_fetch(const Matrix *m, int tile, Block block, int num_rows, int words_per_step) {
    const int64_t bytes = tile_bytes(m);
    const int step_bytes = (is_short(m) ? GROUP_BYTES / GROUP_WORDS : TILE * 4) * words_per_step;
    if (block.count == 1) return (Fetch){tile_at(m, tile) + AHEAD_BYTES, num_rows > UNTOLD_ROWS ? step_bytes : 0};
    return (Fetch){tile_at(m, tile) + bytes + bytes * block.index / block.count, max_int(1, step_bytes / block.count)};
}
