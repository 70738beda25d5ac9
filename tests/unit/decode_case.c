/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/decode_case.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "config/convert.h"

enum { SKIP = 77, MOST_SECONDS = 100 };

moe_context *case_ctx;
moe_device_info case_device;
struct case_model case_models[CASE_SHAPES];
cudaStream_t case_streams[CASE_STREAMS];

static const struct case_shape shapes[CASE_SHAPES] = {
    [CASE_EVEN] = {"even", MOE_BF16, 512, 256, 32, 4},
    [CASE_ODD] = {"odd", MOE_F16, 712, 1160, 24, 3}, /* bands for all SMs to guess, blocks for more than a ring */
    [CASE_MANY] = {"many", MOE_BF16, 264, 136, 255, 9},
};

/* ---- Numbers and memory ---- */

uint64_t case_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 32;
}

void case_fill(void *to, moe_dtype dtype, int64_t count, uint64_t seed, double scale)
{
    for (int64_t i = 0; i < count; i++)
        moe_store_f32(to, dtype, i, (float)((double)(int32_t)case_random(&seed) * 0x1p-31 * scale));
}

void *case_numbers(const struct case_shape *s, int64_t count, uint64_t seed, double scale)
{
    void *numbers = malloc((size_t)count * moe_dtype_size(s->dtype));
    assert_non_null(numbers);
    case_fill(numbers, s->dtype, count, seed, scale);
    return numbers;
}

void *case_alloc(size_t bytes)
{
    void *pointer;
    assert_int_equal(moe_buffer_alloc(case_ctx, bytes, &pointer), MOE_OK);
    return pointer;
}

void *case_copy(const void *host, size_t bytes)
{
    void *pointer = case_alloc(bytes);
    assert_int_equal(moe_copy_in(case_ctx, pointer, host, bytes, NULL), MOE_OK);
    return pointer;
}

void *case_workspace(const moe_layer *layer, moe_path path, int64_t tokens, size_t *bytes)
{
    moe_limits limits = moe_limits_init();
    limits.max_tokens = tokens;
    limits.path = path;
    assert_int_equal(moe_workspace_size(layer, &limits, bytes), MOE_OK);
    return case_alloc(*bytes);
}

/* ---- Configurations, graphs, differences ---- */

bool case_next_config(moe_path path, int32_t *config)
{
    for (; moe_path_config_name(path, *config) != NULL; ++*config)
        if (moe_choose_config(case_ctx, moe_path_info_get(path), *config, NULL) == MOE_OK)
            return true;
    return false;
}

cudaGraphExec_t case_end_capture(cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
    return exec;
}

struct test_differences *case_differences(void)
{
    return case_copy(&(struct test_differences){0, UINT64_MAX}, sizeof(struct test_differences));
}

struct test_differences case_found(const struct test_differences *found, cudaStream_t stream)
{
    struct test_differences host;
    assert_int_equal(moe_copy_out(case_ctx, &host, found, sizeof host, stream), MOE_OK);
    return host;
}

/* ---- Layers ---- */

moe_layer_desc case_desc(const struct case_shape *s)
{
    moe_layer_desc desc = moe_layer_desc_init(s->dtype);
    desc.hidden_size = s->hidden;
    desc.intermediate_size = s->intermediate;
    desc.num_experts = s->experts;
    desc.top_k = s->top_k;
    return desc;
}

/* Weights such that x, gate, up and the experts' results are all of about the same size. */
static void make_model(struct case_model *m, const struct case_shape *s)
{
    const int64_t matrix = s->experts * s->hidden * s->intermediate;
    const size_t size = moe_dtype_size(s->dtype);
    m->shape = s;
    m->gate = case_numbers(s, s->experts * s->hidden, 1, 3 / sqrt((double)s->hidden));
    m->w13 = case_numbers(s, 2 * matrix, 2, sqrt(3 / (double)s->hidden));
    m->w2 = case_numbers(s, matrix, 3, 2 * sqrt(3 / (double)s->intermediate));
    m->on_device[0] = case_copy(m->gate, (size_t)(s->experts * s->hidden) * size);
    m->on_device[1] = case_copy(m->w13, (size_t)(2 * matrix) * size);
    m->on_device[2] = case_copy(m->w2, (size_t)matrix * size);
    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = m->on_device[0];
    weights.w13 = m->on_device[1];
    weights.w2 = m->on_device[2];
    const moe_layer_desc desc = case_desc(s);
    assert_int_equal(moe_layer_create(case_ctx, &desc, &weights, &m->layouts[1]), MOE_OK);
    assert_int_equal(moe_layer_pack(m->layouts[1], &m->layouts[0]), MOE_OK);
}

static void free_model(struct case_model *m)
{
    for (int i = 0; i < CASE_LAYOUTS; i++)
        moe_layer_destroy(m->layouts[i]);
    for (int i = 0; i < 3; i++)
        moe_buffer_free(case_ctx, m->on_device[i]);
    free(m->gate);
    free(m->w13);
    free(m->w2);
}

/* ---- Single forwards ---- */

void case_run_enqueue(const struct case_run *r)
{
    assert_int_equal((r->routed ? moe_experts_forward : moe_forward)(r->layer, &r->batch, r->workspace,
                                                                     r->workspace_bytes, r->stream),
                     MOE_OK);
}

void case_run_poison(const struct case_run *r)
{
    assert_int_equal(cudaMemsetAsync(r->y, 0xff, r->y_bytes, r->stream), cudaSuccess);
    assert_int_equal(cudaMemsetAsync(r->workspace, 0xff, r->workspace_bytes, r->stream), cudaSuccess);
}

void case_run_compare(const struct case_run *r, struct test_differences *found, unsigned long long number)
{
    assert_int_equal(test_compare(r->y, r->expected, (int64_t)r->y_bytes, number, found, r->stream), cudaSuccess);
}

struct case_run case_run_make(const struct case_model *m, int layout, moe_path path, int32_t config, int32_t max_sms,
                              bool routed, int64_t tokens, uint64_t seed, cudaStream_t stream)
{
    const struct case_shape *s = m->shape;
    const size_t pairs = (size_t)(tokens * s->top_k);
    struct case_run r = {.layer = m->layouts[layout], .routed = routed, .batch = moe_batch_init(), .stream = stream};
    void *x = case_numbers(s, tokens * s->hidden, seed, 1.7);
    int32_t *ids = malloc(pairs * sizeof(int32_t));
    float *weights = malloc(pairs * sizeof(float));
    assert_true(ids != NULL && weights != NULL);
    for (size_t i = 0; i < pairs; i++) {
        ids[i] = (int32_t)(case_random(&seed) % (uint64_t)s->experts);
        weights[i] = 0.05f + (float)case_random(&seed) * 0x1p-32f;
    }
    r.y_bytes = (size_t)(tokens * s->hidden) * moe_dtype_size(s->dtype);
    r.x = case_copy(x, r.y_bytes);
    r.ids = case_copy(ids, pairs * sizeof(int32_t));
    r.weights = case_copy(weights, pairs * sizeof(float));
    free(x);
    free(ids);
    free(weights);
    r.y = case_alloc(r.y_bytes);
    r.expected = case_alloc(r.y_bytes);
    r.workspace = case_workspace(r.layer, path, tokens, &r.workspace_bytes);
    r.batch.tokens = tokens;
    r.batch.dtype = s->dtype;
    r.batch.hidden_states = r.x;
    r.batch.output = r.y;
    r.batch.topk_ids = r.ids;
    r.batch.topk_weights = r.weights;
    r.batch.path = path;
    r.batch.config = config;
    r.batch.max_sms = max_sms;
    case_run_poison(&r);
    case_run_enqueue(&r);
    assert_int_equal(cudaMemcpyAsync(r.expected, r.y, r.y_bytes, cudaMemcpyDeviceToDevice, r.stream), cudaSuccess);
    assert_int_equal(moe_synchronize(case_ctx, r.stream), MOE_OK);
    return r;
}

void case_run_free(struct case_run *r)
{
    moe_buffer_free(case_ctx, r->x);
    moe_buffer_free(case_ctx, r->ids);
    moe_buffer_free(case_ctx, r->weights);
    moe_buffer_free(case_ctx, r->y);
    moe_buffer_free(case_ctx, r->expected);
    moe_buffer_free(case_ctx, r->workspace);
}

/* ---- The program ---- */

static void hangs(int signal)
{
    static const char text[] = "a test of forwards hangs\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(2);
    _exit(1);
}

int case_open(void)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &case_ctx) != MOE_OK)
        return SKIP;
    case_device = moe_device_info_init();
    if (moe_context_device(case_ctx, &case_device) != MOE_OK)
        return 1;
    signal(SIGALRM, hangs);
    return 0;
}

void case_close(void)
{
    moe_context_destroy(case_ctx);
}

int case_setup(void **state)
{
    (void)state;
    for (int i = 0; i < CASE_STREAMS; i++)
        assert_int_equal(cudaStreamCreateWithFlags(&case_streams[i], cudaStreamNonBlocking), cudaSuccess);
    for (int i = 0; i < CASE_SHAPES; i++)
        make_model(&case_models[i], &shapes[i]);
    return 0;
}

int case_teardown(void **state)
{
    (void)state;
    for (int i = 0; i < CASE_SHAPES; i++)
        free_model(&case_models[i]);
    for (int i = 0; i < CASE_STREAMS; i++)
        cudaStreamDestroy(case_streams[i]);
    return 0;
}

int case_watch(void **state)
{
    (void)state;
    alarm(MOST_SECONDS);
    return 0;
}
