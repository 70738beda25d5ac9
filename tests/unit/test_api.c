/* SPDX-License-Identifier: Apache-2.0 */
/* The public calls on the CPU: what they refuse, what they say, and that they leave the output alone when they do. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "moe.h"

enum { TOKENS = 5, HIDDEN = 24, INTERMEDIATE = 40, EXPERTS = 6, TOP_K = 2 };

struct fixture {
    moe_context *ctx;
    moe_layer *layer;
    _Alignas(64) float gate[EXPERTS * HIDDEN];
    _Alignas(64) float w13[EXPERTS * 2 * INTERMEDIATE * HIDDEN];
    _Alignas(64) float w2[EXPERTS * HIDDEN * INTERMEDIATE];
    _Alignas(64) float x[TOKENS * HIDDEN];
    _Alignas(64) float y[TOKENS * HIDDEN];
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
    void *workspace;
    size_t bytes;
    moe_batch batch;
};

static float noise(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(int32_t)*state * 0x1p-31f;
}

static void fill(float *values, size_t count, uint32_t seed)
{
    for (size_t i = 0; i < count; i++)
        values[i] = noise(&seed);
}

static int setup(void **state)
{
    struct fixture *f = NULL;
    if (posix_memalign((void **)&f, 64, sizeof *f) != 0)
        return -1;
    memset(f, 0, sizeof *f);
    fill(f->gate, sizeof f->gate / 4, 1);
    fill(f->w13, sizeof f->w13 / 4, 2);
    fill(f->w2, sizeof f->w2 / 4, 3);
    fill(f->x, sizeof f->x / 4, 4);
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    desc.hidden_size = HIDDEN;
    desc.intermediate_size = INTERMEDIATE;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = f->gate;
    weights.w13 = f->w13;
    weights.w2 = f->w2;
    if (moe_context_create(&options, &f->ctx) != MOE_OK ||
        moe_layer_create(f->ctx, &desc, &weights, &f->layer) != MOE_OK)
        return -1;
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS;
    limits.path = MOE_PATH_REFERENCE;
    if (moe_workspace_size(f->layer, &limits, &f->bytes) != MOE_OK ||
        moe_buffer_alloc(f->ctx, f->bytes, &f->workspace) != MOE_OK)
        return -1;
    f->batch = moe_batch_init();
    f->batch.tokens = TOKENS;
    f->batch.dtype = MOE_F32;
    f->batch.hidden_states = f->x;
    f->batch.output = f->y;
    f->batch.path = MOE_PATH_REFERENCE;
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    moe_buffer_free(f->ctx, f->workspace);
    moe_layer_destroy(f->layer);
    moe_context_destroy(f->ctx);
    free(f);
    return 0;
}

/* The call fails with `status`, its text mentions `word`, and nothing was written. */
static void refused(struct fixture *f, moe_status got, moe_status status, const char *word)
{
    char text[512];
    moe_last_error(f->ctx, text, sizeof text);
    if (got != status || strstr(text, word) == NULL)
        fail_msg("got '%s' with text '%s', expected '%s' and a text with '%s'", moe_status_string(got), text,
                 moe_status_string(status), word);
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        assert_true(f->y[i] == 0.0f);
}

#define FORWARD_REFUSES(field, value, status, word)                                                                    \
    do {                                                                                                               \
        moe_batch batch_ = f->batch;                                                                                   \
        batch_.field = value;                                                                                          \
        refused(f, moe_forward(f->layer, &batch_, f->workspace, f->bytes, NULL), status, word);                        \
    } while (0)

static void bad_batches(void **state)
{
    struct fixture *f = *state;
    FORWARD_REFUSES(size, 8, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.size is 8");
    FORWARD_REFUSES(tokens, -1, MOE_ERROR_INVALID_ARGUMENT, "tokens is -1");
    FORWARD_REFUSES(tokens, INT64_MAX, MOE_ERROR_INVALID_ARGUMENT, "tokens is");
    FORWARD_REFUSES(tokens, INT32_MAX, MOE_ERROR_INVALID_ARGUMENT, "tokens * top_k");
    FORWARD_REFUSES(dtype, MOE_I32, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.dtype is 4");
    FORWARD_REFUSES(dtype, MOE_DTYPE_NONE, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.dtype");
    FORWARD_REFUSES(hidden_states, NULL, MOE_ERROR_INVALID_ARGUMENT, "hidden_states is NULL");
    FORWARD_REFUSES(output, NULL, MOE_ERROR_INVALID_ARGUMENT, "output is NULL");
    FORWARD_REFUSES(output, f->x, MOE_ERROR_INVALID_ARGUMENT, "overlaps");
    FORWARD_REFUSES(hidden_states, (char *)f->x + 4, MOE_ERROR_INVALID_ARGUMENT, "hidden_states is not aligned");
    FORWARD_REFUSES(max_sms, -1, MOE_ERROR_INVALID_ARGUMENT, "max_sms is -1");
    FORWARD_REFUSES(path, (moe_path)99, MOE_ERROR_INVALID_ARGUMENT, "path 99");
    FORWARD_REFUSES(path, MOE_PATH_DECODE, MOE_ERROR_UNSUPPORTED, "decode");
    FORWARD_REFUSES(path, MOE_PATH_PREFILL, MOE_ERROR_UNSUPPORTED, "prefill");
    FORWARD_REFUSES(path, MOE_PATH_CUBLAS_LOOP, MOE_ERROR_UNSUPPORTED, "cublas-loop");
    FORWARD_REFUSES(path, MOE_PATH_SIMPLE, MOE_ERROR_UNSUPPORTED, "simple");
    assert_int_equal(moe_forward(NULL, &f->batch, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT);
    refused(f, moe_forward(f->layer, NULL, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "moe_batch is NULL");

    moe_batch experts = f->batch;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "topk_ids is NULL");
    experts.topk_ids = f->ids;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "topk_weights is NULL");
    experts.topk_weights = f->weights;
    experts.topk_ids = f->y + TOKENS * HIDDEN - 1;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "output overlaps topk_ids");
    experts.topk_ids = f->ids;
    experts.topk_weights = f->y;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "output overlaps topk_weights");
    experts.topk_weights = f->weights;
    experts.ids_dtype = MOE_BF16;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "ids_dtype");
    experts.ids_dtype = MOE_I32;
    experts.top_k = MOE_MAX_TOP_K + 1;
    refused(f, moe_experts_forward(f->layer, &experts, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "top_k is 65");
}

static void bad_workspaces(void **state)
{
    struct fixture *f = *state;
    refused(f, moe_forward(f->layer, &f->batch, NULL, f->bytes, NULL), MOE_ERROR_WORKSPACE, "workspace is NULL");
    refused(f, moe_forward(f->layer, &f->batch, (char *)f->workspace + 16, f->bytes, NULL), MOE_ERROR_WORKSPACE,
            "not aligned");
    /* The size asked for holds room for a conversion that this f32 batch does not need; one token's rows less is too
     * little for certain. */
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS - 1;
    limits.path = MOE_PATH_REFERENCE;
    size_t small;
    assert_int_equal(moe_workspace_size(f->layer, &limits, &small), MOE_OK);
    assert_true(small < f->bytes);
    refused(f, moe_forward(f->layer, &f->batch, f->workspace, 256, NULL), MOE_ERROR_WORKSPACE, "256 bytes");
    limits.max_tokens = -1;
    refused(f, moe_workspace_size(f->layer, &limits, &small), MOE_ERROR_INVALID_ARGUMENT, "tokens is -1");
    limits.max_tokens = 1;
    limits.path = MOE_PATH_PADDED;
    refused(f, moe_workspace_size(f->layer, &limits, &small), MOE_ERROR_UNSUPPORTED, "padded");
}

/* A struct from a newer header is taken if what this library does not know is not set, and refused if it is. */
static void newer_struct(void **state)
{
    struct fixture *f = *state;
    struct {
        moe_batch batch;
        uint64_t later;
    } newer = {f->batch, 0};
    newer.batch.size = sizeof newer;
    newer.later = 1;
    refused(f, moe_forward(f->layer, &newer.batch, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT, "byte");
    newer.later = 0;
    assert_int_equal(moe_forward(f->layer, &newer.batch, f->workspace, f->bytes, NULL), MOE_OK);
}

/* A struct from an older header is taken too: what it lacks counts as zero, and is not looked at. */
static void older_struct(void **state)
{
    struct fixture *f = *state;
    moe_batch batch = f->batch;
    batch.config = -1;
    batch.size = offsetof(moe_batch, config);
    assert_int_equal(moe_forward(f->layer, &batch, f->workspace, f->bytes, NULL), MOE_OK);
    memset(f->y, 0, sizeof f->y);
    batch.size--;
    refused(f, moe_forward(f->layer, &batch, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT,
            "moe_batch.size is 95, expected at least 96");

    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    moe_layer_weights weights = moe_layer_weights_init();
    moe_layer *layer = NULL;
    assert_int_equal(moe_layer_describe(f->layer, &desc), MOE_OK);
    weights.layout = (moe_layout)77;
    weights.size = offsetof(moe_layer_weights, layout);
    assert_int_equal(moe_layer_weights_get(f->layer, &weights), MOE_OK);
    assert_ptr_equal(weights.w2, f->w2);
    assert_int_equal(weights.layout, 77);
    assert_int_equal(weights.size, offsetof(moe_layer_weights, layout));
    assert_int_equal(moe_layer_create(f->ctx, &desc, &weights, &layer), MOE_OK);
    weights.size = sizeof weights;
    assert_int_equal(moe_layer_weights_get(layer, &weights), MOE_OK);
    assert_int_equal(weights.layout, MOE_LAYOUT_ROW_MAJOR);
    assert_int_equal(weights.size, sizeof weights);
    moe_layer_destroy(layer);
    weights.size = 16;
    refused(f, moe_layer_create(f->ctx, &desc, &weights, &layer), MOE_ERROR_INVALID_ARGUMENT, "expected at least 32");
    refused(f, moe_layer_weights_get(f->layer, &weights), MOE_ERROR_INVALID_ARGUMENT, "expected at least 32");
}

static void configs(void **state)
{
    struct fixture *f = *state;
    assert_null(moe_path_config_name(MOE_PATH_REFERENCE, 1));
    assert_null(moe_path_config_name(MOE_PATH_AUTO, 1));
    assert_null(moe_path_config_name((moe_path)-1, 1));
    assert_null(moe_path_config_name(MOE_PATH_COUNT, 1));
    for (int p = MOE_PATH_DECODE; p <= MOE_PATH_PREFILL; p++) {
        assert_null(moe_path_config_name((moe_path)p, 0));
        assert_null(moe_path_config_name((moe_path)p, -1));
        assert_null(moe_path_config_name((moe_path)p, INT32_MAX));
    }
    FORWARD_REFUSES(config, 1, MOE_ERROR_INVALID_ARGUMENT,
                    "moe_batch.config is 1, expected 0 to 0 on path 'reference'");
    FORWARD_REFUSES(config, -1, MOE_ERROR_INVALID_ARGUMENT, "moe_batch.config is -1");
    moe_batch batch = f->batch;
    batch.path = MOE_PATH_AUTO;
    batch.config = 1;
    refused(f, moe_route(f->layer, &batch, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT, "path 'cpu'");
}

static void layouts(void **state)
{
    struct fixture *f = *state;
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    moe_layer_weights weights = moe_layer_weights_init();
    assert_int_equal(moe_layer_describe(f->layer, &desc), MOE_OK);
    assert_int_equal(moe_layer_weights_get(f->layer, &weights), MOE_OK);
    assert_int_equal(weights.layout, MOE_LAYOUT_ROW_MAJOR);
    moe_layer *layer = (moe_layer *)f;
    weights.layout = MOE_LAYOUT_PACKED;
    refused(f, moe_layer_create(f->ctx, &desc, &weights, &layer), MOE_ERROR_UNSUPPORTED, "packed weights: path");
    assert_null(layer);
    weights.layout = (moe_layout)3;
    refused(f, moe_layer_create(f->ctx, &desc, &weights, &layer), MOE_ERROR_INVALID_ARGUMENT, "layout 3");
    layer = (moe_layer *)f;
    refused(f, moe_layer_pack(f->layer, &layer), MOE_ERROR_UNSUPPORTED, "packed weights: path");
    assert_null(layer);
    assert_int_equal(moe_layer_pack(NULL, &layer), MOE_ERROR_INVALID_ARGUMENT);
    assert_int_equal(moe_layer_pack(f->layer, NULL), MOE_ERROR_INVALID_ARGUMENT);
}

static void bad_layers(void **state)
{
    struct fixture *f = *state;
    moe_layer_desc good;
    good = moe_layer_desc_init(MOE_F32);
    assert_int_equal(moe_layer_describe(f->layer, &good), MOE_OK);
    moe_layer_weights weights = moe_layer_weights_init();
    assert_int_equal(moe_layer_weights_get(f->layer, &weights), MOE_OK);
    assert_ptr_equal(weights.w13, f->w13);
    moe_layer *layer = (moe_layer *)f;
    moe_layer_desc bad = good;
    bad.top_k = EXPERTS + 1;
    refused(f, moe_layer_create(f->ctx, &bad, &weights, &layer), MOE_ERROR_INVALID_ARGUMENT, "top_k");
    assert_null(layer);
    bad = good;
    bad.hidden_size = 0;
    refused(f, moe_layer_create(f->ctx, &bad, &weights, &layer), MOE_ERROR_INVALID_ARGUMENT, "hidden_size");
    bad = good;
    bad.dtype = MOE_I64;
    refused(f, moe_layer_create(f->ctx, &bad, &weights, &layer), MOE_ERROR_INVALID_ARGUMENT, "dtype");
    moe_layer_weights none = weights;
    none.w2 = NULL;
    refused(f, moe_layer_create(f->ctx, &good, &none, &layer), MOE_ERROR_INVALID_ARGUMENT, "w2 is NULL");
    none = weights;
    none.w13 = (const char *)weights.w13 + 8;
    refused(f, moe_layer_create(f->ctx, &good, &none, &layer), MOE_ERROR_INVALID_ARGUMENT, "w13 is not aligned");

    none = weights;
    none.gate = NULL;
    assert_int_equal(moe_layer_create(f->ctx, &good, &none, &layer), MOE_OK);
    refused(f, moe_forward(layer, &f->batch, f->workspace, f->bytes, NULL), MOE_ERROR_INVALID_ARGUMENT, "gate");
    moe_layer_destroy(layer);
}

static void bad_contexts(void **state)
{
    (void)state;
    char text[256];
    moe_context *ctx = (moe_context *)text;
    moe_context_options options = moe_context_options_init();
    options.threads = -1;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_ERROR_INVALID_ARGUMENT);
    assert_null(ctx);
    moe_last_error(NULL, text, sizeof text);
    assert_non_null(strstr(text, "threads -1"));
    options = moe_context_options_init();
    options.device = (moe_device)7;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_ERROR_INVALID_ARGUMENT);
    options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    options.device_index = 1000;
    assert_int_equal(moe_context_create(&options, &ctx), MOE_ERROR_NO_DEVICE);
    moe_last_error(NULL, text, sizeof text);
    assert_true(strlen(text) > 10);
    assert_int_equal(moe_context_create(NULL, NULL), MOE_ERROR_INVALID_ARGUMENT);
    moe_context_destroy(NULL);
    moe_layer_destroy(NULL);
    moe_checkpoint_close(NULL);
    moe_capture_close(NULL);
    moe_session_close(NULL);
    moe_buffer_free(NULL, NULL);
}

/* Route, then experts with what it returned, is the whole layer; and what forward returns beside the output is the
 * same routing. */
static void seams(void **state)
{
    struct fixture *f = *state;
    float whole[TOKENS * HIDDEN], logits[TOKENS * EXPERTS], weights[TOKENS * TOP_K];
    int32_t ids[TOKENS * TOP_K];
    int64_t wide[TOKENS * TOP_K];
    for (int p = MOE_PATH_REFERENCE; p <= MOE_PATH_CPU; p++) {
        moe_batch batch = f->batch;
        batch.path = (moe_path)p;
        batch.router_logits_out = logits;
        batch.topk_ids_out = ids;
        batch.topk_weights_out = weights;
        moe_limits limits = moe_limits_init();
        limits.max_tokens = TOKENS;
        limits.path = batch.path;
        size_t bytes;
        void *workspace;
        assert_int_equal(moe_workspace_size(f->layer, &limits, &bytes), MOE_OK);
        assert_int_equal(moe_buffer_alloc(f->ctx, bytes, &workspace), MOE_OK);
        assert_int_equal(moe_forward(f->layer, &batch, workspace, bytes, NULL), MOE_OK);
        memcpy(whole, f->y, sizeof whole);
        memset(f->y, 0, sizeof f->y);

        memset(ids, 0xff, sizeof ids);
        batch.output = NULL;
        assert_int_equal(moe_route(f->layer, &batch, workspace, bytes, NULL), MOE_OK);
        for (int i = 0; i < TOKENS * TOP_K; i++) {
            assert_in_range(ids[i], 0, EXPERTS - 1);
            wide[i] = ids[i];
        }
        for (int i = 0; i < 2; i++) {
            moe_batch experts = f->batch;
            experts.path = (moe_path)p;
            experts.topk_ids = i == 0 ? (void *)ids : (void *)wide;
            experts.ids_dtype = i == 0 ? MOE_I32 : MOE_I64;
            experts.topk_weights = weights;
            memset(f->y, 0xff, sizeof f->y);
            assert_int_equal(moe_experts_forward(f->layer, &experts, workspace, bytes, NULL), MOE_OK);
            assert_memory_equal(f->y, whole, sizeof whole);
        }
        moe_buffer_free(f->ctx, workspace);
    }
}

static void no_tokens(void **state)
{
    struct fixture *f = *state;
    moe_batch batch = moe_batch_init();
    batch.dtype = MOE_BF16;
    assert_int_equal(moe_forward(f->layer, &batch, NULL, 0, NULL), MOE_OK);
    assert_int_equal(moe_experts_forward(f->layer, &batch, NULL, 0, NULL), MOE_OK);
    assert_int_equal(moe_route(f->layer, &batch, NULL, 0, NULL), MOE_OK);
}

static void names(void **state)
{
    struct fixture *f = *state;
    moe_path path;
    for (int i = 0; i < MOE_PATH_COUNT; i++) {
        assert_int_equal(moe_path_from_name(moe_path_name((moe_path)i), &path), MOE_OK);
        assert_int_equal(path, i);
    }
    assert_null(moe_path_name((moe_path)MOE_PATH_COUNT));
    assert_null(moe_path_name((moe_path)-1));
    assert_int_equal(moe_path_from_name("fast", &path), MOE_ERROR_INVALID_ARGUMENT);
    assert_string_equal(moe_status_string(MOE_OK), "success");
    assert_string_equal(moe_status_string((moe_status)1234), "unknown status");
    assert_int_equal(moe_dtype_size(MOE_I64), 8);
    assert_int_equal(moe_dtype_size((moe_dtype)99), 0);
    assert_int_equal(moe_version(), MOE_VERSION);

    char reason[128];
    assert_int_equal(moe_path_choose(f->layer, MOE_PATH_AUTO, 1, &path, reason, sizeof reason), MOE_OK);
    assert_int_equal(path, MOE_PATH_CPU);
    assert_true(strlen(reason) > 0);
    assert_int_equal(moe_path_choose(f->layer, MOE_PATH_SIMPLE, 1, &path, reason, sizeof reason),
                     MOE_ERROR_UNSUPPORTED);
    assert_non_null(strstr(reason, "simple"));
    assert_int_equal(moe_path_available(f->ctx, MOE_PATH_CPU, NULL, reason, sizeof reason), MOE_OK);
    assert_int_equal(moe_path_available(f->ctx, MOE_PATH_AUTO, NULL, reason, sizeof reason), MOE_OK);
    assert_string_equal(reason, "");
    assert_int_equal(moe_path_available(f->ctx, MOE_PATH_COUNT, NULL, reason, sizeof reason),
                     MOE_ERROR_INVALID_ARGUMENT);
    assert_string_equal(reason, "path 9 does not exist");
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    assert_int_equal(moe_path_available(f->ctx, MOE_PATH_CPU, &desc, reason, sizeof reason), MOE_OK);
    desc.size = 8;
    assert_int_equal(moe_path_available(f->ctx, MOE_PATH_CPU, &desc, reason, sizeof reason),
                     MOE_ERROR_INVALID_ARGUMENT);
    assert_non_null(strstr(reason, "moe_layer_desc.size is 8"));

    moe_device_info info = moe_device_info_init();
    assert_int_equal(moe_context_device(f->ctx, &info), MOE_OK);
    assert_int_equal(info.device, MOE_DEVICE_CPU);
    assert_true(info.cores >= 1 && info.memory_bytes > 0 && info.name[0] != 0);
}

struct job {
    _Alignas(16) float y[TOKENS * HIDDEN];
    struct fixture *f;
    int failures;
};

static void *run_job(void *argument)
{
    struct job *job = argument;
    size_t bytes;
    void *workspace = NULL;
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS;
    moe_batch batch = job->f->batch;
    batch.path = MOE_PATH_CPU;
    batch.output = job->y;
    job->failures = moe_workspace_size(job->f->layer, &limits, &bytes) != MOE_OK ||
                    moe_buffer_alloc(job->f->ctx, bytes, &workspace) != MOE_OK;
    for (int i = 0; i < 200 && !job->failures; i++)
        job->failures += moe_forward(job->f->layer, &batch, workspace, bytes, NULL) != MOE_OK;
    moe_buffer_free(job->f->ctx, workspace);
    return NULL;
}

/* One context and one layer, used by several threads with a workspace each. */
static void threads(void **state)
{
    struct fixture *f = *state;
    enum { COUNT = 3 };
    static struct job jobs[COUNT];
    pthread_t thread[COUNT];
    for (int i = 0; i < COUNT; i++) {
        jobs[i].f = f;
        assert_int_equal(pthread_create(&thread[i], NULL, run_job, &jobs[i]), 0);
    }
    for (int i = 0; i < COUNT; i++)
        pthread_join(thread[i], NULL);
    for (int i = 0; i < COUNT; i++) {
        assert_int_equal(jobs[i].failures, 0);
        assert_memory_equal(jobs[i].y, jobs[0].y, sizeof jobs[0].y);
        assert_true(jobs[i].y[0] != 0.0f);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
        TEST(bad_batches), TEST(bad_workspaces), TEST(newer_struct), TEST(older_struct), TEST(configs), TEST(layouts),
        TEST(bad_layers),  TEST(bad_contexts),   TEST(seams),        TEST(no_tokens),    TEST(names),   TEST(threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
