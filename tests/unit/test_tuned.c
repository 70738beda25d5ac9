/* SPDX-License-Identifier: Apache-2.0 */
/* Tuned tables: what is read and refused, which point holds, how tables are changed and written, and that a context
 * chooses by one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "config/tuned.h"
#include "tests/unit/files.h"

#define DEVICE "\"device\":{\"name\":\"NVIDIA H200\",\"compute_capability\":90,\"cores\":132}"
#define SHAPE                                                                                                          \
    "\"hidden_size\":4096,\"intermediate_size\":14336,\"num_experts\":8,\"top_k\":2,\"dtype\":\"bf16\","               \
    "\"layout\":\"packed\""
#define POINT         "{\"tokens\":256,\"path\":\"prefill\"}"
#define TABLE(points) "{" DEVICE ",\"entries\":[{" SHAPE ",\"points\":[" points "]}]}"

static void parse(const char *text, struct moe_tuned *table)
{
    struct moe_error err = {""};
    if (moe_tuned_parse(text, strlen(text), "t.json", table, &err) != MOE_OK)
        fail_msg("%s: %s", text, err.text);
}

static moe_layer_desc mixtral(void)
{
    moe_layer_desc desc = moe_layer_desc_init(MOE_BF16);
    desc.hidden_size = 4096;
    desc.intermediate_size = 14336;
    desc.num_experts = 8;
    desc.top_k = 2;
    return desc;
}

/* ---- The file ---- */

static void reads(void **state)
{
    (void)state;
    struct moe_tuned t;
    parse(
        TABLE("{\"tokens\":256,\"path\":\"prefill\"},{\"config\":\"wgmma-192\",\"tokens\":1024,\"path\":\"prefill\"}"),
        &t);
    assert_string_equal(t.file, "t.json");
    assert_string_equal(t.device, "NVIDIA H200");
    assert_int_equal(t.compute_capability, 90);
    assert_int_equal(t.cores, 132);
    assert_int_equal(t.count, 1);
    const struct moe_tuned_entry *e = t.entries;
    assert_int_equal(e->hidden_size, 4096);
    assert_int_equal(e->intermediate_size, 14336);
    assert_int_equal(e->num_experts, 8);
    assert_int_equal(e->top_k, 2);
    assert_int_equal(e->dtype, MOE_BF16);
    assert_int_equal(e->layout, MOE_LAYOUT_PACKED);
    assert_int_equal(e->count, 2);
    assert_int_equal(e->points[0].tokens, 256);
    assert_int_equal(e->points[0].path, MOE_PATH_PREFILL);
    assert_string_equal(e->points[0].name, "");
    assert_int_equal(e->points[1].tokens, 1024);
    assert_string_equal(e->points[1].name, "wgmma-192");
    moe_tuned_free(&t);
    assert_null(t.entries);

    parse("{\"entries\":[]," DEVICE "}", &t);
    assert_int_equal(t.count, 0);
    moe_tuned_free(&t);
}

static void refuses(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "not valid JSON"},
        {"[]", "not valid JSON"},
        {"{\"entries\":[]}", "'device' is missing, expected an object"},
        {"{" DEVICE "}", "'entries' is missing, expected an array"},
        {"{" DEVICE ",\"entries\":{}}", "'entries' is an object, expected an array"},
        {"{" DEVICE ",\"entries\":[],\"sms\":1}", "'sms' is no field of a tuned table"},
        {"{\"device\":{},\"entries\":[]}", "'device.name' is missing, expected a string of 1 to 255 bytes"},
        {"{\"device\":{\"name\":\"\"},\"entries\":[]}", "'device.name' is \"\", expected a string"},
        {"{\"device\":{\"name\":\"x\",\"sms\":132},\"entries\":[]}", "'device.sms' is no field of a tuned table"},
        {"{\"device\":{\"name\":\"x\",\"compute_capability\":9.5},\"entries\":[]}",
         "'device.compute_capability' is 9.5, expected an integer from 0 to 1000"},
        {"{\"device\":{\"name\":\"x\",\"compute_capability\":90,\"cores\":0},\"entries\":[]}",
         "'device.cores' is 0, expected an integer from 1 to 65536"},
        {"{" DEVICE ",\"entries\":[1]}", "'entries[0]' is 1, expected an object"},
        {"{" DEVICE ",\"entries\":[{}]}", "'entries[0].hidden_size' is missing, expected an integer from 1 to 1048576"},
        {"{" DEVICE ",\"entries\":[{" SHAPE "}]}", "'entries[0].points' is missing, expected an array of one point"},
        {TABLE(""), "'entries[0].points' is an array, expected an array of one point or more"},
        {TABLE("7"), "'entries[0].points[0]' is 7, expected an object"},
        {TABLE(POINT ",{}"), "'entries[0].points[1].tokens' is missing, expected an integer from 1 to 2147483647"},
        {TABLE(POINT "," POINT), "'entries[0].points[1].tokens' is 256, expected more than the 256 before it"},
        {TABLE("{\"tokens\":1}"), "'entries[0].points[0].path' is missing, expected one of \"reference\", \"cpu\","},
        {TABLE("{\"tokens\":1,\"path\":\"auto\"}"), "'entries[0].points[0].path' is \"auto\", expected one of"},
        {TABLE("{\"tokens\":1,\"path\":\"cpu\",\"config\":3}"),
         "'entries[0].points[0].config' is 3, expected a string"},
        {TABLE("{\"tokens\":1,\"path\":\"cpu\",\"config\":\"12345678901234567890123456789012\"}"),
         "'entries[0].points[0].config' is \"12345678901234567890123456789012\", expected a string of 1 to 31 bytes"},
        {TABLE("{\"tokens\":1,\"path\":\"cpu\",\"time\":3}"), "'entries[0].points[0].time' is no field"},
        {"{" DEVICE ",\"entries\":[{" SHAPE ",\"points\":[" POINT "]},{" SHAPE ",\"points\":[" POINT "]}]}",
         "'entries[1]' has the shape of 'entries[0]', expected another"},
        {"{" DEVICE ",\"entries\":[{\"hidden_size\":8,\"intermediate_size\":8,\"num_experts\":4,\"top_k\":5}]}",
         "'entries[0].top_k' is 5, expected an integer from 1 to 4"},
        {"{" DEVICE ",\"entries\":[{\"hidden_size\":8,\"intermediate_size\":8,\"num_experts\":4,\"top_k\":1,"
         "\"dtype\":\"i32\"}]}",
         "'entries[0].dtype' is \"i32\", expected one of \"bf16\", \"f16\", \"f32\""},
        {"{" DEVICE ",\"entries\":[{\"hidden_size\":8,\"intermediate_size\":8,\"num_experts\":4,\"top_k\":1,"
         "\"dtype\":\"f16\",\"layout\":\"auto\"}]}",
         "'entries[0].layout' is \"auto\", expected one of \"row-major\", \"packed\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_tuned t;
        struct moe_error err = {""};
        moe_status status = moe_tuned_parse(cases[i].text, strlen(cases[i].text), "t.json", &t, &err);
        if (status != MOE_ERROR_FILE || strncmp(err.text, "t.json: ", 8) != 0 || !strstr(err.text, cases[i].message))
            fail_msg("%s: status %d, '%s', expected '%s'", cases[i].text, status, err.text, cases[i].message);
        assert_null(t.entries);
        assert_null(t.file);
    }
}

/* ---- Looking up ---- */

static void point_holds_up_to_the_next(void **state)
{
    (void)state;
    struct moe_tuned t;
    parse(TABLE("{\"tokens\":16,\"path\":\"simple\"},{\"tokens\":17,\"path\":\"padded\"},"
                "{\"tokens\":1024,\"path\":\"prefill\"}"),
          &t);
    const moe_layer_desc desc = mixtral();
    const struct moe_tuned_entry *e = moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED);
    assert_ptr_equal(e, t.entries);
    static const struct {
        int64_t tokens;
        int point;
    } cases[] = {{0, -1}, {1, -1}, {15, -1}, {16, 0}, {17, 1}, {18, 1}, {1023, 1}, {1024, 2}, {INT32_MAX, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_ptr_equal(moe_tuned_at(e, cases[i].tokens), cases[i].point < 0 ? NULL : &e->points[cases[i].point]);
    moe_tuned_free(&t);
}

static void finds_exact_shapes(void **state)
{
    (void)state;
    struct moe_tuned t;
    parse(TABLE(POINT), &t);
    moe_layer_desc desc = mixtral();
    assert_non_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_ROW_MAJOR));
    desc.hidden_size++;
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    desc = mixtral();
    desc.intermediate_size--;
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    desc = mixtral();
    desc.num_experts = 16;
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    desc = mixtral();
    desc.top_k = 1;
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    desc = mixtral();
    desc.dtype = MOE_F16;
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
    moe_tuned_free(&t);
    desc = mixtral();
    assert_null(moe_tuned_find(&t, &desc, MOE_LAYOUT_PACKED));
}

static void fits_one_device(void **state)
{
    (void)state;
    struct moe_tuned t;
    struct moe_error err;
    parse(TABLE(POINT), &t);
    moe_device_info device = moe_device_info_init();
    strcpy(device.name, "NVIDIA H200");
    device.compute_capability = 90;
    device.cores = 132;
    assert_true(moe_tuned_fits(&t, &device, &err));
    device.cores = 66;
    assert_false(moe_tuned_fits(&t, &device, &err));
    assert_string_equal(err.text, "t.json: was measured on 'NVIDIA H200', compute capability 90, 132 cores; this is "
                                  "'NVIDIA H200', compute capability 90, 66 cores");
    device.cores = 132;
    device.compute_capability = 100;
    assert_false(moe_tuned_fits(&t, &device, NULL));
    device.compute_capability = 90;
    strcpy(device.name, "NVIDIA H100");
    assert_false(moe_tuned_fits(&t, &device, NULL));
    moe_tuned_free(&t);
}

/* ---- Where the path changes ---- */

static void expect_between(int32_t count, const struct moe_tuned_point *points, int64_t expected)
{
    const struct moe_tuned_entry entry = {.points = (struct moe_tuned_point *)points, .count = count};
    assert_int_equal(moe_tuned_between(&entry), expected);
}

static void looks_between_paths_only(void **state)
{
    (void)state;
    const struct moe_tuned_point points[] = {
        {.tokens = 1, .path = MOE_PATH_DECODE},    {.tokens = 100, .path = MOE_PATH_DECODE, .name = "mma"},
        {.tokens = 110, .path = MOE_PATH_PREFILL}, {.tokens = 400, .path = MOE_PATH_PREFILL, .name = "mma"},
        {.tokens = 484, .path = MOE_PATH_DECODE},  {.tokens = 500, .path = MOE_PATH_PREFILL},
    };
    expect_between(0, points, 0);
    expect_between(1, points, 0);
    expect_between(2, points, 0); /* another configuration of the same path */
    expect_between(3, points, 0); /* close enough */
    expect_between(4, points, 0);
    expect_between(5, points, 440); /* sqrt(400 * 484) */
    expect_between(2, points + 4, 0);
    const struct moe_tuned_point next[] = {{.tokens = 2, .path = MOE_PATH_DECODE},
                                           {.tokens = 3, .path = MOE_PATH_PREFILL},
                                           {.tokens = 5, .path = MOE_PATH_DECODE}};
    expect_between(2, next, 0); /* nothing lies between neighbouring counts */
    expect_between(3, next, 4);
}

/* As `moe tune` goes about it, on a device whose decode wins up to `last` tokens: how many counts that takes. */
static int find_change(int64_t last, int64_t *low, int64_t *high)
{
    struct moe_tuned_point points[64];
    struct moe_tuned_entry entry = {.points = points};
    for (int64_t tokens = 1; tokens <= 16384; tokens *= 2)
        points[entry.count++] =
            (struct moe_tuned_point){.tokens = tokens, .path = tokens <= last ? MOE_PATH_DECODE : MOE_PATH_PREFILL};
    const int32_t first = entry.count;
    int32_t change = 0;
    for (int64_t tokens; (tokens = moe_tuned_between(&entry)) != 0 && entry.count < 64; entry.count++) {
        for (change = entry.count; points[change - 1].tokens > tokens; change--)
            points[change] = points[change - 1];
        assert_true(points[change - 1].tokens < tokens && tokens < points[change + 1].tokens);
        points[change] =
            (struct moe_tuned_point){.tokens = tokens, .path = tokens <= last ? MOE_PATH_DECODE : MOE_PATH_PREFILL};
    }
    for (change = 1; points[change].path == MOE_PATH_DECODE; change++)
        ;
    *low = points[change - 1].tokens;
    *high = points[change].tokens;
    return entry.count - first;
}

static void finds_the_change(void **state)
{
    (void)state;
    for (int64_t last = 1; last < 16384; last++) {
        int64_t low, high;
        int counts = find_change(last, &low, &high);
        if (low > last || high <= last || (high - low > 1 && 10 * (high - low) > low) || counts > 4)
            fail_msg("decode up to %lld: found %lld to %lld with %d counts", (long long)last, (long long)low,
                     (long long)high, counts);
    }
}

/* ---- Changing and writing ---- */

static void expect_points(const struct moe_tuned_entry *e, int32_t count, const struct moe_tuned_point *points)
{
    assert_int_equal(e->count, count);
    for (int32_t i = 0; i < count; i++) {
        assert_int_equal(e->points[i].tokens, points[i].tokens);
        assert_int_equal(e->points[i].path, points[i].path);
        assert_string_equal(e->points[i].name, points[i].name);
    }
}

static void sets_and_merges(void **state)
{
    (void)state;
    struct moe_tuned_point points[] = {
        {.tokens = 1, .path = MOE_PATH_SIMPLE},
        {.tokens = 2, .path = MOE_PATH_SIMPLE},
        {.tokens = 4, .path = MOE_PATH_PREFILL},
        {.tokens = 8, .path = MOE_PATH_PREFILL, .name = "64"},
        {.tokens = 16, .path = MOE_PATH_PREFILL, .name = "64"},
        {.tokens = 32, .path = MOE_PATH_PREFILL, .name = "64"},
        {.tokens = 64, .path = MOE_PATH_PREFILL},
        {.tokens = 128, .path = MOE_PATH_SIMPLE},
    };
    const struct moe_tuned_point merged[] = {points[0], points[2], points[3], points[6], points[7]};
    struct moe_tuned_entry entry = {.hidden_size = 4096,
                                    .intermediate_size = 14336,
                                    .num_experts = 8,
                                    .top_k = 2,
                                    .dtype = MOE_BF16,
                                    .layout = MOE_LAYOUT_ROW_MAJOR,
                                    .points = points,
                                    .count = 8};
    struct moe_tuned t, again;
    struct moe_error err = {""};
    parse(TABLE(POINT), &t);
    assert_int_equal(moe_tuned_set(&t, &entry), MOE_OK); /* another layout: a second entry */
    assert_int_equal(t.count, 2);
    expect_points(&t.entries[0], 1, &(struct moe_tuned_point){.tokens = 256, .path = MOE_PATH_PREFILL});
    expect_points(&t.entries[1], 5, merged);

    entry.layout = MOE_LAYOUT_PACKED; /* in the first one's place */
    entry.points = points + 5;
    entry.count = 3;
    assert_int_equal(moe_tuned_set(&t, &entry), MOE_OK);
    assert_int_equal(t.count, 2);
    expect_points(&t.entries[0], 3, points + 5);
    expect_points(&t.entries[1], 5, merged);

    strcpy(t.device, "a \"quoted\" name \\ with \xc3\xa9");
    struct moe_output *output;
    const char *path = files_path("written.json");
    assert_int_equal(moe_output_open(path, &output, &err), MOE_OK);
    assert_int_equal(moe_tuned_write(&t, output, &err), MOE_OK);
    assert_int_equal(moe_output_commit(output, &err), MOE_OK);
    if (moe_tuned_load(path, &again, &err) != MOE_OK)
        fail_msg("%s", err.text);
    assert_string_equal(again.file, path);
    assert_string_equal(again.device, t.device);
    assert_int_equal(again.compute_capability, 90);
    assert_int_equal(again.cores, 132);
    assert_int_equal(again.count, 2);
    assert_int_equal(again.entries[1].layout, MOE_LAYOUT_ROW_MAJOR);
    expect_points(&again.entries[0], 3, points + 5);
    expect_points(&again.entries[1], 5, merged);
    moe_tuned_free(&again);
    moe_tuned_free(&t);
}

static void loads_from_a_file(void **state)
{
    (void)state;
    struct moe_tuned t;
    struct moe_error err = {""};
    assert_int_equal(moe_tuned_load(files_path("none.json"), &t, &err), MOE_ERROR_FILE);
    assert_non_null(strstr(err.text, "none.json: cannot open"));
    assert_null(t.entries);
}

/* ---- A context that chooses by a table, on the CPU of this machine ---- */

static char warning[1024];

static void keep_warning(void *user, moe_log_level level, const char *text)
{
    (void)user;
    if (level == MOE_LOG_WARNING)
        snprintf(warning, sizeof warning, "%s", text);
}

static moe_context_options cpu(const char *tuned)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = 1;
    options.log = keep_warning;
    options.tuned = tuned;
    warning[0] = 0;
    return options;
}

/* For a layer of 8 x 4, 4 experts, top 2, f32; of this CPU with so many cores. */
static const char *write_table(const char *name, int cores, const char *points)
{
    char text[2048];
    moe_device_info device = moe_device_info_init();
    moe_context_options options = cpu("");
    moe_context *ctx;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_OK);
    assert_int_equal(moe_context_device(ctx, &device), MOE_OK);
    moe_context_destroy(ctx);
    int length = snprintf(text, sizeof text,
                          "{\"device\":{\"name\":\"%s\",\"compute_capability\":0,\"cores\":%d},\"entries\":[{"
                          "\"hidden_size\":8,\"intermediate_size\":4,\"num_experts\":4,\"top_k\":2,\"dtype\":\"f32\","
                          "\"layout\":\"row-major\",\"points\":[%s]}]}",
                          device.name, cores, points);
    return files_write(name, text, (size_t)length);
}

/* What `auto` says of 2 and of 3 tokens. */
static void expect_choice(const moe_context_options *options, const char *two, const char *three)
{
    static _Alignas(16) const float weights[4 * 8 * 8];
    moe_context *ctx;
    moe_layer *layer;
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    desc.hidden_size = 8;
    desc.intermediate_size = 4;
    desc.num_experts = 4;
    desc.top_k = 2;
    moe_layer_weights w = moe_layer_weights_init();
    w.gate = w.w13 = w.w2 = weights;
    if (moe_context_create(options, &ctx) != MOE_OK) {
        char text[1024];
        moe_last_error(NULL, text, sizeof text);
        fail_msg("%s", text);
    }
    assert_int_equal(moe_layer_create(ctx, &desc, &w, &layer), MOE_OK);
    const char *const expected[] = {two, three};
    for (int i = 0; i < 2; i++) {
        char reason[512], name[64];
        moe_path path;
        assert_int_equal(moe_path_choose(layer, MOE_PATH_AUTO, 2 + i, &path, reason, sizeof reason), MOE_OK);
        assert_string_equal(reason, expected[i]);
        snprintf(name, sizeof name, "%s: ", moe_path_name(path));
        assert_int_equal(strncmp(reason, name, strlen(name)), 0);
    }
    moe_layer_destroy(layer);
    moe_context_destroy(ctx);
}

static const char formula[] = "cpu: the fastest path on the CPU";

static void context_chooses_by_table(void **state)
{
    (void)state;
    const char *file = write_table("cpu.json", 1, "{\"tokens\":3,\"path\":\"reference\"}");
    char tuned[600];
    snprintf(tuned, sizeof tuned, "reference: tuned for 3 tokens and more in %s", file);
    moe_context_options options = cpu(file);
    expect_choice(&options, formula, tuned);

    /* By the environment, unless the caller says otherwise. */
    assert_int_equal(setenv("MOE_TUNED", file, 1), 0);
    options = cpu(NULL);
    expect_choice(&options, formula, tuned);
    options = cpu("");
    expect_choice(&options, formula, formula);
    options = cpu(write_table("other.json", 1, "{\"tokens\":1,\"path\":\"cpu\"}"));
    snprintf(tuned, sizeof tuned, "cpu: tuned for 1 token and more in %s", options.tuned);
    expect_choice(&options, tuned, tuned);
    assert_int_equal(unsetenv("MOE_TUNED"), 0);
    assert_string_equal(warning, "");
}

static void context_of_another_device(void **state)
{
    (void)state;
    moe_context_options options = cpu(write_table("wide.json", 77, "{\"tokens\":1,\"path\":\"reference\"}"));
    expect_choice(&options, formula, formula);
    assert_non_null(strstr(warning, "wide.json: was measured on '"));
    assert_non_null(strstr(warning, "77 cores; this is '"));
    assert_non_null(strstr(warning, ": the table is not used"));
}

static void context_refuses(void **state)
{
    (void)state;
    static const struct {
        const char *points, *message;
    } cases[] = {
        {"{\"tokens\":0,\"path\":\"cpu\"}", "bad.json: 'entries[0].points[0].tokens' is 0, expected an integer"},
        {"{\"tokens\":1,\"path\":\"cpu\"},{\"tokens\":2,\"path\":\"simple\"}",
         "bad.json: 'entries[0].points[1]': path 'simple'"},
        {"{\"tokens\":1,\"path\":\"cpu\",\"config\":\"fast\"}",
         "bad.json: 'entries[0].points[0]': path 'cpu' has no configuration 'fast'; 'moe tune' makes a new table"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024];
        moe_context *ctx;
        moe_context_options options = cpu(write_table("bad.json", 1, cases[i].points));
        assert_int_equal(moe_context_create(&options, &ctx), MOE_ERROR_FILE);
        assert_null(ctx);
        moe_last_error(NULL, text, sizeof text);
        if (!strstr(text, cases[i].message))
            fail_msg("'%s', expected '%s'", text, cases[i].message);
    }
}

/* A caller that was compiled before there were tables. */
static void older_options(void **state)
{
    (void)state;
    moe_context_options options = cpu("no such file");
    options.size = offsetof(moe_context_options, tuned);
    expect_choice(&options, formula, formula);
    options.size--;
    moe_context *ctx;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_ERROR_INVALID_ARGUMENT);
}

int main(void)
{
    unsetenv("MOE_TUNED");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads),
        cmocka_unit_test(refuses),
        cmocka_unit_test(point_holds_up_to_the_next),
        cmocka_unit_test(finds_exact_shapes),
        cmocka_unit_test(fits_one_device),
        cmocka_unit_test(looks_between_paths_only),
        cmocka_unit_test(finds_the_change),
        cmocka_unit_test(sets_and_merges),
        cmocka_unit_test(loads_from_a_file),
        cmocka_unit_test(context_chooses_by_table),
        cmocka_unit_test(context_of_another_device),
        cmocka_unit_test(context_refuses),
        cmocka_unit_test(older_options),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
