// A whole step of a decoder in one call: model/transformer.py's `forward`, with the bits of its compiled operators.
//
// The layers' loop runs inside one team of threads, which meet after each operator; from Python each operator would be
// a call of its own, and waking the threads for each takes longer than many of them last. Shapes as in
// model/transformer.py: T tokens, W wanted tokens, E hidden size, F intermediate size, V vocabulary.
#pragma once

#include "attention.h"
#include "multiply.h"

typedef struct {
    Matrix qkv, o, gate_up, down;
    const void *norm1, *norm2;  // [E]
    void *k_cache, *v_cache;
} Layer;

// Where rows lie that are about to meet a matrix.
typedef struct {
    void *normed;        // [rows][E]
    uint8_t *codes;      // [rows][inputs of the widest matrix], where any holds codes
    float *code_scales;  // [rows]
} Room;

// A step, token by token and row by row. Shapes as in model/inputs.py.
typedef struct {
    int64_t *ids, *positions, *write_blocks, *write_offsets;  // [T]
    int64_t *wanted;                                          // [W], ascending
    int32_t *query_starts, *context_lens, *slots;             // [rows + 1], [rows], [rows]
} Plan;

// A model, and the room that a step of at most so many tokens works in.
typedef struct {
    const Layer *layers;
    Matrix unembedding;
    const void *embedding, *norm;  // [V][E], [E]
    const float *cosines, *sines;  // [positions][head_dim]
    void *x, *qkv, *mixed;         // [T][E], [T][heads and 2 kv heads][head_dim], [T][heads][head_dim]
    void *q, *activated;           // [T][heads][head_dim], [T][F]
    int32_t *tiles;                // [2][T]
    Plan plan;
    const Room *rooms;             // one of T rows for all, and one of FEW_ROWS for each thread
    int num_layers, hidden_size, num_heads, num_kv_heads, head_dim, block_size, is_bf16;
    float epsilon, scale;
} Decoder;

// One row of a step, as in model/interface.py.
typedef struct {
    int32_t slot, start, num_tokens, wants_token;
} Row;

// One step, and the tables by slot of model/inputs.py.
typedef struct {
    const Row *rows;
    const int32_t *tokens, *block_tables;  // [slots][stride]
    int64_t token_stride, table_stride;
    int num_rows, num_tokens, num_wanted;
    float *logits;    // [W][V]
    float *peaks;     // [W]: the largest logit of each row
    int64_t *places;  // [W]: and the first token that has it
} Step;

typedef struct {
    const Decoder *decoder;
    const Step *step;
    Attention attention;  // of the layer at hand but for its caches
    int num_items;
} Forward;

// Writes a step's rows out token by token; SlotTables.build in model/inputs.py tells it in NumPy.
static void lay_out(const Decoder *d, const Step *s) {
    const Plan *p = &d->plan;
    int token = 0, num_wanted = 0;
    p->query_starts[0] = 0;
    for (int r = 0; r < s->num_rows; r++) {
        const Row row = s->rows[r];
        const int32_t *tokens = s->tokens + row.slot * s->token_stride;
        const int32_t *block_table = s->block_tables + row.slot * s->table_stride;
        for (int position = row.start; position < row.start + row.num_tokens; position++, token++) {
            p->ids[token] = tokens[position];
            p->positions[token] = position;
            p->write_blocks[token] = block_table[position / d->block_size];
            p->write_offsets[token] = position % d->block_size;
        }
        p->slots[r] = row.slot;
        p->query_starts[r + 1] = token;
        p->context_lens[r] = row.start + row.num_tokens;
        if (row.wants_token) p->wanted[num_wanted++] = token - 1;
    }
}

// Runs `body` for the rows that this thread takes, as `row`.
#define TAKE_ROWS(thread, count, body)                                 \
    do {                                                               \
        int from_, to_;                                                \
        while (take(thread, count, 1, &from_, &to_))                   \
            for (int64_t row = from_; row < to_; row++) { body; }      \
    } while (0)

// ... and meets the others.
#define SHARE_ROWS(thread, count, body)                                \
    do {                                                               \
        TAKE_ROWS(thread, count, body);                                \
        meet(thread);                                                  \
    } while (0)

// So few rows each thread prepares for itself, in a room of its own: that takes less than to meet. Where the others go on
// meanwhile it may read what they are writing; then it gets no part of what it prepared for, and nobody reads that room.
#define FEW_ROWS 4

#define PREPARE_ROWS(thread, count, body)                              \
    do {                                                               \
        if (count > FEW_ROWS) SHARE_ROWS(thread, count, body);         \
        else if (!is_late(thread))                                     \
            for (int64_t row = 0; row < count; row++) { body; }        \
    } while (0)

INLINE const Room *room_for(const Decoder *d, int num_rows, int thread) {
    return d->rooms + (num_rows > FEW_ROWS ? 0 : 1 + thread);
}

// y = W x (+ residual), for a matrix of any kind; codes of x are made first. `next` is what is multiplied afterwards.
INLINE void apply(const Decoder *d, const Matrix *m, const void *x, const void *residual, void *y, int num_rows,
                  int width, const Matrix *next, int thread, int is_bf16, int y_is_bf16) {
    Product product = {x, NULL, residual, y, num_rows, y_is_bf16};
    if (m->numbers == CODES) {
        const Room *room = room_for(d, num_rows, thread);
        PREPARE_ROWS(thread, num_rows, encode_row(x, room->codes, room->code_scales + row, row, width,
                                                  4 * m->num_words, is_bf16));
        product.x = (const uint32_t *)room->codes, product.scales = room->code_scales;
    }
    multiply_part(m, &product, thread);
    if (next != NULL) fetch_start(next, num_rows, thread);
    meet(thread);
}

// Returns where the rows are: for this thread only, where they are few.
INLINE const void *norm_rows(const Decoder *d, const void *weight, int num_rows, int thread, int is_bf16) {
    const Room *room = room_for(d, num_rows, thread);
    PREPARE_ROWS(thread, num_rows, norm_row(d->x, weight, room->normed, row, d->hidden_size, d->epsilon, is_bf16));
    return room->normed;
}

// The rows of wanted tokens move to the front; nothing behind the last keys and values reads the others.
INLINE void keep_wanted(const int64_t *wanted, int num_wanted, void *rows, int64_t row_bytes) {
    for (int i = 0; i < num_wanted; i++)
        if (wanted[i] != i) memmove((char *)rows + i * row_bytes, (char *)rows + wanted[i] * row_bytes, row_bytes);
}

// Whether each item is all that sees its token's key: then it can rotate it itself, and nobody has to meet in between.
INLINE int rotates_in_items(const Attention *a, int num_tokens) {
    return num_tokens == a->num_rows && cut_heads(a).head_parts == 1;
}

// `rotation` is given where items rotate for themselves.
INLINE void attend_items(Scratch *scratch, const Attention *a, const Rotation *rotation, int num_items, int thread,
                         int is_bf16) {
    int from, to;
    while (take(thread, num_items, 1, &from, &to))
        for (int i = from; i < to; i++) {
            const Item item = make_item(a, i), next = make_item(a, min_int(i + 1, num_items - 1));
            if (rotation != NULL) {
                fetch_place(rotation, next.first_token, next.kv_head, is_bf16);
                rotate_heads(rotation, item.first_token, item.first_head, item.num_heads, item.kv_head, is_bf16);
            }
            attend_item(scratch, a, &item, &next, is_bf16);
        }
    meet(thread);
}

// One layer; the last one computes only what is wanted from its attention on. Returns the rows that are left.
INLINE int run_layer(const Forward *f, int index, Scratch *scratch, int thread, int is_bf16) {
    const Decoder *d = f->decoder;
    const Step *s = f->step;
    const Layer *layer = d->layers + index;
    const int is_last = index == d->num_layers - 1;
    const Matrix *next = is_last ? &d->unembedding : &layer[1].qkv;
    const int num_tokens = s->num_tokens, q_size = d->num_heads * d->head_dim, bytes = is_bf16 ? 2 : 4;
    const void *normed = norm_rows(d, layer->norm1, num_tokens, thread, is_bf16);
    apply(d, &layer->qkv, normed, NULL, d->qkv, num_tokens, d->hidden_size, &layer->o, thread, is_bf16, is_bf16);
    const Rotation rotation = {
        .qkv = d->qkv, .cosines = d->cosines, .sines = d->sines, .positions = d->plan.positions, .q = d->q,
        .k_cache = layer->k_cache, .v_cache = layer->v_cache, .blocks = d->plan.write_blocks, .offsets = d->plan.write_offsets,
        .num_tokens = num_tokens, .num_heads = d->num_heads, .num_kv_heads = d->num_kv_heads,
        .head_dim = d->head_dim, .block_size = d->block_size};
    Attention attention = f->attention;
    attention.k_cache = layer->k_cache, attention.v_cache = layer->v_cache;
    const Item item = make_item(&attention, min_int(share_start(thread, f->num_items), f->num_items - 1));
    fetch_item(&attention, &item, TILES_AHEAD, is_bf16);
    const int rotates_first = !rotates_in_items(&attention, num_tokens);
    if (rotates_first) SHARE_ROWS(thread, num_tokens, rotate_token(&rotation, row, is_bf16));
    attend_items(scratch, &attention, rotates_first ? NULL : &rotation, f->num_items, thread, is_bf16);
    const int num_left = is_last ? s->num_wanted : num_tokens;
    if (num_left < num_tokens) {
        void *const kept[] = {d->mixed, d->x};
        const int64_t row_bytes[] = {(int64_t)q_size * bytes, (int64_t)d->hidden_size * bytes};
        SHARE_ROWS(thread, 2, keep_wanted(d->plan.wanted, num_left, kept[row], row_bytes[row]));
    }
    if (num_left == 0) return 0;
    apply(d, &layer->o, d->mixed, d->x, d->x, num_left, q_size, &layer->gate_up, thread, is_bf16, is_bf16);
    normed = norm_rows(d, layer->norm2, num_left, thread, is_bf16);
    apply(d, &layer->gate_up, normed, NULL, d->activated, num_left, d->hidden_size, &layer->down, thread, is_bf16,
          is_bf16);
    apply(d, &layer->down, d->activated, d->x, d->x, num_left, layer->gate_up.num_outputs, next, thread, is_bf16,
          is_bf16);
    return num_left;
}

INLINE void embed(const Decoder *d, int64_t row) {
    const int64_t row_bytes = (int64_t)d->hidden_size * (d->is_bf16 ? 2 : 4);
    memcpy((char *)d->x + row * row_bytes, (const char *)d->embedding + d->plan.ids[row] * row_bytes, row_bytes);
}

// Before the team is called, which saves it a meeting: the caller multiplies while the others wake up.
INLINE void embed_few(const Decoder *d, int num_tokens) {
    for (int row = 0; num_tokens <= FEW_ROWS && row < num_tokens; row++) embed(d, row);
}

// After embed_few.
INLINE void run_step(const Forward *f, int thread, int is_bf16) {
    const Decoder *d = f->decoder;
    Scratch scratch;
    int num_left = f->step->num_tokens;
    if (num_left > FEW_ROWS) SHARE_ROWS(thread, num_left, embed(d, row));
    for (int layer = 0; layer < d->num_layers; layer++) num_left = run_layer(f, layer, &scratch, thread, is_bf16);
    if (num_left == 0) return;
    const void *normed = norm_rows(d, d->norm, num_left, thread, is_bf16);
    const Step *s = f->step;
    const int width = d->unembedding.num_outputs;
    apply(d, &d->unembedding, normed, NULL, s->logits, num_left, d->hidden_size, NULL, thread, is_bf16, 0);
    TAKE_ROWS(thread, num_left, find_peak(s->logits + row * width, width, s->peaks + row, s->places + row));
}

static void run_step_part(void *work, int thread) {
    const Forward *f = work;
    if (f->decoder->is_bf16) run_step(f, thread, 1);
    else run_step(f, thread, 0);
}
