/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steps of the `cpu` path, each against plain sums in double over the same inputs, for every instruction set that
 * this processor has. Inputs end where a page without access begins, outputs stand between guard bytes.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "config/convert.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/pool.h"

static const char *const isas[] = {"c", "avx2", "avx512", "avx512_bf16"};
static const moe_dtype dtypes[] = {MOE_BF16, MOE_F16, MOE_F32};
enum { ISAS = 4, DTYPES = 3, GUARD = 512, GUARD_BYTE = 0xa5 };

static uint64_t seed;

static double uniform(void) /* in [-1, 1) */
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)seed * 0x1p-63;
}

/* ---- Memory with edges ---- */

struct area {
    char *map, *data;
    size_t bytes, map_bytes;
};

static struct area area_make(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + GUARD + page - 1) / page * page;
    struct area a = {.bytes = bytes, .map_bytes = room + page};
    a.map = mmap(NULL, a.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(a.map != MAP_FAILED);
    assert_int_equal(mprotect(a.map + room, page, PROT_NONE), 0);
    memset(a.map, GUARD_BYTE, room);
    a.data = a.map + room - bytes;
    return a;
}

static void area_free(struct area *a)
{
    for (const char *p = a->map; p < a->data; p++)
        if (*(const unsigned char *)p != GUARD_BYTE)
            fail_msg("%td bytes before the buffer were written", a->data - p);
    munmap(a->map, a->map_bytes);
}

static struct area area_random(int64_t count, moe_dtype dtype, double scale)
{
    struct area a = area_make((size_t)count * moe_dtype_size(dtype));
    for (int64_t i = 0; i < count; i++)
        moe_store_f32(a.data, dtype, i, (float)(uniform() * scale));
    return a;
}

/* ---- A layer ---- */

struct shape {
    const char *name;
    int64_t tokens, hidden, intermediate;
    int32_t experts, slots;
    int32_t only; /* all ids are this one; -1: random */
};

static const struct shape shapes[] = {
    {"one token", 1, 64, 32, 4, 2, -1},
    {"no token", 0, 64, 32, 4, 2, -1},
    {"odd sizes", 7, 33, 17, 5, 2, -1},
    {"tiny", 5, 1, 1, 3, 2, -1},
    {"one expert takes all", 61, 48, 56, 6, 2, 4},
    {"many tokens", 83, 129, 50, 3, 2, -1},
    {"more than a job's tokens", 300, 40, 31, 2, 1, 1},
    {"deep", 27, 1131, 70, 4, 3, -1},
    {"deep rows", 9, 3307, 5, 2, 4, -1},
    {"five rows", 5, 1655, 37, 2, 1, 1},
    {"weights in regions", 17, 12007, 25, 2, 1, 1},
    {"many experts", 40, 96, 49, 64, 4, -1},
    {"more columns than a job", 6, 50, 203, 2, 2, -1},
};

struct layer {
    struct area w13, w2, gate, x, logits, gate_ids, gate_weights, ids, weights, act, down, output, scratch, plan[6],
        plan_scratch;
    struct moe_exec exec;
    struct moe_call call;
};

static void layer_make(struct layer *l, const struct shape *s, moe_dtype dtype, moe_dtype io_dtype, int32_t threads)
{
    const int64_t rows = s->tokens * s->slots;
    const size_t plan_bytes[6] = {(size_t)s->experts * 4, (size_t)(s->experts + 1) * 4,
                                  (size_t)rows * 4,       (size_t)rows * 4,
                                  (size_t)rows * 4,       (size_t)rows * 4};

    seed = 1234;
    *l = (struct layer){0};
    l->exec.device = MOE_DEVICE_CPU;
    assert_int_equal(moe_pool_create(threads, &l->exec.pool), MOE_OK);
    l->w13 = area_random(s->experts * 2 * s->intermediate * s->hidden, dtype, sqrt(3.0 / (double)s->hidden));
    l->w2 = area_random(s->experts * s->hidden * s->intermediate, dtype, sqrt(3.0 / (double)s->intermediate));
    l->gate = area_random(s->experts * s->hidden, io_dtype, 1);
    l->x = area_random(s->tokens * s->hidden, dtype, 1);
    l->logits = area_make((size_t)(s->tokens * s->experts) * sizeof(float));
    l->gate_ids = area_make((size_t)rows * sizeof(int32_t));
    l->gate_weights = area_make((size_t)rows * sizeof(float));
    l->weights = area_random(rows, MOE_F32, 1);
    l->ids = area_make((size_t)rows * sizeof(int32_t));
    for (int64_t i = 0; i < rows; i++) { /* some of no expert, some twice in a token */
        int32_t id = (int32_t)((uniform() + 1) / 2 * s->experts);
        ((int32_t *)l->ids.data)[i] = s->only >= 0 ? s->only : i % 11 == 5 ? -1 : id;
    }
    for (int i = 0; i < 6; i++)
        l->plan[i] = area_make(plan_bytes[i]);
    l->plan_scratch = area_make(moe_plan_scratch_bytes(s->tokens, s->slots, s->experts));
    l->act = area_make((size_t)(rows * s->intermediate) * moe_dtype_size(dtype));
    l->down = area_make((size_t)(rows * s->hidden) * sizeof(float));
    l->output = area_make((size_t)(s->tokens * s->hidden) * moe_dtype_size(io_dtype));

    struct moe_call *c = &l->call;
    c->exec = &l->exec;
    c->tokens = s->tokens;
    c->hidden = s->hidden;
    c->intermediate = s->intermediate;
    c->slots = s->slots;
    c->dtype = dtype;
    c->io_dtype = io_dtype;
    c->activation = MOE_ACTIVATION_SILU;
    c->w13 =
        (struct moe_weights_view){l->w13.data, dtype, MOE_LAYOUT_ROW_MAJOR, s->experts, 2 * s->intermediate, s->hidden};
    c->w2 = (struct moe_weights_view){l->w2.data, dtype, MOE_LAYOUT_ROW_MAJOR, s->experts, s->hidden, s->intermediate};
    c->x = l->x.data;
    c->act = l->act.data;
    c->down = l->down.data;
    c->output = l->output.data;
    c->gate = (struct moe_gate_args){
        .tokens = s->tokens,
        .hidden = s->hidden,
        .experts = s->experts,
        .top_k = s->slots < s->experts ? s->slots : s->experts,
        .x_dtype = dtype,
        .gate_dtype = io_dtype,
        .logits_dtype = MOE_F32,
        .topk_weight_dtype = MOE_F32,
        .x = l->x.data,
        .gate = l->gate.data,
        .logits = (float *)l->logits.data,
        .ids = (int32_t *)l->gate_ids.data,
        .weights = (float *)l->gate_weights.data,
    };
    c->plan = (struct moe_plan_args){
        .tokens = s->tokens,
        .slots = s->slots,
        .experts = s->experts,
        .groups = s->experts,
        .ids = l->ids.data,
        .ids_dtype = MOE_I32,
        .weights = (float *)l->weights.data,
        .plan = {(int32_t *)l->plan[0].data, (int32_t *)l->plan[1].data, (int32_t *)l->plan[2].data,
                 (int32_t *)l->plan[3].data, (float *)l->plan[4].data, (int32_t *)l->plan[5].data},
        .scratch = l->plan_scratch.data,
    };
    c->scratch_bytes = moe_scratch_cpu(c) / MOE_WORKSPACE_ALIGNMENT * MOE_WORKSPACE_ALIGNMENT + MOE_WORKSPACE_ALIGNMENT;
    l->scratch = area_make(c->scratch_bytes);
    c->scratch = l->scratch.data;
    moe_plan_ref(&c->plan);
}

static void layer_free(struct layer *l)
{
    struct area *all[] = {&l->w13,      &l->w2,           &l->gate,    &l->x,       &l->logits,
                          &l->gate_ids, &l->gate_weights, &l->ids,     &l->weights, &l->act,
                          &l->down,     &l->output,       &l->scratch, &l->plan[0], &l->plan[1],
                          &l->plan[2],  &l->plan[3],      &l->plan[4], &l->plan[5], &l->plan_scratch};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        area_free(all[i]);
    moe_pool_destroy(l->exec.pool);
}

/* ---- Expectations ---- */

static double unit_roundoff(moe_dtype dtype)
{
    return dtype == MOE_BF16 ? 0x1p-8 : dtype == MOE_F16 ? 0x1p-11 : 0x1p-24;
}

/* `got` is `want` rounded to dtype, after sums in fp32 whose error is a few units of their magnitude (about 1 here). */
static void expect(const char *what, const char *isa, const struct shape *s, moe_dtype dtype, int64_t row,
                   int64_t column, double got, double want, double rounding)
{
    if (!(fabs(got - want) <= rounding * fabs(want) + 4e-6))
        fail_msg("%s: %s, %s, %s: row %lld, column %lld is %.9g, expected %.9g", isa, s->name, moe_dtype_name(dtype),
                 what, (long long)row, (long long)column, got, want);
}

static void check_logits(struct layer *l, const struct shape *s, const char *isa)
{
    const struct moe_gate_args *g = &l->call.gate;
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t e = 0; e < s->experts; e++) {
            double scale = sqrt((double)s->hidden); /* the gate is not normalised */
            double want = moe_dot((const char *)g->x + (size_t)(t * s->hidden) * moe_dtype_size(g->x_dtype), g->x_dtype,
                                  (const char *)g->gate + (size_t)(e * s->hidden) * moe_dtype_size(g->gate_dtype),
                                  g->gate_dtype, s->hidden);
            expect("logits", isa, s, g->x_dtype, t, e, g->logits[t * s->experts + e] / scale, want / scale, 0x1p-22);
        }
}

static void check_act(struct layer *l, const struct shape *s, const char *isa)
{
    const struct moe_call *c = &l->call;
    const size_t row_bytes = (size_t)s->hidden * moe_dtype_size(c->dtype);
    for (int32_t g = 0; g < s->experts; g++)
        for (int32_t r = c->plan.plan.offsets[g]; r < c->plan.plan.offsets[g + 1]; r++)
            for (int64_t i = 0; i < s->intermediate; i++) {
                const char *x = (const char *)c->x + (size_t)c->plan.plan.row_token[r] * row_bytes;
                const char *gate = (const char *)c->w13.data + (size_t)(g * c->w13.rows + i) * row_bytes;
                const char *up = gate + (size_t)s->intermediate * row_bytes;
                double a = moe_dot(x, c->dtype, gate, c->dtype, s->hidden);
                double want = a / (1 + exp(-a)) * moe_dot(x, c->dtype, up, c->dtype, s->hidden);
                expect("act", isa, s, c->dtype, r, i, moe_load_f32(c->act, c->dtype, r * s->intermediate + i), want,
                       unit_roundoff(c->dtype) + 0x1p-22);
            }
}

static void check_down(struct layer *l, const struct shape *s, const char *isa)
{
    const struct moe_call *c = &l->call;
    const size_t row_bytes = (size_t)s->intermediate * moe_dtype_size(c->dtype);
    for (int32_t g = 0; g < s->experts; g++)
        for (int32_t r = c->plan.plan.offsets[g]; r < c->plan.plan.offsets[g + 1]; r++)
            for (int64_t h = 0; h < s->hidden; h++) {
                double want = moe_dot((const char *)c->act + (size_t)r * row_bytes, c->dtype,
                                      (const char *)c->w2.data + (size_t)(g * s->hidden + h) * row_bytes, c->dtype,
                                      s->intermediate);
                expect("down", isa, s, c->dtype, r, h, ((float *)c->down)[r * s->hidden + h], want, 0x1p-22);
            }
}

static void check_output(struct layer *l, const struct shape *s, const char *isa)
{
    const struct moe_call *c = &l->call;
    for (int64_t t = 0; t < s->tokens; t++)
        for (int64_t h = 0; h < s->hidden; h++) {
            double want = 0;
            for (int32_t i = 0; i < s->slots; i++) {
                int32_t row = c->plan.plan.slot_row[t * s->slots + i];
                if (row >= 0)
                    want += (double)c->plan.plan.row_weight[row] * ((float *)c->down)[row * s->hidden + h];
            }
            expect("output", isa, s, c->io_dtype, t, h, moe_load_f32(c->output, c->io_dtype, t * s->hidden + h), want,
                   unit_roundoff(c->io_dtype) + 0x1p-22);
        }
}

static void run_steps(struct layer *l)
{
    assert_int_equal(moe_logits_cpu(&l->call), MOE_OK);
    assert_int_equal(moe_topk_cpu(&l->call), MOE_OK);
    assert_int_equal(moe_gemm1_cpu(&l->call), MOE_OK);
    assert_int_equal(moe_gemm2_cpu(&l->call), MOE_OK);
    assert_int_equal(moe_combine_cpu(&l->call), MOE_OK);
}

static void each_step_is_right(void **state)
{
    const char *isa = *state;
    if (!moe_cpu_force(isa))
        skip();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int d = 0; d < DTYPES; d++) {
            struct layer l;
            layer_make(&l, &shapes[i], dtypes[d], dtypes[(d + i) % DTYPES], 1 + (int32_t)(i + (size_t)d) % 3);
            run_steps(&l);
            check_logits(&l, &shapes[i], isa);
            check_act(&l, &shapes[i], isa);
            check_down(&l, &shapes[i], isa);
            check_output(&l, &shapes[i], isa);
            layer_free(&l);
        }
    moe_cpu_force(NULL);
}

/* The results are the same bits with any number of threads, however often. */
static void threads_do_not_matter(void **state)
{
    const char *isa = *state;
    if (!moe_cpu_force(isa))
        skip();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int d = 0; d < DTYPES; d++) {
            struct layer first;
            layer_make(&first, &shapes[i], dtypes[d], MOE_F32, 1);
            run_steps(&first);
            for (int32_t threads = 1; threads <= 7; threads += 3) {
                struct layer again;
                layer_make(&again, &shapes[i], dtypes[d], MOE_F32, threads);
                run_steps(&again);
                assert_memory_equal(again.logits.data, first.logits.data, first.logits.bytes);
                assert_memory_equal(again.gate_ids.data, first.gate_ids.data,
                                    (size_t)(first.call.tokens * first.call.gate.top_k) * sizeof(int32_t));
                assert_memory_equal(again.output.data, first.output.data, first.output.bytes);
                layer_free(&again);
            }
            layer_free(&first);
        }
    moe_cpu_force(NULL);
}

static void logits_round(void **state)
{
    const char *isa = *state;
    if (!moe_cpu_force(isa))
        skip();
    struct layer l;
    layer_make(&l, &shapes[5], MOE_BF16, MOE_F32, 2);
    assert_int_equal(moe_logits_cpu(&l.call), MOE_OK);
    size_t count = l.logits.bytes / sizeof(float);
    float *exact = malloc(l.logits.bytes);
    assert_non_null(exact);
    memcpy(exact, l.logits.data, l.logits.bytes);
    l.call.gate.logits_dtype = MOE_BF16;
    assert_int_equal(moe_logits_cpu(&l.call), MOE_OK);
    for (size_t i = 0; i < count; i++)
        assert_true(l.call.gate.logits[i] == moe_round_f32(exact[i], MOE_BF16));
    free(exact);
    layer_free(&l);
    moe_cpu_force(NULL);
}

/* Numbers where rounding is delicate, and what silu must do at the ends. */
static const float delicate[] = {0,       -0.0f,    1,         1.00390625f, 1.01171875f, -1.00390625f, 65504, 65519.99f,
                                 65520,   1e30f,    3.3e38f,   3.4e38f,     INFINITY,    -INFINITY,    NAN,   6e-8f,
                                 2.9e-8f, 5.97e-8f, 1.17e-38f, 1e-40f,      -1e-40f,     1e-45f,       0.1f};
enum { DELICATE = sizeof delicate / sizeof delicate[0] };

static void entry_converts(void **state)
{
    const char *isa = *state;
    if (!moe_cpu_force(isa))
        skip();
    enum { COUNT = 9001 };
    for (int from = 0; from < DTYPES; from++)
        for (int to = 0; to < DTYPES; to++) {
            if (to == from)
                continue;
            struct moe_exec exec = {.device = MOE_DEVICE_CPU};
            assert_int_equal(moe_pool_create(2, &exec.pool), MOE_OK);
            struct area in = area_make(COUNT * moe_dtype_size(dtypes[from]));
            struct area out = area_make(COUNT * moe_dtype_size(dtypes[to]));
            for (int64_t i = 0; i < COUNT; i++)
                moe_store_f32(in.data, dtypes[from], i, i % 3 ? delicate[i % DELICATE] : (float)(uniform() * 100));
            struct moe_call call = {.exec = &exec,
                                    .tokens = 1,
                                    .hidden = COUNT,
                                    .dtype = dtypes[to],
                                    .io_dtype = dtypes[from],
                                    .input = in.data,
                                    .x = out.data};
            assert_int_equal(moe_entry_cpu(&call), MOE_OK);
            for (int64_t i = 0; i < COUNT; i++) {
                float want = moe_round_f32(moe_load_f32(in.data, dtypes[from], i), dtypes[to]);
                float got = moe_load_f32(out.data, dtypes[to], i);
                if (isnan(want) ? !isnan(got) : moe_f32_bits(want) != moe_f32_bits(got))
                    fail_msg("%s: %s to %s: %a became %a, expected %a", isa, moe_dtype_name(dtypes[from]),
                             moe_dtype_name(dtypes[to]), (double)moe_load_f32(in.data, dtypes[from], i), (double)got,
                             (double)want);
            }
            area_free(&in);
            area_free(&out);
            moe_pool_destroy(exec.pool);
        }
    moe_cpu_force(NULL);
}

static void silu_over_its_range(void **state)
{
    const char *isa = *state;
    if (!moe_cpu_force(isa))
        skip();
    enum { COLUMNS = 64, ROWS = 16 };
    static const double scales[] = {8, 80, 1e5, 3.4e38};
    static float gate[ROWS][COLUMNS], up[ROWS][COLUMNS], out[COLUMNS][ROWS];
    for (int sweep = 0; sweep < 200; sweep++) {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) {
                gate[r][c] = (float)(uniform() * scales[sweep / 50]);
                up[r][c] = 1;
            }
        gate[3][5] = NAN;
        moe_cpu_ops()->silu(out, MOE_F32, ROWS, &gate[0][0], &up[0][0], COLUMNS, ROWS, COLUMNS);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) {
                double g = (double)gate[r][c], want = g / (1 + exp(-g));
                if (isnan(want))
                    assert_true(isnan(out[c][r]));
                else if (!(fabs((double)out[c][r] - want) <= fmax(1e-6 * fabs(want), 1e-36)))
                    fail_msg("%s: silu(%.9g) is %.9g, expected %.9g", isa, g, (double)out[c][r], want);
            }
    }
    moe_cpu_force(NULL);
}

static void unknown_isa_is_refused(void **state)
{
    (void)state;
    assert_false(moe_cpu_force("mmx"));
    assert_true(moe_cpu_force("c"));
    assert_string_equal(moe_cpu_features(), "none");
    assert_true(moe_cpu_force(NULL));
    assert_true(strlen(moe_cpu_features()) > 0);
}

int main(void)
{
    static const struct {
        const char *name;
        CMUnitTestFunction run;
    } each[] = {
        {"each_step_is_right", each_step_is_right},
        {"threads_do_not_matter", threads_do_not_matter},
        {"logits_round", logits_round},
        {"entry_converts", entry_converts},
        {"silu_over_its_range", silu_over_its_range},
    };
    enum { EACH = sizeof each / sizeof each[0] };
    struct CMUnitTest tests[EACH * ISAS + 1];
    static char names[EACH * ISAS][64];

    for (int i = 0; i < EACH * ISAS; i++) {
        snprintf(names[i], sizeof names[i], "%s on %s", each[i / ISAS].name, isas[i % ISAS]);
        tests[i] = (struct CMUnitTest){names[i], each[i / ISAS].run, NULL, NULL, (void *)isas[i % ISAS]};
    }
    tests[EACH * ISAS] = (struct CMUnitTest)cmocka_unit_test(unknown_isa_is_refused);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
