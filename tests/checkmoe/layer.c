/* SPDX-License-Identifier: Apache-2.0 */
/* Whole calls through the public interface: moe_experts_forward with the case's ids and weights, moe_route, and
 * moe_forward, which must do what the two do one after the other. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

/* Region numbers in the arena. */
struct setup {
    moe_layer *layer, *packed; /* the case's weights as they are, and packed if they run so */
    int gate, w13, w2, input, ids, weights, output, logits_out, ids_out, weights_out, workspace;
    size_t workspace_bytes;
};

enum call { CALL_EXPERTS, CALL_ROUTE, CALL_FORWARD };

/* What a workspace must have for the layer, which need not have its weights yet. */
static bool size_workspace(struct checker *checker, const struct test_case *c, struct setup *s)
{
    moe_limits limits = moe_limits_init();
    moe_layer_desc desc = case_desc(c);
    moe_layer_weights weights = moe_layer_weights_init();
    moe_layer *layer = NULL;

    limits.max_tokens = c->tokens + c->spare_tokens;
    limits.top_k = c->level == LEVEL_EXPERTS ? c->slots : 0;
    limits.path = checker->path;
    weights.w13 = weights.w2 = checker->arena.device;
    weights.layout = checker->layout;
    bool fine = check_call(checker, moe_layer_create(checker->ctx, &desc, &weights, &layer), "moe_layer_create") &&
                check_call(checker, moe_workspace_size(layer, &limits, &s->workspace_bytes), "moe_workspace_size");
    moe_layer_destroy(layer);
    return fine;
}

static bool set_up(struct checker *checker, const struct test_case *c, struct setup *s)
{
    struct arena *arena = &checker->arena;
    const size_t size = moe_dtype_size(c->dtype), tokens = (size_t)c->tokens, experts = (size_t)c->experts;
    const size_t hidden = (size_t)c->hidden, width = (size_t)c->intermediate;
    const size_t sixteen = c->misaligned ? 16 : 0, four = c->misaligned ? 4 : 0;
    const size_t id_size = moe_dtype_size(c->ids_dtype), pairs = tokens * (size_t)c->slots;

    arena_begin(arena, checker->ctx);
    s->gate = arena_add(arena, "gate", experts * hidden * moe_dtype_size(c->gate_dtype), c->gate, sixteen);
    s->w13 = arena_add(arena, "w13", experts * 2 * width * hidden * size, c->w13, sixteen);
    s->w2 = arena_add(arena, "w2", experts * hidden * width * size, c->w2, sixteen);
    s->input = arena_add(arena, "hidden_states", tokens * hidden * moe_dtype_size(c->io_dtype), c->input, sixteen);
    s->ids = arena_add(arena, "topk_ids", pairs * id_size, c->ids, c->misaligned ? id_size : 0);
    s->weights = arena_add(arena, "topk_weights", pairs * sizeof(float), c->weights, four);
    s->output = arena_add(arena, "output", tokens * hidden * moe_dtype_size(c->io_dtype), NULL, sixteen);
    s->logits_out = arena_add(arena, "router_logits_out", tokens * experts * sizeof(float), NULL, four);
    s->ids_out = arena_add(arena, "topk_ids_out", tokens * (size_t)c->top_k * sizeof(int32_t), NULL, four);
    s->weights_out = arena_add(arena, "topk_weights_out", tokens * (size_t)c->top_k * sizeof(float), NULL, four);
    if (!check_call(checker, arena_ready(arena), "device memory") || !size_workspace(checker, c, s))
        return false;
    s->workspace = arena_add(arena, "workspace", s->workspace_bytes, NULL, 0);
    return check_call(checker, arena_ready(arena), "device memory") &&
           make_layers(checker, c, c->level == LEVEL_FORWARD ? s->gate : -1, s->w13, s->w2, &s->layer, &s->packed);
}

/* Plants the bug asked for into what came back, if it fits. `run` counts the repeats. */
static void plant(struct checker *checker, const struct test_case *c, const struct setup *s, enum call call, int run)
{
    struct arena *arena = &checker->arena;
    int32_t *ids = arena_host(arena, s->ids_out);
    float *weights = arena_host(arena, s->weights_out);
    int64_t last = c->tokens * c->top_k - 1;

    if (call == CALL_ROUTE && last >= 0 && checker->broken == BREAK_ID && c->experts > 1) {
        ids[last] = (ids[last] + 1) % c->experts;
        checker->planted = true;
    }
    if (call == CALL_ROUTE && last >= 0 && checker->broken == BREAK_WEIGHT && weights[last] > 1e-3f) {
        weights[last] *= 1.02f;
        checker->planted = true;
    }
    if (checker->broken == BREAK_GUARD) {
        ((uint8_t *)arena_host(arena, s->workspace))[s->workspace_bytes] ^= 1;
        checker->planted = true;
    }
    if (checker->broken == BREAK_INPUT) {
        ((uint8_t *)arena_host(arena, s->w2))[0] ^= 1;
        checker->planted = true;
    }
    if (call != CALL_ROUTE)
        plant_output(checker, s->output, c, run);
}

/* One call on fresh poison, its results in the arena's image. */
static bool run_call(struct checker *checker, const struct test_case *c, const struct setup *s, enum call call,
                     bool outputs, int run)
{
    struct arena *arena = &checker->arena;
    const moe_layer *layer = s->packed != NULL ? s->packed : s->layer;
    moe_batch batch = moe_batch_init();
    void *workspace = arena_device(arena, s->workspace);
    moe_status status;
    uint64_t may_write = UINT64_C(1) << s->workspace;

    if (!check_call(checker, arena_send(arena, run % 2 ? 0x5a : 0xff), "copying to the device"))
        return false;
    batch.tokens = c->tokens;
    batch.dtype = c->io_dtype;
    batch.hidden_states = arena_device(arena, s->input);
    batch.path = checker->path;
    batch.config = checker->config;
    batch.max_sms = checker->max_sms >= 0 ? checker->max_sms : c->max_sms;
    if (call != CALL_ROUTE) {
        batch.output = arena_device(arena, s->output);
        may_write |= UINT64_C(1) << s->output;
    }
    if (call == CALL_EXPERTS) {
        batch.topk_ids = arena_device(arena, s->ids);
        batch.topk_weights = arena_device(arena, s->weights);
        batch.ids_dtype = c->ids_dtype == MOE_I32 ? MOE_DTYPE_NONE : c->ids_dtype;
        batch.top_k = c->slots == c->top_k ? 0 : c->slots;
    } else if (outputs) {
        batch.router_logits_out = arena_device(arena, s->logits_out);
        batch.topk_ids_out = arena_device(arena, s->ids_out);
        batch.topk_weights_out = arena_device(arena, s->weights_out);
        may_write |= UINT64_C(1) << s->logits_out | UINT64_C(1) << s->ids_out | UINT64_C(1) << s->weights_out;
    }
    status = call == CALL_EXPERTS ? moe_experts_forward(layer, &batch, workspace, s->workspace_bytes, NULL)
             : call == CALL_ROUTE ? moe_route(layer, &batch, workspace, s->workspace_bytes, NULL)
                                  : moe_forward(layer, &batch, workspace, s->workspace_bytes, NULL);
    if (!check_call(checker, status, checker->op) ||
        !check_call(checker, moe_synchronize(checker->ctx, NULL), "moe_synchronize") ||
        !check_call(checker, arena_fetch(arena), "copying from the device"))
        return false;
    plant(checker, c, s, call, run);
    return check_arena(checker, may_write);
}

/* How much the expert of slot s counts for in this token, all its slots together: their errors are the same, not
 * independent. 0 for all but the first of these slots. */
static double expert_size(const struct expert_rows *rows, const float *weights, int64_t token, int32_t s)
{
    const int32_t *expert = rows->expert + token * rows->slots;
    double sum = 0;

    for (int32_t other = 0; other < rows->slots; other++)
        if (expert[other] == expert[s]) {
            if (other < s)
                return 0;
            sum += fabs(weights[token * rows->slots + other]);
        }
    return sum;
}

/* The output against what the experts give in fp64 with these ids and weights. */
static void check_output(struct checker *checker, const struct test_case *c, const void *output,
                         const struct expert_rows *rows, const float *weights)
{
    const int64_t hidden = c->hidden;
    const double budget = budget_layer(checker->path, c, c->io_dtype);
    double *expected = must_alloc((size_t)hidden * 2 * sizeof(double)), *typical = expected + hidden;

    for (int64_t t = 0; t < c->tokens; t++) {
        memset(expected, 0, (size_t)hidden * 2 * sizeof(double));
        for (int32_t s = 0; s < rows->slots; s++) {
            const int64_t pair = t * rows->slots + s;
            const double size = expert_size(rows, weights, t, s);

            for (int64_t h = 0; rows->expert[pair] >= 0 && h < hidden; h++) {
                expected[h] += weights[pair] * rows->down[pair * hidden + h];
                typical[h] += size * size * rows->typical[pair * hidden + h] * rows->typical[pair * hidden + h];
            }
        }
        for (int64_t h = 0; h < hidden; h++)
            typical[h] = sqrt(typical[h]);

        const struct result_row row = {.got = output,
                                       .dtype = c->io_dtype,
                                       .first = t * hidden,
                                       .count = hidden,
                                       .expected = expected,
                                       .typical = typical,
                                       .any_f16 = c->dtype == MOE_F16 || c->io_dtype == MOE_F16};
        if (!check_row(checker, &row, budget, "output[token %" PRId64 "] (first slot: expert %d, weight %g)", t,
                       rows->expert[t * rows->slots], weights[t * rows->slots]))
            break;
    }
    free(expected);
}

static void check_repeats(struct checker *checker, const struct test_case *c, const struct setup *s, enum call call,
                          bool outputs, int region)
{
    const size_t bytes = checker->arena.regions[region].bytes;
    uint8_t *first = memcpy(must_alloc(bytes), arena_host(&checker->arena, region), bytes);

    for (int run = 1; run < c->repeats; run++) {
        if (!run_call(checker, c, s, call, outputs, run))
            break;
        const uint8_t *again = arena_host(&checker->arena, region);
        if (memcmp(first, again, bytes) != 0) {
            check_fail(checker, "%s differs from the first run's from byte %zu on (run %d, other memory contents)",
                       checker->arena.regions[region].name, first_difference(first, again, bytes), run + 1);
            break;
        }
    }
    free(first);
}

/* Where the k-th and a later expert are two steps or more apart in fp64, they must not have changed places. */
static bool check_id_order(struct checker *checker, const struct test_case *c, const int32_t *ids)
{
    double *logits = must_alloc((size_t)c->experts * 2 * sizeof(double)), *tolerance = logits + c->experts;
    bool *taken = must_alloc((size_t)c->experts), fine = true;

    for (int64_t t = 0; fine && t < c->tokens; t++) {
        memset(taken, 0, (size_t)c->experts);
        logits64(c, t, logits, tolerance);
        for (int32_t k = 0; fine && k < c->top_k; k++) {
            int32_t id = ids[t * c->top_k + k];

            if (id < 0 || id >= c->experts || taken[id]) {
                check_fail(checker, "topk_ids_out[token %" PRId64 "][%d] is %d, out of range or twice", t, k, id);
                fine = false;
                break;
            }
            taken[id] = true;
            for (int32_t e = 0; fine && e < c->experts; e++) {
                double step = 2 * budget_ulp(fmax(fabs(logits[id]), fabs(logits[e])), c->logits_dtype);
                if (!taken[e] && logits[e] - logits[id] >= fmax(step, tolerance[e] + tolerance[id] + step / 2)) {
                    check_fail(checker,
                               "topk_ids_out[token %" PRId64 "][%d] is expert %d of logit %.9g, but expert %d has %.9g",
                               t, k, id, logits[id], e, logits[e]);
                    fine = false;
                }
            }
        }
    }
    free(logits);
    free(taken);
    return fine;
}

static void check_forward(struct checker *checker, const struct test_case *c, struct setup *s, struct expert_rows *rows)
{
    struct arena *arena = &checker->arena;
    const size_t pairs = (size_t)(c->tokens * c->top_k);
    int32_t *ids = must_alloc(pairs * sizeof(int32_t));
    float *weights = must_alloc(pairs * sizeof(float));

    checker->op = "moe_route";
    if (!run_call(checker, c, s, CALL_ROUTE, true, 0))
        goto done;
    memcpy(ids, arena_host(arena, s->ids_out), pairs * sizeof(int32_t));
    memcpy(weights, arena_host(arena, s->weights_out), pairs * sizeof(float));
    if (!check_logits(checker, arena_host(arena, s->logits_out)) || !check_id_order(checker, c, ids) ||
        !check_topk(checker, arena_host(arena, s->logits_out), ids, weights))
        goto done;

    checker->op = "moe_forward";
    if (!run_call(checker, c, s, CALL_FORWARD, c->outputs_given, 0))
        goto done;
    if (c->outputs_given && (memcmp(ids, arena_host(arena, s->ids_out), pairs * sizeof(int32_t)) != 0 ||
                             memcmp(weights, arena_host(arena, s->weights_out), pairs * sizeof(float)) != 0)) {
        check_fail(checker, "moe_forward and moe_route give different ids or weights");
        goto done;
    }
    expert_rows_make(rows, c, ids, MOE_I32, c->top_k);
    check_output(checker, c, arena_host(arena, s->output), rows, weights);
    check_repeats(checker, c, s, CALL_FORWARD, c->outputs_given, s->output);
done:
    free(ids);
    free(weights);
}

void check_layer(struct checker *checker, const struct test_case *c, struct expert_rows *rows)
{
    const int64_t failures = checker->failures;
    struct setup s = {0};

    checker->op = "set-up";
    if (set_up(checker, c, &s)) {
        if (c->level == LEVEL_FORWARD) {
            check_forward(checker, c, &s, rows);
        } else {
            checker->op = "moe_experts_forward";
            if (run_call(checker, c, &s, CALL_EXPERTS, false, 0)) {
                expert_rows_make(rows, c, c->ids, c->ids_dtype, c->slots);
                check_output(checker, c, arena_host(&checker->arena, s.output), rows, c->weights);
                check_repeats(checker, c, &s, CALL_EXPERTS, false, s.output);
            }
        }
        if (checker->failures == failures && s.packed != NULL)
            check_packed(checker, c, s.packed); /* nothing has written to them */
        if (checker->failures == failures)
            check_layouts(checker, s.output);
    }
    moe_layer_destroy(s.packed);
    moe_layer_destroy(s.layer);
}
