/* SPDX-License-Identifier: Apache-2.0 */
/* The address arithmetic of kernels/packed.h against packing from front to back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/packed.h"
#include "tests/unit/packer.h"

static const struct shape {
    int32_t experts;
    int64_t rows, cols;
    bool w13;
} shapes[] = {
    {2, 48, 40, true},                          /* hidden 40, intermediate 24 */
    {2, 40, 24, false},   {1, 16, 8, true},     /* the least that there is */
    {1, 8, 8, false},     {3, 128, 64, true},   /* nothing to pad: one tile */
    {3, 128, 64, false},  {2, 192, 72, true},   /* a last band of 64 rows, a block of 8 columns */
    {2, 200, 448, false}, {1, 1040, 200, true}, /* padded to a whole band */
    {1, 320, 136, true},
};

/* Every chunk of every row goes where the arithmetic says. */
static void scatter(const uint16_t *canonical, const struct shape *s, char *packed)
{
    for (int64_t e = 0; e < s->experts; e++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t chunk = 0; chunk < s->cols / 8; chunk++) {
                const int64_t to = s->w13 ? moe_packed_w13_row(s->rows, row) : row;
                const uint64_t at = (uint64_t)e * moe_packed_expert_bytes(s->rows, s->cols) +
                                    moe_packed_offset(s->rows, s->cols, to, chunk);
                memcpy(packed + at, canonical + (e * s->rows + row) * s->cols + chunk * 8, 16);
            }
}

static void places(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape *s = &shapes[i];
        const size_t count = (size_t)(s->experts * s->rows * s->cols);
        const size_t bytes = packer_pack(NULL, s->experts, s->rows, s->cols, s->w13, NULL) * 2;
        assert_int_equal(bytes, s->experts * moe_packed_expert_bytes(s->rows, s->cols));
        uint16_t *canonical = malloc(count * 2), *expected = malloc(bytes);
        char *got = calloc(1, bytes);
        assert_true(canonical != NULL && expected != NULL && got != NULL);
        for (size_t k = 0; k < count; k++)
            canonical[k] = (uint16_t)(k % 65521 + 1);
        packer_pack(canonical, s->experts, s->rows, s->cols, s->w13, expected);
        scatter(canonical, s, got);
        if (memcmp(got, expected, bytes) != 0)
            fail_msg("shape %zu differs", i);
        free(canonical);
        free(expected);
        free(got);
    }
}

/* Of matrices beyond 2^31 elements: the last row's last chunk, at place 0 of the row; and the last row of the gate
 * half. */
static void large(void **state)
{
    (void)state;
    const int64_t rows = (int64_t)1 << 21, cols = (int64_t)1 << 20;
    assert_int_equal(moe_packed_expert_bytes(rows, cols), (uint64_t)1 << 42);
    assert_int_equal(moe_packed_offset(rows, cols, rows - 1, cols / 8 - 1), ((uint64_t)1 << 42) - 128);
    assert_int_equal(moe_packed_w13_row(rows, rows - 1), rows - 1);
    assert_int_equal(moe_packed_w13_row(rows, rows / 2 - 1), rows - 9);
    assert_int_equal(moe_packed_w13_row(rows, rows / 2), 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(places), cmocka_unit_test(large)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
