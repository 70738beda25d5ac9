/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library against outputs of the transformers library (tests/fixtures, whose path is the first argument): every
 * checkpoint, every case, on every path that can run here, and the recorded sessions. Needs no GPU, uses one that is
 * there.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "config/convert.h"
#include "models/safetensors.h"
#include "runtime/internal.h"

static const char *fixtures;

static const char *const checkpoints[] = {
    "mixtral-f32",         "mixtral-bf16",         "mixtral-f32-sharded", "mixtral-bf16-sharded",
    "mixtral-f32-stacked", "mixtral-bf16-stacked", "qwen3_moe-f32",       "qwen3_moe-bf16",
    "olmoe-f32",           "olmoe-bf16",
};

static const struct {
    const char *session, *checkpoint;
} sessions[] = {{"session-f32", "mixtral-f32"}, {"session-bf16", "mixtral-bf16"}};

/* What a batch may differ by. transformers rounds every intermediate result to bf16, the library need not. */
struct budget {
    double output; /* ||out - ref|| / ||ref|| over the whole batch */
    double weight; /* of one routing weight, absolute; in bf16 a logit may be the neighbouring number */
};

static struct budget budget_of(moe_dtype dtype)
{
    return dtype == MOE_BF16 ? (struct budget){8e-3, 1e-2} : (struct budget){1e-5, 1e-5};
}

/* The distance between neighbouring numbers of dtype at x. */
static double ulp(double x, moe_dtype dtype)
{
    int exponent;
    frexp(x, &exponent);
    return ldexp(1.0, exponent - (dtype == MOE_BF16 ? 8 : 24));
}

/* ---- Reading a case, in the form of a captured batch ---- */

static void *tensor_copy(const struct moe_st_file *file, const char *name, moe_dtype dtype, int64_t rows, int64_t cols)
{
    const struct moe_st_tensor *t = moe_st_find(file, name);
    if (!t || t->type != dtype || t->rank != 2 || t->shape[0] != rows || t->shape[1] != cols)
        fail_msg("%s: no %s '%s' of [%lld, %lld]", moe_st_path(file), moe_dtype_name(dtype), name, (long long)rows,
                 (long long)cols);
    void *copy = malloc(t->bytes);
    assert_non_null(copy);
    memcpy(copy, moe_st_data(file, t), t->bytes);
    return copy;
}

static moe_record case_read(const char *path, const moe_layer_desc *desc)
{
    struct moe_st_file *file;
    struct moe_error err;
    if (moe_st_open(path, &file, &err))
        fail_msg("%s", err.text);
    const struct moe_st_tensor *x = moe_st_find(file, "hidden_states");
    assert_non_null(x);
    moe_record r = moe_record_init();
    r.tokens = x->shape[0];
    r.hidden_size = desc->hidden_size;
    r.num_experts = desc->num_experts;
    r.top_k = desc->top_k;
    r.dtype = desc->dtype;
    r.hidden_states = tensor_copy(file, "hidden_states", r.dtype, r.tokens, r.hidden_size);
    r.output = tensor_copy(file, "output", r.dtype, r.tokens, r.hidden_size);
    r.router_logits = tensor_copy(file, "router_logits", MOE_F32, r.tokens, r.num_experts);
    r.topk_ids = tensor_copy(file, "topk_ids", MOE_I32, r.tokens, r.top_k);
    r.topk_weights = tensor_copy(file, "topk_weights", MOE_F32, r.tokens, r.top_k);
    moe_st_close(file);
    return r;
}

static void case_free(moe_record *r)
{
    free((void *)r->hidden_states);
    free((void *)r->output);
    free((void *)r->router_logits);
    free((void *)r->topk_ids);
    free((void *)r->topk_weights);
}

/* ---- Running ---- */

static void check(moe_context *ctx, moe_status status, const char *what)
{
    if (status == MOE_OK)
        return;
    char text[1024];
    moe_last_error(ctx, text, sizeof text);
    fail_msg("%s: %s: %s", what, moe_status_string(status), text);
}

static void *device_alloc(moe_context *ctx, size_t bytes)
{
    void *p;
    check(ctx, moe_buffer_alloc(ctx, bytes, &p), "moe_buffer_alloc");
    return p;
}

static void *device_copy(moe_context *ctx, const void *host, size_t bytes)
{
    void *p = device_alloc(ctx, bytes);
    check(ctx, moe_copy_in(ctx, p, host, bytes, NULL), "moe_copy_in");
    return p;
}

static void *host_copy(moe_context *ctx, void *device, size_t bytes)
{
    void *p = malloc(bytes);
    assert_non_null(p);
    check(ctx, moe_copy_out(ctx, p, device, bytes, NULL), "moe_copy_out");
    moe_buffer_free(ctx, device);
    return p;
}

/* Runs the layer on the record's hidden states; everything in the result belongs to the caller (case_free). With
 * `routed` only the experts run, with the record's ids and weights. */
static moe_record run(moe_context *ctx, const moe_layer *layer, const moe_record *r, moe_path path, int32_t config,
                      int routed, const char *what)
{
    size_t xy_bytes = (size_t)(r->tokens * r->hidden_size) * moe_dtype_size(r->dtype);
    size_t logits_bytes = (size_t)(r->tokens * r->num_experts) * sizeof(float);
    size_t topk_bytes = (size_t)(r->tokens * r->top_k) * sizeof(float);
    moe_limits limits = moe_limits_init();
    limits.max_tokens = r->tokens;
    limits.path = path;
    size_t bytes;
    check(ctx, moe_workspace_size(layer, &limits, &bytes), what);
    void *workspace = device_alloc(ctx, bytes);

    moe_batch batch = moe_batch_init();
    batch.tokens = r->tokens;
    batch.dtype = r->dtype;
    batch.path = path;
    batch.config = config;
    void *x = device_copy(ctx, r->hidden_states, xy_bytes);
    void *ids = device_copy(ctx, r->topk_ids, topk_bytes);
    void *weights = device_copy(ctx, r->topk_weights, topk_bytes);
    batch.hidden_states = x;
    batch.output = device_alloc(ctx, xy_bytes);
    if (routed) {
        batch.topk_ids = ids;
        batch.topk_weights = weights;
    } else {
        batch.router_logits_out = device_alloc(ctx, logits_bytes);
        batch.topk_ids_out = device_alloc(ctx, topk_bytes);
        batch.topk_weights_out = device_alloc(ctx, topk_bytes);
    }
    check(ctx,
          routed ? moe_experts_forward(layer, &batch, workspace, bytes, NULL)
                 : moe_forward(layer, &batch, workspace, bytes, NULL),
          what);
    check(ctx, moe_synchronize(ctx, NULL), what);

    moe_record result = *r;
    result.hidden_states = NULL;
    result.output = host_copy(ctx, batch.output, xy_bytes);
    result.router_logits = routed ? NULL : host_copy(ctx, batch.router_logits_out, logits_bytes);
    result.topk_ids = routed ? NULL : host_copy(ctx, batch.topk_ids_out, topk_bytes);
    result.topk_weights = routed ? NULL : host_copy(ctx, batch.topk_weights_out, topk_bytes);
    moe_buffer_free(ctx, x);
    moe_buffer_free(ctx, ids);
    moe_buffer_free(ctx, weights);
    moe_buffer_free(ctx, workspace);
    return result;
}

/* ---- Comparing ---- */

static void compare_output(const moe_record *got, const moe_record *ref, const char *what)
{
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < ref->tokens * ref->hidden_size; i++) {
        double a = moe_load_f32(got->output, ref->dtype, i), b = moe_load_f32(ref->output, ref->dtype, i);
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    assert_true(norm > 0);
    double error = sqrt(difference / norm);
    if (!(error <= budget_of(ref->dtype).output))
        fail_msg("%s: output is off by %.3g, budget %.3g", what, error, budget_of(ref->dtype).output);
}

static void compare_logits(const moe_record *got, const moe_record *ref, const char *what)
{
    int64_t count = ref->tokens * ref->num_experts;
    double largest = 0;
    for (int64_t i = 0; i < count; i++)
        largest = fmax(largest, fabs(ref->router_logits[i]));
    for (int64_t i = 0; i < count; i++) {
        double a = got->router_logits[i], b = ref->router_logits[i];
        double allowed = 1e-5 * largest + (ref->dtype == MOE_BF16 ? ulp(b, MOE_BF16) : 0);
        if (!(fabs(a - b) <= allowed))
            fail_msg("%s: logit of token %d, expert %d is %.9g, expected %.9g", what, (int)(i / ref->num_experts),
                     (int)(i % ref->num_experts), a, b);
    }
}

static int by_falling_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* A slot is settled if its logit is 2 ulps or more away from its neighbours in the order: no rounding can move it. */
static int settled(const float *sorted, int32_t experts, int32_t slot, moe_dtype dtype)
{
    double above = slot > 0 ? sorted[slot - 1] - sorted[slot] : INFINITY;
    double below = slot + 1 < experts ? sorted[slot] - sorted[slot + 1] : INFINITY;
    double two = 2 * ulp(sorted[slot], dtype);
    return above >= two && below >= two;
}

static void compare_routing(const moe_record *got, const moe_record *ref, const char *what)
{
    float sorted[256];
    assert_true(ref->num_experts <= 256);
    int64_t compared = 0;
    for (int64_t t = 0; t < ref->tokens; t++) {
        memcpy(sorted, ref->router_logits + t * ref->num_experts, (size_t)ref->num_experts * sizeof *sorted);
        qsort(sorted, (size_t)ref->num_experts, sizeof *sorted, by_falling_value);
        for (int32_t k = 0; k < ref->top_k; k++) {
            if (!settled(sorted, ref->num_experts, k, ref->dtype))
                continue;
            int64_t i = t * ref->top_k + k;
            compared++;
            if (got->topk_ids[i] != ref->topk_ids[i])
                fail_msg("%s: id of token %d, slot %d is %d, expected %d", what, (int)t, k, got->topk_ids[i],
                         ref->topk_ids[i]);
            double difference = fabs((double)got->topk_weights[i] - ref->topk_weights[i]);
            if (!(difference <= budget_of(ref->dtype).weight))
                fail_msg("%s: weight of token %d, slot %d is %.9g, expected %.9g", what, (int)t, k,
                         got->topk_weights[i], ref->topk_weights[i]);
        }
    }
    assert_true(compared * 10 >= ref->tokens * ref->top_k * 9);
}

/* One recorded batch on every path of the device, in each configuration that runs there; returns how many paths ran. */
static int check_record(moe_context *ctx, const moe_layer *layer, const moe_record *ref, const char *name)
{
    int ran = 0;
    for (int p = 0; p < MOE_PATH_COUNT; p++) {
        char what[512], reason[256];
        moe_path chosen;
        moe_status status = moe_path_choose(layer, (moe_path)p, ref->tokens, &chosen, reason, sizeof reason);
        if (status == MOE_ERROR_UNSUPPORTED)
            continue;
        for (int32_t config = 0; config == 0 || moe_path_config_name((moe_path)p, config) != NULL; config++) {
            if (moe_choose_config(ctx, moe_path_info_get(chosen), config, NULL) != MOE_OK)
                continue;
            snprintf(what, sizeof what, "%s, path %s, configuration %d", name, moe_path_name((moe_path)p), config);
            check(ctx, status, what);
            moe_record got = run(ctx, layer, ref, (moe_path)p, config, 0, what);
            compare_logits(&got, ref, what);
            compare_routing(&got, ref, what);
            compare_output(&got, ref, what);
            case_free(&got);
            got = run(ctx, layer, ref, (moe_path)p, config, 1, what);
            compare_output(&got, ref, what);
            case_free(&got);
        }
        ran++;
    }
    return ran;
}

/* auto, reference and cpu run on the CPU. On any GPU auto, decode and prefill on packed weights, and simple too on
 * row-major ones; decode and prefill are not for f32. */
static int least_paths(moe_context *ctx, moe_device device, const moe_layer *layer)
{
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    moe_layer_weights weights = moe_layer_weights_init();
    check(ctx, moe_layer_describe(layer, &desc), "moe_layer_describe");
    check(ctx, moe_layer_weights_get(layer, &weights), "moe_layer_weights_get");
    if (device == MOE_DEVICE_CPU || weights.layout == MOE_LAYOUT_PACKED)
        return 3;
    return desc.dtype == MOE_F32 ? 2 : 4;
}

static moe_context *context_or_null(moe_device device)
{
    moe_context_options options = moe_context_options_init();
    options.device = device;
    moe_context *ctx = NULL;
    moe_status status = moe_context_create(&options, &ctx);
    if (device == MOE_DEVICE_CUDA && status == MOE_ERROR_NO_DEVICE)
        return NULL;
    check(NULL, status, "moe_context_create");
    return ctx;
}

static moe_checkpoint *open_checkpoint(moe_context *ctx, const char *name)
{
    char path[1024];
    moe_checkpoint *checkpoint;
    snprintf(path, sizeof path, "%s/%s", fixtures, name);
    check(ctx, moe_checkpoint_open(ctx, path, &checkpoint), name);
    return checkpoint;
}

static moe_layer *load_layer(moe_context *ctx, moe_checkpoint *checkpoint, int32_t index, moe_layout layout,
                             const char *name)
{
    moe_layer *layer;
    moe_load_options options = moe_load_options_init();
    options.layout = layout;
    check(ctx, moe_layer_load(checkpoint, index, &options, &layer), name);
    return layer;
}

static void check_layer(moe_context *ctx, moe_device device, const moe_layer *layer, const char *name, int32_t index,
                        bool first)
{
    static const char *const first_layer_cases[] = {"case_T1", "case_T5", "case_T33"};
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    check(ctx, moe_layer_describe(layer, &desc), name);
    for (int c = 0; c < (first ? 3 : 1); c++) {
        char path[1200], case_name[32];
        snprintf(case_name, sizeof case_name, "layer%d_T5", (int)index);
        snprintf(path, sizeof path, "%s/%s/%s.safetensors", fixtures, name, first ? first_layer_cases[c] : case_name);
        moe_record ref = case_read(path, &desc);
        assert_true(check_record(ctx, layer, &ref, path) >= least_paths(ctx, device, layer));
        case_free(&ref);
    }
}

static void check_checkpoint(moe_context *ctx, moe_device device, const char *name)
{
    moe_checkpoint *checkpoint = open_checkpoint(ctx, name);
    moe_checkpoint_info info = moe_checkpoint_info_init();
    check(ctx, moe_checkpoint_describe(checkpoint, &info), name);
    assert_true(info.first_moe_layer >= 0);

    for (int32_t index = 0; index < info.num_layers; index++) {
        if (index < info.first_moe_layer) {
            moe_layer *layer;
            assert_int_not_equal(moe_layer_load(checkpoint, index, NULL, &layer), MOE_OK);
            continue;
        }
        /* A GPU has paths for either layout; the CPU has one layout. */
        for (int layout = MOE_LAYOUT_AUTO; layout <= (device == MOE_DEVICE_CPU ? 0 : MOE_LAYOUT_ROW_MAJOR); layout++) {
            moe_layer *layer = load_layer(ctx, checkpoint, index, (moe_layout)layout, name);
            check_layer(ctx, device, layer, name, index, index == info.first_moe_layer);
            moe_layer_destroy(layer);
        }
    }
    moe_checkpoint_close(checkpoint);
}

static void check_session(moe_context *ctx, moe_device device, const char *name, const char *checkpoint_name)
{
    moe_layer *layers[2];
    moe_checkpoint *checkpoint = open_checkpoint(ctx, checkpoint_name);
    for (int32_t i = 0; i < 2; i++)
        layers[i] = load_layer(ctx, checkpoint, i, MOE_LAYOUT_AUTO, checkpoint_name);
    moe_checkpoint_close(checkpoint);

    char path[1024];
    moe_session *session;
    snprintf(path, sizeof path, "%s/%s", fixtures, name);
    check(ctx, moe_session_open(ctx, path, &session), name);
    int prefill[2] = {0, 0}, decode[2] = {0, 0};
    for (int64_t i = 0; i < moe_session_count(session); i++) {
        moe_record ref = moe_record_init();
        check(ctx, moe_session_read(session, i, &ref), name);
        assert_in_range(ref.layer, 0, 1);
        assert_non_null(ref.output);
        assert_non_null(ref.router_logits);
        prefill[ref.layer] += !strcmp(ref.phase, "prefill") && ref.tokens > 1;
        decode[ref.layer] += !strcmp(ref.phase, "decode") && ref.tokens == 1;
        char what[1100];
        snprintf(what, sizeof what, "%s, batch %d", path, (int)i);
        assert_true(check_record(ctx, layers[ref.layer], &ref, what) >= least_paths(ctx, device, layers[ref.layer]));
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(prefill[i], 1);
        assert_int_equal(decode[i], 5);
        moe_layer_destroy(layers[i]);
    }
    moe_session_close(session);
}

static void check_all(moe_device device)
{
    moe_context *ctx = context_or_null(device);
    if (!ctx)
        skip();
    for (size_t i = 0; i < sizeof checkpoints / sizeof *checkpoints; i++)
        check_checkpoint(ctx, device, checkpoints[i]);
    for (size_t i = 0; i < sizeof sessions / sizeof *sessions; i++)
        check_session(ctx, device, sessions[i].session, sessions[i].checkpoint);
    moe_context_destroy(ctx);
}

static void test_cpu(void **state)
{
    (void)state;
    check_all(MOE_DEVICE_CPU);
}

/* What the load options may ask for where there is one layout. */
static void test_layouts(void **state)
{
    (void)state;
    moe_context *ctx = context_or_null(MOE_DEVICE_CPU);
    moe_checkpoint *checkpoint = open_checkpoint(ctx, "mixtral-bf16");
    moe_layer *layer = NULL;
    moe_layer_weights weights = moe_layer_weights_init();
    char text[256];
    for (int layout = MOE_LAYOUT_AUTO; layout <= MOE_LAYOUT_ROW_MAJOR; layout++) {
        layer = load_layer(ctx, checkpoint, 0, (moe_layout)layout, "mixtral-bf16");
        check(ctx, moe_layer_weights_get(layer, &weights), "moe_layer_weights_get");
        assert_int_equal(weights.layout, MOE_LAYOUT_ROW_MAJOR);
        moe_layer_destroy(layer);
    }
    moe_load_options options = moe_load_options_init();
    options.layout = MOE_LAYOUT_PACKED;
    assert_int_equal(moe_layer_load(checkpoint, 0, &options, &layer), MOE_ERROR_UNSUPPORTED);
    assert_null(layer);
    moe_last_error(ctx, text, sizeof text);
    assert_non_null(strstr(text, "packed weights: path 'prefill'"));
    options.layout = (moe_layout)3;
    assert_int_equal(moe_layer_load(checkpoint, 0, &options, &layer), MOE_ERROR_INVALID_ARGUMENT);
    moe_last_error(ctx, text, sizeof text);
    assert_string_equal(text, "layout 3 does not exist");
    /* A program that was built before there were layouts: what stands behind its struct is not looked at. */
    options.size = offsetof(moe_load_options, layout);
    check(ctx, moe_layer_load(checkpoint, 0, &options, &layer), "first version");
    moe_layer_destroy(layer);
    options.size--;
    assert_int_equal(moe_layer_load(checkpoint, 0, &options, &layer), MOE_ERROR_INVALID_ARGUMENT);
    moe_checkpoint_close(checkpoint);
    moe_context_destroy(ctx);
}

static void test_cuda(void **state)
{
    (void)state;
    check_all(MOE_DEVICE_CUDA);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s FIXTURES\n", argv[0]);
        return 2;
    }
    fixtures = argv[1];
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cpu), cmocka_unit_test(test_layouts),
                                       cmocka_unit_test(test_cuda)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
