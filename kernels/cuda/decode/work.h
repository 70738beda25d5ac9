/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the decode path cuts a GEMM into work. In plain C, so that it can be tested without a GPU.
 *
 * The GEMM is a row of `bands`: a band is MOE_PACKED_ROWS weight rows of an expert times one tile of its tokens, over
 * all of K, which is `blocks` blocks of 64 columns. Bands are taken one by one as long as there are plenty. What is
 * left after the last round that is full is cut, without regard to where a band ends, into as many pieces as there are
 * workers, so that all end at the same time; unless they would end at nearly the same time anyway. So are the bands of
 * that round, or pieces might be short; but not where they would be so long that workers drift apart on the way. Pieces
 * are taken in order, and not all at once: the more workers have read, the further they are apart, up to a band. So
 * sizes fall from piece to piece: who comes first gets the longest. A piece is up to three kinds of tasks, in this
 * order:
 *
 *   tail   the beginning of its last band, which the next piece goes on with: leaves a partial sum in the piece's slot
 *   whole  bands
 *   head   the rest of the band that pieces before it began: adds their partial sums to its own
 *
 * A piece that lies inside one band is a tail alone; the band's last piece adds up all their slots, in the order of K.
 * What a head waits for was begun by an item with a lower number and is the first thing that this does: so workers that
 * take items in order never wait for one that has not begun, however few of them run.
 */
#ifndef MOE_KERNELS_CUDA_DECODE_WORK_H
#define MOE_KERNELS_CUDA_DECODE_WORK_H

#include <stdbool.h>

#include "kernels/cuda/common/divisor.h"

enum {
    MOE_WORK_LEAST_BLOCKS = 2, /* a piece of fewer is not worth its own partial sum */
    MOE_WORK_EXCHANGE = 3,     /* blocks that are read while partial sums pass from one worker to another */
    MOE_WORK_DRIFT = 64,       /* blocks after which the first worker is one before the average, the last one behind */
    MOE_WORK_MOST_SPREAD = 64, /* blocks: so that places are numbers of 32 bits */
    MOE_WORK_LONG = 256,       /* blocks of a piece on average, with which the last full round is not cut, */
    MOE_WORK_SHORT = 48,       /* unless without it they were fewer than these */
    MOE_WORK_FALL_LOG2 = 10,   /* binary places of `fall` */
};

/* What is known of a GEMM when it is not yet known how many bands it is. */
struct moe_work_gemm {
    int32_t blocks; /* of a band, at least 1 */
    int32_t workers;
    int32_t before;    /* how many times as much as there is in this GEMM the workers have read before it */
    int32_t most_over; /* bands of a last round that is cut: with more of them, all end at nearly the same time */
    struct moe_divisor by_blocks, by_workers;
};

/* Items 0 to whole - 1 are bands; the others are pieces. */
struct moe_work {
    int32_t bands;
    int32_t blocks;
    int32_t whole;
    int32_t pieces;
    int32_t size, longer; /* of a piece on average, in blocks; the first `longer` pieces have one more */
    int32_t fall;         /* half of what a piece is shorter than the one before it, << MOE_WORK_FALL_LOG2 */
    struct moe_divisor by_blocks;
};

struct moe_task {
    int32_t band;
    int32_t begin, end; /* blocks */
    int32_t first_slot; /* of the partial sums that it adds */
    int32_t slots;      /* how many; they follow each other */
    int32_t own_slot;   /* where it leaves a partial sum; -1: it ends its band */
};

/* 2 * workers * blocks must be below 2^31, workers below 2^17, before below 2^6. */
static inline struct moe_work_gemm moe_work_gemm_make(int32_t blocks, int32_t workers, int32_t before)
{
    const int32_t idle = MOE_WORK_EXCHANGE * workers / blocks; /* that many of the workers may be, for a band */
    const struct moe_work_gemm gemm = {
        blocks,
        workers,
        before,
        idle < workers ? workers - idle - 1 : 0,
        moe_divisor_make(blocks),
        moe_divisor_make(workers),
    };
    return gemm;
}

static MOE_HOST_DEVICE inline int32_t moe_work_least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Everything waits for this on the GPU, so it does not divide. */
static MOE_HOST_DEVICE inline struct moe_work moe_work_make(const struct moe_work_gemm *gemm, int32_t bands)
{
    const int32_t blocks = gemm->blocks, workers = gemm->workers;
    struct moe_work work = {bands, blocks, bands, 0, 0, 0, 0, gemm->by_blocks};
    const int32_t full = moe_divide(bands, gemm->by_workers);
    const int32_t over = bands - full * workers; /* bands of a last round that is not full */
    if (over == 0 || over > gemm->most_over)
        return work;
    const int32_t rest = over * blocks; /* behind the rounds that are full */
    const bool all = rest + workers * blocks > MOE_WORK_LONG * workers && rest >= MOE_WORK_SHORT * workers;
    const int32_t rounds = all ? full : full > 1 ? full - 1 : 0; /* of whole bands */
    work.whole = rounds * workers;
    /* Where pieces of the least size are fewer than the workers, cut / workers is less than that size. */
    const int32_t cut = (bands - work.whole) * blocks, each = moe_divide(cut, gemm->by_workers);
    work.pieces = moe_work_least((int32_t)((uint32_t)cut / MOE_WORK_LEAST_BLOCKS), workers);
    work.size = each > MOE_WORK_LEAST_BLOCKS ? each : MOE_WORK_LEAST_BLOCKS;
    work.longer = cut - work.size * work.pieces;

    /* What workers have read is only counted up to where it is enough for the most spread. */
    const int32_t enough = MOE_WORK_MOST_SPREAD * MOE_WORK_DRIFT;
    const int32_t whole = moe_work_least(rounds, enough) * moe_work_least(blocks, enough);
    const int32_t read = whole + gemm->before * (whole + moe_work_least(work.size, enough));
    int32_t spread = work.size - MOE_WORK_LEAST_BLOCKS; /* by which the first is longer, and the last one shorter */
    spread = moe_work_least(spread, (int32_t)((uint32_t)blocks / 2));
    spread = moe_work_least(spread, MOE_WORK_MOST_SPREAD);
    spread = moe_work_least(spread, (int32_t)((uint32_t)read / MOE_WORK_DRIFT));
    work.fall = moe_divide(spread << MOE_WORK_FALL_LOG2, gemm->by_workers); /* 0 where pieces are fewer */
    return work;
}

static MOE_HOST_DEVICE inline int32_t moe_work_items(const struct moe_work *work)
{
    return work->whole + work->pieces;
}

/* Where piece p (up to `pieces`, the end) begins, in blocks from the first band that is cut. */
static MOE_HOST_DEVICE inline int32_t moe_work_begin(const struct moe_work *work, int32_t piece)
{
    return piece * work->size + moe_work_least(piece, work->longer) +
           (work->fall * piece * (work->pieces - piece) >> MOE_WORK_FALL_LOG2);
}

/* The tasks of an item, one after another: `at` counts them from 0. False: there are no more. */
static MOE_HOST_DEVICE inline bool moe_work_task(const struct moe_work *work, int32_t item, int32_t at,
                                                 struct moe_task *task)
{
    const int32_t blocks = work->blocks;
    task->slots = task->first_slot = 0;
    task->own_slot = -1;
    task->begin = 0;
    task->end = blocks;
    task->band = item;
    if (item < work->whole)
        return at == 0;

    const int32_t piece = item - work->whole;
    const int32_t begin = moe_work_begin(work, piece), end = moe_work_begin(work, piece + 1);
    const int32_t first = moe_divide(begin, work->by_blocks), skipped = begin - first * blocks; /* where it begins */
    const int32_t last = moe_divide(end, work->by_blocks), tail = end - last * blocks;          /* and ends */
    const bool head = skipped != 0 && first < last;
    if (tail != 0 && at-- == 0) {
        task->band = work->whole + last;
        task->begin = first == last ? skipped : 0;
        task->end = tail;
        task->own_slot = piece;
        return true;
    }
    const int32_t first_whole = first + (skipped != 0), wholes = last > first_whole ? last - first_whole : 0;
    if (at < wholes) {
        task->band = work->whole + first_whole + at;
        return true;
    }
    if (!head || at > wholes)
        return false;
    task->band = work->whole + first;
    task->begin = skipped;
    task->first_slot = piece - 1;
    while (moe_work_begin(work, task->first_slot) > first * blocks)
        task->first_slot--;
    task->slots = piece - task->first_slot;
    return true;
}

/* Whether the piece (-1: none) leaves a partial sum. */
static MOE_HOST_DEVICE inline bool moe_work_leaves(const struct moe_work *work, int32_t piece)
{
    if (piece < 0 || piece >= work->pieces)
        return false;
    const int32_t end = moe_work_begin(work, piece + 1);
    return end != moe_divide(end, work->by_blocks) * work->blocks;
}

#endif
