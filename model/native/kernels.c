// What the library offers to Python: single operators, and a whole step of a decoder.
#define _GNU_SOURCE
#include "decoder.h"

#define EXPORTED __attribute__((visibility("default")))

// Below this effort, some 15 microseconds, waking other threads takes longer than they save.
#define PARALLEL_EFFORT (1 << 17)
#define NUMBERS_PER_EFFORT 16  // of a row-wise operator

static int threads_for(int64_t effort, int num_threads) { return effort >= PARALLEL_EFFORT ? num_threads : 1; }

// ---- a product ----

typedef struct {
    const Matrix *m;
    const void *x;
    Product product;
    uint8_t *codes;
    float *scales;
    int width, x_is_bf16;
} MatrixWork;

static void multiply_work(void *work, int thread) {
    MatrixWork *w = work;
    if (w->m->numbers == CODES)
        SHARE_ROWS(thread, w->product.num_rows,
                   encode_row(w->x, w->codes, w->scales + row, row, w->width, 4 * w->m->num_words, w->x_is_bf16));
    multiply_part(w->m, &w->product, thread);
}

// y [num_rows][num_outputs] of x [num_rows][width], at least one row, both of the type of `is_bf16` unless y is wanted
// in float32. A matrix of codes takes room for those of x: `codes` [num_rows][4 * num_words], `scales` [num_rows].
EXPORTED void quire_multiply(const Matrix *m, const void *x, const void *residual, void *y, uint8_t *codes,
                             float *scales, int num_rows, int width, int is_bf16, int y_is_bf16, int num_threads) {
    const int has_codes = m->numbers == CODES;
    MatrixWork work = {m, x, {has_codes ? (const void *)codes : x, scales, residual, y, num_rows, y_is_bf16},
                       codes, scales, width, is_bf16};
    run_together(multiply_work, &work, threads_for(effort(m, num_rows), num_threads));
}

// How many outputs a tile of the packed weight holds at this level.
EXPORTED int quire_tile(void) { return TILE; }

// How many words the rows of a packed weight are filled up to multiples of.
EXPORTED int quire_row_words(void) { return ROW_WORDS; }

// Whether this level keeps bfloat16 in 12 bits, and how large the parts are that it keeps them in; see shorts.h.
EXPORTED int quire_has_shorts(void) { return HAS_SHORTS; }

EXPORTED int quire_short_palette(void) { return SHORT_PALETTE; }

EXPORTED int quire_group_words(void) { return GROUP_WORDS; }

EXPORTED int quire_group_bytes(void) { return GROUP_BYTES; }

static void choose_palettes(void *work, int thread) {
    const Shortening *s = work;
    TAKE_ROWS(thread, s->num_tiles, choose_palette(s, row));
}

static void shorten_tiles(void *work, int thread) {
    const Shortening *s = work;
    TAKE_ROWS(thread, s->num_tiles, shorten_tile(s, row));
}

// Fills in `palettes` and `num_escapes`.
EXPORTED void quire_choose_palettes(Shortening *s, int num_threads) { run_together(choose_palettes, s, num_threads); }

// And the rest, for `escape_starts` that follow from them.
EXPORTED void quire_shorten(Shortening *s, int num_threads) { run_together(shorten_tiles, s, num_threads); }

// What is added to the codes of x; see matrix.h.
EXPORTED int quire_code_offset(void) { return CODE_OFFSET; }

// ---- row by row ----

typedef struct {
    const void *x, *weight;
    void *y;
    int num_rows, width, is_bf16;
    float epsilon;
} NormWork;

static void norm_work(void *work, int thread) {
    NormWork *w = work;
    if (w->is_bf16) SHARE_ROWS(thread, w->num_rows, norm_row(w->x, w->weight, w->y, row, w->width, w->epsilon, 1));
    else SHARE_ROWS(thread, w->num_rows, norm_row(w->x, w->weight, w->y, row, w->width, w->epsilon, 0));
}

// Root mean square norm of [num_rows][width], times the weight.
EXPORTED void quire_rms_norm(const void *x, const void *weight, void *y, int num_rows, int width, float epsilon,
                             int is_bf16, int num_threads) {
    NormWork work = {x, weight, y, num_rows, width, is_bf16, epsilon};
    run_together(norm_work, &work, threads_for((int64_t)num_rows * width / NUMBERS_PER_EFFORT, num_threads));
}

typedef struct {
    const Rotation *rotation;
    int is_bf16;
} RotationWork;

static void rotation_work(void *work, int thread) {
    RotationWork *w = work;
    if (w->is_bf16) SHARE_ROWS(thread, w->rotation->num_tokens, rotate_token(w->rotation, row, 1));
    else SHARE_ROWS(thread, w->rotation->num_tokens, rotate_token(w->rotation, row, 0));
}

// Rotates queries and keys; keys and values go to the cache.
EXPORTED void quire_rotate(const Rotation *r, int is_bf16, int num_threads) {
    RotationWork work = {r, is_bf16};
    const int64_t numbers = (int64_t)r->num_tokens * r->head_dim * (r->num_heads + 2 * r->num_kv_heads);
    run_together(rotation_work, &work, threads_for(numbers / NUMBERS_PER_EFFORT, num_threads));
}

// ---- attention ----

typedef struct {
    const Attention *attention;
    int num_items, is_bf16;
} AttentionWork;

static void attention_work(void *work, int thread) {
    AttentionWork *w = work;
    Scratch scratch;
    if (w->is_bf16) attend_items(&scratch, w->attention, NULL, w->num_items, thread, 1);
    else attend_items(&scratch, w->attention, NULL, w->num_items, thread, 0);
}

EXPORTED void quire_attend(const Attention *a, int is_bf16, int num_threads) {
    AttentionWork work = {a, num_items(a, list_tiles(a)), is_bf16};
    run_together(attention_work, &work, work.num_items > 1 ? num_threads : 1);
}

// ---- a whole step ----

EXPORTED void quire_step(const Decoder *d, const Step *s, int num_threads) {
    const Plan *p = &d->plan;
    Forward f = {
        .decoder = d,
        .step = s,
        .attention = {.q = d->q, .out = d->mixed, .query_starts = p->query_starts, .context_lens = p->context_lens,
                      .block_tables = s->block_tables, .slots = p->slots, .tile_rows = d->tiles,
                      .tile_firsts = d->tiles + s->num_tokens, .table_stride = s->table_stride,
                      .num_rows = s->num_rows, .num_heads = d->num_heads, .num_kv_heads = d->num_kv_heads,
                      .head_dim = d->head_dim, .block_size = d->block_size, .scale = d->scale},
    };
    lay_out(d, s);
    embed_few(d, s->num_tokens);
    f.num_items = num_items(&f.attention, list_tiles(&f.attention));
    const Layer *layer = d->layers;
    const int64_t of_layer = effort(&layer->qkv, s->num_tokens) + effort(&layer->gate_up, s->num_tokens);
    run_together(run_step_part, &f, threads_for(of_layer * d->num_layers, num_threads));
}

// Asks the system for what this level needs; 0 where it refuses. To be called before any work.
EXPORTED int quire_permit(void) { return permit_tmm(); }

// How many rows each thread has a room of its own for.
EXPORTED int quire_few_rows(void) { return FEW_ROWS; }

// The sizes of the structs that callers fill in.
EXPORTED int quire_struct_size(int index) {
    const size_t sizes[] = {sizeof(Matrix), sizeof(Attention), sizeof(Rotation), sizeof(Layer), sizeof(Room),
                            sizeof(Decoder), sizeof(Row), sizeof(Step), sizeof(Shortening)};
    return (int)sizes[index];
}

// What this library was built from; the loader refuses a library that does not match its sources.
EXPORTED const char *quire_source_digest(void) { return QUIRE_SOURCE_DIGEST; }
