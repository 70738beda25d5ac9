/* SPDX-License-Identifier: Apache-2.0 */
/* Layers and batches whose buffers have more than 2^31 elements, so that a 32-bit offset anywhere reads or writes the
 * wrong place. Some tokens of each are compared with fp64, the first and the last among them. Takes up to 30 GB of both
 * memories and some minutes, so only on request. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

enum { SAMPLES = 12 };

static const struct {
    const char *what;
    int64_t tokens, hidden, intermediate;
    int32_t experts, slots;
} shapes[] = {
    {"T * S * I, act and gate_up", 34000, 64, 8192, 4, 8},
    {"T * S * H, rows and down", 17000, 16384, 64, 4, 8},
    {"T * H, hidden states and output", 150000, 16384, 64, 4, 1},
    {"E * 2I * H and E * H * I, weights", 16, 4096, 8192, 65, 8},
};

static int64_t sample(const struct test_case *c, int i)
{
    return i * (c->tokens - 1) / (SAMPLES - 1);
}

/* expected[SAMPLES][H] and its typical sizes */
static void make_expected(const struct test_case *c, double *expected, double *typical)
{
    const unsigned stages = MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2;
    const int64_t hidden = c->hidden;
    double *in = must_alloc((size_t)hidden * 3 * sizeof(double)), *out = in + hidden, *size = out + hidden;
    double *work = must_alloc(rows64_work(c) * sizeof(double));

    memset(expected, 0, (size_t)hidden * SAMPLES * sizeof(double));
    memset(typical, 0, (size_t)hidden * SAMPLES * sizeof(double));
    for (int i = 0; i < SAMPLES; i++) {
        const int64_t token = sample(c, i);

        for (int64_t h = 0; h < hidden; h++)
            in[h] = moe_load_f32(c->x, c->dtype, token * hidden + h);
        for (int32_t s = 0; s < c->slots; s++) {
            const int64_t pair = token * c->slots + s;
            const double weight = c->weights[pair];

            rows64(c, expert_of(c->ids, c->ids_dtype, pair, c->experts), stages, 1, in, out, size, work);
            for (int64_t h = 0; h < hidden; h++) {
                expected[i * hidden + h] += weight * out[h];
                typical[i * hidden + h] = hypot(typical[i * hidden + h], weight * size[h]);
            }
        }
    }
    free(in);
    free(work);
}

struct buffers {
    void *w13, *w2, *input, *ids, *weights, *output, *workspace;
    size_t output_bytes;
};

static bool upload(struct checker *checker, const void *host, size_t bytes, void **device)
{
    return check_call(checker, moe_buffer_alloc(checker->ctx, bytes, device), "moe_buffer_alloc") &&
           check_call(checker, moe_copy_in(checker->ctx, *device, host, bytes, NULL), "moe_copy_in");
}

static bool run_path(struct checker *checker, const struct test_case *c, moe_layer *layer, struct buffers *b,
                     void *output)
{
    moe_limits limits = moe_limits_init();
    moe_batch batch = moe_batch_init();
    size_t bytes;

    limits.max_tokens = c->tokens;
    limits.top_k = c->slots;
    limits.path = checker->path;
    batch.tokens = c->tokens;
    batch.dtype = c->io_dtype;
    batch.hidden_states = b->input;
    batch.output = b->output;
    batch.topk_ids = b->ids;
    batch.topk_weights = b->weights;
    batch.top_k = c->slots;
    batch.path = checker->path;
    batch.config = checker->config;
    memset(output, 0xff, b->output_bytes);
    bool fine =
        check_call(checker, moe_copy_in(checker->ctx, b->output, output, b->output_bytes, NULL), "moe_copy_in") &&
        check_call(checker, moe_workspace_size(layer, &limits, &bytes), "moe_workspace_size") &&
        check_call(checker, moe_buffer_alloc(checker->ctx, bytes, &b->workspace), "workspace") &&
        check_call(checker, moe_experts_forward(layer, &batch, b->workspace, bytes, NULL), "moe_experts_forward") &&
        check_call(checker, moe_copy_out(checker->ctx, output, b->output, b->output_bytes, NULL), "moe_copy_out");
    moe_buffer_free(checker->ctx, b->workspace);
    b->workspace = NULL;
    return fine;
}

static void check_samples(struct checker *checker, const struct test_case *c, const void *output,
                          const double *expected, const double *typical)
{
    const double budget = budget_layer(checker->path, c, c->io_dtype);

    for (int i = 0; i < SAMPLES; i++) {
        const int64_t token = sample(c, i);
        const struct result_row row = {.got = output,
                                       .dtype = c->io_dtype,
                                       .first = token * c->hidden,
                                       .count = c->hidden,
                                       .expected = expected + i * c->hidden,
                                       .typical = typical + i * c->hidden};

        check_row(checker, &row, budget, "output[token %" PRId64 "]", token);
    }
}

/* In every layout and configuration of a path; both layouts give the same bits. */
static void check_path(struct checker *checker, const struct test_case *c, moe_path path, moe_layer *const *layers,
                       struct buffers *b, void *output, const double *expected, const double *typical)
{
    const moe_layer_desc desc = case_desc(c);
    void *other = must_alloc(b->output_bytes);
    const int64_t failures = checker->failures;

    for (int32_t config = 0; config <= count_configs(path); config++) {
        bool compare = false;

        for (int layout = MOE_LAYOUT_ROW_MAJOR; layout < LAYOUTS && checker->failures == failures; layout++) {
            if (!wants_config(checker, path, config) || !wants_layout(checker, path, &desc, (moe_layout)layout))
                continue;
            check_begin(checker, path, (moe_layout)layout, config);
            if (!can_run(checker, path, &desc, config)) {
                check_totals(checker)->unsupported++;
                continue;
            }
            check_totals(checker)->cases++;
            if (!run_path(checker, c, layers[layout], b, output))
                break;
            check_samples(checker, c, output, expected, typical);
            if (compare && memcmp(output, other, b->output_bytes) != 0)
                check_fail(checker, "output differs from that of row-major weights");
            memcpy(other, output, b->output_bytes);
            compare = true;
        }
    }
    free(other);
}

static void check_shape(struct checker *checker, struct test_case *c)
{
    const size_t matrix = (size_t)(c->experts * c->hidden * c->intermediate) * 2;
    const size_t pairs = (size_t)(c->tokens * c->slots);
    struct buffers b = {.output_bytes = (size_t)(c->tokens * c->hidden) * 2};
    moe_layer_weights weights = moe_layer_weights_init();
    moe_layer_desc desc = case_desc(c);
    moe_layer *layers[LAYOUTS] = {NULL};
    double *expected = must_alloc((size_t)c->hidden * SAMPLES * 2 * sizeof(double));
    double *typical = expected + c->hidden * SAMPLES;
    void *output = must_alloc(b.output_bytes);

    make_expected(c, expected, typical);
    if (upload(checker, c->w13, 2 * matrix, &b.w13) && upload(checker, c->w2, matrix, &b.w2) &&
        upload(checker, c->input, b.output_bytes, &b.input) &&
        upload(checker, c->ids, pairs * sizeof(int32_t), &b.ids) &&
        upload(checker, c->weights, pairs * sizeof(float), &b.weights) &&
        upload(checker, output, b.output_bytes, &b.output)) {
        weights.w13 = b.w13;
        weights.w2 = b.w2;
        moe_layer **row_major = &layers[MOE_LAYOUT_ROW_MAJOR], **packed = &layers[MOE_LAYOUT_PACKED];
        if (check_call(checker, moe_layer_create(checker->ctx, &desc, &weights, row_major), "moe_layer_create") &&
            (!wants_layout(checker, checker->only_path == MOE_PATH_COUNT ? MOE_PATH_AUTO : checker->only_path, &desc,
                           MOE_LAYOUT_PACKED) ||
             check_call(checker, moe_layer_pack(*row_major, packed), "moe_layer_pack")))
            for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++)
                if (wants_path(checker, (moe_path)p))
                    check_path(checker, c, (moe_path)p, layers, &b, output, expected, typical);
        moe_layer_destroy(*packed);
        moe_layer_destroy(*row_major);
    }
    void *all[] = {b.w13, b.w2, b.input, b.ids, b.weights, b.output};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        moe_buffer_free(checker->ctx, all[i]);
    free(expected);
    free(output);
}

int large(struct checker *checker)
{
    if (checker->ctx->info.device != MOE_DEVICE_CUDA) {
        fprintf(stderr, "checkmoe: --large is for a GPU\n");
        return 77;
    }
    checker->op = "large";
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct test_case c = {.seed = i + 1,
                              .tokens = shapes[i].tokens,
                              .hidden = shapes[i].hidden,
                              .intermediate = shapes[i].intermediate,
                              .experts = shapes[i].experts,
                              .top_k = 2,
                              .slots = shapes[i].slots,
                              .dtype = MOE_BF16,
                              .io_dtype = MOE_BF16,
                              .gate_dtype = MOE_BF16,
                              .logits_dtype = MOE_BF16,
                              .topk_weight_dtype = MOE_F32,
                              .ids_dtype = MOE_I32,
                              .routing = "random",
                              .gating = "random",
                              .activation = "random"};

        printf("large: %s: ", shapes[i].what);
        case_print(&c, stdout);
        printf("\n");
        case_fill(&c);
        check_shape(checker, &c);
        case_free(&c);
    }
    print_totals(checker);
    return checker->failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
