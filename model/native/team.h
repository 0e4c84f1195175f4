// Threads that compute one thing together: they take parts of it as they can, and meet before they go on to the next.
//
// One team for each library, asleep while there is no work. Whoever waits looks on for a moment, which is how long a
// meeting takes when all threads have a core, and then sleeps: a thread that went on spinning would keep the core from
// the one it waits for, once another process wants one. The moment is learnt: at meetings it shrinks with every wait
// that ends asleep, and grows again with those that do not. Which thread computes what is left to chance and must not
// show in any result. It does not know what is computed.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

static struct {
    pthread_mutex_t used;  // by one caller at a time
    int num_started, num_threads;
    Part part;
    void *work;
    atomic_int num_arrived;
    struct {
        _Alignas(64) atomic_int num_taken;  // each in a cache line of its own
    } shares[MAX_THREADS];
    atomic_int ids[MAX_THREADS];  // the system's
    Signal job;  // (count << 8) + number of threads that it is for
    Signal meeting;
#if defined(__linux__)
    int num_cpus;
    int cpus[MAX_THREADS];
#endif
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .job = SIGNAL, .meeting = SIGNAL};

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

// Returns the value once it is not `old`. A sleeper counts itself first and looks at the value afterwards, a changer
// changes the value first and looks for sleepers afterwards, so that one of them sees the other.
static unsigned sleep_until_changed(Signal *s, unsigned old) {
    atomic_fetch_add(&s->num_sleeping, 1);
    pthread_mutex_lock(&s->mutex);
    while (atomic_load(&s->value) == old) pthread_cond_wait(&s->changed, &s->mutex);
    pthread_mutex_unlock(&s->mutex);
    atomic_fetch_sub(&s->num_sleeping, 1);
    return atomic_load(&s->value);
}

static void change(Signal *s, unsigned value) {
    atomic_store(&s->value, value);
    if (atomic_load(&s->num_sleeping) == 0) return;
    pthread_mutex_lock(&s->mutex);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

// Waits until every thread of the team has come here; what is taken next starts anew.
static void meet(void) {
    static _Thread_local int64_t patience = MOST_PATIENCE;
    const unsigned meeting = atomic_load(&team.meeting.value);
    const int num_threads = team.num_threads;  // read before arriving: afterwards it may be the next work's
    if (atomic_fetch_add(&team.num_arrived, 1) + 1 < num_threads) {
        if (changes_within(&team.meeting, meeting, patience)) {
            patience += (MOST_PATIENCE - patience) / 8;
            return;
        }
        sleep_until_changed(&team.meeting, meeting);
        if (patience > LEAST_PATIENCE) patience /= 2;
        return;
    }
    atomic_store(&team.num_arrived, 0);
    for (int i = 0; i < num_threads; i++) atomic_store_explicit(&team.shares[i].num_taken, 0, memory_order_relaxed);
    change(&team.meeting, meeting + 1);
}

// Where a thread's own share of `total` parts starts; it ends where the next one's starts.
INLINE int share_start(int thread, int total) { return (int)((int64_t)thread * total / team.num_threads); }

// Takes some parts [from, to) of `total`, at least `least` where so many are left in a share. Returns 0 when all are
// taken. A thread goes through its own share from the start, so that what it reads there is one stream through memory,
// and then helps the next ones. Large pieces first and small ones in the end: whoever is held up leaves most of it.
INLINE int take(int thread, int total, int least, int *from, int *to) {
    for (int i = 0; i < team.num_threads; i++) {
        const int owner = (thread + i) % team.num_threads;
        const int start = share_start(owner, total), length = share_start(owner + 1, total) - start;
        atomic_int *num_taken = &team.shares[owner].num_taken;
        int taken = atomic_load_explicit(num_taken, memory_order_relaxed);
        while (taken < length) {
            const int count = min_int(max_int(least, (length - taken) / 2), length - taken);
            if (!atomic_compare_exchange_weak(num_taken, &taken, taken + count)) continue;
            *from = start + taken, *to = *from + count;
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

static void *work_on(void *argument) {
    const int thread = (int)(intptr_t)argument;
    unsigned job = 0;
    int64_t patience = LEAST_PATIENCE;
#if defined(__linux__)
    atomic_store(&team.ids[thread], (int)syscall(SYS_gettid));
#endif
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
        if (!is_mine) continue;
        team.part(team.work, thread);
        meet();
    }
    return NULL;
}

// A child of fork has none of its parent's threads.
static void forget_threads(void) {
    team.num_started = 0;
    atomic_store(&team.num_arrived, 0);
    for (int i = 0; i < MAX_THREADS; i++) atomic_store(&team.shares[i].num_taken, 0), atomic_store(&team.ids[i], 0);
    team.used = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    team.job = team.meeting = (Signal)SIGNAL;
}

// Starts what is missing of `num_threads`, the caller being one. Returns how many there are.
static int gather(int num_threads) {
    if (team.num_started == 0) {
        pthread_atfork(NULL, NULL, forget_threads);
        team.num_started = 1;
    }
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

// Has `part` run once by each of so many threads, the caller being number 0, and returns when all have.
static void run_together(Part part, void *work, int num_threads) {
    pthread_mutex_lock(&team.used);
    team.num_threads = gather(num_threads);
    team.part = part, team.work = work;
    if (team.num_threads > 1) {
        const unsigned count = (atomic_load(&team.job.value) >> 8) + 1;
        change(&team.job, (count << 8) + team.num_threads);
    }
    part(work, 0);
    meet();
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

// What the system calls a thread of the team, but for the caller's, number 0; 0 where it has not started or has no name.
__attribute__((visibility("default"))) int quire_thread_id(int thread) { return atomic_load(&team.ids[thread]); }
