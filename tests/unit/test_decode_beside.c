/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: the decode path beside a kernel that does not end, with less room than it would take. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <time.h>

#include <cmocka.h>

#include "tests/unit/decode_case.h"

/* Up to so many tokens a block that routes needs no other one: it routes for all, or each of the FFN's for itself. */
enum { RUNS = 2, ROUTED_ALONE = 16 };

static cudaStream_t holder;
static volatile int32_t *stop, *running; /* of test_hold_sms: one number, and one for each SM */

static const struct batch {
    int64_t tokens;
    bool routed; /* by the caller */
} batches[] = {{1, false}, {16, false}, {64, false}, {64, true}, {200, false}};

static void wait_a_moment(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}

/* All SMs but `left` are taken until release_sms. */
static void hold_sms(int32_t left)
{
    const int32_t blocks = case_device.cores - left;
    *stop = 0;
    memset((int32_t *)running, 0, (size_t)case_device.cores * sizeof *running);
    assert_int_equal(test_hold_sms(blocks, case_ctx->exec.shared_bytes, running, stop, holder), cudaSuccess);
    for (int32_t b = 0; b < blocks; b++)
        while (running[b] == 0)
            wait_a_moment();
}

static void release_sms(void)
{
    *stop = 1;
    assert_int_equal(cudaStreamSynchronize(holder), cudaSuccess);
}

/* Two forwards with `left` SMs to share: they come to their end while the holder is still there, or after it. */
static void check_room(const struct case_run runs[RUNS], int32_t left, bool after)
{
    for (int i = 0; i < RUNS; i++) {
        case_run_poison(&runs[i]);
        assert_int_equal(cudaStreamSynchronize(runs[i].stream), cudaSuccess);
    }
    hold_sms(left);
    for (int i = 0; i < RUNS; i++)
        case_run_enqueue(&runs[i]);
    if (after)
        wait_a_moment();
    for (int i = 0; i < RUNS; i++)
        if (left == 0)
            assert_int_equal(cudaStreamQuery(runs[i].stream), cudaErrorNotReady); /* it does hold them all */
        else if (!after)
            assert_int_equal(cudaStreamSynchronize(runs[i].stream), cudaSuccess);
    if (cudaStreamQuery(holder) != cudaErrorNotReady)
        fail_msg("%d tokens%s, at most %d SMs, %d left: the other kernel ended first", (int)runs[0].batch.tokens,
                 runs[0].routed ? " with their routing" : "", (int)runs[0].batch.max_sms, (int)left);
    release_sms();
}

static void check_batch(const struct batch *batch, int layout, int32_t config, int32_t max_sms,
                        struct test_differences *found)
{
    static const int32_t lefts[] = {0, 1, 2, 5};
    const bool at_once = max_sms == 0 && !batch->routed && batch->tokens > ROUTED_ALONE;
    struct case_run runs[RUNS];
    for (int i = 0; i < RUNS; i++) {
        runs[i] = case_run_make(&case_models[CASE_ODD], layout, MOE_PATH_DECODE, config, max_sms, batch->routed,
                                batch->tokens, 600 + (uint64_t)i, case_streams[i]);
        case_run_compare(&runs[i], found, 0);
    }
    for (size_t l = 0; l < sizeof lefts / sizeof *lefts && lefts[l] < case_device.cores; l++) {
        check_room(runs, lefts[l], lefts[l] == 0 || at_once);
        for (int i = 0; i < RUNS; i++)
            case_run_compare(&runs[i], found, (unsigned long long)lefts[l]);
    }
    for (int i = 0; i < RUNS; i++)
        assert_int_equal(moe_synchronize(case_ctx, runs[i].stream), MOE_OK);
    const struct test_differences got = case_found(found, NULL);
    if (got.count != 0)
        fail_msg("configuration %d, %d tokens, at most %d SMs: %llu differences, the first with %llu SMs left",
                 (int)config, (int)batch->tokens, (int)max_sms, got.count, got.first);
    for (int i = 0; i < RUNS; i++)
        case_run_free(&runs[i]);
}

/* On the SMs that the other kernel leaves forwards come to their end, where it leaves none they wait for it. So they do
 * where many tokens are routed on all SMs, which takes some of them at the same time: who has little to give says so
 * (max_sms). */
static void little_room(void **state)
{
    (void)state;
    static const int32_t bounds[] = {0, 1, 2, 3};
    struct test_differences *found = case_differences();
    hold_sms(case_device.cores - 1); /* loads the kernel */
    release_sms();
    for (int32_t config = 1; case_next_config(MOE_PATH_DECODE, &config); config++)
        for (int layout = 0; layout < CASE_LAYOUTS; layout++)
            for (size_t bound = 0; bound < sizeof bounds / sizeof *bounds; bound++)
                for (size_t b = 0; b < sizeof batches / sizeof *batches; b++)
                    check_batch(&batches[b], layout, config, bounds[bound], found);
    moe_buffer_free(case_ctx, found);
}

static int setup(void **state)
{
    void *pinned;
    assert_int_equal(cudaStreamCreateWithFlags(&holder, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaHostAlloc(&pinned, (size_t)(1 + case_device.cores) * sizeof(int32_t), cudaHostAllocMapped),
                     cudaSuccess);
    stop = pinned;
    running = stop + 1;
    return case_setup(state);
}

static int teardown(void **state)
{
    cudaStreamDestroy(holder);
    cudaFreeHost((int32_t *)stop);
    return case_teardown(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(little_room, case_watch),
    };
    const int status = case_open();
    if (status != 0)
        return status;
    const int failed = cmocka_run_group_tests(tests, setup, teardown);
    case_close();
    return failed;
}
