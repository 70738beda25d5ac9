/* SPDX-License-Identifier: Apache-2.0 */
/* Times of the paths and their steps for one shape, routed evenly at random: medians of host time around a call and the
 * wait for it, so that on a GPU a launch is included. The steps share the work as in moe_forward, where one may do
 * another's. For changes to one kernel; `moe bench` has the ceilings. */
#include <inttypes.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

enum { MAX_RUNS = 101, MAX_STEPS = 16 };

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *times, int count)
{
    qsort(times, (size_t)count, sizeof *times, by_size);
    return times[count / 2];
}

static bool bench_path(struct checker *checker, const struct test_case *c, struct moe_call *call,
                       const struct moe_path_info *path)
{
    double times[MAX_STEPS][MAX_RUNS], whole[MAX_RUNS], begin = seconds_now();
    const double work = 6.0 * (double)(c->tokens * c->slots) * (double)c->hidden * (double)c->intermediate;
    void *workspace = NULL;
    int runs = 0, steps = 0;
    const size_t bytes = moe_workspace_carve(call, path, NULL);
    bool fine = check_call(checker, moe_buffer_alloc(checker->ctx, bytes, &workspace), "workspace");

    moe_workspace_carve(call, path, workspace);
    call->gate.x = call->x;
    call->plan.ids = call->gate.ids;
    call->plan.weights = call->gate.weights;
    while (fine && runs < MAX_RUNS && (runs < 3 || seconds_now() - begin < 3)) {
        double start = seconds_now(), last = start;

        steps = 0;
        for (const struct moe_step *step = path->steps; fine && step->run != NULL; step++, steps++) {
            fine =
                call_step(checker, step, call) && check_call(checker, moe_synchronize(checker->ctx, NULL), step->name);
            times[steps][runs] = seconds_now() - last;
            last = seconds_now();
        }
        whole[runs++] = last - start;
    }
    if (fine) {
        double all = median(whole, runs);

        printf("%-15s %-9s %2d %10.1f us  %8.1f GFLOP/s, %d runs:", moe_path_name(path->path),
               layout_names[checker->layout], checker->config, 1e6 * all, 1e-9 * work / all, runs);
        for (int i = 0; i < steps; i++)
            printf(" %s %.1f", path->steps[i].name, 1e6 * median(times[i], runs));
        printf("\n");
    }
    moe_buffer_free(checker->ctx, workspace);
    return fine;
}

int bench(struct checker *checker, const char *shape, moe_dtype dtype)
{
    struct test_case c = {.seed = 1,
                          .dtype = dtype,
                          .io_dtype = dtype,
                          .gate_dtype = dtype,
                          .logits_dtype = dtype,
                          .topk_weight_dtype = MOE_F32,
                          .ids_dtype = MOE_I32,
                          .renormalize = 1,
                          .routing = "random",
                          .gating = "random",
                          .activation = "random"};
    struct arena *arena = &checker->arena;
    moe_layer_weights weights = moe_layer_weights_init();
    moe_layer *layers[LAYOUTS] = {NULL};
    bool fine;

    if (sscanf(shape, "%" SCNd64 ",%" SCNd64 ",%" SCNd64 ",%" SCNd32 ",%" SCNd32, &c.tokens, &c.hidden, &c.intermediate,
               &c.experts, &c.top_k) != 5 ||
        c.tokens < 1 || c.hidden < 1 || c.intermediate < 1 || c.experts < 1 || c.top_k < 1 || c.top_k > c.experts ||
        c.top_k > MOE_MAX_TOP_K) {
        fprintf(stderr, "checkmoe: --bench takes tokens,hidden,intermediate,experts,top_k\n");
        return 2;
    }
    c.slots = c.top_k;
    checker->op = "bench";
    case_fill(&c);
    const size_t size = moe_dtype_size(dtype), matrix = (size_t)(c.experts * c.hidden * c.intermediate) * size;
    const size_t batch = (size_t)(c.tokens * c.hidden) * size;

    arena_begin(arena, checker->ctx);
    int gate = arena_add(arena, "gate", (size_t)(c.experts * c.hidden) * size, c.gate, 0);
    int w13 = arena_add(arena, "w13", 2 * matrix, c.w13, 0), w2 = arena_add(arena, "w2", matrix, c.w2, 0);
    int input = arena_add(arena, "input", batch, c.input, 0), output = arena_add(arena, "output", batch, NULL, 0);
    fine = check_call(checker, arena_ready(arena), "device memory") &&
           check_call(checker, arena_send(arena, 0), "copying to the device");
    const moe_layer_desc desc = case_desc(&c);
    if (fine) {
        weights.gate = arena_device(arena, gate);
        weights.w13 = arena_device(arena, w13);
        weights.w2 = arena_device(arena, w2);
        fine = check_call(checker, moe_layer_create(checker->ctx, &desc, &weights, &layers[MOE_LAYOUT_ROW_MAJOR]),
                          "moe_layer_create");
    }
    for (int p = MOE_PATH_AUTO + 1; fine && p < MOE_PATH_COUNT; p++)
        for (int layout = MOE_LAYOUT_ROW_MAJOR; fine && layout < LAYOUTS; layout++)
            for (int32_t config = 0; fine && config <= count_configs((moe_path)p); config++) {
                struct moe_call call;
                struct moe_error error = {{0}};

                if (!wants_path(checker, (moe_path)p) ||
                    !wants_layout(checker, (moe_path)p, &desc, (moe_layout)layout) ||
                    !wants_config(checker, (moe_path)p, config) || !can_run(checker, (moe_path)p, &desc, config))
                    continue;
                if (layers[layout] == NULL)
                    fine = check_call(checker, moe_layer_pack(layers[MOE_LAYOUT_ROW_MAJOR], &layers[layout]),
                                      "moe_layer_pack");
                if (!fine)
                    break;
                check_begin(checker, (moe_path)p, (moe_layout)layout, config);
                moe_call_shape(&call, layers[layout], c.tokens, c.top_k, dtype);
                call.stages = MOE_STAGES_ALL;
                call.input = arena_device(arena, input);
                call.output = arena_device(arena, output);
                call.max_sms = checker->max_sms > 0 ? checker->max_sms : 0;
                call.config = config;
                call.error = &error;
                fine = bench_path(checker, &c, &call, moe_path_info_get((moe_path)p));
            }
    moe_layer_destroy(layers[MOE_LAYOUT_PACKED]);
    moe_layer_destroy(layers[MOE_LAYOUT_ROW_MAJOR]);
    case_free(&c);
    return fine ? EXIT_SUCCESS : EXIT_FAILURE;
}
