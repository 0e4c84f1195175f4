// Threads that compute one thing together: they take parts of it as they can, and go on to the next when all are done.
//
// One team for each library, asleep while there is no work. A work is a fixed sequence of phases, each of parts, which
// every thread goes through. A phase ends when its parts are done, whoever did them: it waits for no thread that has none
// of them in hand. One that lost its core meanwhile finds the phases gone by that the others ended, and catches up; one
// that slept until the whole work was over leaves it from there. Only the end of the work waits for all who are awake
// inside, once: they may still look at it.
//
// Whoever waits looks on for a moment, which is how long it takes when all threads have a core, and then sleeps: a thread
// that went on spinning would keep the core from the one it waits for, once another process wants one. The moment is
// learnt: it shrinks with every wait that ends asleep, and grows again with those that do not. Which thread computes
// what is left to chance and must not show in any result. It does not know what is computed.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "simd.h"

#define MAX_THREADS 255
#define STACK_BYTES (2 << 20)  // parts keep what they work on there; some C libraries give less by default
#define MOST_PATIENCE 50000  // nanoseconds before a thread sleeps that waits
#define LEAST_PATIENCE 1000

typedef void (*Part)(void *work, int thread);

// A number that changes, and a way to wait for its change.
typedef struct {
    atomic_uint value;
    atomic_int num_sleeping;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} Signal;

#define SIGNAL {0, 0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER}

// Of a thread: its share of the parts, which others help with, and how far it has come.
typedef struct {
    _Alignas(64) atomic_ullong taken;  // the phase it was last taken from, times 2^32, and how many parts of it were
    _Alignas(64) unsigned phase;       // in cache lines of their own: the thread alone knows
    int total, num_done;               // parts of the phase, and those that this thread has done
    unsigned job;
    jmp_buf way_out;
} Member;

static struct {
    pthread_mutex_t used;  // by one caller at a time
    int num_started, num_threads;  // the caller is one of them
    Part part;
    void *work;
    unsigned first_phase;
    atomic_int num_done;   // parts of the phase that is on
    atomic_ullong door;    // to the work: the job, times 2^32, whether it is open, how many are inside beside the caller
    Member members[MAX_THREADS];
    Signal job;      // (count << 8) + number of threads that it is for
    Signal phase;    // how many have ended
    Signal emptied;  // how often the last one left a closed door
#if defined(__linux__)
    int num_cpus;
    int cpus[MAX_THREADS];
#endif
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .num_started = 1, .job = SIGNAL, .phase = SIGNAL, .emptied = SIGNAL};

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Whether the value is another one than `old` within so many nanoseconds.
static int changes_within(Signal *s, unsigned old, int64_t patience) {
    const int64_t until = nanoseconds() + patience;
    do {
        for (int i = 0; i < 16; i++, pause_briefly())
            if (atomic_load(&s->value) != old) return 1;
    } while (nanoseconds() < until);
    return 0;
}

// Returns once the value is not `old`. A sleeper counts itself first and looks at the value afterwards, a changer
// changes the value first and looks for sleepers afterwards, so that one of them sees the other.
static void sleep_until_changed(Signal *s, unsigned old) {
    atomic_fetch_add(&s->num_sleeping, 1);
    pthread_mutex_lock(&s->mutex);
    while (atomic_load(&s->value) == old) pthread_cond_wait(&s->changed, &s->mutex);
    pthread_mutex_unlock(&s->mutex);
    atomic_fetch_sub(&s->num_sleeping, 1);
}

static void change(Signal *s, unsigned value) {
    atomic_store(&s->value, value);
    if (atomic_load(&s->num_sleeping) == 0) return;
    pthread_mutex_lock(&s->mutex);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

#define DOOR_OPEN ((uint64_t)1 << 31)

// Whether a thread may work on this job: while it is inside, the work stays.
static int enter(unsigned job) {
    unsigned long long door = atomic_load(&team.door);
    do
        if (door >> 31 != ((unsigned long long)job << 1 | 1)) return 0;
    while (!atomic_compare_exchange_weak(&team.door, &door, door + 1));
    return 1;
}

static void leave(void) {
    const uint32_t left = (uint32_t)(atomic_fetch_sub(&team.door, 1) - 1);
    if (left == 0) change(&team.emptied, atomic_load(&team.emptied.value) + 1);
}

static void open_door(unsigned job) { atomic_store(&team.door, (uint64_t)job << 32 | DOOR_OPEN); }

// Waits for those inside; nobody enters any more.
static void close_door(void) {
    const unsigned emptied = atomic_load(&team.emptied.value);
    if ((uint32_t)atomic_fetch_and(&team.door, ~DOOR_OPEN) == (uint32_t)DOOR_OPEN) return;
    if (!changes_within(&team.emptied, emptied, MOST_PATIENCE)) sleep_until_changed(&team.emptied, emptied);
}

// Whether the phase that a thread has come to has ended: without it.
INLINE int is_late(int thread) { return atomic_load(&team.phase.value) != team.members[thread].phase; }

// Tells what a thread has done of the phase it is at, which it leaves behind. Returns whether that has ended.
static int report(int thread) {
    Member *m = &team.members[thread];
    const int total = m->total, num_done = m->num_done;
    if (total == 0) return 1;  // nothing was to be taken since the last report
    const unsigned phase = m->phase++;
    m->total = m->num_done = 0;
    if (num_done == 0 || atomic_fetch_add(&team.num_done, num_done) + num_done < total)
        return atomic_load(&team.phase.value) != phase;
    atomic_store(&team.num_done, 0);
    change(&team.phase, phase + 1);
    return 1;
}

// Waits until all parts of the phase are done; what is taken next is of the next one. Of a thread that sleeps until the
// work is over it does not return: who calls it holds nothing that must be given back.
static void meet(int thread) {
    static _Thread_local int64_t patience = MOST_PATIENCE;
    Member *m = &team.members[thread];
    if (report(thread)) return;
    if (changes_within(&team.phase, m->phase - 1, patience)) {
        patience += (MOST_PATIENCE - patience) / 8;
        return;
    }
    if (patience > LEAST_PATIENCE) patience /= 2;
    // Nobody is to wait for a sleeper who has woken up and has no core yet.
    if (thread > 0) leave();
    sleep_until_changed(&team.phase, m->phase - 1);
    if (thread > 0 && !enter(m->job)) longjmp(m->way_out, 1);
}

// Where a thread's own share of `total` parts starts; it ends where the next one's starts.
INLINE int share_start(int thread, int total) { return (int)((int64_t)thread * total / team.num_threads); }

// Takes some parts [from, to) of `total`, which is the same for all threads, at least `least` where so many are left in
// a share. Returns 0 when all are taken. A thread goes through its own share from the start, so that what it reads there
// is one stream through memory, and then helps the next ones. Large pieces first and small ones in the end: whoever is
// held up leaves most of it.
INLINE int take(int thread, int total, int least, int *from, int *to) {
    Member *m = &team.members[thread];
    const uint64_t phase = (uint64_t)m->phase << 32;
    m->total = total;
    if (is_late(thread)) return 0;
    for (int i = 0; i < team.num_threads; i++) {
        const int owner = (thread + i) % team.num_threads;
        const int start = share_start(owner, total), length = share_start(owner + 1, total) - start;
        atomic_ullong *taken = &team.members[owner].taken;
        unsigned long long seen = atomic_load_explicit(taken, memory_order_relaxed);
        for (;;) {
            const int lead = (int)((unsigned)(seen >> 32) - m->phase);
            if (lead > 0) return 0;
            const int num_taken = lead < 0 ? 0 : (int)(unsigned)seen;
            if (num_taken >= length) break;
            const int count = min_int(max_int(least, (length - num_taken) / 2), length - num_taken);
            if (!atomic_compare_exchange_weak(taken, &seen, phase + num_taken + count)) continue;
            *from = start + num_taken, *to = *from + count;
            m->num_done += count;
            return 1;
        }
    }
    return 0;
}

static void stay_on_cpu(int thread) {
#if defined(__linux__)
    if (team.num_cpus == 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(team.cpus[thread % team.num_cpus], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused where the system forbids it: then it may move
#else
    (void)thread;
#endif
}

// What a thread of the team does of a job. Where it sleeps while the job ends without it, it comes back from there.
static void join_in(int thread, unsigned job) {
    Member *m = &team.members[thread];
    if (!enter(job)) return;
    m->job = job, m->phase = team.first_phase, m->total = m->num_done = 0;
    if (setjmp(m->way_out)) return;
    team.part(team.work, thread);
    report(thread);
    leave();
}

static void *work_on(void *argument) {
    const int thread = (int)(intptr_t)argument;
    unsigned job = 0;
    int64_t patience = LEAST_PATIENCE;
    stay_on_cpu(thread);
    for (;;) {
        // A small model's steps follow each other faster than a thread wakes up: where one came that soon, it looks on
        // for the next, and goes on to as long as that pays. (Twice: the time that was spent on waking up is in it.)
        const int64_t idle_since = nanoseconds();
        const int came_soon = changes_within(&team.job, job, patience);
        if (!came_soon) sleep_until_changed(&team.job, job);
        const int tries = patience == LEAST_PATIENCE && nanoseconds() - idle_since < 2 * MOST_PATIENCE;
        job = atomic_load(&team.job.value);
        const int is_mine = thread < (int)(job & 0xff);
        patience = is_mine && (came_soon || tries) ? MOST_PATIENCE : LEAST_PATIENCE;
        if (is_mine) join_in(thread, job);
    }
    return NULL;
}

// A child of fork has none of its parent's threads.
static void forget_threads(void) {
    team.num_started = 1;
    atomic_store(&team.num_done, 0);
    atomic_store(&team.door, 0);
    team.used = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    team.job = team.phase = team.emptied = (Signal)SIGNAL;
}

__attribute__((constructor)) static void survive_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

// Starts what is missing of `num_threads`, the caller being one. Returns how many there are.
static int gather(int num_threads) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (; team.num_started < min_int(num_threads, MAX_THREADS); team.num_started++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, work_on, (void *)(intptr_t)team.num_started)) break;
    }
    pthread_attr_destroy(&attributes);
    return min_int(num_threads, team.num_started);
}

// Has `part` run by each of so many threads that finds the time, the caller being number 0, and returns when all phases
// have ended.
static void run_together(Part part, void *work, int num_threads) {
    pthread_mutex_lock(&team.used);
    team.num_threads = gather(num_threads);
    team.part = part, team.work = work;
    team.first_phase = team.members[0].phase = atomic_load(&team.phase.value);
    team.members[0].total = team.members[0].num_done = 0;
    // Phases are told apart by 32 bits: a share is not to be found as an earlier job left it, some billions ago.
    for (int i = 0; i < team.num_threads; i++) atomic_store(&team.members[i].taken, (uint64_t)team.first_phase << 32);
    if (team.num_threads > 1) {
        const unsigned job = (((atomic_load(&team.job.value) >> 8) + 1) << 8) + team.num_threads;
        open_door(job);
        change(&team.job, job);
    }
    part(work, 0);
    meet(0);
    if (team.num_threads > 1) close_door();
    pthread_mutex_unlock(&team.used);
}

// From now on thread i keeps to the CPU cpus[i], but for the caller's, number 0: threads that it starts for others would
// inherit its CPU. To be called before any work.
__attribute__((visibility("default"))) void quire_keep_to_cpus(const int *cpus, int num_cpus) {
#if defined(__linux__)
    team.num_cpus = min_int(num_cpus, MAX_THREADS);
    memcpy(team.cpus, cpus, sizeof(int) * team.num_cpus);
#else
    (void)cpus, (void)num_cpus;
#endif
}
