/* SPDX-License-Identifier: Apache-2.0 */
/* A product and a shift give the quotient that division gives, for divisors of all sizes and numbers next to where the
 * quotient changes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "kernels/cuda/common/divisor.h"

static uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void check_one(int32_t d, struct moe_divisor by, int64_t n)
{
    if (n < 0 || n > INT32_MAX)
        return;
    const int32_t quotient = moe_divide((int32_t)n, by);
    if (quotient != (int32_t)n / d)
        fail_msg("%d / %d: %d", (int)n, (int)d, (int)quotient);
}

/* Next to the first and the last multiples of d there are, and to some between. */
static void check(int32_t d, uint32_t *state)
{
    const struct moe_divisor by = moe_divisor_make(d);
    const int64_t most = INT32_MAX / d;
    for (int64_t step = 0; step < 40; step++) {
        const int64_t between = (int64_t)(next_random(state) % ((uint64_t)most + 1));
        const int64_t multiples[] = {step * d, (most - step) * d, between * d};
        for (size_t i = 0; i < sizeof multiples / sizeof *multiples; i++)
            for (int32_t beside = -1; beside <= 1; beside++)
                check_one(d, by, multiples[i] + beside);
        check_one(d, by, INT32_MAX - step);
        check_one(d, by, next_random(state) & INT32_MAX);
    }
}

static void small_divisors(void **unused)
{
    (void)unused;
    uint32_t state = 1;
    for (int32_t d = 1; d <= 5000; d++)
        check(d, &state);
}

static void divisors_near_powers_of_two(void **unused)
{
    (void)unused;
    uint32_t state = 2;
    for (int log2 = 1; log2 < 31; log2++)
        for (int32_t beside = -2; beside <= 2; beside++) {
            const int32_t d = ((int32_t)1 << log2) + beside;
            if (d >= 1)
                check(d, &state);
        }
    for (int32_t below = 0; below < 100; below++)
        check(INT32_MAX - below, &state);
}

static void divisors_of_all_sizes(void **unused)
{
    (void)unused;
    uint32_t state = 3;
    for (int i = 0; i < 20000; i++) {
        const int32_t d = (int32_t)((next_random(&state) & INT32_MAX) >> next_random(&state) % 31);
        check(d > 0 ? d : 1, &state);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(small_divisors),
        cmocka_unit_test(divisors_near_powers_of_two),
        cmocka_unit_test(divisors_of_all_sizes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
