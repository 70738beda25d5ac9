/* SPDX-License-Identifier: Apache-2.0 */
/* Which path runs and which layout a layer gets, by device, shape and layout; the device is made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "runtime/internal.h"

static moe_context gpu = {.info = {.device = MOE_DEVICE_CUDA, .compute_capability = 90}};

static moe_layer make_layer(moe_dtype dtype, int64_t hidden, int64_t intermediate, moe_layout layout)
{
    moe_layer layer = {.ctx = &gpu, .desc = moe_layer_desc_init(dtype), .weights.layout = layout};
    layer.desc.hidden_size = hidden;
    layer.desc.intermediate_size = intermediate;
    layer.desc.num_experts = 8;
    layer.desc.top_k = 2;
    return layer;
}

static void expect_path(const moe_layer *layer, moe_path wanted, moe_path path, const char *text)
{
    char reason[512];
    moe_path got;
    assert_int_equal(moe_path_choose(layer, wanted, 512, &got, reason, sizeof reason), MOE_OK);
    assert_int_equal(got, path);
    assert_non_null(strstr(reason, text));
}

static void expect_refusal(const moe_layer *layer, moe_path wanted, const char *text)
{
    char reason[512];
    moe_path got;
    assert_int_equal(moe_path_choose(layer, wanted, 512, &got, reason, sizeof reason), MOE_ERROR_UNSUPPORTED);
    assert_string_equal(reason, text);
}

/* Row-major weights of a shape that prefill cannot take. */
static void expect_simple(moe_dtype dtype, int64_t hidden, int64_t intermediate, const char *text)
{
    const moe_layer layer = make_layer(dtype, hidden, intermediate, MOE_LAYOUT_ROW_MAJOR);
    char reason[512], packed[512];
    moe_layout layout;
    struct moe_error err;
    expect_path(&layer, MOE_PATH_AUTO, MOE_PATH_SIMPLE, text);
    expect_refusal(&layer, MOE_PATH_PREFILL, text);
    assert_int_equal(moe_path_available(&gpu, MOE_PATH_PREFILL, &layer.desc, reason, sizeof reason),
                     MOE_ERROR_UNSUPPORTED);
    assert_string_equal(reason, text);
    assert_int_equal(moe_choose_layout(&gpu, &layer.desc, MOE_LAYOUT_AUTO, &layout, &err), MOE_OK);
    assert_int_equal(layout, MOE_LAYOUT_ROW_MAJOR);
    assert_int_equal(moe_choose_layout(&gpu, &layer.desc, MOE_LAYOUT_PACKED, &layout, &err), MOE_ERROR_UNSUPPORTED);
    snprintf(packed, sizeof packed, "packed weights: %s", text);
    assert_string_equal(err.text, packed);
}

static void shapes(void **state)
{
    (void)state;
    expect_simple(MOE_F32, 64, 64, "path 'prefill' needs weights in bf16 or f16; these are in f32");
    expect_simple(MOE_BF16, 60, 64, "path 'prefill' needs sizes in multiples of 8; hidden_size is 60");
    expect_simple(MOE_F16, 64, 44, "path 'prefill' needs sizes in multiples of 8; intermediate_size is 44");
}

static void layouts(void **state)
{
    (void)state;
    const moe_dtype dtypes[] = {MOE_BF16, MOE_F16};
    for (int i = 0; i < 2; i++) {
        const moe_layer rows = make_layer(dtypes[i], 40, 24, MOE_LAYOUT_ROW_MAJOR);
        const moe_layer packed = make_layer(dtypes[i], 40, 24, MOE_LAYOUT_PACKED);
        moe_layout layout;
        expect_path(&rows, MOE_PATH_AUTO, MOE_PATH_PREFILL, "row-major");
        expect_path(&rows, MOE_PATH_PREFILL, MOE_PATH_PREFILL, "by name");
        expect_path(&rows, MOE_PATH_SIMPLE, MOE_PATH_SIMPLE, "by name");
        expect_path(&packed, MOE_PATH_AUTO, MOE_PATH_PREFILL, "packed");
        expect_path(&packed, MOE_PATH_PREFILL, MOE_PATH_PREFILL, "by name");
        expect_refusal(&packed, MOE_PATH_SIMPLE, "path 'simple' reads row-major weights; this layer's are packed");
        /* Without a layer there is no layout to refuse. */
        assert_int_equal(moe_path_available(&gpu, MOE_PATH_SIMPLE, &packed.desc, NULL, 0), MOE_OK);
        assert_int_equal(moe_path_available(&gpu, MOE_PATH_PREFILL, NULL, NULL, 0), MOE_OK);
        for (int wanted = MOE_LAYOUT_AUTO; wanted <= MOE_LAYOUT_PACKED; wanted++) {
            assert_int_equal(moe_choose_layout(&gpu, &rows.desc, (moe_layout)wanted, &layout, NULL), MOE_OK);
            assert_int_equal(layout, wanted == MOE_LAYOUT_ROW_MAJOR ? MOE_LAYOUT_ROW_MAJOR : MOE_LAYOUT_PACKED);
        }
    }
}

/* Configurations are numbered without gaps and have names of their own. */
static void configs(void **state)
{
    (void)state;
    int32_t count = 0;
    while (moe_path_config_name(MOE_PATH_PREFILL, count + 1) != NULL)
        count++;
    assert_in_range(count, 1, 1000);
    for (int32_t i = 1; i <= count; i++)
        for (int32_t k = 1; k < i; k++)
            assert_string_not_equal(moe_path_config_name(MOE_PATH_PREFILL, i),
                                    moe_path_config_name(MOE_PATH_PREFILL, k));

    char word[64];
    struct moe_call call;
    struct moe_error err = {{0}};
    const struct moe_path_info *path;
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    moe_batch batch = moe_batch_init();
    batch.dtype = MOE_BF16;
    for (batch.config = 0; batch.config <= count; batch.config++) {
        assert_int_equal(moe_call_prepare(&call, &layer, &batch, MOE_STAGES_EXPERTS, NULL, 0, NULL, &path, &err),
                         MOE_OK);
        assert_int_equal(call.config, batch.config);
        assert_int_equal(call.w13.layout, MOE_LAYOUT_PACKED);
        assert_int_equal(call.w2.layout, MOE_LAYOUT_PACKED);
    }
    assert_int_equal(moe_call_prepare(&call, &layer, &batch, MOE_STAGES_EXPERTS, NULL, 0, NULL, &path, &err),
                     MOE_ERROR_INVALID_ARGUMENT);
    snprintf(word, sizeof word, "expected 0 to %d on path 'prefill'", (int)count);
    assert_non_null(strstr(err.text, word));
}

static void without_cuda(void **state)
{
    (void)state;
    const moe_layer layer = make_layer(MOE_BF16, 64, 64, MOE_LAYOUT_ROW_MAJOR);
    expect_refusal(&layer, MOE_PATH_PREFILL, "path 'prefill': this build has no CUDA");
    assert_null(moe_path_config_name(MOE_PATH_PREFILL, 1));
}

int main(void)
{
    const struct CMUnitTest with[] = {cmocka_unit_test(shapes), cmocka_unit_test(layouts), cmocka_unit_test(configs)};
    const struct CMUnitTest without[] = {cmocka_unit_test(without_cuda)};
    return moe_cuda_built() ? cmocka_run_group_tests(with, NULL, NULL) : cmocka_run_group_tests(without, NULL, NULL);
}
