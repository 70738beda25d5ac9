/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* How long a thread watches before it sleeps. The steps of a forward follow each other within tens of microseconds,
 * about what it costs to wake a sleeper. */
enum { SPIN_NANOSECONDS = 100000, PAUSES_PER_LOOK = 64 };

enum { CACHE_LINE = 64 };

/* A count that only grows; threads wait until it has moved on from what they saw. */
struct event {
    alignas(CACHE_LINE) atomic_uint count;
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t moved;
};

struct worker {
    struct moe_pool *pool;
    int32_t number;
    pthread_t thread;
};

struct moe_pool {
    int32_t threads;
    int32_t started; /* workers that exist: threads - 1, fewer while creation fails */
    bool spin;       /* not with more threads than CPUs, where a watcher takes the CPU of the one it waits for */
    bool stop;
    struct worker *workers;
    pthread_mutex_t turn; /* held during a run */

    void (*fn)(void *argument, int32_t thread, int32_t threads);
    void *argument;
    struct event start; /* moves with each run */
    struct event met;   /* moves when all threads have arrived at a barrier */
    alignas(CACHE_LINE) atomic_int arrived;
    alignas(CACHE_LINE) _Atomic int64_t next;
};

static bool event_init(struct event *event)
{
    atomic_init(&event->count, 0);
    atomic_init(&event->sleepers, 0);
    if (pthread_mutex_init(&event->lock, NULL) != 0)
        return false;
    if (pthread_cond_init(&event->moved, NULL) == 0)
        return true;
    pthread_mutex_destroy(&event->lock);
    return false;
}

static void event_destroy(struct event *event)
{
    pthread_cond_destroy(&event->moved);
    pthread_mutex_destroy(&event->lock);
}

/* A sleeper counts itself before it looks at the count, the mover moves the count before it looks for sleepers: in the
 * one order of sequentially consistent operations at least one of them sees the other. */
static void event_move(struct event *event)
{
    atomic_fetch_add(&event->count, 1);
    if (atomic_load(&event->sleepers) == 0)
        return;
    pthread_mutex_lock(&event->lock);
    pthread_cond_broadcast(&event->moved);
    pthread_mutex_unlock(&event->lock);
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void event_wait(struct event *event, unsigned seen, bool spin)
{
    int64_t deadline = spin ? nanoseconds() + SPIN_NANOSECONDS : 0;

    while (spin) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (atomic_load_explicit(&event->count, memory_order_acquire) != seen)
                return;
            relax();
        }
        spin = nanoseconds() < deadline;
    }
    pthread_mutex_lock(&event->lock);
    atomic_fetch_add(&event->sleepers, 1);
    while (atomic_load(&event->count) == seen)
        pthread_cond_wait(&event->moved, &event->lock);
    atomic_fetch_sub(&event->sleepers, 1);
    pthread_mutex_unlock(&event->lock);
}

void moe_pool_barrier(struct moe_pool *pool)
{
    unsigned seen = atomic_load_explicit(&pool->met.count, memory_order_relaxed);

    if (atomic_fetch_add(&pool->arrived, 1) + 1 < pool->threads) {
        event_wait(&pool->met, seen, pool->spin);
        return;
    }
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    event_move(&pool->met);
}

int64_t moe_pool_next(struct moe_pool *pool, int64_t chunk)
{
    return atomic_fetch_add_explicit(&pool->next, chunk, memory_order_relaxed);
}

/* A run ends with a barrier, which leaves the counter at 0 for the next one. */
void moe_pool_run(struct moe_pool *pool, void (*fn)(void *argument, int32_t thread, int32_t threads), void *argument)
{
    pthread_mutex_lock(&pool->turn);
    pool->fn = fn;
    pool->argument = argument;
    event_move(&pool->start);
    fn(argument, 0, pool->threads);
    moe_pool_barrier(pool);
    pthread_mutex_unlock(&pool->turn);
}

static void *work(void *argument)
{
    const struct worker *worker = argument;
    struct moe_pool *pool = worker->pool;

    for (unsigned runs = 0;; runs++) {
        event_wait(&pool->start, runs, pool->spin);
        if (pool->stop)
            return NULL;
        pool->fn(pool->argument, worker->number, pool->threads);
        moe_pool_barrier(pool);
    }
}

/* CPUs that this process may use; the set is larger than cpu_set_t on some machines. */
static int32_t usable_cpus(void)
{
    for (int room = CPU_SETSIZE; room <= 1 << 20; room *= 4) {
        cpu_set_t *set = CPU_ALLOC(room);
        if (set == NULL)
            break;
        int count = sched_getaffinity(0, CPU_ALLOC_SIZE(room), set) == 0 ? CPU_COUNT_S(CPU_ALLOC_SIZE(room), set) : 0;
        CPU_FREE(set);
        if (count > 0)
            return count;
    }
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int32_t)online : 1;
}

/* Signals are the business of the caller's threads. */
static bool start_workers(struct moe_pool *pool)
{
    sigset_t all, before;

    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0)
        return false;
    for (int32_t i = 0; i < pool->threads - 1; i++) {
        struct worker *worker = &pool->workers[i];
        worker->pool = pool;
        worker->number = i + 1;
        if (pthread_create(&worker->thread, NULL, work, worker) != 0)
            break;
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool->started == pool->threads - 1;
}

static bool init_locks(struct moe_pool *pool)
{
    if (pthread_mutex_init(&pool->turn, NULL) != 0)
        return false;
    if (event_init(&pool->start)) {
        if (event_init(&pool->met))
            return true;
        event_destroy(&pool->start);
    }
    pthread_mutex_destroy(&pool->turn);
    return false;
}

moe_status moe_pool_create(int32_t threads, struct moe_pool **pool)
{
    int32_t cpus = usable_cpus();

    *pool = NULL;
    if (threads < 0)
        return MOE_ERROR_INVALID_ARGUMENT;
    if (threads == 0)
        threads = cpus;
    struct moe_pool *p = aligned_alloc(CACHE_LINE, sizeof *p);
    struct worker *workers = calloc((size_t)threads, sizeof *workers);
    if (p == NULL || workers == NULL) {
        free(p);
        free(workers);
        return MOE_ERROR_OUT_OF_MEMORY;
    }
    *p = (struct moe_pool){.threads = threads, .spin = threads <= cpus, .workers = workers};
    if (!init_locks(p)) {
        free(p);
        free(workers);
        return MOE_ERROR_OUT_OF_MEMORY;
    }
    if (!start_workers(p)) {
        moe_pool_destroy(p);
        return MOE_ERROR_OUT_OF_MEMORY;
    }
    *pool = p;
    return MOE_OK;
}

void moe_pool_destroy(struct moe_pool *pool)
{
    if (pool == NULL)
        return;
    pool->stop = true;
    event_move(&pool->start);
    for (int32_t i = 0; i < pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    event_destroy(&pool->met);
    event_destroy(&pool->start);
    pthread_mutex_destroy(&pool->turn);
    free(pool->workers);
    free(pool);
}

int32_t moe_pool_threads(const struct moe_pool *pool)
{
    return pool->threads;
}
