// The tile registers ("tmm") of x86 processors with AMX, and their products; Intel's Software Developer's Manual, AMX.
//
// A register holds up to 16 rows of 16 words. C += A B, with C and A a row for each row of the operand, and B a row for
// each word of A: B lies as a packed weight does (matrix.h), and as keys and values do (attention.h). A word is two
// bfloat16, whose products are summed in float32, or four codes, whose products are summed exactly. A row of C depends
// on its row of A and on B: not on the number of rows, nor on the other ones.
//
// The operations are macros since a register's number is part of the instruction. They are told to the compiler as
// reading and writing any memory, since it does not know what lies where in a tile.
#pragma once

#include "simd.h"

#define TMM_ROWS 16
#define TMM_WORDS 16

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#define AMX(instruction, ...) __asm__ volatile(instruction : : __VA_ARGS__ : "memory")
#else
#define HAS_AMX 0
#define AMX(instruction, ...) (void)0
#endif

// What each register holds: rows, and bytes in a row.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
} TmmShapes;

INLINE void set_shape(TmmShapes *shapes, int tmm, int num_rows, int num_words) {
    shapes->num_rows[tmm] = (uint8_t)num_rows;
    shapes->row_bytes[tmm] = (uint16_t)(num_rows ? 4 * num_words : 0);
}

// Zeroes all registers.
INLINE void shape_tmm(const TmmShapes *shapes) {
    (void)shapes;
    AMX("ldtilecfg %0", "m"(*shapes));
}

// Empty registers are not saved when the system switches threads.
INLINE void release_tmm(void) { AMX("tilerelease"); }

#define ZERO_TMM(tmm) AMX("tilezero %%tmm" #tmm)
#define DOT_TMM_BF16(c, a, b) AMX("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c)
#define DOT_TMM_CODES(c, a, b) AMX("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c)
#define LOAD_TMM(tmm, p, row_stride) MOVE_TMM("tileloadd (%0,%1,1), %%tmm" #tmm, p, row_stride)
#define STORE_TMM(tmm, p, row_stride) MOVE_TMM("tilestored %%tmm" #tmm ", (%0,%1,1)", p, row_stride)
#define MOVE_TMM(instruction, p, row_stride)                 \
    do {                                                     \
        const void *tmm_place = (p);                         \
        const int64_t tmm_stride = (row_stride);             \
        (void)tmm_place, (void)tmm_stride;                   \
        AMX(instruction, "r"(tmm_place), "r"(tmm_stride));   \
    } while (0)

// Linux hands the registers out to a process that asks (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), once for all threads.
static int permit_tmm(void) {
#if HAS_AMX
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 1;
#endif
}
