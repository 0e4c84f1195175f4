// bfloat16 in 12 bits, without loss: a step with few rows lasts as long as memory takes to bring the weights.
//
// The low byte of a number, its last exponent bit and its mantissa, is kept as it is. High bytes, sign and exponent,
// are nearly all of a few kinds: 16 of them make the palette of a tile, and 4 bits say which it is. Of a tile, words go
// in groups of two:
//
//     [ low bytes of word 0 ][ low bytes of word 1 ][ codes: word 0 in the low half of each byte, word 1 in the high ]
//       2 TILE bytes           2 TILE bytes           2 TILE bytes
//
// A group in which a number is of another kind escapes: it is kept as it was, beside the tile, and the list of the
// tile's escapes says when it is its turn. Rare where weights are about normal: the palette reaches over 16 binades,
// and one number in 10,000 to 20,000 is smaller, about one group in 100. (That exponents of weights are worth under 3
// bits: Zhang et al., DFloat11, 2025.)
#pragma once

#include "simd.h"

#define HAS_SHORTS (LANES >= 8)
#define SHORT_PALETTE 16
#define GROUP_WORDS 2
#define GROUP_NUMBERS (GROUP_WORDS * 2 * TILE)
#define GROUP_BYTES (GROUP_NUMBERS * 3 / 2)

// What a matrix of them has beside its groups.
typedef struct {
    const uint8_t *palettes;       // [num_tiles][SHORT_PALETTE]
    const int32_t *escape_starts;  // [num_tiles]: where the list of a tile starts
    const int32_t *escapes;        // groups in ascending order, each list ended by the number of groups
    const uint32_t *escaped;       // [number of escapes, at least 1][GROUP_WORDS][TILE]
} Shorts;

// The escapes of a tile that are still to come.
typedef struct {
    const int32_t *next;
    const uint32_t *words;
} Escapes;

INLINE Escapes escapes_of(const Shorts *s, int tile) {
    const int64_t start = s->escape_starts[tile];
    return (Escapes){s->escapes + start, s->escaped + (start - tile) * GROUP_WORDS * TILE};
}

// Where a number's low byte lies among those of its word, and its code: widening puts the low byte and the high byte of
// numbers side by side in stretches of 16 bytes, the first half of a stretch for the first vector of the tile.
INLINE int place_of(int number) {
    const int vector = number / (2 * LANES), within = number % (2 * LANES);
    return within / 8 * 16 + vector * 8 + within % 8;
}

#if HAS_SHORTS
#if LANES == 16
#define SHUFFLE_BYTES(table, codes) (uvec)_mm512_shuffle_epi8((__m512i)(table), (__m512i)(codes))
#define LOW_BYTE_PAIRS(low, high) (uvec)_mm512_unpacklo_epi8((__m512i)(low), (__m512i)(high))
#define HIGH_BYTE_PAIRS(low, high) (uvec)_mm512_unpackhi_epi8((__m512i)(low), (__m512i)(high))
#else
#define SHUFFLE_BYTES(table, codes) (uvec)_mm256_shuffle_epi8((__m256i)(table), (__m256i)(codes))
#define LOW_BYTE_PAIRS(low, high) (uvec)_mm256_unpacklo_epi8((__m256i)(low), (__m256i)(high))
#define HIGH_BYTE_PAIRS(low, high) (uvec)_mm256_unpackhi_epi8((__m256i)(low), (__m256i)(high))
#endif

// A palette in each stretch of 16 bytes, which is where shuffles look bytes up.
INLINE uvec load_palette(const uint8_t *palette) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)palette);
#if LANES == 16
    return (uvec)_mm512_broadcast_i32x4(bytes);
#else
    return (uvec)_mm256_broadcastsi128_si256(bytes);
#endif
}

// A group as it was: `first` and `second` are the two vectors of each word.
INLINE void widen(const uint8_t *group, uvec palette, uvec *first, uvec *second) {
    const uvec half = splat_word(0x0f0f0f0fu), codes = load_words(group + 4 * TILE);
    const uvec low0 = load_words(group), low1 = load_words(group + 2 * TILE);
    const uvec high0 = SHUFFLE_BYTES(palette, codes & half);
    const uvec high1 = SHUFFLE_BYTES(palette, (codes >> 4) & half);
    first[0] = LOW_BYTE_PAIRS(low0, high0);
    first[1] = HIGH_BYTE_PAIRS(low0, high0);
    second[0] = LOW_BYTE_PAIRS(low1, high1);
    second[1] = HIGH_BYTE_PAIRS(low1, high1);
}
#else  // for code that asked HAS_SHORTS before
INLINE uvec load_palette(const uint8_t *palette) {
    (void)palette;
    return (uvec){0};
}

INLINE void widen(const uint8_t *group, uvec palette, uvec *first, uvec *second) {
    (void)group, (void)palette, (void)first, (void)second;
}
#endif

// ---- making them ----

typedef struct {
    const uint32_t *words;  // [num_tiles][num_words][TILE], two bfloat16 each
    int num_tiles, num_words;
    uint8_t *palettes;
    int32_t *num_escapes;          // [num_tiles]
    const int32_t *escape_starts;  // and the rest as in Shorts
    int32_t *escapes;
    uint32_t *escaped;
    uint8_t *groups;  // [num_tiles][num_words / GROUP_WORDS][GROUP_BYTES]
} Shortening;

#define NO_CODE SHORT_PALETTE  // a bit that no code has

// The code of each high byte in a palette, or NO_CODE.
static void index_palette(const uint8_t *palette, uint8_t code_of[256]) {
    memset(code_of, NO_CODE, 256);
    for (int code = 0; code < SHORT_PALETTE; code++) code_of[palette[code]] = code;
}

static int is_escape(const uint8_t *bytes, const uint8_t code_of[256]) {
    int found = 0;
    for (int i = 0; i < GROUP_NUMBERS; i++) found |= code_of[bytes[2 * i + 1]];
    return (found & NO_CODE) != 0;
}

// A tile's palette is its most frequent high bytes; tells how many groups have others.
static void choose_palette(const Shortening *s, int tile) {
    const int64_t num_numbers = (int64_t)s->num_words * 2 * TILE;
    const uint8_t *bytes = (const uint8_t *)(s->words + tile * (num_numbers / 2));
    uint8_t *palette = s->palettes + tile * SHORT_PALETTE, code_of[256];
    int64_t counts[256] = {0};
    for (int64_t i = 0; i < num_numbers; i++) counts[bytes[2 * i + 1]]++;
    for (int code = 0; code < SHORT_PALETTE; code++) {
        int most = 0;
        for (int byte = 1; byte < 256; byte++)
            if (counts[byte] > counts[most]) most = byte;
        palette[code] = most;
        counts[most] = -1;
    }
    index_palette(palette, code_of);
    s->num_escapes[tile] = 0;
    for (int64_t i = 0; i < num_numbers; i += GROUP_NUMBERS)
        s->num_escapes[tile] += is_escape(bytes + 2 * i, code_of);
}

static void shorten_group(const uint8_t *bytes, const uint8_t code_of[256], uint8_t *group) {
    for (int i = 0; i < 2 * TILE; i++) {
        const uint8_t *first = bytes + 2 * i, *second = first + 4 * TILE;
        const int place = place_of(i);
        group[place] = first[0];
        group[2 * TILE + place] = second[0];
        group[4 * TILE + place] = (code_of[first[1]] & 15) | (code_of[second[1]] & 15) << 4;  // of escapes never read
    }
}

static void shorten_tile(const Shortening *s, int tile) {
    const int num_groups = s->num_words / GROUP_WORDS, start = s->escape_starts[tile];
    const uint8_t *bytes = (const uint8_t *)(s->words + (int64_t)tile * s->num_words * TILE);
    uint8_t *groups = s->groups + (int64_t)tile * num_groups * GROUP_BYTES, code_of[256];
    int32_t *escape = s->escapes + start;
    uint32_t *escaped = s->escaped + (int64_t)(start - tile) * GROUP_WORDS * TILE;
    index_palette(s->palettes + tile * SHORT_PALETTE, code_of);
    for (int group = 0; group < num_groups; group++, bytes += 2 * GROUP_NUMBERS) {
        shorten_group(bytes, code_of, groups + (int64_t)group * GROUP_BYTES);
        if (!is_escape(bytes, code_of)) continue;
        memcpy(escaped, bytes, 2 * GROUP_NUMBERS);
        escaped += GROUP_WORDS * TILE;
        *escape++ = group;
    }
    *escape = num_groups;
}
