/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A path step by step. The moe_call is made by hand, each buffer between guard bands, and each step is held to the
 * contract (kernels.h) of the operations that it covers: what it wrote follows from what it was given, within the
 * budget of one operation, and nothing else changed. What to check comes from the stages in the path's own list, so
 * that a new path or a fused step is checked without a line here.
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

/* Region numbers; -1: the path does without. */
struct setup {
    int input, x, gate, w13, w2, logits, gate_ids, gate_weights, ids, weights;
    int counts, offsets, row_token, row_slot, row_weight, slot_row, plan_scratch;
    int rows, gate_up, act, down, scratch, output;
    moe_dtype gate_up_dtype, act_dtype, down_dtype;
    moe_layer *layer, *packed; /* of the call's weights */
    struct moe_call call;
    struct moe_error error;
};

static int add_if(struct arena *arena, bool needed, const char *name, int64_t count, moe_dtype dtype)
{
    return needed ? arena_add(arena, name, (size_t)count * moe_dtype_size(dtype), NULL, 0) : -1;
}

static void *device(const struct arena *arena, int region)
{
    return region >= 0 ? arena_device(arena, region) : NULL;
}

static bool set_up(struct checker *checker, const struct test_case *c, const struct moe_path_info *path,
                   struct setup *s)
{
    struct arena *arena = &checker->arena;
    const int64_t tokens = c->tokens, pairs = tokens * c->slots, hidden = c->hidden, width = c->intermediate;
    const size_t size = moe_dtype_size(c->dtype), io_size = moe_dtype_size(c->io_dtype);
    const size_t weight_bytes = (size_t)(c->experts * hidden * width) * size;
    moe_layer shape = {.ctx = checker->ctx, .desc = case_desc(c), .weights.layout = checker->layout};
    struct moe_call *call = &s->call;

    memset(s, 0, sizeof *s);
    s->gate_up_dtype = path->gate_up_dtype ? path->gate_up_dtype : c->dtype;
    s->act_dtype = path->act_dtype ? path->act_dtype : c->dtype;
    s->down_dtype = path->down_dtype ? path->down_dtype : c->dtype;

    arena_begin(arena, checker->ctx);
    s->gate = arena_add(arena, "gate", (size_t)(c->experts * hidden) * moe_dtype_size(c->gate_dtype), c->gate, 0);
    s->w13 = arena_add(arena, "w13", 2 * weight_bytes, c->w13, 0);
    s->w2 = arena_add(arena, "w2", weight_bytes, c->w2, 0);
    s->input = arena_add(arena, "input", (size_t)(tokens * hidden) * io_size, c->input, 0);
    s->ids = arena_add(arena, "ids", (size_t)pairs * moe_dtype_size(c->ids_dtype), c->ids, 0);
    s->weights = arena_add(arena, "weights", (size_t)pairs * sizeof(float), c->weights, 0);
    s->output = arena_add(arena, "output", (size_t)(tokens * hidden) * io_size, NULL, 0);
    s->x = add_if(arena, c->dtype != c->io_dtype, "x", tokens * hidden, c->dtype);
    s->logits = add_if(arena, true, "logits", tokens * c->experts, MOE_F32);
    s->gate_ids = add_if(arena, true, "gate.ids", tokens * c->top_k, MOE_I32);
    s->gate_weights = add_if(arena, true, "gate.weights", tokens * c->top_k, MOE_F32);
    s->counts = add_if(arena, true, "plan.counts", c->experts, MOE_I32);
    s->offsets = add_if(arena, true, "plan.offsets", c->experts + 1, MOE_I32);
    s->row_token = add_if(arena, true, "plan.row_token", pairs, MOE_I32);
    s->row_slot = add_if(arena, true, "plan.row_slot", pairs, MOE_I32);
    s->row_weight = add_if(arena, true, "plan.row_weight", pairs, MOE_F32);
    s->slot_row = add_if(arena, true, "plan.slot_row", pairs, MOE_I32);
    s->plan_scratch = arena_add(arena, "plan.scratch", moe_plan_scratch_bytes(tokens, c->slots, c->experts), NULL, 0);
    s->rows = add_if(arena, path->needs & MOE_NEED_ROWS, "rows", pairs * hidden, c->dtype);
    s->gate_up = add_if(arena, path->needs & MOE_NEED_GATE_UP, "gate_up", pairs * 2 * width, s->gate_up_dtype);
    s->act = add_if(arena, path->needs & MOE_NEED_ACT, "act", pairs * width, s->act_dtype);
    s->down = add_if(arena, path->needs & MOE_NEED_DOWN, "down", pairs * hidden, s->down_dtype);

    moe_call_shape(call, &shape, tokens, c->slots, c->io_dtype);
    call->error = &s->error;
    call->max_sms = checker->max_sms >= 0 ? checker->max_sms : c->max_sms;
    call->config = checker->config;
    call->plan.ids_dtype = c->ids_dtype;
    call->scratch_bytes = path->scratch != NULL ? path->scratch(call) : 0;
    call->plan.zeroed_bytes = path->zeroed != NULL ? path->zeroed(call) : 0;
    s->scratch = arena_add(arena, "scratch", call->scratch_bytes, NULL, 0);
    if (!check_call(checker, arena_ready(arena), "device memory") ||
        !make_layers(checker, c, s->gate, s->w13, s->w2, &s->layer, &s->packed))
        return false;

    call->w13.data = s->packed != NULL ? s->packed->weights.w13 : device(arena, s->w13);
    call->w2.data = s->packed != NULL ? s->packed->weights.w2 : device(arena, s->w2);
    call->input = device(arena, s->input);
    call->output = device(arena, s->output);
    call->x = s->x >= 0 ? device(arena, s->x) : device(arena, s->input);
    call->gate.x = call->x;
    call->gate.gate = device(arena, s->gate);
    call->gate.logits = device(arena, s->logits);
    call->gate.ids = device(arena, s->gate_ids);
    call->gate.weights = device(arena, s->gate_weights);
    call->plan.ids = device(arena, s->ids);
    call->plan.weights = device(arena, s->weights);
    call->plan.plan =
        (struct moe_plan){device(arena, s->counts),   device(arena, s->offsets),    device(arena, s->row_token),
                          device(arena, s->row_slot), device(arena, s->row_weight), device(arena, s->slot_row)};
    call->plan.scratch = device(arena, s->plan_scratch);
    call->rows = device(arena, s->rows);
    call->gate_up = device(arena, s->gate_up);
    call->act = device(arena, s->act);
    call->down = device(arena, s->down);
    call->down_dtype = s->down_dtype;
    call->scratch = call->plan.zeroed = device(arena, s->scratch);
    return true;
}

static uint64_t bit(int region)
{
    return region >= 0 ? UINT64_C(1) << region : 0;
}

/* What a step of these stages may change. */
static uint64_t writes(const struct setup *s, unsigned stages)
{
    uint64_t regions = bit(s->scratch);

    if (stages & MOE_STAGE_ENTRY)
        regions |= bit(s->x);
    if (stages & MOE_STAGE_LOGITS)
        regions |= bit(s->logits);
    if (stages & MOE_STAGE_TOPK)
        regions |= bit(s->gate_ids) | bit(s->gate_weights);
    if (stages & MOE_STAGE_PLAN)
        regions |= bit(s->counts) | bit(s->offsets) | bit(s->row_token) | bit(s->row_slot) | bit(s->row_weight) |
                   bit(s->slot_row) | bit(s->plan_scratch);
    if (stages & MOE_STAGE_GATHER)
        regions |= bit(s->rows);
    if (stages & MOE_STAGE_GEMM1)
        regions |= bit(s->gate_up);
    if (stages & MOE_STAGE_ACTIVATION)
        regions |= bit(s->act);
    if (stages & MOE_STAGE_GEMM2)
        regions |= bit(s->down);
    if (stages & MOE_STAGE_COMBINE)
        regions |= bit(s->output);
    return regions;
}

static bool same_ints(struct checker *checker, int region, const int32_t *expected, int64_t count)
{
    const int32_t *got = arena_host(&checker->arena, region);

    for (int64_t i = 0; i < count; i++)
        if (got[i] != expected[i]) {
            check_fail(checker, "%s[%" PRId64 "] is %d, expected %d", checker->arena.regions[region].name, i, got[i],
                       expected[i]);
            return false;
        }
    return true;
}

/* ids and weights: what the plan was made of. */
static bool check_plan(struct checker *checker, const struct test_case *c, const struct setup *s, const void *ids,
                       moe_dtype ids_dtype, const float *weights)
{
    const int64_t pairs = c->tokens * c->slots;
    int32_t *ints = must_alloc((size_t)(2 * c->experts + 1 + 4 * pairs) * sizeof(int32_t));
    struct moe_plan_args args = s->call.plan;

    args.ids = ids;
    args.ids_dtype = ids_dtype;
    args.weights = weights;
    args.zeroed_bytes = 0; /* on the device */
    args.plan = (struct moe_plan){.counts = ints, .offsets = ints + c->experts};
    args.plan.row_token = args.plan.offsets + c->experts + 1;
    args.plan.row_slot = args.plan.row_token + pairs;
    args.plan.slot_row = args.plan.row_slot + pairs;
    args.plan.row_weight = (float *)(args.plan.slot_row + pairs);
    moe_plan_ref(&args);

    const int64_t rows = args.plan.offsets[c->experts];
    bool fine = same_ints(checker, s->counts, args.plan.counts, c->experts) &&
                same_ints(checker, s->offsets, args.plan.offsets, c->experts + 1) &&
                same_ints(checker, s->row_token, args.plan.row_token, rows) &&
                same_ints(checker, s->row_slot, args.plan.row_slot, rows) &&
                same_ints(checker, s->slot_row, args.plan.slot_row, pairs);
    if (fine &&
        memcmp(arena_host(&checker->arena, s->row_weight), args.plan.row_weight, (size_t)rows * sizeof(float)) != 0) {
        check_fail(checker, "plan.row_weight differs from the weights of its rows");
        fine = false;
    }
    free(ints);
    return fine;
}

/* Of the FFN's memory what it asks for is set to zero, by the plan or in its place by the gate, and the rest left. */
static bool check_zeroed(struct checker *checker, const struct setup *s, size_t zeroed)
{
    const struct region *region = &checker->arena.regions[s->scratch];
    const uint8_t *scratch = arena_host(&checker->arena, s->scratch);

    for (size_t i = 0; i < zeroed; i++)
        if (scratch[i] != 0) {
            check_fail(checker, "scratch[byte %zu] is %d, expected 0 up to %zu", i, scratch[i], zeroed);
            return false;
        }
    if (memcmp(scratch + zeroed, checker->arena.before + region->offset + zeroed, region->bytes - zeroed) == 0)
        return true;
    check_fail(checker, "scratch is written past the %zu bytes that are set to zero", zeroed);
    return false;
}

static const int32_t *plan_ints(const struct checker *checker, int region)
{
    return arena_host(&checker->arena, region);
}

static void check_entry(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    const size_t size = moe_dtype_size(c->dtype), row = (size_t)c->hidden * size;

    for (int64_t t = 0; s->x >= 0 && t < c->tokens; t++)
        for (int64_t h = 0; h < c->hidden; h++)
            if (memcmp((char *)arena_host(&checker->arena, s->x) + t * row + h * size,
                       (char *)c->x + t * row + h * size, size) != 0) {
                check_fail(checker, "x[token %" PRId64 "][column %" PRId64 "] is %.9g, expected %.9g", t, h,
                           moe_load_f32(arena_host(&checker->arena, s->x), c->dtype, t * c->hidden + h),
                           moe_load_f32(c->x, c->dtype, t * c->hidden + h));
                return;
            }
}

static void check_gather(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    const size_t row = (size_t)c->hidden * moe_dtype_size(c->dtype);
    const char *got = arena_host(&checker->arena, s->rows);

    for (int32_t r = 0; r < plan_ints(checker, s->offsets)[c->experts]; r++) {
        int32_t token = plan_ints(checker, s->row_token)[r];
        if (memcmp(got + r * row, (char *)c->x + token * row, row) != 0) {
            check_fail(checker, "rows[%d] is not x of token %d", r, token);
            return;
        }
    }
}

/* A buffer of rows: [R, width] of dtype. */
struct rows_buffer {
    int region;
    moe_dtype dtype;
    int64_t width;
};

/* Nothing may be written past the last row in use. */
static void check_tail(struct checker *checker, const struct rows_buffer *buffer, int64_t rows)
{
    const struct region *region = &checker->arena.regions[buffer->region];
    const size_t used = (size_t)(rows * buffer->width) * moe_dtype_size(buffer->dtype);

    if (memcmp(checker->arena.image + region->offset + used, checker->arena.before + region->offset + used,
               region->bytes - used) != 0)
        check_fail(checker, "%s is written past its %" PRId64 " rows in use", region->name, rows);
}

/* From the buffer that the first of these stages reads to the one that the last of them writes. */
static void check_rows(struct checker *checker, const struct test_case *c, const struct setup *s, unsigned stages)
{
    const struct rows_buffer x = {s->x >= 0 ? s->x : s->input, c->dtype, c->hidden};
    const struct rows_buffer gate_up = {s->gate_up, s->gate_up_dtype, 2 * c->intermediate};
    const struct rows_buffer act = {s->act, s->act_dtype, c->intermediate}, down = {s->down, s->down_dtype, c->hidden};
    const struct rows_buffer from = stages & MOE_STAGE_GEMM1 ? x : stages & MOE_STAGE_ACTIVATION ? gate_up : act;
    const struct rows_buffer to = stages & MOE_STAGE_GEMM2 ? down : stages & MOE_STAGE_ACTIVATION ? act : gate_up;
    const bool fused = (stages & (stages - 1)) != 0;
    const bool any_f16 = c->dtype == MOE_F16 || to.dtype == MOE_F16;
    const double budget = fused && budget_rounds_inside(checker->path) ? budget_layer(checker->path, c, to.dtype)
                                                                       : budget_operation(to.dtype);
    const int32_t *offsets = plan_ints(checker, s->offsets), *row_token = plan_ints(checker, s->row_token);
    const void *source = arena_host(&checker->arena, from.region), *result = arena_host(&checker->arena, to.region);
    double *in = must_alloc((size_t)(BLOCK_ROWS * (from.width + 2 * to.width)) * sizeof(double));
    double *work = must_alloc(rows64_work(c) * sizeof(double));
    double *out = in + BLOCK_ROWS * from.width, *typical = out + BLOCK_ROWS * to.width;

    for (int32_t e = 0; e < c->experts; e++)
        for (int32_t first = offsets[e]; first < offsets[e + 1]; first += BLOCK_ROWS) {
            int count = offsets[e + 1] - first < BLOCK_ROWS ? offsets[e + 1] - first : BLOCK_ROWS;

            for (int r = 0; r < count; r++)
                for (int64_t i = 0; i < from.width; i++)
                    in[r * from.width + i] =
                        moe_load_f32(source, from.dtype,
                                     (stages & MOE_STAGE_GEMM1 ? row_token[first + r] : first + r) * from.width + i);
            rows64(c, e, stages, count, in, out, typical, work);
            for (int r = 0; r < count; r++) {
                const struct result_row row = {.got = result,
                                               .dtype = to.dtype,
                                               .first = (first + r) * to.width,
                                               .count = to.width,
                                               .expected = out + r * to.width,
                                               .typical = typical + r * to.width,
                                               .any_f16 = any_f16};

                if (!check_row(checker, &row, budget, "%s[row %d] (expert %d, its row %d, token %d)",
                               checker->arena.regions[to.region].name, first + r, e, first + r - offsets[e],
                               row_token[first + r]))
                    goto done;
            }
        }
    check_tail(checker, &to, offsets[c->experts]);
done:
    free(in);
    free(work);
}

/* Fused stages are checked at every buffer that they leave, each from the one before it. */
static void check_ffn(struct checker *checker, const struct test_case *c, const struct setup *s, unsigned stages)
{
    const struct {
        unsigned stage;
        int leaves;
    } parts[] = {{MOE_STAGE_GEMM1, s->gate_up}, {MOE_STAGE_ACTIVATION, s->act}, {MOE_STAGE_GEMM2, s->down}};
    const int64_t failures = checker->failures;
    unsigned since = 0;

    for (size_t i = 0; i < sizeof parts / sizeof parts[0] && checker->failures == failures; i++) {
        since |= stages & parts[i].stage;
        if (since != 0 && parts[i].leaves >= 0) {
            check_rows(checker, c, s, since);
            since = 0;
        }
    }
}

static void check_combine(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    const int64_t hidden = c->hidden;
    const double budget = budget_operation(c->io_dtype);
    const int32_t *slot_row = plan_ints(checker, s->slot_row);
    const void *down = arena_host(&checker->arena, s->down), *output = arena_host(&checker->arena, s->output);
    double *expected = must_alloc((size_t)hidden * 2 * sizeof(double)), *typical = expected + hidden;

    for (int64_t t = 0; t < c->tokens; t++) {
        memset(expected, 0, (size_t)hidden * 2 * sizeof(double));
        for (int32_t slot = 0; slot < c->slots; slot++) {
            int64_t row = slot_row[t * c->slots + slot];

            for (int64_t h = 0; row >= 0 && h < hidden; h++) {
                double term =
                    (double)c->weights[t * c->slots + slot] * moe_load_f32(down, s->down_dtype, row * hidden + h);
                expected[h] += term;
                typical[h] += term * term;
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
                                       .any_f16 = c->io_dtype == MOE_F16};
        if (!check_row(checker, &row, budget, "output[token %" PRId64 "]", t))
            break;
    }
    free(expected);
}

static void check_step(struct checker *checker, const struct test_case *c, const struct setup *s, unsigned stages)
{
    const unsigned rows = MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2;

    if (stages & MOE_STAGE_ENTRY)
        check_entry(checker, c, s);
    if (stages & MOE_STAGE_LOGITS)
        check_logits(checker, arena_host(&checker->arena, s->logits));
    if (stages & MOE_STAGE_TOPK)
        check_topk(checker, arena_host(&checker->arena, s->logits), arena_host(&checker->arena, s->gate_ids),
                   arena_host(&checker->arena, s->gate_weights));
    if (stages & MOE_STAGE_PLAN)
        check_plan(checker, c, s, c->ids, c->ids_dtype, c->weights);
    if ((stages & MOE_STAGE_PLAN) && !(stages & rows))
        check_zeroed(checker, s, s->call.plan.zeroed_bytes);
    if ((stages & MOE_STAGE_GATHER) && !(stages & rows))
        check_gather(checker, c, s);
    if (stages & rows)
        check_ffn(checker, c, s, stages & rows);
    if (stages & MOE_STAGE_COMBINE)
        check_combine(checker, c, s);
}

/* The largest element of the last row changes its sign. */
static void plant_act(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    void *act = arena_host(&checker->arena, s->act);
    const int64_t row = (plan_ints(checker, s->offsets)[c->experts] - 1) * c->intermediate;
    int64_t at = row;

    for (int64_t i = row; i < row + c->intermediate; i++)
        if (fabsf(moe_load_f32(act, s->act_dtype, i)) > fabsf(moe_load_f32(act, s->act_dtype, at)))
            at = i;
    if (moe_load_f32(act, s->act_dtype, at) == 0)
        return;
    moe_store_f32(act, s->act_dtype, at, -moe_load_f32(act, s->act_dtype, at));
    checker->planted = true;
}

static void plant(struct checker *checker, const struct test_case *c, const struct setup *s, unsigned stages, int run)
{
    int32_t *row_token = arena_host(&checker->arena, s->row_token);

    if (checker->broken == BREAK_PLAN && (stages & MOE_STAGE_PLAN) && plan_ints(checker, s->offsets)[c->experts] > 0) {
        row_token[0]++;
        checker->planted = true;
    }
    if (checker->broken == BREAK_ACT && (stages & MOE_STAGE_ACTIVATION) && c->intermediate >= 8 && s->act >= 0 &&
        plan_ints(checker, s->offsets)[c->experts] > 0)
        plant_act(checker, c, s);
    if (checker->broken == BREAK_TAIL && (stages & MOE_STAGE_GEMM2) &&
        plan_ints(checker, s->offsets)[c->experts] < c->tokens * c->slots) {
        ((uint8_t *)arena_host(&checker->arena, s->down))[checker->arena.regions[s->down].bytes - 1] ^= 1;
        checker->planted = true;
    }
    if (stages & MOE_STAGE_COMBINE)
        plant_output(checker, s->output, c, run);
}

/* Waits for what runs, and has its results here. */
static bool fetch(struct checker *checker)
{
    return check_call(checker, moe_synchronize(checker->ctx, NULL), "moe_synchronize") &&
           check_call(checker, arena_fetch(&checker->arena), "copying from the device");
}

/* Top-k gets logits that no gate would give it. */
static bool send_logits(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    return check_call(checker, arena_write(&checker->arena, s->logits, c->logits), "copying to the device");
}

static bool run_step(struct checker *checker, const struct test_case *c, struct setup *s, const struct moe_step *step,
                     int run)
{
    if ((step->stages & MOE_STAGE_TOPK) && !(step->stages & MOE_STAGE_LOGITS) && !send_logits(checker, c, s))
        return false;
    arena_keep(&checker->arena);
    if (!call_step(checker, step, &s->call) || !fetch(checker))
        return false;
    plant(checker, c, s, step->stages, run);
    return check_arena(checker, writes(s, step->stages));
}

/* As in a whole forward, where the plan is that of the ids just chosen. */
static struct moe_call routing_call(const struct setup *s, unsigned stages)
{
    struct moe_call call = s->call;

    call.stages = stages;
    call.plan.ids = call.gate.ids;
    call.plan.ids_dtype = MOE_I32;
    call.plan.weights = call.gate.weights;
    return call;
}

static bool check_routing(struct checker *checker, const struct test_case *c, const struct setup *s)
{
    const int32_t *ids = arena_host(&checker->arena, s->gate_ids);
    const float *weights = arena_host(&checker->arena, s->gate_weights);

    return check_topk(checker, arena_host(&checker->arena, s->logits), ids, weights) &&
           check_plan(checker, c, s, ids, MOE_I32, weights);
}

/* Top-k and plan where both run, which one launch may do. */
static void run_routing(struct checker *checker, const struct test_case *c, const struct moe_path_info *info,
                        struct setup *s)
{
    const unsigned stages = MOE_STAGE_TOPK | MOE_STAGE_PLAN;
    const struct moe_call call = routing_call(s, stages);

    checker->op = "topk and plan";
    if (!check_call(checker, arena_send(&checker->arena, 0xff), "copying to the device") || !send_logits(checker, c, s))
        return;
    for (const struct moe_step *step = info->steps; step->run != NULL; step++)
        if ((step->stages & stages) != 0 && !call_step(checker, step, &call))
            return;
    if (!fetch(checker))
        return;
    plant(checker, c, s, stages, 0);
    if (check_arena(checker, writes(s, stages)) && check_routing(checker, c, s))
        check_zeroed(checker, s, s->call.plan.zeroed_bytes);
}

/* A whole forward up to combine where the FFN does what top-k and plan do: nobody before it touches their results, and
 * the gate sets to zero what the FFN needs so. */
static void run_ffn_routing(struct checker *checker, const struct test_case *c, const struct moe_path_info *info,
                            struct setup *s)
{
    const unsigned before = MOE_STAGE_ENTRY | MOE_STAGE_LOGITS;
    const unsigned stages = MOE_STAGES_ALL & ~(before | MOE_STAGE_COMBINE);
    struct moe_call call = routing_call(s, MOE_STAGES_ALL);

    call.ffn_routes = true;
    call.gate.zeroed = call.scratch;
    call.gate.zeroed_bytes = info->zeroed(&call);
    call.plan.zeroed_bytes = 0;
    checker->op = "routing in the FFN";
    if (!check_call(checker, arena_send(&checker->arena, 0xff), "copying to the device"))
        return;
    for (const struct moe_step *step = info->steps; !(step->stages & MOE_STAGE_COMBINE); step++) {
        if ((step->stages & MOE_STAGE_GEMM1) &&
            (!fetch(checker) || !check_arena(checker, writes(s, before)) ||
             !check_logits(checker, arena_host(&checker->arena, s->logits)) ||
             !check_zeroed(checker, s, call.gate.zeroed_bytes) || !send_logits(checker, c, s)))
            return;
        if (!call_step(checker, step, &call))
            return;
    }
    if (!fetch(checker))
        return;
    plant(checker, c, s, stages, 0);
    if (check_arena(checker, writes(s, stages) | bit(s->x)) && check_routing(checker, c, s))
        check_ffn(checker, c, s, stages);
}

static bool wants_op(const struct checker *checker, const char *name)
{
    return checker->only_op == NULL || strcmp(checker->only_op, name) == 0;
}

/* Whether a path has top-k and plan as steps of their own, and the case has memory for a plan of what the gate chooses.
 */
static bool has_routing(const struct checker *checker, const struct test_case *c, const struct moe_path_info *info)
{
    const unsigned stages = MOE_STAGE_TOPK | MOE_STAGE_PLAN;

    for (const struct moe_step *step = info->steps; step->run != NULL; step++)
        if ((step->stages & stages) != 0 && (step->stages & ~stages) != 0)
            return false;
    return c->slots == c->top_k && (wants_op(checker, "topk") || wants_op(checker, "plan"));
}

/* Whether the path's FFN does both in such a call, and the case has the memory. */
static bool has_ffn_routing(const struct checker *checker, const struct test_case *c, const struct moe_path_info *info,
                            const struct setup *s)
{
    return info->routes != NULL && c->slots == c->top_k && info->routes(&s->call) && wants_op(checker, "ffn");
}

static void run_steps(struct checker *checker, const struct test_case *c, const struct moe_path_info *info,
                      struct setup *s)
{
    uint8_t *first = NULL;
    const struct region *output = &checker->arena.regions[s->output];
    for (int run = 0; run < c->repeats; run++) {
        int64_t failures = checker->failures;

        if (!check_call(checker, arena_send(&checker->arena, run % 2 ? 0x5a : 0xff), "copying to the device"))
            break;
        for (const struct moe_step *step = info->steps; step->run != NULL; step++) {
            checker->op = step->name;
            if (!run_step(checker, c, s, step, run))
                break;
            if (run == 0 && wants_op(checker, step->name))
                check_step(checker, c, s, step->stages);
            if (checker->failures != failures) /* what follows from a wrong result is of no interest */
                break;
        }
        if (checker->failures != failures)
            break;
        if (run == 0) {
            first = memcpy(must_alloc(output->bytes), checker->arena.image + output->offset, output->bytes);
        } else if (memcmp(first, checker->arena.image + output->offset, output->bytes) != 0) {
            check_fail(checker, "output differs from the first run's (run %d, other memory contents)", run + 1);
            break;
        }
    }
    free(first);
}

void check_steps(struct checker *checker, const struct test_case *c)
{
    const struct moe_path_info *info = moe_path_info_get(checker->path);
    const int64_t failures = checker->failures;
    struct setup s;

    if (c->tokens == 0 || info == NULL) /* no call without tokens reaches a step */
        return;
    checker->op = "set-up";
    if (set_up(checker, c, info, &s)) {
        if (has_routing(checker, c, info))
            run_routing(checker, c, info, &s);
        if (checker->failures == failures && has_ffn_routing(checker, c, info, &s))
            run_ffn_routing(checker, c, info, &s);
        if (checker->failures == failures)
            run_steps(checker, c, info, &s);
    }
    if (checker->failures == failures && s.packed != NULL)
        check_packed(checker, c, s.packed); /* nothing has written to them */
    if (checker->failures == failures)
        check_layouts(checker, s.output);
    moe_layer_destroy(s.packed);
    moe_layer_destroy(s.layer);
}
