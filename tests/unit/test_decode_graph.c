/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: a thousand batches through one captured graph of the decode path, with other tokens and other routing each
 * time. Each is right, and the same bits every time. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#include "config/convert.h"
#include "kernels/budget.h"
#include "tests/unit/decode_case.h"

enum { MAX_THREADS = 64 };

static moe_context *cpu;

/* ---- The batches, each in one block of memory: x, ids, weights, output ---- */

struct batches {
    const struct case_model *model;
    moe_layer *reference; /* the same weights on the CPU */
    bool routed;          /* by the caller: moe_experts_forward; else the gate says ids and weights */
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
    const struct case_shape *s = b->model->shape;
    const int64_t most = case_random(seed) % 8 == 0 || b->tokens < 8 ? b->tokens : 8;
    const int64_t tokens = i == 0 ? b->tokens : 1 + (int64_t)(case_random(seed) % (uint64_t)most);
    const int32_t first = (int32_t)(case_random(seed) % (uint64_t)s->experts);
    for (int64_t pair = 0; pair < b->tokens * s->top_k; pair++) {
        const int32_t slot = (int32_t)(pair % s->top_k);
        const uint64_t random = case_random(seed);
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
        weights[pair] = 0.05f + 0.95f * (float)case_random(seed) * 0x1p-32f;
    }
}

static struct batches make_batches(const struct case_model *model, bool routed, int64_t count, int64_t tokens)
{
    const struct case_shape *s = model->shape;
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
        case_fill(record, s->dtype, tokens * s->hidden, case_random(&seed), i % 16 == 5 ? 0 : 1.7); /* some all zero */
        /* Some are the same token throughout: a gate chooses the fewest experts. */
        for (int64_t t = 1; i % 16 == 9 && t < tokens; t++)
            memcpy(record + (size_t)t * x_bytes / tokens, record, x_bytes / tokens);
        if (routed)
            draw_routing(&b, i, &seed, (int32_t *)(record + b.ids_at), (float *)(record + b.weights_at));
    }
    const moe_layer_desc desc = case_desc(s);
    moe_layer_weights weights = moe_layer_weights_init();
    weights.gate = model->gate;
    weights.w13 = model->w13;
    weights.w2 = model->w2;
    assert_int_equal(moe_layer_create(cpu, &desc, &weights, &b.reference), MOE_OK);
    b.records = case_copy(b.host, (size_t)count * b.bytes);
    b.current = case_copy(b.host, b.bytes);
    return b;
}

static void free_batches(struct batches *b)
{
    moe_layer_destroy(b->reference);
    moe_buffer_free(case_ctx, b->records);
    moe_buffer_free(case_ctx, b->current);
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
    void *workspace = case_workspace(layer, MOE_PATH_DECODE, b->tokens, &bytes);
    cudaStream_t stream = case_streams[0];
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
    assert_int_equal(moe_copy_out(case_ctx, b->host, b->records, (size_t)b->count * b->bytes, stream), MOE_OK);
    moe_buffer_free(case_ctx, workspace);
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
    const struct case_shape *s = b->model->shape;
    const int64_t width = b->tokens * s->hidden;
    moe_limits limits = moe_limits_init();
    moe_batch batch = moe_batch_init();
    size_t bytes;
    void *workspace = NULL;
    limits.max_tokens = b->tokens;
    limits.path = MOE_PATH_REFERENCE;
    float *x = aligned_alloc(256, padded((size_t)width * sizeof(float)));
    job->failures = x == NULL || moe_workspace_size(b->reference, &limits, &bytes) != MOE_OK ||
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
        job->failures += moe_experts_forward(b->reference, &batch, workspace, bytes, NULL) != MOE_OK;
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
    const struct case_shape *s = b->model->shape;
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
    void *workspace = case_workspace(layer, MOE_PATH_DECODE, b->tokens, &bytes);
    struct test_differences *found = case_differences();
    cudaStream_t stream = case_streams[0];
    assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    enqueue_current(b, layer, config, workspace, bytes, stream);
    cudaGraphExec_t exec = case_end_capture(stream);
    for (int64_t run = 0; run < rounds * b->count; run++) {
        const int64_t i = run % b->count;
        swap_in(b, i, stream);
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(
            test_compare(b->current, record_of(b, i), (int64_t)b->bytes, (unsigned long long)run, found, stream),
            cudaSuccess);
    }
    const struct test_differences got = case_found(found, stream);
    if (got.count != 0)
        fail_msg("%s layer, configuration %d, batches of %d tokens: %llu differences, the first in round %llu, batch "
                 "%llu",
                 b->model->shape->name, (int)config, (int)b->tokens, got.count,
                 got.first / (unsigned long long)b->count, got.first % (unsigned long long)b->count);
    /* And what differs is found. */
    assert_int_equal(cudaMemsetAsync((char *)b->current + b->output_at, 1, 16, stream), cudaSuccess);
    assert_int_equal(test_compare(b->current, record_of(b, b->count - 1), (int64_t)b->bytes, 7, found, stream),
                     cudaSuccess);
    const struct test_differences planted = case_found(found, stream);
    assert_true(planted.count == 1 && planted.first == 7);
    cudaGraphExecDestroy(exec);
    moe_buffer_free(case_ctx, found);
    moe_buffer_free(case_ctx, workspace);
}

/* The layout that is the default, in the configuration that the path takes, the full number of rounds; the others a
 * few. Row-major weights give the same bits. */
static void check_batches(int shape, bool routed, int64_t count, int64_t tokens)
{
    const struct case_model *model = &case_models[shape];
    struct batches b = make_batches(model, routed, count, tokens);
    char *first = NULL; /* ids and weights are the same in every configuration */
    int rounds = 100;
    for (int32_t config = 1; case_next_config(MOE_PATH_DECODE, &config); config++) {
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
        for (int layout = 0; layout < CASE_LAYOUTS; layout++) {
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
    check_batches(CASE_EVEN, true, 1000, 64);
    check_batches(CASE_ODD, true, 200, 64);
}

/* Up to four tokens' results pass between the GEMMs without a word that they are there. Where the FFN routes so do the
 * partial sums of up to four rows, while those of more pass in another way. */
static void batches_of_few_tokens(void **state)
{
    (void)state;
    for (int64_t tokens = 1; tokens <= 5; tokens++) {
        check_batches(CASE_EVEN, true, 200, tokens);
        check_batches(CASE_ODD, true, 200, tokens);
        check_batches(CASE_ODD, false, 50, tokens);
    }
    for (int64_t tokens = 6; tokens <= 17; tokens += 5)
        check_batches(CASE_ODD, false, 50, tokens);
}

static void batches_through_one_gate(void **state)
{
    (void)state;
    check_batches(CASE_EVEN, false, 1000, 8);
    check_batches(CASE_ODD, false, 200, 3);
    check_batches(CASE_MANY, false, 100, 16);
}

static int setup(void **state)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = 1;
    assert_int_equal(moe_context_create(&options, &cpu), MOE_OK);
    return case_setup(state);
}

static int teardown(void **state)
{
    moe_context_destroy(cpu);
    return case_teardown(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(batches_through_one_graph, case_watch),
        cmocka_unit_test_setup(batches_of_few_tokens, case_watch),
        cmocka_unit_test_setup(batches_through_one_gate, case_watch),
    };
    const int status = case_open();
    if (status != 0)
        return status;
    const int failed = cmocka_run_group_tests(tests, setup, teardown);
    case_close();
    return failed;
}
