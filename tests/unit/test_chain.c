/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: forwards of a path one after the other, as the layers of a model, in one graph and one workspace. Each
 * gives what it gives alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/unit/decode_case.h"

enum { COUNTS = 7 };

/* Every second one reads what the one before it wrote. */
static void chain(moe_path path, const int64_t tokens[COUNTS]) /* each with each layer */
{
    enum { FORWARDS = 2 * CASE_SHAPES * COUNTS, REPLAYS = 200 };
    struct test_differences *found = case_differences();
    for (int32_t config = 1; case_next_config(path, &config); config++) {
        struct case_run runs[FORWARDS];
        size_t bytes = 0;
        cudaStream_t stream = case_streams[0];
        for (int i = 0; i < FORWARDS; i++) {
            const int32_t max_sms = i % 5 == 3 ? 2 : 0;
            runs[i] = case_run_make(&case_models[i / 2 % CASE_SHAPES], i % CASE_LAYOUTS, path, config, max_sms, false,
                                    tokens[i / 2 % COUNTS], 500 + (uint64_t)i, stream);
            if (i % 2 == 1) { /* alone, once more, on the result of the one before */
                runs[i].batch.hidden_states = runs[i - 1].y;
                case_run_enqueue(&runs[i]);
                assert_int_equal(
                    cudaMemcpyAsync(runs[i].expected, runs[i].y, runs[i].y_bytes, cudaMemcpyDeviceToDevice, stream),
                    cudaSuccess);
            }
            bytes = runs[i].workspace_bytes > bytes ? runs[i].workspace_bytes : bytes;
        }
        void *workspace = case_alloc(bytes);
        assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
        assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        for (int i = 0; i < FORWARDS; i++)
            assert_int_equal(moe_forward(runs[i].layer, &runs[i].batch, workspace, bytes, stream), MOE_OK);
        cudaGraphExec_t exec = case_end_capture(stream);
        for (unsigned long long replay = 0; replay < REPLAYS; replay++) {
            for (int i = 0; i < FORWARDS; i++)
                assert_int_equal(cudaMemsetAsync(runs[i].y, 0xff, runs[i].y_bytes, stream), cudaSuccess);
            assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
            for (int i = 0; i < FORWARDS; i++)
                case_run_compare(&runs[i], found, replay * FORWARDS + (unsigned long long)i);
        }
        const struct test_differences got = case_found(found, stream);
        if (got.count != 0)
            fail_msg("%s, configuration %d: %llu differences, the first in replay %llu, forward %llu",
                     moe_path_name(path), (int)config, got.count, got.first / FORWARDS, got.first % FORWARDS);
        cudaGraphExecDestroy(exec);
        moe_buffer_free(case_ctx, workspace);
        for (int i = 0; i < FORWARDS; i++)
            case_run_free(&runs[i]);
    }
    moe_buffer_free(case_ctx, found);
}

static void decode(void **state)
{
    (void)state;
    static const int64_t tokens[COUNTS] = {1, 64, 5, 16, 2, 33, 300};
    chain(MOE_PATH_DECODE, tokens);
}

/* What combine reads before the FFN has ended is the plan of its own forward. */
static void prefill(void **state)
{
    (void)state;
    static const int64_t tokens[COUNTS] = {300, 1, 700, 33, 16, 513, 64};
    chain(MOE_PATH_PREFILL, tokens);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(decode, case_watch),
        cmocka_unit_test_setup(prefill, case_watch),
    };
    const int status = case_open();
    if (status != 0)
        return status;
    const int failed = cmocka_run_group_tests(tests, case_setup, case_teardown);
    case_close();
    return failed;
}
