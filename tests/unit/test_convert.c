/* SPDX-License-Identifier: Apache-2.0 */
/* Every bf16 and f16 number, the points halfway between neighbours and what lies next to those. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "config/convert.h"

struct format {
    moe_dtype dtype;
    int fraction_bits, bias;
};

static const struct format bf16 = {MOE_BF16, 7, 127}, f16 = {MOE_F16, 10, 15};

static float decode(const struct format *format, uint16_t code)
{
    return moe_load_f32(&code, format->dtype, 0);
}

static uint16_t encode(const struct format *format, float value)
{
    uint16_t code = 0xdead;
    moe_store_f32(&code, format->dtype, 0, value);
    return code;
}

static uint16_t infinity_code(const struct format *format)
{
    return (uint16_t)(0x7fffu >> format->fraction_bits << format->fraction_bits);
}

/* The value of a finite code by the definition of the format. */
static double defined_value(const struct format *format, uint16_t code)
{
    int fraction = code & ((1 << format->fraction_bits) - 1), exponent = (code & 0x7fff) >> format->fraction_bits;
    int implicit = exponent ? 1 << format->fraction_bits : 0, scale = (exponent ? exponent : 1) - format->bias;
    double value = ldexp(fraction + implicit, scale - format->fraction_bits);

    return code & 0x8000 ? -value : value;
}

static void check_all_codes(const struct format *format)
{
    uint16_t infinity = infinity_code(format);

    for (uint32_t code = 0; code <= 0xffff; code++) {
        float value = decode(format, (uint16_t)code);
        uint16_t magnitude = code & 0x7fff;

        if (magnitude > infinity) {
            assert_true(isnan(value));
            assert_true((encode(format, value) & 0x7fff) > infinity);
            assert_int_equal(encode(format, value) & 0x8000, code & 0x8000);
            continue;
        }
        if (magnitude == infinity)
            assert_true(isinf(value) && !signbit(value) == !(code & 0x8000));
        else
            assert_true(value == defined_value(format, (uint16_t)code));
        assert_int_equal(encode(format, value), code);
    }
}

static void check_halfway(const struct format *format, uint16_t sign)
{
    uint16_t infinity = infinity_code(format);

    for (uint16_t code = 0; code < infinity; code++) {
        double low = defined_value(format, code);
        /* Past the largest number the next one would follow in the same steps; rounding to it gives infinity. */
        double high = code + 1 == infinity ? 2 * low - defined_value(format, code - 1)
                                           : defined_value(format, (uint16_t)(code + 1));
        float middle = (float)((low + high) / 2);
        uint16_t even = code & 1 ? code + 1 : code;

        assert_true(middle == (low + high) / 2);
        middle = sign ? -middle : middle;
        assert_int_equal(encode(format, middle), even | sign);
        assert_int_equal(encode(format, nextafterf(middle, 0)), code | sign);
        assert_int_equal(encode(format, nextafterf(middle, sign ? -INFINITY : INFINITY)), (code + 1) | sign);
    }
}

static void test_bf16(void **state)
{
    (void)state;
    check_all_codes(&bf16);
    check_halfway(&bf16, 0);
    check_halfway(&bf16, 0x8000);
    assert_int_equal(encode(&bf16, FLT_MAX), 0x7f80);
}

static void test_f16(void **state)
{
    (void)state;
    check_all_codes(&f16);
    check_halfway(&f16, 0);
    check_halfway(&f16, 0x8000);
    assert_int_equal(encode(&f16, FLT_MAX), 0x7c00);
    assert_int_equal(encode(&f16, 0x1p-149f), 0);
    assert_int_equal(encode(&f16, -0x1p-149f), 0x8000);
}

static void test_nan_in_low_bits(void **state)
{
    (void)state;
    static const uint32_t nans[] = {0x7f800001, 0xff800001, 0x7fc00000, 0x7fffffff, 0xffffffff};

    for (size_t i = 0; i < sizeof nans / sizeof nans[0]; i++) {
        float nan = moe_f32_from_bits(nans[i]);
        assert_true(isnan(moe_round_f32(nan, MOE_BF16)));
        assert_true(isnan(moe_round_f32(nan, MOE_F16)));
        assert_int_equal(encode(&bf16, nan) >> 15, nans[i] >> 31);
        assert_int_equal(encode(&f16, nan) >> 15, nans[i] >> 31);
    }
}

static void test_round_and_convert(void **state)
{
    (void)state;
    static const moe_dtype dtypes[] = {MOE_BF16, MOE_F16, MOE_F32};
    static const float values[] = {0,     -0.0f, 1,      -1.00390625f, 3.14159265f, 65519,
                                   65520, 1e-7f, -5e-8f, 1e30f,        INFINITY};
    enum { COUNT = sizeof values / sizeof values[0] };

    for (int a = 0; a < 3; a++)
        for (int b = 0; b < 3; b++) {
            float from[COUNT], to[COUNT + 1];

            memset(to, 0x5a, sizeof to);
            for (int i = 0; i < COUNT; i++)
                moe_store_f32(from, dtypes[a], i, values[i]);
            moe_convert(to, dtypes[b], from, dtypes[a], COUNT);
            for (int i = 0; i < COUNT; i++) {
                float expected = moe_round_f32(moe_round_f32(values[i], dtypes[a]), dtypes[b]);
                assert_int_equal(moe_f32_bits(moe_load_f32(to, dtypes[b], i)), moe_f32_bits(expected));
            }
            assert_int_equal(((uint8_t *)to)[COUNT * moe_dtype_size(dtypes[b])], 0x5a);
        }
    moe_convert(NULL, MOE_F32, NULL, MOE_F32, 0);
}

static void test_dot_adds_in_double(void **state)
{
    (void)state;
    float a[] = {1e8f, 1, 1e8f}, b[] = {1, 1, -1};
    uint16_t c[3];

    moe_convert(c, MOE_BF16, b, MOE_F32, 3);
    assert_true(moe_dot(a, MOE_F32, b, MOE_F32, 3) == 1);
    assert_true(moe_dot(a, MOE_F32, c, MOE_BF16, 3) == 1);
    assert_true(moe_dot(a, MOE_F32, b, MOE_F32, 0) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_f16),
        cmocka_unit_test(test_nan_in_low_bits),
        cmocka_unit_test(test_round_and_convert),
        cmocka_unit_test(test_dot_adds_in_double),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
