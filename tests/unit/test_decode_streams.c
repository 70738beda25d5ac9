/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: forwards of the decode path on several streams at once, and of prefill beside them. Each gives what it
 * gives alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/unit/decode_case.h"

static void streams_at_once(void **state)
{
    (void)state;
    enum { ROUNDS = 20, CALLS = 10 };
    /* All SMs for each, half of them for each, many left over. */
    const int32_t bounds[] = {0, case_device.cores / 2, 2};
    struct test_differences *found = case_differences();
    for (int32_t config = 1; case_next_config(MOE_PATH_DECODE, &config); config++)
        for (size_t bound = 0; bound < sizeof bounds / sizeof *bounds; bound++) {
            const int32_t sms = bounds[bound];
            struct case_run runs[CASE_STREAMS] = {
                case_run_make(&case_models[CASE_EVEN], 0, MOE_PATH_DECODE, config, sms, false, 64, 1, case_streams[0]),
                /* the same layer */
                case_run_make(&case_models[CASE_EVEN], 0, MOE_PATH_DECODE, config, sms, true, 16, 2, case_streams[1]),
                case_run_make(&case_models[CASE_ODD], 1, MOE_PATH_DECODE, config, sms, false, 7, 3, case_streams[2]),
                case_run_make(&case_models[CASE_EVEN], 0, MOE_PATH_PREFILL, 0, sms, false, 520, 4, case_streams[3]),
            };
            for (int round = 0; round < ROUNDS; round++) {
                for (int i = 0; i < CASE_STREAMS; i++)
                    case_run_poison(&runs[i]);
                for (int call = 0; call < CALLS; call++)
                    for (int i = 0; i < CASE_STREAMS; i++) {
                        case_run_enqueue(&runs[i]);
                        case_run_compare(&runs[i], found, (unsigned long long)i);
                    }
            }
            for (int i = 0; i < CASE_STREAMS; i++)
                assert_int_equal(moe_synchronize(case_ctx, runs[i].stream), MOE_OK);
            const struct test_differences got = case_found(found, NULL);
            if (got.count != 0)
                fail_msg("configuration %d on %d SMs: %llu differences, the first stream that has one is %llu",
                         (int)config, (int)sms, got.count, got.first);
            for (int i = 0; i < CASE_STREAMS; i++)
                case_run_free(&runs[i]);
        }
    moe_buffer_free(case_ctx, found);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(streams_at_once, case_watch),
    };
    const int status = case_open();
    if (status != 0)
        return status;
    const int failed = cmocka_run_group_tests(tests, case_setup, case_teardown);
    case_close();
    return failed;
}
