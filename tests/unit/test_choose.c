/* SPDX-License-Identifier: Apache-2.0 */
/* Which path runs, in which configuration, and which layout a layer gets, by device, shape, layout and table; the
 * device is made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "runtime/internal.h"

static moe_context gpu = {
    .info = {.device = MOE_DEVICE_CUDA, .compute_capability = 90},
    .exec = {.device = MOE_DEVICE_CUDA, .sms = 132, .compute_capability = 90, .shared_bytes = 227 * 1024}};

static moe_layer make_layer(moe_dtype dtype, int64_t hidden, int64_t intermediate, moe_layout layout)
{
    moe_layer layer = {.ctx = &gpu, .desc = moe_layer_desc_init(dtype), .weights.layout = layout};
    layer.desc.hidden_size = hidden;
    layer.desc.intermediate_size = intermediate;
    layer.desc.num_experts = 8;
    layer.desc.top_k = 2;
    return layer;
}

/* What auto takes. */
static void expect_path_at(const moe_layer *layer, int64_t tokens, moe_path path)
{
    moe_path got;
    assert_int_equal(moe_path_choose(layer, MOE_PATH_AUTO, tokens, &got, NULL, 0), MOE_OK);
    assert_int_equal(got, path);
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

/* Row-major weights of a shape that neither decode nor prefill can take. */
static void expect_simple(moe_dtype dtype, int64_t hidden, int64_t intermediate, const char *needs)
{
    static const moe_path fused[] = {MOE_PATH_DECODE, MOE_PATH_PREFILL};
    const moe_layer layer = make_layer(dtype, hidden, intermediate, MOE_LAYOUT_ROW_MAJOR);
    char text[256], reason[512], packed[512];
    moe_layout layout;
    struct moe_error err;
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, "path '%s' needs %s", moe_path_name(fused[i]), needs);
        expect_refusal(&layer, fused[i], text);
        assert_int_equal(moe_path_available(&gpu, fused[i], &layer.desc, reason, sizeof reason), MOE_ERROR_UNSUPPORTED);
        assert_string_equal(reason, text);
    }
    expect_path(&layer, MOE_PATH_AUTO, MOE_PATH_SIMPLE, text);
    assert_int_equal(moe_choose_layout(&gpu, &layer.desc, MOE_LAYOUT_AUTO, &layout, &err), MOE_OK);
    assert_int_equal(layout, MOE_LAYOUT_ROW_MAJOR);
    assert_int_equal(moe_choose_layout(&gpu, &layer.desc, MOE_LAYOUT_PACKED, &layout, &err), MOE_ERROR_UNSUPPORTED);
    snprintf(packed, sizeof packed, "packed weights: %s", text);
    assert_string_equal(err.text, packed);
}

static void shapes(void **state)
{
    (void)state;
    expect_simple(MOE_F32, 64, 64, "weights in bf16 or f16; these are in f32");
    expect_simple(MOE_BF16, 60, 64, "sizes in multiples of 8; hidden_size is 60");
    expect_simple(MOE_F16, 64, 44, "sizes in multiples of 8; intermediate_size is 44");
}

static void layouts(void **state)
{
    (void)state;
    const moe_dtype dtypes[] = {MOE_BF16, MOE_F16};
    for (int i = 0; i < 2; i++) {
        const moe_layer rows = make_layer(dtypes[i], 40, 24, MOE_LAYOUT_ROW_MAJOR);
        const moe_layer packed = make_layer(dtypes[i], 40, 24, MOE_LAYOUT_PACKED);
        moe_layout layout;
        expect_path(&rows, MOE_PATH_AUTO, MOE_PATH_PREFILL, "rows an expert");
        expect_path(&rows, MOE_PATH_PREFILL, MOE_PATH_PREFILL, "by name");
        expect_path(&rows, MOE_PATH_DECODE, MOE_PATH_DECODE, "by name");
        expect_path(&rows, MOE_PATH_SIMPLE, MOE_PATH_SIMPLE, "by name");
        expect_path(&packed, MOE_PATH_AUTO, MOE_PATH_PREFILL, "rows an expert");
        expect_path(&packed, MOE_PATH_PREFILL, MOE_PATH_PREFILL, "by name");
        expect_path(&packed, MOE_PATH_DECODE, MOE_PATH_DECODE, "by name");
        expect_refusal(&packed, MOE_PATH_SIMPLE, "path 'simple' reads row-major weights; this layer's are packed");
        /* Without a layer there is no layout to refuse. */
        assert_int_equal(moe_path_available(&gpu, MOE_PATH_SIMPLE, &packed.desc, NULL, 0), MOE_OK);
        assert_int_equal(moe_path_available(&gpu, MOE_PATH_PREFILL, NULL, NULL, 0), MOE_OK);
        assert_int_equal(moe_path_available(&gpu, MOE_PATH_DECODE, NULL, NULL, 0), MOE_OK);
        for (int wanted = MOE_LAYOUT_AUTO; wanted <= MOE_LAYOUT_PACKED; wanted++) {
            assert_int_equal(moe_choose_layout(&gpu, &rows.desc, (moe_layout)wanted, &layout, NULL), MOE_OK);
            assert_int_equal(layout, wanted == MOE_LAYOUT_ROW_MAJOR ? MOE_LAYOUT_ROW_MAJOR : MOE_LAYOUT_PACKED);
        }
    }
}

/* The number of the path's configuration of that name. */
static int32_t number_of(moe_path path, const char *name)
{
    const char *found;
    for (int32_t config = 1; (found = moe_path_config_name(path, config)) != NULL; config++)
        if (strcmp(found, name) == 0)
            return config;
    fail_msg("%s has no configuration '%s'", moe_path_name(path), name);
    return 0;
}

/* What a batch without tokens in this configuration comes to. */
static moe_status try_config(const moe_layer *layer, moe_path path, int32_t config, struct moe_call *call,
                             struct moe_error *err)
{
    const struct moe_path_info *info;
    moe_batch batch = moe_batch_init();
    batch.dtype = layer->desc.dtype;
    batch.path = path;
    batch.config = config;
    return moe_call_prepare(call, layer, &batch, MOE_STAGES_EXPERTS, NULL, 0, NULL, &info, err);
}

/* Whether this build has kernels for 9.0: without them that device's own choice is another. */
static bool built_for_90(const moe_layer *layer)
{
    struct moe_call call;
    moe_call_shape(&call, layer, 100, layer->desc.top_k, layer->desc.dtype);
    const int32_t config = moe_path_info_get(MOE_PATH_PREFILL)->config(&call);
    return strncmp(moe_path_config_name(MOE_PATH_PREFILL, config), "wgmma", 5) == 0;
}

/* Configurations are numbered without gaps and have names of their own. */
static void check_configs(moe_path path)
{
    int32_t count = 0;
    while (moe_path_config_name(path, count + 1) != NULL)
        count++;
    assert_in_range(count, 1, 1000);
    for (int32_t i = 1; i <= count; i++)
        for (int32_t k = 1; k < i; k++)
            assert_string_not_equal(moe_path_config_name(path, i), moe_path_config_name(path, k));

    char word[64];
    struct moe_call call;
    struct moe_error err = {{0}};
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    for (int32_t config = built_for_90(&layer) ? 0 : number_of(path, "mma"); config <= count; config++) {
        assert_int_equal(try_config(&layer, path, config, &call, &err), MOE_OK);
        assert_int_equal(call.config, config);
        assert_int_equal(call.w13.layout, MOE_LAYOUT_PACKED);
        assert_int_equal(call.w2.layout, MOE_LAYOUT_PACKED);
    }
    assert_int_equal(try_config(&layer, path, count + 1, &call, &err), MOE_ERROR_INVALID_ARGUMENT);
    snprintf(word, sizeof word, "expected 0 to %d on path '%s'", (int)count, moe_path_name(path));
    assert_non_null(strstr(err.text, word));
}

static void configs(void **state)
{
    (void)state;
    check_configs(MOE_PATH_DECODE);
    check_configs(MOE_PATH_PREFILL);
}

/* What a batch, and a table, in this configuration come to on such a device; message NULL: both can run. */
static void expect_config(moe_path path, const char *name, int32_t compute_capability, int32_t shared_bytes,
                          const char *message)
{
    static const char *const format =
        "{\"device\":{\"name\":\"GPU\",\"compute_capability\":90,\"cores\":132},\"entries\":[{\"hidden_size\":40,"
        "\"intermediate_size\":24,\"num_experts\":8,\"top_k\":2,\"dtype\":\"bf16\",\"layout\":\"packed\",\"points\":["
        "{\"tokens\":1,\"path\":\"%s\",\"config\":\"%s\"}]}]}";
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    const struct moe_exec before = gpu.exec;
    struct moe_tuned table;
    struct moe_call call;
    struct moe_error err = {{0}}, table_err = {{0}};
    char text[1024], expected[512];
    snprintf(text, sizeof text, format, moe_path_name(path), name);
    gpu.exec.compute_capability = compute_capability;
    gpu.exec.shared_bytes = shared_bytes;
    const moe_status status = try_config(&layer, path, number_of(path, name), &call, &err);
    const moe_status parsed = moe_tuned_parse(text, strlen(text), "t.json", &table, &table_err);
    const moe_status used = parsed == MOE_OK ? moe_choose_from(&gpu, &table, &table_err) : parsed;
    gpu.exec = before;
    moe_tuned_free(&table);

    assert_int_equal(parsed, MOE_OK);
    assert_int_equal(status, message != NULL ? MOE_ERROR_UNSUPPORTED : MOE_OK);
    assert_int_equal(used, message != NULL ? MOE_ERROR_FILE : MOE_OK);
    assert_string_equal(err.text, message != NULL ? message : "");
    if (message != NULL) {
        snprintf(expected, sizeof expected, "t.json: 'entries[0].points[0]': %s; 'moe tune' makes a new table",
                 message);
        assert_string_equal(table_err.text, expected);
    }
    moe_tuned_free(&gpu.tuned);
}

static void configs_of_other_devices(void **state)
{
    (void)state;
    enum { SMALL = 99 * 1024, LARGE = 163 * 1024 }; /* 8.6 and 8.0 */
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    const char *no_wgmma =
        "prefill configuration 'wgmma-128' needs a GPU of compute capability 9.0, and a build for it";
    expect_config(MOE_PATH_PREFILL, "wgmma-128", 80, LARGE, no_wgmma);
    expect_config(MOE_PATH_PREFILL, "wgmma-128", 100, 227 * 1024, no_wgmma);
    expect_config(MOE_PATH_PREFILL, "wgmma-128", 90, 227 * 1024, built_for_90(&layer) ? NULL : no_wgmma);
    expect_config(MOE_PATH_PREFILL, "mma", 86, SMALL, NULL);
    expect_config(MOE_PATH_PREFILL, "mma-128x128x3", 86, SMALL, NULL);
    expect_config(MOE_PATH_PREFILL, "mma-128x256x3", 80, LARGE, NULL);
    expect_config(MOE_PATH_PREFILL, "mma-128x256x3", 86, SMALL,
                  "prefill configuration 'mma-128x256x3' takes 147712 bytes of shared memory, this GPU has 101376 a "
                  "block");
    no_wgmma = "decode configuration 'wgmma' needs a GPU of compute capability 9.0, and a build for it";
    expect_config(MOE_PATH_DECODE, "wgmma", 80, LARGE, no_wgmma);
    expect_config(MOE_PATH_DECODE, "wgmma", 100, 227 * 1024, no_wgmma);
    expect_config(MOE_PATH_DECODE, "wgmma", 90, 227 * 1024, built_for_90(&layer) ? NULL : no_wgmma);
    expect_config(MOE_PATH_DECODE, "mma", 80, LARGE, NULL);
    expect_config(MOE_PATH_DECODE, "mma", 86, SMALL, NULL);
}

/* ---- The formula and a table ---- */

static const int64_t counts[] = {1, 100, 255, 256, 1023, 1024, 4095, 4096, 100000};
enum { COUNTS = sizeof counts / sizeof *counts };

static void expect_reason(const moe_layer *layer, moe_path wanted, int64_t tokens, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static void expect_reason(const moe_layer *layer, moe_path wanted, int64_t tokens, const char *format, ...)
{
    char reason[512], expected[512];
    moe_path path;
    va_list args;
    va_start(args, format);
    vsnprintf(expected, sizeof expected, format, args);
    va_end(args);
    assert_int_equal(moe_path_choose(layer, wanted, tokens, &path, reason, sizeof reason), MOE_OK);
    assert_string_equal(reason, expected);
}

/* The configuration that a batch runs in. */
static int32_t config_of(const moe_layer *layer, moe_path wanted, int64_t tokens, int32_t config, int32_t max_sms)
{
    struct moe_call call;
    struct moe_error err = {{0}};
    const struct moe_path_info *path;
    static _Alignas(256) char memory[256]; /* nothing is read or written */
    moe_batch batch = moe_batch_init();
    batch.tokens = tokens;
    batch.dtype = layer->desc.dtype;
    batch.path = wanted;
    batch.config = config;
    batch.max_sms = max_sms;
    batch.hidden_states = (void *)((uintptr_t)1 << 40);
    batch.output = (void *)((uintptr_t)1 << 41);
    batch.topk_ids = batch.hidden_states;
    batch.topk_weights = batch.hidden_states;
    if (moe_call_prepare(&call, layer, &batch, MOE_STAGES_EXPERTS, memory, SIZE_MAX, NULL, &path, &err) != MOE_OK)
        fail_msg("%s", err.text);
    return call.config;
}

static int32_t formula(const moe_layer *layer, moe_path path, int64_t tokens, int32_t max_sms)
{
    struct moe_call call;
    moe_call_shape(&call, layer, tokens, layer->desc.top_k, layer->desc.dtype);
    call.max_sms = max_sms;
    return moe_path_info_get(path)->config(&call);
}

static const char *formula_name(const moe_layer *layer, moe_path path, int64_t tokens)
{
    return moe_path_config_name(path, formula(layer, path, tokens, 0));
}

/* Without a table: decode for few tokens, then prefill; of the path the configuration that its formula says, which is
 * left to the path when the batch runs. */
static void chooses_by_formula(void **state)
{
    (void)state;
    static const moe_path fused[] = {MOE_PATH_DECODE, MOE_PATH_PREFILL};
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED); /* a quarter of the tokens to an expert */
    const moe_layer odd = make_layer(MOE_BF16, 40, 20, MOE_LAYOUT_ROW_MAJOR);
    for (int i = 0; i < COUNTS; i++) {
        for (int p = 0; p < 2; p++) {
            const int32_t mma = number_of(fused[p], "mma");
            assert_non_null(formula_name(&layer, fused[p], counts[i]));
            assert_non_null(moe_path_config_name(fused[p], formula(&layer, fused[p], counts[i], 1)));
            assert_int_equal(config_of(&layer, fused[p], counts[i], 0, 0), 0);
            assert_int_equal(config_of(&layer, fused[p], counts[i], mma, 0), mma);
        }
        assert_int_equal(config_of(&layer, MOE_PATH_AUTO, counts[i], 0, 0), 0);
        expect_reason(&odd, MOE_PATH_AUTO, counts[i],
                      "simple: path 'prefill' needs sizes in multiples of 8; intermediate_size is 20");
    }
    const char *decode = formula_name(&layer, MOE_PATH_DECODE, 10);
    const char *few = formula_name(&layer, MOE_PATH_PREFILL, 10), *many = formula_name(&layer, MOE_PATH_PREFILL, 8192);
    if (built_for_90(&layer)) { /* another build leaves the tile to the launch */
        assert_string_not_equal(few, many);
        assert_string_equal(decode, "wgmma");
    }
    expect_reason(&layer, MOE_PATH_AUTO, 10, "decode, configuration %s: 2.5 rows an expert on average", decode);
    expect_reason(&layer, MOE_PATH_AUTO, 128, "decode, configuration %s: 32 rows an expert on average", decode);
    expect_reason(&layer, MOE_PATH_AUTO, 129, "prefill, configuration %s: 32 rows an expert on average",
                  formula_name(&layer, MOE_PATH_PREFILL, 129));
    expect_reason(&layer, MOE_PATH_AUTO, 8192, "prefill, configuration %s: 2048 rows an expert on average", many);
    expect_reason(&layer, MOE_PATH_PREFILL, 10,
                  "prefill, configuration %s: asked for by name; 2.5 rows an expert on average", few);
    expect_reason(&layer, MOE_PATH_PREFILL, 8192,
                  "prefill, configuration %s: asked for by name; 2048 rows an expert on average", many);
    expect_reason(&layer, MOE_PATH_DECODE, 8192,
                  "decode, configuration %s: asked for by name; 2048 rows an expert on average",
                  formula_name(&layer, MOE_PATH_DECODE, 8192));
    expect_reason(&odd, MOE_PATH_SIMPLE, 1, "simple: asked for by name");

    /* Elsewhere up to 48 rows an expert. */
    gpu.exec.compute_capability = 80;
    expect_reason(&layer, MOE_PATH_AUTO, 192, "decode, configuration mma: 48 rows an expert on average");
    expect_reason(&layer, MOE_PATH_AUTO, 193, "prefill, configuration mma: 48 rows an expert on average");
    gpu.exec.compute_capability = 90;

    /* Between: 20 rows an expert are 106 tokens, 32 are 170, of which 128 fit in a tile. */
    moe_layer between = layer;
    between.desc.num_experts = 16;
    between.desc.top_k = 3;
    for (int64_t tokens = 105; tokens <= 131; tokens++)
        expect_path_at(&between, tokens, tokens <= 128 ? MOE_PATH_DECODE : MOE_PATH_PREFILL);

    /* Where a token has half of the experts 64 tokens have 32 rows an expert. */
    moe_layer half = layer;
    half.desc.top_k *= 2;
    for (int64_t tokens = 62; tokens <= 67; tokens++)
        expect_path_at(&half, tokens, tokens <= 64 ? MOE_PATH_DECODE : MOE_PATH_PREFILL);

    /* Many experts, few of them a token's. */
    moe_layer wide = make_layer(MOE_F16, 40, 24, MOE_LAYOUT_ROW_MAJOR);
    wide.desc.num_experts = 129;
    wide.desc.top_k = 7;
    for (int64_t tokens = 365; tokens <= 372; tokens++)
        expect_path_at(&wide, tokens, tokens <= 368 ? MOE_PATH_DECODE : MOE_PATH_PREFILL); /* 368.6 */
}

/* Entries for layers of 40 x 24, 8 experts, top 2, bf16, in both layouts. %s: names of configurations. */
static void use_table(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void use_table(const char *format, ...)
{
    char text[4096];
    struct moe_tuned table;
    struct moe_error err = {{0}};
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    moe_tuned_free(&gpu.tuned);
    if (moe_tuned_parse(text, strlen(text), "t.json", &table, &err) != MOE_OK ||
        moe_choose_from(&gpu, &table, &err) != MOE_OK)
        fail_msg("%s", err.text);
    assert_null(table.entries);
}

static int drop_table(void **state)
{
    (void)state;
    moe_tuned_free(&gpu.tuned);
    gpu.exec.cublas = NULL;
    return 0;
}

#define TABLE(rows, packed)                                                                                            \
    "{\"device\":{\"name\":\"GPU\",\"compute_capability\":90,\"cores\":132},\"entries\":["                             \
    "{" SHAPE "\"bf16\",\"layout\":\"row-major\",\"points\":[" rows "]},"                                              \
    "{" SHAPE "\"bf16\",\"layout\":\"packed\",\"points\":[" packed "]}]}"
#define SHAPE "\"hidden_size\":40,\"intermediate_size\":24,\"num_experts\":8,\"top_k\":2,\"dtype\":"

static void chooses_by_table(void **state)
{
    (void)state;
    const int32_t one = number_of(MOE_PATH_PREFILL, "mma"), two = one + 1; /* which every build can run */
    const char *first = moe_path_config_name(MOE_PATH_PREFILL, one);
    const char *second = moe_path_config_name(MOE_PATH_PREFILL, two);
    use_table(TABLE("{\"tokens\":1,\"path\":\"simple\"},{\"tokens\":256,\"path\":\"prefill\",\"config\":\"%s\"}",
                    "{\"tokens\":256,\"path\":\"prefill\",\"config\":\"%s\"},{\"tokens\":1024,\"path\":\"prefill\"},"
                    "{\"tokens\":4096,\"path\":\"prefill\",\"config\":\"%s\"}"),
              first, second, first);
    const moe_layer rows = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_ROW_MAJOR);
    const moe_layer packed = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    for (int i = 0; i < COUNTS; i++) {
        const int64_t tokens = counts[i];
        const int32_t in_rows = tokens < 256 ? 0 : one;
        const int32_t in_packed = tokens < 256 ? 0 : tokens < 1024 ? two : tokens < 4096 ? 0 : one;
        assert_int_equal(config_of(&rows, MOE_PATH_AUTO, tokens, 0, 0), in_rows);
        assert_int_equal(config_of(&rows, MOE_PATH_PREFILL, tokens, 0, 0), in_rows);
        assert_int_equal(config_of(&packed, MOE_PATH_AUTO, tokens, 0, 0), in_packed);
        assert_int_equal(config_of(&packed, MOE_PATH_PREFILL, tokens, 0, 0), in_packed);
        /* The batch's own configuration goes first; fewer SMs are another machine than the one that was measured. */
        assert_int_equal(config_of(&packed, MOE_PATH_PREFILL, tokens, two + 1, 0), two + 1);
        assert_int_equal(config_of(&packed, MOE_PATH_AUTO, tokens, 0, 66), 0);
        assert_int_equal(config_of(&rows, MOE_PATH_SIMPLE, tokens, 0, 0), 0);

        const char *by_formula = formula_name(&packed, MOE_PATH_PREFILL, tokens);
        const int64_t from = tokens < 1024 ? 256 : tokens < 4096 ? 1024 : 4096;
        const char *chosen = in_packed ? moe_path_config_name(MOE_PATH_PREFILL, in_packed) : by_formula;
        if (tokens < 256)
            expect_reason(&rows, MOE_PATH_AUTO, tokens, "simple: tuned for 1 token and more in t.json");
        else
            expect_reason(&rows, MOE_PATH_AUTO, tokens,
                          "prefill, configuration %s: tuned for 256 tokens and more in t.json", first);
        if (tokens >= 256) {
            expect_reason(&packed, MOE_PATH_AUTO, tokens,
                          "prefill, configuration %s: tuned for %lld tokens and more in t.json", chosen,
                          (long long)from);
            expect_reason(&packed, MOE_PATH_PREFILL, tokens,
                          "prefill, configuration %s: asked for by name; tuned for %lld tokens and more in t.json",
                          chosen, (long long)from);
        }
    }
    /* Another shape: the formula. */
    moe_layer other = packed;
    other.desc.top_k = 4;
    assert_int_equal(config_of(&other, MOE_PATH_AUTO, 256, 0, 0), 0);
    expect_reason(&other, MOE_PATH_AUTO, 256, "prefill, configuration %s: 128 rows an expert on average",
                  formula_name(&other, MOE_PATH_PREFILL, 256));
}

/* Where a table has decode end earlier than the formula would, and begin later. */
static void crosses_by_table(void **state)
{
    (void)state;
    const int32_t mma = number_of(MOE_PATH_DECODE, "mma");
    use_table(TABLE("{\"tokens\":1,\"path\":\"decode\",\"config\":\"mma\"},{\"tokens\":100,\"path\":\"prefill\"}",
                    "{\"tokens\":1,\"path\":\"prefill\"},{\"tokens\":4,\"path\":\"decode\"},"
                    "{\"tokens\":4096,\"path\":\"prefill\"}"));
    const moe_layer rows = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_ROW_MAJOR);
    const moe_layer packed = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    for (int64_t tokens = 1; tokens < 5000; tokens = tokens < 210 ? tokens + 1 : tokens + 7) {
        expect_path_at(&rows, tokens, tokens < 100 ? MOE_PATH_DECODE : MOE_PATH_PREFILL);
        expect_path_at(&packed, tokens, 4 <= tokens && tokens < 4096 ? MOE_PATH_DECODE : MOE_PATH_PREFILL);
        assert_int_equal(config_of(&rows, MOE_PATH_AUTO, tokens, 0, 0), tokens < 100 ? mma : 0);
        assert_int_equal(config_of(&rows, MOE_PATH_AUTO, tokens, 0, 66), 0);
        assert_int_equal(config_of(&packed, MOE_PATH_AUTO, tokens, 0, 0), 0);
    }
    expect_reason(&rows, MOE_PATH_AUTO, 99, "decode, configuration mma: tuned for 1 token and more in t.json");
    expect_reason(&packed, MOE_PATH_AUTO, 2000, "decode, configuration %s: tuned for 4 tokens and more in t.json",
                  formula_name(&packed, MOE_PATH_DECODE, 2000));
}

/* Whether such a batch takes a workspace of so many bytes. */
static bool serves(const moe_layer *layer, moe_path path, int64_t tokens, int32_t slots, moe_dtype dtype,
                   int32_t max_sms, int32_t config, size_t bytes)
{
    struct moe_call call;
    struct moe_error err = {{0}};
    const struct moe_path_info *info;
    static _Alignas(256) char memory[256]; /* nothing is read or written */
    moe_batch batch = moe_batch_init();
    batch.tokens = tokens;
    batch.dtype = dtype;
    batch.path = path;
    batch.config = config;
    batch.max_sms = max_sms;
    batch.top_k = slots;
    batch.hidden_states = (void *)((uintptr_t)1 << 40);
    batch.output = (void *)((uintptr_t)1 << 41);
    batch.topk_ids = batch.hidden_states;
    batch.topk_weights = batch.hidden_states;
    const moe_status status =
        moe_call_prepare(&call, layer, &batch, MOE_STAGES_EXPERTS, memory, bytes, NULL, &info, &err);
    if (status != MOE_OK && status != MOE_ERROR_WORKSPACE)
        fail_msg("%s", err.text);
    return status == MOE_OK;
}

/* The workspace for up to `most` tokens serves each count, in every dtype, on any number of SMs, and one byte less does
 * not. */
static void check_workspace(const moe_layer *layer, moe_path path, int64_t most, int32_t slots)
{
    static const int32_t max_sms[] = {0, 1, 17, 66, 1000};
    moe_limits limits = moe_limits_init();
    size_t bytes;
    bool less = true;
    limits.max_tokens = most;
    limits.top_k = slots;
    limits.path = path;
    assert_int_equal(moe_workspace_size(layer, &limits, &bytes), MOE_OK);
    for (int64_t tokens = 1; tokens <= most; tokens++)
        for (int dtype = MOE_BF16; dtype <= MOE_F32; dtype++)
            for (size_t i = 0; i < sizeof max_sms / sizeof *max_sms; i++) {
                if (!serves(layer, path, tokens, slots, (moe_dtype)dtype, max_sms[i], 0, bytes))
                    fail_msg("%s, %d tokens in %d slots on %d SMs: a workspace for %d tokens is too small",
                             moe_path_name(path), (int)tokens, (int)slots, (int)max_sms[i], (int)most);
                less = less && serves(layer, path, tokens, slots, (moe_dtype)dtype, max_sms[i], 0, bytes - 1);
            }
    assert_true(most == 0 || !less);
}

static void workspace_for_every_count(void **state)
{
    (void)state;
    static const struct {
        int64_t hidden, intermediate;
        int32_t experts, top_k;
    } shapes[] = {{40, 24, 8, 2}, {4096, 1024, 8, 2}, {2048, 768, 128, 8}, {64, 64, 1, 1}, {8, 8, 512, 10}};
    static const moe_path wanted[] = {MOE_PATH_AUTO, MOE_PATH_DECODE, MOE_PATH_PREFILL};
    const int32_t sms = gpu.exec.sms;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        moe_layer layer = make_layer(MOE_BF16, shapes[i].hidden, shapes[i].intermediate, MOE_LAYOUT_PACKED);
        layer.desc.num_experts = shapes[i].experts;
        layer.desc.top_k = shapes[i].top_k;
        const int64_t few = 32 * (int64_t)shapes[i].experts / shapes[i].top_k; /* decode's last: one of these, or 128 */
        const int64_t many = 20 * (int64_t)shapes[i].experts / shapes[i].top_k;
        const int64_t most[] = {0,   1,   7,   8,   9,       127,  128,      129,      191,
                                192, 193, 400, few, few + 1, many, many + 1, many + 30};
        for (size_t k = 0; k < sizeof most / sizeof *most; k++)
            for (size_t p = 0; p < sizeof wanted / sizeof *wanted; p++)
                for (gpu.exec.sms = sms; gpu.exec.sms > 0; gpu.exec.sms -= sms - 1) {
                    check_workspace(&layer, wanted[p], most[k], layer.desc.top_k);
                    check_workspace(&layer, wanted[p], most[k] < 200 ? most[k] : 200, MOE_MAX_TOP_K);
                }
        gpu.exec.sms = sms;
    }
    /* This is why: what decode takes for few tokens is more than what prefill takes for some more. */
    const moe_layer layer = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_PACKED);
    moe_limits limits = moe_limits_init();
    size_t bytes, decode, prefill;
    limits.max_tokens = 128;
    assert_int_equal(moe_workspace_size(&layer, &limits, &decode), MOE_OK);
    limits.max_tokens = 132;
    assert_int_equal(moe_workspace_size(&layer, &limits, &bytes), MOE_OK);
    limits.path = MOE_PATH_PREFILL;
    assert_int_equal(moe_workspace_size(&layer, &limits, &prefill), MOE_OK);
    assert_true(prefill < decode);
    assert_int_equal(bytes, decode);
}

/* The same where a table says what auto takes. */
static void workspace_for_every_choice(void **state)
{
    (void)state;
    use_table(TABLE("{\"tokens\":1,\"path\":\"simple\"},{\"tokens\":300,\"path\":\"prefill\"}",
                    "{\"tokens\":20,\"path\":\"prefill\"},{\"tokens\":30,\"path\":\"decode\"},"
                    "{\"tokens\":150,\"path\":\"prefill\"}"));
    for (int layout = MOE_LAYOUT_ROW_MAJOR; layout <= MOE_LAYOUT_PACKED; layout++) {
        const moe_layer layer = make_layer(MOE_BF16, 40, 24, (moe_layout)layout);
        for (int64_t most = 0; most <= 330; most += most % 10 == 9 || most % 10 == 0 ? 1 : 8)
            check_workspace(&layer, MOE_PATH_AUTO, most, 2);
    }
    /* Of two paths the one that takes more, whichever comes first. */
    const moe_layer rows = make_layer(MOE_BF16, 40, 24, MOE_LAYOUT_ROW_MAJOR);
    moe_limits limits = moe_limits_init();
    size_t bytes, simple, prefill;
    limits.max_tokens = 299;
    limits.path = MOE_PATH_SIMPLE;
    assert_int_equal(moe_workspace_size(&rows, &limits, &simple), MOE_OK);
    limits.max_tokens = 310;
    limits.path = MOE_PATH_PREFILL;
    assert_int_equal(moe_workspace_size(&rows, &limits, &prefill), MOE_OK);
    limits.path = MOE_PATH_AUTO;
    assert_int_equal(moe_workspace_size(&rows, &limits, &bytes), MOE_OK);
    assert_true(prefill < simple);
    assert_true(bytes >= simple);
}

/* More rows than decode can count, which auto would never give it, end before anything is launched. */
static void refuses_too_many_rows(void **state)
{
    (void)state;
    moe_layer layer = make_layer(MOE_BF16, 4096, 14336, MOE_LAYOUT_PACKED);
    const struct moe_step *step = moe_path_info_get(MOE_PATH_DECODE)->steps;
    struct moe_call call;
    struct moe_error err = {{0}};
    while (strcmp(step->name, "ffn") != 0)
        step++;
    moe_call_shape(&call, &layer, 4000000, 2, MOE_BF16);
    call.error = &err;
    call.config = number_of(MOE_PATH_DECODE, "mma");
    assert_int_equal(step->run(&call), MOE_ERROR_UNSUPPORTED);
    assert_string_equal(err.text,
                        "path 'decode': 4000000 tokens in a layer of 4096 x 14336 are too many: split the batch");
}

static void refuses_tables(void **state)
{
    (void)state;
    static const struct {
        const char *points, *message; /* of the packed entry */
    } cases[] = {
        {"{\"tokens\":1,\"path\":\"simple\"}",
         "t.json: 'entries[1].points[0]': path 'simple' reads row-major weights; this layer's are packed"},
        {"{\"tokens\":1,\"path\":\"prefill\"},{\"tokens\":2,\"path\":\"cpu\"}",
         "t.json: 'entries[1].points[1]': path 'cpu' runs on the CPU"},
        {"{\"tokens\":1,\"path\":\"decode\",\"config\":\"wgmma-128\"}",
         "t.json: 'entries[1].points[0]': path 'decode' has no configuration 'wgmma-128'; 'moe tune' makes a new "
         "table"},
        {"{\"tokens\":1,\"path\":\"prefill\",\"config\":\"of old\"}",
         "t.json: 'entries[1].points[0]': path 'prefill' has no configuration 'of old'; 'moe tune' makes a new table"},
    };
    struct moe_tuned table;
    struct moe_error err;
    char text[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(text, sizeof text, TABLE("{\"tokens\":1,\"path\":\"simple\"}", "%s"), cases[i].points);
        assert_int_equal(moe_tuned_parse(text, strlen(text), "t.json", &table, &err), MOE_OK);
        assert_int_equal(moe_choose_from(&gpu, &table, &err), MOE_ERROR_FILE);
        if (!strstr(err.text, cases[i].message))
            fail_msg("'%s', expected '%s'", err.text, cases[i].message);
        assert_int_equal(gpu.tuned.count, 0);
        moe_tuned_free(&table);
    }
    gpu.exec.cublas = (struct moe_cublas *)&gpu; /* never called: so that the paths are available */
    snprintf(text, sizeof text, "%s",
             TABLE("{\"tokens\":1,\"path\":\"cublas-loop\"}", "{\"tokens\":1,\"path\":\"prefill\"}"));
    assert_int_equal(moe_tuned_parse(text, strlen(text), "t.json", &table, &err), MOE_OK);
    assert_int_equal(moe_choose_from(&gpu, &table, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "path 'cublas-loop' waits for the host"));
    moe_tuned_free(&table);
}

static void without_cuda(void **state)
{
    (void)state;
    const moe_layer layer = make_layer(MOE_BF16, 64, 64, MOE_LAYOUT_ROW_MAJOR);
    expect_refusal(&layer, MOE_PATH_PREFILL, "path 'prefill': this build has no CUDA");
    expect_refusal(&layer, MOE_PATH_DECODE, "path 'decode': this build has no CUDA");
    assert_null(moe_path_config_name(MOE_PATH_PREFILL, 1));
    assert_null(moe_path_config_name(MOE_PATH_DECODE, 1));
}

int main(void)
{
    const struct CMUnitTest with[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(layouts),
        cmocka_unit_test(configs),
        cmocka_unit_test(configs_of_other_devices),
        cmocka_unit_test(chooses_by_formula),
        cmocka_unit_test_teardown(chooses_by_table, drop_table),
        cmocka_unit_test_teardown(crosses_by_table, drop_table),
        cmocka_unit_test(workspace_for_every_count),
        cmocka_unit_test_teardown(workspace_for_every_choice, drop_table),
        cmocka_unit_test(refuses_too_many_rows),
        cmocka_unit_test_teardown(refuses_tables, drop_table),
    };
    const struct CMUnitTest without[] = {cmocka_unit_test(without_cuda)};
    return moe_cuda_built() ? cmocka_run_group_tests(with, NULL, NULL) : cmocka_run_group_tests(without, NULL, NULL);
}
