/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: what can be captured in a CUDA graph gives the same bits when replayed with other inputs and other routing
 * as when called; what cannot says so; a device that is full is a status, not an end. */
#include <cuda_runtime.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "moe.h"

enum { TOKENS = 70, HIDDEN = 256, INTERMEDIATE = 192, EXPERTS = 16, TOP_K = 4, SKIP = 77 };

static moe_context *ctx;
static moe_layer *layer;
static void *gate, *w13, *w2, *x, *y, *ids, *weights, *logits;
static const size_t io_bytes = TOKENS * HIDDEN * sizeof(float);

static void fill(void *device, size_t count, uint64_t seed, float scale)
{
    float *host = malloc(count * sizeof *host);
    assert_non_null(host);
    for (size_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        host[i] = (float)(int32_t)(seed >> 32) * 0x1p-31f * scale;
    }
    assert_int_equal(moe_copy_in(ctx, device, host, count * sizeof *host, NULL), MOE_OK);
    free(host);
}

static void *device_floats(size_t count, uint64_t seed, float scale)
{
    void *pointer;
    assert_int_equal(moe_buffer_alloc(ctx, count * sizeof(float), &pointer), MOE_OK);
    fill(pointer, count, seed, scale);
    return pointer;
}

static int setup(void **state)
{
    (void)state;
    gate = device_floats(EXPERTS * HIDDEN, 1, 0.2f);
    w13 = device_floats((size_t)EXPERTS * 2 * INTERMEDIATE * HIDDEN, 2, 0.1f);
    w2 = device_floats((size_t)EXPERTS * HIDDEN * INTERMEDIATE, 3, 0.1f);
    x = device_floats(TOKENS * HIDDEN, 4, 1.0f);
    y = device_floats(TOKENS * HIDDEN, 5, 1.0f);
    ids = device_floats(TOKENS * TOP_K, 6, 1.0f);
    weights = device_floats(TOKENS * TOP_K, 7, 1.0f);
    logits = device_floats(TOKENS * EXPERTS, 8, 1.0f);
    moe_layer_desc desc = moe_layer_desc_init(MOE_F32);
    desc.hidden_size = HIDDEN;
    desc.intermediate_size = INTERMEDIATE;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    moe_layer_weights w = moe_layer_weights_init();
    w.gate = gate;
    w.w13 = w13;
    w.w2 = w2;
    return moe_layer_create(ctx, &desc, &w, &layer) == MOE_OK ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    moe_layer_destroy(layer);
    void *all[] = {gate, w13, w2, x, y, ids, weights, logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        moe_buffer_free(ctx, all[i]);
    return 0;
}

static moe_batch make_batch(moe_path path)
{
    moe_batch batch = moe_batch_init();
    batch.tokens = TOKENS;
    batch.dtype = MOE_F32;
    batch.hidden_states = x;
    batch.output = y;
    batch.topk_ids_out = ids;
    batch.topk_weights_out = weights;
    batch.router_logits_out = logits;
    batch.path = path;
    return batch;
}

static void *make_workspace(moe_path path, size_t *bytes)
{
    void *workspace;
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS;
    limits.path = path;
    assert_int_equal(moe_workspace_size(layer, &limits, bytes), MOE_OK);
    assert_int_equal(moe_buffer_alloc(ctx, *bytes, &workspace), MOE_OK);
    return workspace;
}

static void replay_is_the_call(void **state)
{
    (void)state;
    size_t bytes;
    void *workspace = make_workspace(MOE_PATH_SIMPLE, &bytes);
    moe_batch batch = make_batch(MOE_PATH_SIMPLE);
    float *called = malloc(io_bytes), *replayed = malloc(io_bytes), *before = calloc(1, io_bytes);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    assert_int_equal(moe_forward(layer, &batch, workspace, bytes, stream), MOE_OK);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (uint64_t seed = 100; seed < 120; seed++) {
        fill(x, TOKENS * HIDDEN, seed, 1.0f);
        assert_int_equal(cudaMemset(y, 0xff, io_bytes), cudaSuccess);
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(moe_copy_out(ctx, replayed, y, io_bytes, stream), MOE_OK);
        assert_int_equal(cudaMemset(y, 0xff, io_bytes), cudaSuccess);
        assert_int_equal(cudaMemset(workspace, 0xff, bytes), cudaSuccess);
        assert_int_equal(moe_forward(layer, &batch, workspace, bytes, stream), MOE_OK);
        assert_int_equal(moe_copy_out(ctx, called, y, io_bytes, stream), MOE_OK);
        assert_memory_equal(called, replayed, io_bytes);
        assert_memory_not_equal(called, before, io_bytes);
        memcpy(before, called, io_bytes);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    moe_buffer_free(ctx, workspace);
    free(called);
    free(replayed);
    free(before);
}

static void capture_is_refused(void **state)
{
    (void)state;
    const moe_path paths[] = {MOE_PATH_CUBLAS_LOOP, MOE_PATH_CUBLAS_GROUPED, MOE_PATH_PADDED};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        if (moe_path_available(ctx, paths[i], NULL, NULL, 0) != MOE_OK)
            continue;
        size_t bytes;
        void *workspace = make_workspace(paths[i], &bytes);
        moe_batch batch = make_batch(paths[i]);
        cudaStream_t stream;
        cudaGraph_t graph = NULL;
        size_t nodes = 1;
        assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
        assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
        assert_int_equal(moe_forward(layer, &batch, workspace, bytes, stream), MOE_ERROR_CAPTURE);
        /* The capture is still good, and empty: nothing was enqueued. */
        assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
        assert_int_equal(cudaGraphGetNodes(graph, NULL, &nodes), cudaSuccess);
        assert_int_equal(nodes, 0);
        cudaGraphDestroy(graph);
        assert_int_equal(moe_forward(layer, &batch, workspace, bytes, stream), MOE_OK);
        assert_int_equal(moe_synchronize(ctx, stream), MOE_OK);
        cudaStreamDestroy(stream);
        moe_buffer_free(ctx, workspace);
    }
}

static void full_device(void **state)
{
    (void)state;
    size_t free_bytes, total;
    void *hog = NULL, *more = NULL;
    char text[256];
    assert_int_equal(cudaMemGetInfo(&free_bytes, &total), cudaSuccess);
    assert_int_equal(moe_buffer_alloc(ctx, total * 2, &more), MOE_ERROR_DEVICE_MEMORY);
    moe_last_error(ctx, text, sizeof text);
    assert_non_null(strstr(text, "bytes"));
    assert_null(more);
    assert_int_equal(moe_buffer_alloc(ctx, free_bytes - ((size_t)256 << 20), &hog), MOE_OK);
    assert_int_equal(moe_buffer_alloc(ctx, (size_t)1 << 30, &more), MOE_ERROR_DEVICE_MEMORY);
    moe_buffer_free(ctx, hog);
    replay_is_the_call(state); /* and the failure has left nothing behind */
}

int main(void)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &ctx) != MOE_OK)
        return SKIP;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(replay_is_the_call, setup, teardown),
        cmocka_unit_test_setup_teardown(capture_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(full_device, setup, teardown),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe_context_destroy(ctx);
    return failed;
}
