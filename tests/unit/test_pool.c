/* SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#include "kernels/cpu/pool.h"

enum { MOST_THREADS = 16 };

static struct moe_pool *create(int32_t threads)
{
    struct moe_pool *pool;
    assert_int_equal(moe_pool_create(threads, &pool), MOE_OK);
    assert_int_equal(moe_pool_threads(pool), threads);
    return pool;
}

struct visits {
    struct moe_pool *pool;
    atomic_int of_thread[MOST_THREADS];
    pthread_t caller;
    atomic_int wrong;
};

static void visit(void *argument, int32_t thread, int32_t threads)
{
    struct visits *v = argument;
    if (threads != moe_pool_threads(v->pool) || thread < 0 || thread >= threads ||
        (thread == 0) != (pthread_equal(pthread_self(), v->caller) != 0))
        v->wrong++;
    else
        v->of_thread[thread]++;
}

static void each_thread_runs_once(void **state)
{
    (void)state;
    for (int32_t threads = 1; threads <= MOST_THREADS; threads += 5) {
        struct visits v = {.pool = create(threads), .caller = pthread_self()};
        for (int run = 1; run <= 200; run++) {
            moe_pool_run(v.pool, visit, &v);
            assert_int_equal(v.wrong, 0);
            for (int32_t t = 0; t < threads; t++)
                assert_int_equal(v.of_thread[t], run);
        }
        moe_pool_destroy(v.pool);
    }
}

static void workers_wake_from_sleep(void **state)
{
    (void)state;
    struct visits v = {.pool = create(3), .caller = pthread_self()};
    for (int run = 1; run <= 5; run++) {
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL); /* longer than they watch */
        moe_pool_run(v.pool, visit, &v);
        assert_int_equal(v.of_thread[2], run);
    }
    moe_pool_destroy(v.pool);
}

enum { ITEMS = 1000, CHUNK = 7, PHASES = 20 };

struct phases {
    struct moe_pool *pool;
    atomic_int taken[PHASES][ITEMS];
    atomic_int done[PHASES]; /* threads that have left the phase */
    atomic_int early;
};

/* Each phase hands out every item once, and none begins before all threads have finished the one before. */
static void walk_phases(void *argument, int32_t thread, int32_t threads)
{
    struct phases *p = argument;
    (void)thread;
    for (int phase = 0; phase < PHASES; phase++) {
        if (phase > 0 && p->done[phase - 1] != threads)
            p->early++;
        for (int64_t i; (i = moe_pool_next(p->pool, CHUNK)) < ITEMS;)
            for (int64_t j = i; j < i + CHUNK && j < ITEMS; j++)
                p->taken[phase][j]++;
        p->done[phase]++;
        moe_pool_barrier(p->pool);
    }
}

static void barriers_part_the_phases(void **state)
{
    (void)state;
    struct phases *p = malloc(sizeof *p);
    assert_non_null(p);
    for (int32_t threads = 1; threads <= MOST_THREADS; threads += 3) {
        *p = (struct phases){.pool = create(threads)};
        moe_pool_run(p->pool, walk_phases, p);
        assert_int_equal(p->early, 0);
        for (int phase = 0; phase < PHASES; phase++)
            for (int i = 0; i < ITEMS; i++)
                assert_int_equal(p->taken[phase][i], 1);
        moe_pool_destroy(p->pool);
    }
    free(p);
}

struct turns {
    struct moe_pool *pool;
    atomic_int inside, overlaps;
    int total; /* not atomic: the pool keeps runs apart */
};

static void take_turn(void *argument, int32_t thread, int32_t threads)
{
    struct turns *t = argument;
    (void)threads;
    if (thread == 0) {
        if (atomic_fetch_add(&t->inside, 1) != 0)
            t->overlaps++;
        t->total++;
        atomic_fetch_sub(&t->inside, 1);
    }
}

static void *call_often(void *argument)
{
    struct turns *t = argument;
    for (int i = 0; i < 300; i++)
        moe_pool_run(t->pool, take_turn, t);
    return NULL;
}

static void callers_take_turns(void **state)
{
    (void)state;
    struct turns t = {.pool = create(2)};
    pthread_t callers[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&callers[i], NULL, call_often, &t), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(callers[i], NULL);
    assert_int_equal(t.overlaps, 0);
    assert_int_equal(t.total, 4 * 300);
    moe_pool_destroy(t.pool);
}

static void edges(void **state)
{
    (void)state;
    struct moe_pool *pool = (struct moe_pool *)1;
    assert_int_equal(moe_pool_create(-1, &pool), MOE_ERROR_INVALID_ARGUMENT);
    assert_null(pool);
    moe_pool_destroy(NULL);
    assert_int_equal(moe_pool_create(0, &pool), MOE_OK);
    assert_true(moe_pool_threads(pool) >= 1);
    moe_pool_destroy(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_thread_runs_once),
        cmocka_unit_test(workers_wake_from_sleep),
        cmocka_unit_test(barriers_part_the_phases),
        cmocka_unit_test(callers_take_turns),
        cmocka_unit_test(edges),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
