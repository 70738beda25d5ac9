/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: what can be captured in a CUDA graph gives the same bits when replayed with other inputs and other routing
 * as when called; what cannot says so; calls on two streams do not disturb each other; a device that is full is a
 * status, not an end. */
#include <cuda_runtime.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

#include "config/convert.h"
#include "runtime/internal.h"

/* Some 130 rows an expert, more for one and fewer for another: tiles of every size. GEMM 2's sums are so long that
 * prefill cuts its items. */
enum { TOKENS = 520, HIDDEN = 256, INTERMEDIATE = 2600, EXPERTS = 16, TOP_K = 4, SKIP = 77 };

static moe_context *ctx;
static moe_dtype dtype; /* of all tensors */
static size_t io_bytes;
static moe_layer *layer, *packed; /* NULL: no path reads packed weights here */
static void *gate, *w13, *w2, *x, *y, *ids, *weights, *logits;

static void fill(void *device, size_t count, uint64_t seed, float scale)
{
    const size_t bytes = count * moe_dtype_size(dtype);
    void *host = malloc(bytes);
    assert_non_null(host);
    for (size_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        moe_store_f32(host, dtype, (int64_t)i, (float)(int32_t)(seed >> 32) * 0x1p-31f * scale);
    }
    assert_int_equal(moe_copy_in(ctx, device, host, bytes, NULL), MOE_OK);
    free(host);
}

static void *device_alloc(size_t bytes)
{
    void *pointer;
    assert_int_equal(moe_buffer_alloc(ctx, bytes, &pointer), MOE_OK);
    return pointer;
}

static void *device_numbers(size_t count, uint64_t seed, float scale)
{
    void *pointer = device_alloc(count * moe_dtype_size(dtype));
    fill(pointer, count, seed, scale);
    return pointer;
}

static int setup_dtype(moe_dtype wanted)
{
    dtype = wanted;
    io_bytes = TOKENS * HIDDEN * moe_dtype_size(dtype);
    gate = device_numbers(EXPERTS * HIDDEN, 1, 0.2f);
    w13 = device_numbers((size_t)EXPERTS * 2 * INTERMEDIATE * HIDDEN, 2, 0.1f);
    w2 = device_numbers((size_t)EXPERTS * HIDDEN * INTERMEDIATE, 3, 0.1f);
    x = device_numbers(TOKENS * HIDDEN, 4, 1.0f);
    y = device_numbers(TOKENS * HIDDEN, 5, 1.0f);
    ids = device_alloc(TOKENS * TOP_K * sizeof(int32_t));
    weights = device_alloc(TOKENS * TOP_K * sizeof(float));
    logits = device_alloc(TOKENS * EXPERTS * sizeof(float));
    moe_layer_desc desc = moe_layer_desc_init(dtype);
    desc.hidden_size = HIDDEN;
    desc.intermediate_size = INTERMEDIATE;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    moe_layer_weights w = moe_layer_weights_init();
    w.gate = gate;
    w.w13 = w13;
    w.w2 = w2;
    packed = NULL;
    if (moe_layer_create(ctx, &desc, &w, &layer) != MOE_OK)
        return -1;
    const moe_status status = moe_layer_pack(layer, &packed);
    return status == MOE_OK || (dtype == MOE_F32 && status == MOE_ERROR_UNSUPPORTED) ? 0 : -1;
}

static int setup(void **state)
{
    (void)state;
    return setup_dtype(MOE_F32);
}

static int setup_bf16(void **state)
{
    (void)state;
    return setup_dtype(MOE_BF16);
}

static int teardown(void **state)
{
    (void)state;
    moe_layer_destroy(packed);
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
    batch.dtype = dtype;
    batch.hidden_states = x;
    batch.output = y;
    batch.topk_ids_out = ids;
    batch.topk_weights_out = weights;
    batch.router_logits_out = logits;
    batch.path = path;
    return batch;
}

static void *make_workspace(const moe_layer *on, moe_path path, size_t *bytes)
{
    moe_limits limits = moe_limits_init();
    limits.max_tokens = TOKENS;
    limits.path = path;
    assert_int_equal(moe_workspace_size(on, &limits, bytes), MOE_OK);
    return device_alloc(*bytes);
}

/* Other hidden states each time, and with them other ids and other counts. */
static void check_replay(const moe_layer *on, moe_path path, int32_t config)
{
    enum { IDS_BYTES = TOKENS * TOP_K * sizeof(int32_t) };
    size_t bytes;
    void *workspace = make_workspace(on, path, &bytes);
    moe_batch batch = make_batch(path);
    char *called = malloc(io_bytes), *replayed = malloc(io_bytes), *before = calloc(1, io_bytes);
    int32_t *called_ids = malloc(IDS_BYTES), *replayed_ids = malloc(IDS_BYTES), *before_ids = calloc(1, IDS_BYTES);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    batch.config = config;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    assert_int_equal(moe_forward(on, &batch, workspace, bytes, stream), MOE_OK);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    for (uint64_t seed = 100; seed < 120; seed++) {
        fill(x, TOKENS * HIDDEN, seed, 1.0f);
        assert_int_equal(cudaMemsetAsync(y, 0xff, io_bytes, stream), cudaSuccess);
        assert_int_equal(cudaMemsetAsync(ids, 0xff, IDS_BYTES, stream), cudaSuccess);
        assert_int_equal(cudaGraphLaunch(exec, stream), cudaSuccess);
        assert_int_equal(moe_copy_out(ctx, replayed, y, io_bytes, stream), MOE_OK);
        assert_int_equal(moe_copy_out(ctx, replayed_ids, ids, IDS_BYTES, stream), MOE_OK);
        assert_int_equal(cudaMemsetAsync(y, 0xff, io_bytes, stream), cudaSuccess);
        assert_int_equal(cudaMemsetAsync(workspace, 0xff, bytes, stream), cudaSuccess);
        assert_int_equal(moe_forward(on, &batch, workspace, bytes, stream), MOE_OK);
        assert_int_equal(moe_copy_out(ctx, called, y, io_bytes, stream), MOE_OK);
        assert_int_equal(moe_copy_out(ctx, called_ids, ids, IDS_BYTES, stream), MOE_OK);
        assert_memory_equal(called, replayed, io_bytes);
        assert_memory_equal(called_ids, replayed_ids, IDS_BYTES);
        assert_memory_not_equal(called, before, io_bytes);
        assert_memory_not_equal(called_ids, before_ids, IDS_BYTES);
        memcpy(before, called, io_bytes);
        memcpy(before_ids, called_ids, IDS_BYTES);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    moe_buffer_free(ctx, workspace);
    free(called);
    free(replayed);
    free(before);
    free(called_ids);
    free(replayed_ids);
    free(before_ids);
}

static void replay_is_the_call(void **state)
{
    (void)state;
    check_replay(layer, MOE_PATH_SIMPLE, 0);
}

/* What reads packed weights. */
static const moe_path fused[] = {MOE_PATH_DECODE, MOE_PATH_PREFILL};
enum { FUSED = sizeof fused / sizeof *fused };

/* From *config on, the first configuration of the path that this GPU can run; false: none. */
static bool next_config(moe_path path, int32_t *config)
{
    for (; *config == 0 || moe_path_config_name(path, *config) != NULL; ++*config)
        if (moe_choose_config(ctx, moe_path_info_get(path), *config, NULL) == MOE_OK)
            return true;
    return false;
}

static void fused_replay_is_the_call(void **state)
{
    (void)state;
    for (int p = 0; p < FUSED; p++)
        for (int32_t config = 0; next_config(fused[p], &config); config++) {
            check_replay(layer, fused[p], config);
            check_replay(packed, fused[p], config);
        }
}

enum { STREAMS = 2 };

/* A batch of its own on each stream: alone they say what is expected, then many of them run at once. */
static void check_streams(const moe_layer *const on[STREAMS], moe_path path, int32_t config, int32_t max_sms)
{
    moe_batch batches[STREAMS];
    cudaStream_t streams[STREAMS];
    void *workspaces[STREAMS], *inputs[STREAMS], *outputs[STREAMS];
    char *expected[STREAMS], *got = malloc(io_bytes);
    size_t bytes[STREAMS];
    assert_non_null(got);
    for (int i = 0; i < STREAMS; i++) {
        inputs[i] = device_numbers(TOKENS * HIDDEN, 200 + (uint64_t)i, 1.0f);
        outputs[i] = device_alloc(io_bytes);
        workspaces[i] = make_workspace(on[i], path, &bytes[i]);
        batches[i] = moe_batch_init();
        batches[i].tokens = TOKENS;
        batches[i].dtype = dtype;
        batches[i].hidden_states = inputs[i];
        batches[i].output = outputs[i];
        batches[i].path = path;
        batches[i].config = config;
        batches[i].max_sms = max_sms;
        expected[i] = malloc(io_bytes);
        assert_non_null(expected[i]);
        assert_int_equal(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking), cudaSuccess);
        assert_int_equal(moe_forward(on[i], &batches[i], workspaces[i], bytes[i], streams[i]), MOE_OK);
        assert_int_equal(moe_copy_out(ctx, expected[i], outputs[i], io_bytes, streams[i]), MOE_OK);
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < STREAMS; i++)
            assert_int_equal(cudaMemsetAsync(outputs[i], 0xff, io_bytes, streams[i]), cudaSuccess);
        for (int call = 0; call < 10; call++)
            for (int i = 0; i < STREAMS; i++)
                assert_int_equal(moe_forward(on[i], &batches[i], workspaces[i], bytes[i], streams[i]), MOE_OK);
        for (int i = 0; i < STREAMS; i++) {
            assert_int_equal(moe_copy_out(ctx, got, outputs[i], io_bytes, streams[i]), MOE_OK);
            assert_memory_equal(got, expected[i], io_bytes);
        }
    }
    for (int i = 0; i < STREAMS; i++) {
        cudaStreamDestroy(streams[i]);
        moe_buffer_free(ctx, workspaces[i]);
        moe_buffer_free(ctx, inputs[i]);
        moe_buffer_free(ctx, outputs[i]);
        free(expected[i]);
    }
    free(got);
}

static void streams_run_at_once(void **state)
{
    (void)state;
    moe_device_info info = moe_device_info_init();
    assert_int_equal(moe_context_device(ctx, &info), MOE_OK);
    const int32_t bounds[] = {0, info.cores / 2, 2}; /* all SMs for each, half of them for each, many left over */
    const moe_layer *const layouts[][STREAMS] = {{layer, layer}, {packed, packed}, {layer, packed}};
    for (int p = 0; p < FUSED; p++)
        for (int32_t config = 0; next_config(fused[p], &config); config++)
            for (size_t b = 0; b < sizeof bounds / sizeof *bounds; b++)
                for (size_t l = 0; l < sizeof layouts / sizeof *layouts; l++)
                    check_streams(layouts[l], fused[p], config, bounds[b]);
}

static void capture_is_refused(void **state)
{
    (void)state;
    const moe_path paths[] = {MOE_PATH_CUBLAS_LOOP, MOE_PATH_CUBLAS_GROUPED, MOE_PATH_PADDED};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        if (moe_path_available(ctx, paths[i], NULL, NULL, 0) != MOE_OK)
            continue;
        size_t bytes;
        void *workspace = make_workspace(layer, paths[i], &bytes);
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
        cmocka_unit_test_setup_teardown(fused_replay_is_the_call, setup_bf16, teardown),
        cmocka_unit_test_setup_teardown(streams_run_at_once, setup_bf16, teardown),
        cmocka_unit_test_setup_teardown(capture_is_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(full_device, setup, teardown),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe_context_destroy(ctx);
    return failed;
}
