/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU, what the decode path must hold beyond a right result now and then: a thousand batches through one captured
 * graph, each right and the same bits every time; forwards one after another in one graph; others beside it on the GPU,
 * and less room than it would take. A test that hangs fails. */
#include <cuda_runtime.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "config/convert.h"
#include "kernels/budget.h"
#include "runtime/internal.h"
#include "tests/unit/device.h"

enum { SKIP = 77, MOST_SECONDS = 100, LAYOUTS = 2, MAX_THREADS = 64 };

static moe_context *ctx, *cpu;
static moe_device_info device;
/* All that there are, so that no two of them share a queue, where one would wait for the other. */
static cudaStream_t streams[4], holder;

/* ---- Layers ---- */

static const struct shape {
    const char *name;
    moe_dtype dtype;
    int64_t hidden, intermediate;
    int32_t experts, top_k;
} shapes[] = {{"even", MOE_BF16, 512, 256, 32, 4}, {"odd", MOE_F16, 328, 136, 24, 3}};
enum { EVEN, ODD, SHAPES };

static struct model {
    const struct shape *shape;
    void *gate, *w13, *w2;       /* host */
    void *on_device[3];          /* the same */
    moe_layer *layouts[LAYOUTS]; /* packed, row-major */
    moe_layer *reference;        /* on the CPU */
} models[SHAPES];

static uint64_t next(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 32;
}

/* Uniform in [-scale, scale]. */
static void fill(void *to, moe_dtype dtype, int64_t count, uint64_t seed, double scale)
{
    for (int64_t i = 0; i < count; i++)
        moe_store_f32(to, dtype, i, (float)((double)(int32_t)next(&seed) * 0x1p-31 * scale));
}

static void *host_numbers(const struct shape *s, int64_t count, uint64_t seed, double scale)
{
    void *numbers = malloc((size_t)count * moe_dtype_size(s->dtype));
    assert_non_null(numbers);
    fill(numbers, s->dtype, count, seed, scale);
    return numbers;
}

static void *device_alloc(size_t bytes)
{
    void *pointer;
    assert_int_equal(moe_buffer_alloc(ctx, bytes, &pointer), MOE_OK);
    return pointer;
}

static void *device_copy(const void *host, size_t bytes)
{
    void *pointer = device_alloc(bytes);
    assert_int_equal(moe_copy_in(ctx, pointer, host, bytes, NULL), MOE_OK);
    return pointer;
}

/* Weights such that x, gate, up and the experts' results are all of about the same size. */
static void make_model(struct model *m, const struct shape *s)
{
    const int64_t matrix = s->experts * s->hidden * s->intermediate;
    const size_t size = moe_dtype_size(s->dtype);
    m->shape = s;
    m->gate = host_numbers(s, s->experts * s->hidden, 1, 3 / sqrt((double)s->hidden));
    m->w13 = host_numbers(s, 2 * matrix, 2, sqrt(3 / (double)s->hidden));
    m->w2 = host_numbers(s, matrix, 3, 2 * sqrt(3 / (double)s->intermediate));
    m->on_device[0] = device_copy(m->gate, (size_t)(s->experts * s->hidden) * size);
    m->on_device[1] = device_copy(m->w13, (size_t)(2 * matrix) * size);
    m->on_device[2] = device_copy(m->w2, (size_t)matrix * size);

    moe_layer_desc desc = moe_layer_desc_init(s->dtype);
    desc.hidden_size = s->hidden;
    desc.intermediate_size = s->intermediate;
    desc.num_experts = s->experts;
    desc.top_k = s->top_k;
    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = m->gate;
    weights.w13 = m->w13;
    weights.w2 = m->w2;
    assert_int_equal(moe_layer_create(cpu, &desc, &weights, &m->reference), MOE_OK);
    weights.gate = m->on_device[0];
    weights.w13 = m->on_device[1];
    weights.w2 = m->on_device[2];
    assert_int_equal(moe_layer_create(ctx, &desc, &weights, &m->layouts[1]), MOE_OK);
    assert_int_equal(moe_layer_pack(m->layouts[1], &m->layouts[0]), MOE_OK);
}

static void free_model(struct model *m)
{
    for (int i = 0; i < LAYOUTS; i++)
        moe_layer_destroy(m->layouts[i]);
    moe_layer_destroy(m->reference);
    for (int i = 0; i < 3; i++)
        moe_buffer_free(ctx, m->on_device[i]);
    free(m->gate);
    free(m->w13);
    free(m->w2);
}

static void *make_workspace(const moe_layer *layer, moe_path path, int64_t tokens, size_t *bytes)
{
    moe_limits limits = moe_limits_init();
    limits.max_tokens = tokens;
    limits.path = path;
    assert_int_equal(moe_workspace_size(layer, &limits, bytes), MOE_OK);
    return device_alloc(*bytes);
}

/* From *config on, the first configuration of decode that this GPU can run; false: none. */
static bool next_config(int32_t *config)
{
    for (; moe_path_config_name(MOE_PATH_DECODE, *config) != NULL; ++*config)
        if (moe_choose_config(ctx, moe_path_info_get(MOE_PATH_DECODE), *config, NULL) == MOE_OK)
            return true;
    return false;
}

static cudaGraphExec_t end_capture(cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
    return exec;
}

static struct test_differences *make_differences(void)
{
    return device_copy(&(struct test_differences){0, UINT64_MAX}, sizeof(struct test_differences));
}

static struct test_differences get_differences(const struct test_differences *found, cudaStream_t stream)
{
    struct test_differences host;
    assert_int_equal(moe_copy_out(ctx, &host, found, sizeof host, stream), MOE_OK);
    return host;
}

/* ---- Many batches, each in one block of memory: x, ids, weights, output ---- */

struct batches {
    const struct model *model;
    bool routed; /* by the caller: moe_experts_forward; else the gate says ids and weights */
    int64_t count, tokens;
    size_t ids_at, weights_at, output_at, bytes;
    char *host;    /* [count] */
    void *records; /* the same on the device */
    void *current; /* the one that runs */
    float *exact;  /* [count, tokens, hidden]: by the reference, with these ids and weights */
};

static size_t padded(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

/* What is routed by the caller has 1 to `tokens` tokens, few more often than many; the rest has no experts, as in a
 * serving stack that keeps a graph for some sizes only. */
static void draw_routing(const struct batches *b, int64_t i, uint64_t *seed, int32_t *ids, float *weights)
{
    const struct shape *s = b->model->shape;
    const int64_t most = next(seed) % 8 == 0 || b->tokens < 8 ? b->tokens : 8;
    const int64_t tokens = i == 0 ? b->tokens : 1 + (int64_t)(next(seed) % (uint64_t)most);
    const int32_t first = (int32_t)(next(seed) % (uint64_t)s->experts);
    for (int64_t pair = 0; pair < b->tokens * s->top_k; pair++) {
        const int32_t slot = (int32_t)(pair % s->top_k);
        const uint64_t random = next(seed);
        int32_t id = (int32_t)(random % (uint64_t)s->experts);
        if (i % 6 == 0) /* one expert takes all */
            id = first;
        if (i % 6 == 1) /* all tokens on the same experts */
            id = (first + slot) % s->experts;
        if (i % 6 == 2) /* the first ones take most */
            id = (int32_t)((uint64_t)id * (random >> 8 & 0xff) >> 8);
        if (i % 6 == 3 && random >> 8 & 1) /* half of the slots are not used */
            id = -1;
        ids[pair] = pair < tokens * s->top_k ? id : -1;
        weights[pair] = 0.05f + 0.95f * (float)next(seed) * 0x1p-32f;
    }
}

static struct batches make_batches(const struct model *model, bool routed, int64_t count, int64_t tokens)
{
    const struct shape *s = model->shape;
    const size_t x_bytes = (size_t)(tokens * s->hidden) * moe_dtype_size(s->dtype);
    const size_t pairs = (size_t)(tokens * s->top_k);
    struct batches b = {.model = model, .routed = routed, .count = count, .tokens = tokens};
    b.ids_at = padded(x_bytes);
    b.weights_at = b.ids_at + padded(pairs * sizeof(int32_t));
    b.output_at = b.weights_at + padded(pairs * sizeof(float));
    b.bytes = b.output_at + padded(x_bytes);
    b.host = calloc((size_t)count, b.bytes);
    b.exact = aligned_alloc(256, padded((size_t)(count * tokens * s->hidden) * sizeof(float)));
    assert_true(b.host != NULL && b.exact != NULL);
    for (int64_t i = 0; i < count; i++) {
        char *record = b.host + (size_t)i * b.bytes;
        uint64_t seed = 1000 + (uint64_t)i;
        fill(record, s->dtype, tokens * s->hidden, next(&seed), 1.7);
        if (routed)
            draw_routing(&b, i, &seed, (int32_t *)(record + b.ids_at), (float *)(record + b.weights_at));
    }
    b.records = device_copy(b.host, (size_t)count * b.bytes);
    b.current = device_copy(b.host, b.bytes);
    return b;
}

static void free_batches(struct batches *b)
{
    moe_buffer_free(ctx, b->records);
    moe_buffer_free(ctx, b->current);
    free(b->host);
    free(b->exact);
}

/* A forward of what `current` holds. */
static void enqueue_current(const struct batches *b, const moe_layer *layer, int32_t config, void *workspace,
                            size_t bytes, cudaStream_t stream)
{
    char *current = b->current;
    moe_batch batch = moe_batch_init();
    batch.tokens = b->tokens;
    batch.dtype = b->model->shape->dtype;
    batch.hidden_states = current;
    batch.output = current + b->output_at;
    batch.path = MOE_PATH_DECODE;
    batch.config = config;
    if (b->routed) {
        batch.topk_ids = current + b->ids_at;
        batch.topk_weights = (float *)(current + b->weights_at);
        assert_int_equal(moe_experts_forward(layer, &batch, workspace, bytes, stream), MOE_OK);
    } else {
        batch.topk_ids_out = (int32_t *)(current + b->ids_at);
        batch.topk_weights_out = (float *)(current + b->weights_at);
        assert_int_equal(moe_forward(layer, &batch, workspace, bytes, stream), MOE_OK);
    }
}

static char *record_of(const struct batches *b, int64_t i)
{
    return (char *)b->records + (size_t)i * b->bytes;
}

/* The batch's input becomes current: all that the forward does not make. */
static void swap_in(const struct batches *b, int64_t i, cudaStream_t stream)
{
    assert_int_equal(cudaMemcpyAsync(b->current, record_of(b, i), b->routed ? b->output_at : b->ids_at,
                                     cudaMemcpyDeviceToDevice, stream),
                     cudaSuccess);
}

/* Runs each batch by itself, in memory that held nothing of use, and keeps what it makes in its record. */
static void run_alone(struct batches *b, const moe_layer *layer, int32_t config)
{
    size_t bytes;
    void *workspace = make_workspace(layer, MOE_PATH_DECODE, b->tokens, &bytes);
    cudaStream_t stream = streams[0];
    for (int64_t i = 0; i < b->count; i++) {
        const size_t made = b->routed ? b->output_at : b->ids_at;
        assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
        assert_int_equal(cudaMemsetAsync((char *)b->current + b->output_at, 0xff, b->bytes - b->output_at, stream),
                         cudaSuccess);
        swap_in(b, i, stream);
        enqueue_current(b, layer, config, workspace, bytes, stream);
        assert_int_equal(cudaMemcpyAsync(record_of(b, i) + made, (char *)b->current + made, b->bytes - made,
                                         cudaMemcpyDeviceToDevice, stream),
                         cudaSuccess);
    }
    assert_int_equal(moe_copy_out(ctx, b->host, b->records, (size_t)b->count * b->bytes, stream), MOE_OK);
    moe_buffer_free(ctx, workspace);
}

/* ---- The reference, on all cores ---- */

struct job {
    const struct batches *batches;
    atomic_llong *next;
    int failures;
};

static void *run_reference(void *argument)
{
    struct job *job = argument;
    const struct batches *b = job->batches;
    const struct shape *s = b->model->shape;
    const int64_t width = b->tokens * s->hidden;
    moe_limits limits = moe_limits_init();
    moe_batch batch = moe_batch_init();
    size_t bytes;
    void *workspace = NULL;
    limits.max_tokens = b->tokens;
    limits.path = MOE_PATH_REFERENCE;
    float *x = aligned_alloc(256, padded((size_t)width * sizeof(float)));
    job->failures = x == NULL || moe_workspace_size(b->model->reference, &limits, &bytes) != MOE_OK ||
                    moe_buffer_alloc(cpu, bytes, &workspace) != MOE_OK;
    batch.tokens = b->tokens;
    batch.dtype = MOE_F32;
    batch.hidden_states = x;
    batch.path = MOE_PATH_REFERENCE;
    for (int64_t i; job->failures == 0 && (i = atomic_fetch_add(job->next, 1)) < b->count;) {
        const char *record = b->host + (size_t)i * b->bytes;
        moe_convert(x, MOE_F32, record, s->dtype, width);
        batch.output = b->exact + i * width;
        batch.topk_ids = record + b->ids_at;
        batch.topk_weights = (const float *)(record + b->weights_at);
        job->failures += moe_experts_forward(b->model->reference, &batch, workspace, bytes, NULL) != MOE_OK;
    }
    moe_buffer_free(cpu, workspace);
    free(x);
    return NULL;
}

static void make_exact(const struct batches *b)
{
    pthread_t threads[MAX_THREADS];
    struct job jobs[MAX_THREADS];
    atomic_llong next_batch = 0;
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const int count = cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : (int)cores;
    for (int t = 0; t < count; t++) {
        jobs[t] = (struct job){b, &next_batch, 0};
        assert_int_equal(pthread_create(&threads[t], NULL, run_reference, &jobs[t]), 0);
    }
    for (int t = 0; t < count; t++) {
        pthread_join(threads[t], NULL);
        assert_int_equal(jobs[t].failures, 0);
    }
}

/* Each row of each output against the reference; a token without experts is exactly zero. */
static void check_outputs(const struct batches *b, int32_t config)
{
    const struct shape *s = b->model->shape;
    double worst = 0;
    for (int64_t row = 0; row < b->count * b->tokens; row++) {
        const void *got = b->host + (size_t)(row / b->tokens) * b->bytes + b->output_at;
        double difference = 0, norm = 0;
        for (int64_t h = 0; h < s->hidden; h++) {
            const double exact = b->exact[row * s->hidden + h];
            const double error = moe_load_f32(got, s->dtype, row % b->tokens * s->hidden + h) - exact;
            difference += error * error;
            norm += exact * exact;
        }
        const double error = difference == 0 ? 0 : sqrt(difference / norm);
        if (!(error <= moe_error_budget(s->dtype)))
            fail_msg("%s layer, configuration %d, batch %d, token %d: error %.3g, budget %.3g", s->name, (int)config,
                     (int)(row / b->tokens), (int)(row % b->tokens), error, moe_error_budget(s->dtype));
        worst = error > worst ? error : worst;
    }
    assert_true(worst > 0);
}

/* All batches `rounds` times through one graph, in memory that is as the one before left it. */
static void check_cycles(const struct batches *b, const moe_layer *layer, int32_t config, int rounds)
{
    size_t bytes;
    void *workspace = make_workspace(layer, MOE_PATH_DECODE, b->tokens, &bytes);
    struct test_differences *found = make_differences();
    cudaStream_t stream = streams[0];
    assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    enqueue_current(b, layer, config, workspace, bytes, stream);
    cudaGraphExec_t exec = end_capture(stream);
    for (int64_t run = 0; run < rounds * b->count; run++) {
        const int64_t i = run % b->count;
        swap_in(b, i, stream);
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(
            test_compare(b->current, record_of(b, i), (int64_t)b->bytes, (unsigned long long)run, found, stream),
            cudaSuccess);
    }
    const struct test_differences got = get_differences(found, stream);
    if (got.count != 0)
        fail_msg("%s layer, configuration %d, batches of %d tokens: %llu differences, the first in round %llu, batch "
                 "%llu",
                 b->model->shape->name, (int)config, (int)b->tokens, got.count,
                 got.first / (unsigned long long)b->count, got.first % (unsigned long long)b->count);
    /* And what differs is found. */
    assert_int_equal(cudaMemsetAsync((char *)b->current + b->output_at, 1, 16, stream), cudaSuccess);
    assert_int_equal(test_compare(b->current, record_of(b, b->count - 1), (int64_t)b->bytes, 7, found, stream),
                     cudaSuccess);
    const struct test_differences planted = get_differences(found, stream);
    assert_true(planted.count == 1 && planted.first == 7);
    cudaGraphExecDestroy(exec);
    moe_buffer_free(ctx, found);
    moe_buffer_free(ctx, workspace);
}

/* The layout that is the default, in the configuration that the path takes, the full number of rounds; the others a
 * few. Row-major weights give the same bits. */
static void check_batches(int shape, bool routed, int64_t count, int64_t tokens)
{
    const struct model *model = &models[shape];
    struct batches b = make_batches(model, routed, count, tokens);
    char *first = NULL; /* ids and weights are the same in every configuration */
    int rounds = 100;
    for (int32_t config = 1; next_config(&config); config++) {
        run_alone(&b, model->layouts[0], config);
        if (first == NULL) {
            make_exact(&b);
            first = malloc((size_t)count * b.bytes);
            assert_non_null(first);
            memcpy(first, b.host, (size_t)count * b.bytes);
        }
        for (int64_t i = 0; i < count; i++)
            assert_memory_equal(first + (size_t)i * b.bytes, b.host + (size_t)i * b.bytes, b.output_at);
        check_outputs(&b, config);
        for (int layout = 0; layout < LAYOUTS; layout++) {
            check_cycles(&b, model->layouts[layout], config, rounds);
            rounds = 10;
        }
    }
    assert_non_null(first);
    free(first);
    free_batches(&b);
}

static void batches_through_one_graph(void **state)
{
    (void)state;
    check_batches(EVEN, true, 1000, 64);
    check_batches(ODD, true, 200, 64);
}

static void batches_through_one_gate(void **state)
{
    (void)state;
    check_batches(EVEN, false, 1000, 8);
    check_batches(ODD, false, 200, 3);
}

/* ---- Single forwards and what they give alone ---- */

struct run {
    const moe_layer *layer;
    bool routed; /* by the caller, as in struct batches */
    moe_batch batch;
    void *x, *y, *ids, *weights, *workspace, *expected; /* expected is on the device too */
    size_t workspace_bytes, y_bytes;
    cudaStream_t stream;
};

static void enqueue(const struct run *r)
{
    assert_int_equal((r->routed ? moe_experts_forward : moe_forward)(r->layer, &r->batch, r->workspace,
                                                                     r->workspace_bytes, r->stream),
                     MOE_OK);
}

static void poison(const struct run *r)
{
    assert_int_equal(cudaMemsetAsync(r->y, 0xff, r->y_bytes, r->stream), cudaSuccess);
    assert_int_equal(cudaMemsetAsync(r->workspace, 0xff, r->workspace_bytes, r->stream), cudaSuccess);
}

/* Also loads every kernel that it needs, which could not be while another one has the GPU. */
static struct run make_run(const struct model *m, int layout, moe_path path, int32_t config, int32_t max_sms,
                           bool routed, int64_t tokens, uint64_t seed, cudaStream_t stream)
{
    const struct shape *s = m->shape;
    const size_t pairs = (size_t)(tokens * s->top_k);
    struct run r = {.layer = m->layouts[layout], .routed = routed, .batch = moe_batch_init(), .stream = stream};
    void *x = host_numbers(s, tokens * s->hidden, seed, 1.7);
    int32_t *ids = malloc(pairs * sizeof(int32_t));
    float *weights = malloc(pairs * sizeof(float));
    assert_true(ids != NULL && weights != NULL);
    for (size_t i = 0; i < pairs; i++) {
        ids[i] = (int32_t)(next(&seed) % (uint64_t)s->experts);
        weights[i] = 0.05f + (float)next(&seed) * 0x1p-32f;
    }
    r.y_bytes = (size_t)(tokens * s->hidden) * moe_dtype_size(s->dtype);
    r.x = device_copy(x, r.y_bytes);
    r.ids = device_copy(ids, pairs * sizeof(int32_t));
    r.weights = device_copy(weights, pairs * sizeof(float));
    free(x);
    free(ids);
    free(weights);
    r.y = device_alloc(r.y_bytes);
    r.expected = device_alloc(r.y_bytes);
    r.workspace = make_workspace(r.layer, path, tokens, &r.workspace_bytes);
    r.batch.tokens = tokens;
    r.batch.dtype = s->dtype;
    r.batch.hidden_states = r.x;
    r.batch.output = r.y;
    r.batch.topk_ids = r.ids;
    r.batch.topk_weights = r.weights;
    r.batch.path = path;
    r.batch.config = config;
    r.batch.max_sms = max_sms;
    poison(&r);
    enqueue(&r);
    assert_int_equal(cudaMemcpyAsync(r.expected, r.y, r.y_bytes, cudaMemcpyDeviceToDevice, r.stream), cudaSuccess);
    assert_int_equal(moe_synchronize(ctx, r.stream), MOE_OK);
    return r;
}

static void free_run(struct run *r)
{
    moe_buffer_free(ctx, r->x);
    moe_buffer_free(ctx, r->ids);
    moe_buffer_free(ctx, r->weights);
    moe_buffer_free(ctx, r->y);
    moe_buffer_free(ctx, r->expected);
    moe_buffer_free(ctx, r->workspace);
}

static void compare(const struct run *r, struct test_differences *found, unsigned long long number)
{
    assert_int_equal(test_compare(r->y, r->expected, (int64_t)r->y_bytes, number, found, r->stream), cudaSuccess);
}

/* ---- Forwards in one graph ---- */

/* The layers of a model one after the other, in one workspace; every second one reads what the one before it wrote. */
static void forwards_in_one_graph(void **state)
{
    (void)state;
    enum { FORWARDS = 32, REPLAYS = 200 };
    static const int64_t tokens[] = {1, 64, 5, 16, 2, 33, 300};
    struct test_differences *found = make_differences();
    for (int32_t config = 1; next_config(&config); config++) {
        struct run runs[FORWARDS];
        size_t bytes = 0;
        cudaStream_t stream = streams[0];
        for (int i = 0; i < FORWARDS; i++) {
            const int32_t max_sms = i % 8 == 6 ? 2 : 0;
            runs[i] = make_run(&models[i / 2 % SHAPES], i % 3 % 2, MOE_PATH_DECODE, config, max_sms, false,
                               tokens[i / 2 % (int)(sizeof tokens / sizeof *tokens)], 500 + (uint64_t)i, stream);
            if (i % 2 == 1) { /* alone, once more, on the result of the one before */
                runs[i].batch.hidden_states = runs[i - 1].y;
                enqueue(&runs[i]);
                assert_int_equal(
                    cudaMemcpyAsync(runs[i].expected, runs[i].y, runs[i].y_bytes, cudaMemcpyDeviceToDevice, stream),
                    cudaSuccess);
            }
            bytes = runs[i].workspace_bytes > bytes ? runs[i].workspace_bytes : bytes;
        }
        void *workspace = device_alloc(bytes);
        assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
        assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        for (int i = 0; i < FORWARDS; i++)
            assert_int_equal(moe_forward(runs[i].layer, &runs[i].batch, workspace, bytes, stream), MOE_OK);
        cudaGraphExec_t exec = end_capture(stream);
        for (unsigned long long replay = 0; replay < REPLAYS; replay++) {
            for (int i = 0; i < FORWARDS; i++)
                assert_int_equal(cudaMemsetAsync(runs[i].y, 0xff, runs[i].y_bytes, stream), cudaSuccess);
            assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
            for (int i = 0; i < FORWARDS; i++)
                assert_int_equal(test_compare(runs[i].y, runs[i].expected, (int64_t)runs[i].y_bytes,
                                              replay * FORWARDS + (unsigned long long)i, found, stream),
                                 cudaSuccess);
        }
        const struct test_differences got = get_differences(found, stream);
        if (got.count != 0)
            fail_msg("configuration %d: %llu differences, the first in replay %llu, forward %llu", (int)config,
                     got.count, got.first / FORWARDS, got.first % FORWARDS);
        cudaGraphExecDestroy(exec);
        moe_buffer_free(ctx, workspace);
        for (int i = 0; i < FORWARDS; i++)
            free_run(&runs[i]);
    }
    moe_buffer_free(ctx, found);
}

/* ---- Others on the GPU ---- */

/* Several streams, one of them with prefill, all at it at once. */
static void streams_at_once(void **state)
{
    (void)state;
    enum { STREAMS = 4, ROUNDS = 20, CALLS = 10 };
    const int32_t bounds[] = {0, device.cores / 2, 2}; /* all SMs for each, half of them for each, many left over */
    struct test_differences *found = make_differences();
    for (int32_t config = 1; next_config(&config); config++)
        for (size_t bound = 0; bound < sizeof bounds / sizeof *bounds; bound++) {
            const int32_t sms = bounds[bound];
            struct run runs[STREAMS] = {
                make_run(&models[EVEN], 0, MOE_PATH_DECODE, config, sms, false, 64, 1, streams[0]),
                make_run(&models[EVEN], 0, MOE_PATH_DECODE, config, sms, true, 16, 2, streams[1]), /* the same layer */
                make_run(&models[ODD], 1, MOE_PATH_DECODE, config, sms, false, 7, 3, streams[2]),
                make_run(&models[EVEN], 0, MOE_PATH_PREFILL, 0, sms, false, 520, 4, streams[3]),
            };
            for (int round = 0; round < ROUNDS; round++) {
                for (int i = 0; i < STREAMS; i++)
                    poison(&runs[i]);
                for (int call = 0; call < CALLS; call++)
                    for (int i = 0; i < STREAMS; i++) {
                        enqueue(&runs[i]);
                        compare(&runs[i], found, (unsigned long long)i);
                    }
            }
            for (int i = 0; i < STREAMS; i++)
                assert_int_equal(moe_synchronize(ctx, runs[i].stream), MOE_OK);
            const struct test_differences got = get_differences(found, NULL);
            if (got.count != 0)
                fail_msg("configuration %d on %d SMs: %llu differences, the first stream that has one is %llu",
                         (int)config, (int)sms, got.count, got.first);
            for (int i = 0; i < STREAMS; i++)
                free_run(&runs[i]);
        }
    moe_buffer_free(ctx, found);
}

static void wait_a_moment(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
}

/* All SMs but `left` are taken until *stop is set. */
static void hold_sms(int32_t left, volatile int32_t *running, volatile int32_t *stop)
{
    const int32_t blocks = device.cores - left;
    *stop = 0;
    memset((int32_t *)running, 0, (size_t)device.cores * sizeof *running);
    assert_int_equal(test_hold_sms(blocks, ctx->exec.shared_bytes, running, stop, holder), cudaSuccess);
    for (int32_t b = 0; b < blocks; b++)
        while (running[b] == 0)
            wait_a_moment();
}

/* Two forwards with `left` SMs to share: they come to their end while the holder is still there, or after it. */
static void check_room(const struct run runs[2], int32_t left, bool after, volatile int32_t *running,
                       volatile int32_t *stop)
{
    for (int i = 0; i < 2; i++) {
        poison(&runs[i]);
        assert_int_equal(cudaStreamSynchronize(runs[i].stream), cudaSuccess);
    }
    hold_sms(left, running, stop);
    for (int i = 0; i < 2; i++)
        enqueue(&runs[i]);
    if (after)
        wait_a_moment();
    for (int i = 0; i < 2; i++)
        if (left == 0)
            assert_int_equal(cudaStreamQuery(runs[i].stream), cudaErrorNotReady); /* it does hold them all */
        else if (!after)
            assert_int_equal(cudaStreamSynchronize(runs[i].stream), cudaSuccess);
    if (cudaStreamQuery(holder) != cudaErrorNotReady)
        fail_msg("%d tokens%s, at most %d SMs, %d left: the other kernel ended first", (int)runs[0].batch.tokens,
                 runs[0].routed ? " with their routing" : "", (int)runs[0].batch.max_sms, (int)left);
    *stop = 1;
    assert_int_equal(cudaStreamSynchronize(holder), cudaSuccess);
}

/* Beside a kernel that does not end: on the SMs that it leaves forwards come to their end, where it leaves none they
 * wait for it. So they do where many tokens are routed on all SMs, which takes some of them at the same time: who has
 * little to give says so (max_sms). */
static void little_room(void **state)
{
    (void)state;
    static const int32_t bounds[] = {0, 1, 2, 3}, lefts[] = {0, 1, 2, 5};
    static const struct {
        int64_t tokens;
        bool routed;
    } batches[] = {{1, false}, {16, false}, {64, false}, {64, true}};
    enum { ROUTED_BY_ONE_BLOCK = 16 };
    volatile int32_t *stop, *running;
    void *pinned;
    assert_int_equal(cudaHostAlloc(&pinned, (size_t)(1 + device.cores) * sizeof(int32_t), cudaHostAllocMapped),
                     cudaSuccess);
    stop = pinned;
    running = stop + 1;
    struct test_differences *found = make_differences();
    hold_sms(device.cores - 1, running, stop); /* loads the kernel */
    *stop = 1;
    assert_int_equal(cudaStreamSynchronize(holder), cudaSuccess);

    for (int32_t config = 1; next_config(&config); config++)
        for (int layout = 0; layout < LAYOUTS; layout++)
            for (size_t bound = 0; bound < sizeof bounds / sizeof *bounds; bound++)
                for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
                    const bool at_once =
                        bounds[bound] == 0 && !batches[b].routed && batches[b].tokens > ROUTED_BY_ONE_BLOCK;
                    struct run runs[2];
                    for (int i = 0; i < 2; i++) {
                        runs[i] = make_run(&models[EVEN], layout, MOE_PATH_DECODE, config, bounds[bound],
                                           batches[b].routed, batches[b].tokens, 600 + (uint64_t)i, streams[i]);
                        compare(&runs[i], found, 0);
                    }
                    for (size_t l = 0; l < sizeof lefts / sizeof *lefts && lefts[l] < device.cores; l++) {
                        check_room(runs, lefts[l], lefts[l] == 0 || at_once, running, stop);
                        for (int i = 0; i < 2; i++)
                            compare(&runs[i], found, (unsigned long long)lefts[l]);
                    }
                    for (int i = 0; i < 2; i++)
                        assert_int_equal(moe_synchronize(ctx, runs[i].stream), MOE_OK);
                    const struct test_differences got = get_differences(found, NULL);
                    if (got.count != 0)
                        fail_msg("configuration %d, %d tokens, at most %d SMs: %llu differences, the first with %llu "
                                 "SMs left",
                                 (int)config, (int)batches[b].tokens, (int)bounds[bound], got.count, got.first);
                    for (int i = 0; i < 2; i++)
                        free_run(&runs[i]);
                }
    moe_buffer_free(ctx, found);
    cudaFreeHost(pinned);
}

/* ---- */

static void hangs(int signal)
{
    static const char text[] = "test_decode hangs\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(2);
    _exit(1);
}

static int watch(void **state)
{
    (void)state;
    alarm(MOST_SECONDS);
    return 0;
}

static int setup(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        assert_int_equal(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamCreateWithFlags(&holder, cudaStreamNonBlocking), cudaSuccess);
    for (int i = 0; i < SHAPES; i++)
        make_model(&models[i], &shapes[i]);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    for (int i = 0; i < SHAPES; i++)
        free_model(&models[i]);
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        cudaStreamDestroy(streams[i]);
    cudaStreamDestroy(holder);
    return 0;
}

int main(void)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &ctx) != MOE_OK)
        return SKIP;
    device = moe_device_info_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = 1;
    if (moe_context_device(ctx, &device) != MOE_OK || moe_context_create(&options, &cpu) != MOE_OK)
        return 1;
    signal(SIGALRM, hangs);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(batches_through_one_graph, watch),
        cmocka_unit_test_setup(batches_through_one_gate, watch),
        cmocka_unit_test_setup(forwards_in_one_graph, watch),
        cmocka_unit_test_setup(streams_at_once, watch),
        cmocka_unit_test_setup(little_room, watch),
    };
    int failed = cmocka_run_group_tests(tests, setup, teardown);
    moe_context_destroy(cpu);
    moe_context_destroy(ctx);
    return failed;
}
