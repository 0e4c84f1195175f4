// A program for test_team.py: phases of parts, by model/native/team.h alone. Exits with 0 when all went as it must.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "team.h"

#define CHECK(condition) \
    do if (!(condition)) { fprintf(stderr, "line %d: %s\n", __LINE__, #condition); exit(1); } while (0)

static void sleep_for(int64_t count) { nanosleep(&(struct timespec){count / 1000000000, count % 1000000000}, NULL); }

// ---- a helper that has no part in hand is not waited for ----

static atomic_int num_phases_ended, num_helpers_inside;

static void go_alone(void *work, int thread) {
    (void)work;
    int from, to;
    if (thread > 0) {
        atomic_fetch_add(&num_helpers_inside, 1);
        // Until the caller has ended the phases without it, which one that waits for all would never do.
        while (atomic_load(&num_phases_ended) < 3) sleep_for(100000);
    } else
        while (atomic_load(&num_helpers_inside) == 0) sleep_for(100000);
    for (int phase = 0; phase < 3; phase++) {
        while (take(thread, 40, 1, &from, &to)) CHECK(thread == 0);
        meet(thread);
        if (thread == 0) atomic_fetch_add(&num_phases_ended, 1);
    }
}

// ---- every part once, and after those of the phases before, whoever sleeps and oversleeps ----

#define NUM_PHASES 40
#define MOST_PARTS 60

typedef struct {
    int seed, num_parts[NUM_PHASES];
    atomic_int num_done[NUM_PHASES], times[NUM_PHASES][MOST_PARTS];
} Phases;

static _Atomic(Phases *) at_work;  // while it is, its phases may be gone through

static void go_through(void *work, int thread) {
    Phases *p = work;
    CHECK(atomic_load(&at_work) == p);
    unsigned state = p->seed * 31 + thread + 1;
    for (int phase = 0; phase < NUM_PHASES; phase++) {
        int from, to;
        while (take(thread, p->num_parts[phase], 1 + phase % 3, &from, &to))
            for (int part = from; part < to; part++) {
                for (int before = 0; before < phase; before++)
                    CHECK(atomic_load(&p->num_done[before]) == p->num_parts[before]);
                state = state * 1664525 + 1013904223;
                if (state >> 24 < 4) sleep_for(200000);  // the others wait until they sleep
                atomic_fetch_add(&p->times[phase][part], 1);
                atomic_fetch_add(&p->num_done[phase], 1);
            }
        if (phase % 5 != 4) meet(thread);
        else meet(thread), meet(thread);  // nothing was taken since: it asks for nothing
        CHECK(atomic_load(&at_work) == p);
    }
}

static void check_phases(int seed, int num_threads) {
    static Phases works[2];  // by turns: who is still in the last one must not take this one for it
    Phases *p = &works[seed % 2];
    memset(p, 0, sizeof *p);
    p->seed = seed;
    for (int phase = 0; phase < NUM_PHASES; phase++) p->num_parts[phase] = (seed * 7 + phase * 13) % MOST_PARTS;
    atomic_store(&at_work, p);
    run_together(go_through, p, num_threads);
    atomic_store(&at_work, NULL);
    for (int phase = 0; phase < NUM_PHASES; phase++)
        for (int part = 0; part < MOST_PARTS; part++)
            CHECK(atomic_load(&p->times[phase][part]) == (part < p->num_parts[phase]));
    memset(p, 0xff, sizeof *p);
}

int main(void) {
    run_together(go_alone, NULL, 2);
    for (int seed = 0; seed < 300; seed++) check_phases(seed, 1 + seed % 6);
    return 0;
}
