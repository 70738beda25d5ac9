/* SPDX-License-Identifier: Apache-2.0 */
/* How the decode path cuts a GEMM: each block of each band is multiplied once, each band has one end, partial sums are
 * added in the order of K and are waited for by nobody who could hold them up, pieces get shorter as their workers
 * come later, and nothing is cut where that would gain too little; for every small GEMM, and for the largest numbers.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "kernels/cuda/decode/work.h"

/* A task, and whose it is. */
struct found {
    struct moe_task task;
    int32_t item, at;
};

static struct found *tasks; /* of the pieces, in the order of items */
static int32_t count, room;
static int32_t *slot_task; /* [pieces]: the task that writes the slot, -1: none */
static int32_t *slot_uses; /* [pieces] */

/* What is cut, and how. */
static const struct moe_work *work;
static int32_t workers;
static int32_t before; /* of which there is as much as in this GEMM that workers have read */

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            fail_msg("%d bands of %d blocks, %d workers, %d before: %s is not so", (int)work->bands,                   \
                     (int)work->blocks, (int)workers, (int)before, #condition);                                        \
    } while (0)

static void add(const struct moe_task *task, int32_t item, int32_t at)
{
    if (count == room) {
        room = room > 0 ? 2 * room : 1024;
        tasks = realloc(tasks, (size_t)room * sizeof *tasks);
        assert_non_null(tasks);
    }
    tasks[count++] = (struct found){*task, item, at};
}

static int by_place(const void *a, const void *b)
{
    const struct moe_task *x = &((const struct found *)a)->task, *y = &((const struct found *)b)->task;
    if (x->band != y->band)
        return x->band < y->band ? -1 : 1;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* A band that is an item is its only task. */
static void check_whole(int32_t item)
{
    struct moe_task task;
    CHECK(moe_work_task(work, item, 0, &task));
    CHECK(task.band == item && task.begin == 0 && task.end == work->blocks);
    CHECK(task.slots == 0 && task.own_slot == -1);
    CHECK(!moe_work_task(work, item, 1, &task));
}

/* The tasks of a piece as such, and its size in blocks. */
static int64_t check_piece(int32_t piece)
{
    const int32_t item = work->whole + piece;
    struct moe_task task;
    int32_t at = 0;
    int64_t blocks = 0;
    bool leaves = false;
    for (; moe_work_task(work, item, at, &task); at++) {
        CHECK(task.band >= work->whole && task.band < work->bands);
        CHECK(0 <= task.begin && task.begin < task.end && task.end <= work->blocks);
        CHECK(task.slots >= 0 && (task.slots == 0) == (task.begin == 0 || task.own_slot >= 0));
        if (task.own_slot >= 0) {
            CHECK(at == 0 && !leaves); /* others wait for it: first of all */
            CHECK(task.end < work->blocks && task.own_slot < work->pieces);
            CHECK(slot_task[task.own_slot] < 0); /* nobody else's */
            slot_task[task.own_slot] = count;
            leaves = true;
        } else {
            CHECK(task.own_slot == -1 && task.end == work->blocks);
        }
        add(&task, item, at);
        blocks += task.end - task.begin;
        CHECK(blocks <= (int64_t)(work->bands - work->whole) * work->blocks);
    }
    CHECK(at > 0);
    for (int32_t later = at; later < at + 3; later++)
        CHECK(!moe_work_task(work, item, later, &task));
    CHECK(moe_work_leaves(work, piece) == leaves);
    return blocks;
}

/* What a task that ends a band adds was left by the tasks before it in that band, all of them, in the order of K; each
 * of lower items, as the first thing that these do. */
static void check_sums(const struct found *head)
{
    int32_t end = 0;
    for (int32_t s = head->task.first_slot; s < head->task.first_slot + head->task.slots; s++) {
        CHECK(s >= 0 && s < work->pieces && slot_task[s] >= 0);
        const struct found *tail = &tasks[slot_task[s]];
        CHECK(tail->task.band == head->task.band && tail->task.begin == end);
        CHECK(tail->item < head->item && tail->at == 0);
        end = tail->task.end;
        slot_uses[s]++;
    }
    CHECK(end == head->task.begin);
}

/* Together the tasks of the pieces are the bands that are cut, from end to end. */
static void check_cover(void)
{
    if (count > 0)
        qsort(tasks, (size_t)count, sizeof *tasks, by_place);
    int32_t band = work->whole, end = 0;
    for (int32_t i = 0; i < count; i++) {
        const struct moe_task *task = &tasks[i].task;
        CHECK(task->band == band && task->begin == end);
        end = task->end;
        if (end == work->blocks) {
            band++;
            end = 0;
        }
    }
    CHECK(band == work->bands && end == 0);
}

/* By how much the first piece is longer than the average: by a block for each MOE_WORK_DRIFT that a worker has read, up
 * to half a band, so that all pieces can end within one; and the last one shorter, down to the least. */
static int64_t spread(int64_t average)
{
    const int64_t whole = (int64_t)(work->whole / workers) * work->blocks;
    const int64_t bounds[] = {work->blocks / 2, average - MOE_WORK_LEAST_BLOCKS, MOE_WORK_MOST_SPREAD};
    int64_t least = (whole + before * (whole + average)) / MOE_WORK_DRIFT;
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++)
        least = bounds[i] < least ? bounds[i] : least;
    return least;
}

/* Of the bands that are cut each worker gets as much as another, as far as blocks allow, but for the spread, by which
 * sizes fall evenly; where that would be pieces too small to be worth it, there are as many as can be. */
static void check_sizes(void)
{
    const int64_t cut = (int64_t)(work->bands - work->whole) * work->blocks;
    const int64_t average = work->pieces > 0 ? cut / work->pieces : 0, wider = spread(average);
    /* A block for `longer`, one for where pieces begin, and what `fall` leaves out; times the pieces. */
    const int64_t rounding = work->pieces * (2 + ((int64_t)work->pieces >> MOE_WORK_FALL_LOG2) + 1);
    int64_t left = cut, least = INT64_MAX, last = INT64_MAX, most = 0;
    for (int32_t piece = 0; piece < work->pieces; piece++) {
        const int64_t size = check_piece(piece);
        const int64_t fair = (int64_t)work->pieces * average + wider * (work->pieces - 1 - 2 * piece);
        CHECK(llabs(size * work->pieces - fair) <= rounding);
        CHECK(size - 1 <= last);
        last = size;
        least = size < least ? size : least;
        most = size > most ? size : most;
        left -= size;
    }
    CHECK(left == 0);
    CHECK(work->pieces == 0 || wider > 0 || most - least <= 1);
    CHECK(work->pieces <= 1 || least >= MOE_WORK_LEAST_BLOCKS);
    CHECK(work->pieces == 0 || work->pieces == workers || most < 2 * MOE_WORK_LEAST_BLOCKS);
}

/* By cutting, all end as much earlier as in whole bands workers are idle on average. Only where that is more than an
 * exchange of partial sums takes is anything cut, and no more than the last full round with what is left over: just
 * this if the pieces were too long with that round, and are not too short without. */
static void check_cut(void)
{
    const int64_t rounds = ((int64_t)work->bands + workers - 1) / workers;
    const int64_t idle = (rounds * workers - work->bands) * work->blocks; /* of all workers together */

    if (idle <= (int64_t)MOE_WORK_EXCHANGE * workers) {
        CHECK(work->whole == work->bands && work->pieces == 0);
        return;
    }
    CHECK(work->pieces > 0 && work->pieces <= workers);
    CHECK(work->whole >= 0 && work->whole < work->bands && work->whole % workers == 0);
    const int32_t over = work->bands % workers, cut = work->bands - work->whole;
    const double short_piece = (double)over * work->blocks / workers, long_piece = short_piece + work->blocks;
    const bool over_only = long_piece > MOE_WORK_LONG && short_piece >= MOE_WORK_SHORT;
    CHECK(cut == over || cut == workers + over);
    CHECK(work->bands < workers || (cut == over) == over_only);
}

/* all: every whole band; else some of them. */
static void check(int32_t bands, int32_t blocks, bool all)
{
    const struct moe_work_gemm gemm = moe_work_gemm_make(blocks, workers, before);
    const struct moe_work made = moe_work_make(&gemm, bands);
    work = &made;
    CHECK(work->bands == bands && work->blocks == blocks);
    CHECK(moe_work_items(work) == work->whole + work->pieces);
    check_cut();
    CHECK(!moe_work_leaves(work, work->pieces) && !moe_work_leaves(work, -1));

    const int32_t step = all || work->whole < 1000 ? 1 : work->whole / 1000;
    for (int64_t item = 0; item < work->whole; item += step)
        check_whole((int32_t)item);
    if (work->whole > 0)
        check_whole(work->whole - 1);

    count = 0;
    slot_task = realloc(slot_task, (size_t)workers * sizeof *slot_task);
    slot_uses = realloc(slot_uses, (size_t)workers * sizeof *slot_uses);
    assert_true(slot_task != NULL && slot_uses != NULL);
    for (int32_t s = 0; s < workers; s++) {
        slot_task[s] = -1;
        slot_uses[s] = 0;
    }
    check_sizes();
    for (int32_t i = 0; i < count; i++)
        if (tasks[i].task.own_slot < 0)
            check_sums(&tasks[i]);
    for (int32_t s = 0; s < work->pieces; s++)
        CHECK(slot_uses[s] == (slot_task[s] >= 0)); /* what is left is added, and once */
    check_cover();
}

static void every_small_gemm(void **state)
{
    (void)state;
    for (workers = 1; workers <= 24; workers++)
        for (int32_t blocks = 1; blocks <= 26; blocks++)
            for (int32_t bands = 0; bands <= 80; bands++)
                for (before = 0; before <= 40; before += 20) /* none, or much */
                    check(bands, blocks, true);
}

/* The SMs of several GPUs, and of what a caller may leave of them, on shapes of models. */
static void real_gemms(void **state)
{
    (void)state;
    static const int32_t sms[] = {1, 2, 3, 17, 66, 78, 108, 114, 131, 132, 148, 264};
    static const int32_t blocks[] = {12, 16, 22, 32, 45, 64, 112, 224};
    for (size_t w = 0; w < sizeof sms / sizeof *sms; w++)
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
            for (int32_t bands = 1; bands < 4000; bands += bands / 7 + 1) {
                workers = sms[w];
                for (before = 0; before <= 2; before += 2) /* GEMM 1, and 2 */
                    check(bands, blocks[b], true);
            }
}

/* As many bands as there are numbers for, and bands as long as may be, in those that are whole and in those that are
 * cut. */
static void largest_numbers(void **state)
{
    (void)state;
    static const int32_t sms[] = {1, 2, 132, 1999};
    for (size_t w = 0; w < sizeof sms / sizeof *sms; w++) {
        workers = sms[w];
        const int32_t longest = INT32_MAX / (2 * workers);
        const int32_t blocks[] = {1, 3, 1024, 1000003, longest - 1, longest};
        const int32_t most = INT32_MAX - workers; /* items are numbers too */
        const int32_t bands[] = {most, most - 1, most - workers + 1, 2000000011};
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
            if (blocks[b] > longest)
                continue;
            for (before = 0; before <= 2; before += 2) {
                for (size_t i = 0; i < sizeof bands / sizeof *bands; i++)
                    check(bands[i], blocks[b], false);
                for (int32_t few = 1; few <= 4 * workers; few += few / 3 + 1)
                    check(few, blocks[b], false);
            }
        }
    }
}

static int forget(void **state)
{
    (void)state;
    free(tasks);
    free(slot_task);
    free(slot_uses);
    tasks = NULL;
    slot_task = NULL;
    slot_uses = NULL;
    room = 0;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(every_small_gemm, forget),
        cmocka_unit_test_teardown(real_gemms, forget),
        cmocka_unit_test_teardown(largest_numbers, forget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
