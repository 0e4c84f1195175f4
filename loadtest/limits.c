// What this machine can do at most: how fast memory is read, and how many operations the dot-product instructions do.
//
//     limits read MIB THREADS
//     limits bf16|fp32|int8 THREADS
//
// Prints one number: bytes or operations per second (a multiply and an add are two), the best of several tries; or
// nothing where the machine lacks the instruction.

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { TRIES = 7, SUMS = 12, ROUNDS = 4000000 };

static volatile double sink;  // what is computed must look needed

static double read_once(const uint64_t *data, size_t count, int threads) {
    uint64_t sum = 0;
    double begun_at = omp_get_wtime();
#pragma omp parallel for num_threads(threads) reduction(^ : sum) schedule(static)
    for (size_t begin = 0; begin < count; begin += 4096) {
        uint64_t part = 0;
        for (size_t i = begin; i < begin + 4096; i++) part ^= data[i];
        sum ^= part;
    }
    sink = (double)sum;
    return omp_get_wtime() - begun_at;
}

// Sizes of a few MiB lie in the last level of the cache; hundreds of MiB come from memory.
static double read_rate(size_t mib, int threads) {
    size_t bytes = mib << 20, count = bytes / sizeof(uint64_t);
    int repeats = 1 + (int)((512u << 20) / bytes);
    uint64_t *data = aligned_alloc(1u << 21, (bytes + (1u << 21) - 1) >> 21 << 21);
    if (!data) return 0;
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);  // as weights are kept: with small pages, address translation is measured too
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t i = 0; i < count; i++) data[i] = i;
    double best = 0;
    for (int try = 0; try < TRIES; try++) {
        double seconds = 0;
        for (int i = 0; i < repeats; i++) seconds += read_once(data, count, threads);
        double rate = (double)bytes * repeats / seconds;
        if (rate > best) best = rate;
    }
    free(data);
    return best;
}

static inline double first(const void *vector) {
    float value;
    memcpy(&value, vector, sizeof value);
    return value;
}

// A loop of twelve independent sums: enough to hide the latency. They are named one by one, since an array would live in
// memory. The empty assembly keeps the compiler from adding the same product up ahead of time.
#define EACH(DO) DO(a) DO(b) DO(c) DO(d) DO(e) DO(f) DO(g) DO(h) DO(i) DO(j) DO(k) DO(l)
#define ZERO(sum) Vector sum = {0};
#define ADD(sum) sum = STEP(sum, x); __asm__ volatile("" : "+v"(sum));
#define TOTAL(sum) total += first(&sum);
#define LOOP(NAME)                                                                \
    static double NAME(int64_t rounds) {                                          \
        EACH(ZERO)                                                                \
        Vector x = {0};                                                           \
        double total = 0;                                                         \
        for (int64_t round = 0; round < rounds; round++) { EACH(ADD) }            \
        EACH(TOTAL)                                                               \
        return total;                                                             \
    }

#if defined(__AVX512F__)
enum { FLOATS = 16 };
#define Vector __m512
#define STEP(sum, x) _mm512_fmadd_ps(x, x, sum)
LOOP(loop_fp32)
#undef STEP
#elif defined(__FMA__)
enum { FLOATS = 8 };
#define Vector __m256
#define STEP(sum, x) _mm256_fmadd_ps(x, x, sum)
LOOP(loop_fp32)
#undef STEP
#endif

#if defined(__AVX512BF16__)
#define STEP(sum, x) _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x)
LOOP(loop_bf16)
#undef STEP
#endif

#if defined(__AVX512VNNI__)
#undef Vector
#define Vector __m512i
#define STEP(sum, x) _mm512_dpbusd_epi32(sum, x, x)
LOOP(loop_int8)
#undef STEP
#endif

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux hands the tile registers out to a process that asks (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static int has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Four sums of full registers, three times a round: a product takes as long as a register has rows.
#define TILE_LOOP(NAME, INSTRUCTION)                                                                    \
    static double NAME(int64_t rounds) {                                                                \
        struct {                                                                                        \
            uint8_t palette, start, reserved[14];                                                       \
            uint16_t row_bytes[16];                                                                     \
            uint8_t rows[16];                                                                           \
        } shapes = {.palette = 1};                                                                      \
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;                      \
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");                                    \
        for (int64_t round = 0; round < rounds / 16 * 3; round++)                                       \
            __asm__ volatile(INSTRUCTION " %tmm6, %tmm4, %tmm0\n" INSTRUCTION " %tmm7, %tmm4, %tmm1\n"   \
                             INSTRUCTION " %tmm6, %tmm5, %tmm2\n" INSTRUCTION " %tmm7, %tmm5, %tmm3\n"); \
        __asm__ volatile("tilerelease");                                                                \
        return 0;                                                                                       \
    }
TILE_LOOP(tile_loop_bf16, "tdpbf16ps")
TILE_LOOP(tile_loop_int8, "tdpbusd")
enum { TILE_PRODUCTS = 16 * 16 * 16 / 16 };  // words multiplied by an instruction, over the rounds that are left out
#else
static int has_tiles(void) { return 0; }
#define tile_loop_bf16 NULL
#define tile_loop_int8 NULL
enum { TILE_PRODUCTS = 0 };
#endif

static double rate_of(double (*loop)(int64_t), int operations, int threads) {
    double best = 0;
    for (int try = 0; try < TRIES; try++) {
        double total = 0, begun_at = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : total)
        total += loop(ROUNDS);
        sink = total;
        double rate = (double)operations * SUMS * ROUNDS * threads / (omp_get_wtime() - begun_at);
        if (rate > best) best = rate;
    }
    return best;
}

static double measure(const char *what, int threads) {
    if (has_tiles() && !strcmp(what, "bf16")) return rate_of(tile_loop_bf16, 4 * TILE_PRODUCTS, threads);
    if (has_tiles() && !strcmp(what, "int8")) return rate_of(tile_loop_int8, 8 * TILE_PRODUCTS, threads);
#if defined(__AVX512BF16__)
    if (!strcmp(what, "bf16")) return rate_of(loop_bf16, 64, threads);
#endif
#if defined(__AVX512F__) || defined(__FMA__)
    if (!strcmp(what, "fp32")) return rate_of(loop_fp32, 2 * FLOATS, threads);
#endif
#if defined(__AVX512VNNI__)
    if (!strcmp(what, "int8")) return rate_of(loop_int8, 128, threads);
#endif
    return 0;
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    int threads = atoi(arguments[count - 1]);
    int is_read = count == 4 && !strcmp(arguments[1], "read");
    double rate = is_read ? read_rate(strtoul(arguments[2], NULL, 10), threads) : measure(arguments[1], threads);
    if (rate > 0) printf("%.0f\n", rate);
    return 0;
}
