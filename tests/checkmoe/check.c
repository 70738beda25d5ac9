/* SPDX-License-Identifier: Apache-2.0 */
/* What the checks of whole calls and of single steps share: how a failure is told, the checks of a row's error, of
 * guard bands, of logits, of top-k and of the other layout, and the bugs that --break plants into an output. */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <time.h>

#include "tests/checkmoe/checkmoe.h"

enum { FAILURES_SHOWN = 10 };

void *must_alloc(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);

    if (memory == NULL) {
        fprintf(stderr, "checkmoe: no memory for %zu bytes\n", bytes);
        exit(EXIT_FAILURE);
    }
    return memory;
}

size_t first_difference(const void *a, const void *b, size_t bytes)
{
    size_t at = 0;

    while (at < bytes && ((const uint8_t *)a)[at] == ((const uint8_t *)b)[at])
        at++;
    return at;
}

double seconds_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void check_begin(struct checker *checker, moe_path path, moe_layout layout, int32_t config)
{
    checker->path = path;
    checker->layout = layout;
    checker->config = config;
}

struct totals *check_totals(struct checker *checker)
{
    return &checker->totals[checker->path][checker->layout][checker->config];
}

void check_fail(struct checker *checker, const char *format, ...)
{
    va_list args;

    checker->failures++;
    check_totals(checker)->failures++;
    if (checker->broken != BREAK_NONE || checker->failures > FAILURES_SHOWN)
        return;
    printf("FAIL path %s, %s weights, configuration %d, %s: ", moe_path_name(checker->path),
           layout_names[checker->layout], checker->config, checker->op);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    if (checker->c != NULL) {
        printf("\n  case: ");
        case_print(checker->c, stdout);
        printf("\n  again: checkmoe --device %s --path %s --case-seed 0x%" PRIx64, checker->device_name,
               moe_path_name(checker->path), checker->c->seed);
        if (checker->kind.small)
            printf(" --small");
        if (checker->kind.cut)
            printf(" --cut");
        if (checker->only_layout >= 0)
            printf(" --layout %s", layout_names[checker->only_layout]);
        if (checker->only_config != NULL)
            printf(" --config %d", checker->config);
        if (checker->only_op != NULL)
            printf(" --op %s", checker->only_op);
        if (checker->max_sms >= 0)
            printf(" --max-sms %d", checker->max_sms);
    }
    printf("\n");
}

bool check_row(struct checker *checker, const struct result_row *row, double budget, const char *format, ...)
{
    struct totals *totals = check_totals(checker);
    int64_t column = 0;
    const double error = row_error(row, &column);
    char name[256];
    va_list args;

    totals->worst = fmax(totals->worst, error / budget);
    if (error <= budget)
        return true;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    check_fail(checker, "%s: column %" PRId64 " is %.9g, expected %.9g; error of the row %.3g, budget %.3g", name,
               column, moe_load_f32(row->got, row->dtype, row->first + column), row->expected[column], error, budget);
    return false;
}

bool check_call(struct checker *checker, moe_status status, const char *what)
{
    char text[1024];

    if (status == MOE_OK)
        return true;
    moe_last_error(checker->ctx, text, sizeof text);
    check_fail(checker, "%s: %s (%s)", what, moe_status_string(status), text);
    return false;
}

bool call_step(struct checker *checker, const struct moe_step *step, const struct moe_call *call)
{
    const moe_status status = step->run(call);

    if (status == MOE_OK)
        return true;
    check_fail(checker, "step %s: %s (%s)", step->name, moe_status_string(status), call->error->text);
    return false;
}

bool check_arena(struct checker *checker, uint64_t may_write)
{
    const struct arena *arena = &checker->arena;
    size_t at = 0;

    for (int i = 0; i <= arena->count; i++) {
        /* The guard band between the last region and this one, then, if it is not the step's to write, the region. */
        const struct region end = {"", arena->used, 0, NULL};
        const struct region *region = i < arena->count ? &arena->regions[i] : &end;

        if (memcmp(arena->image + at, arena->before + at, region->offset - at) != 0) {
            at += first_difference(arena->image + at, arena->before + at, region->offset - at);
            const struct region *before = i > 0 ? &arena->regions[i - 1] : &end;
            check_fail(checker, "a guard band is written, %zd bytes past the end of %s and %zu before %s",
                       (ssize_t)(at - before->offset - before->bytes), before->name, region->offset - at, region->name);
            return false;
        }
        at = region->offset + region->bytes;
        if (i < arena->count && !(may_write >> i & 1) &&
            memcmp(arena->image + region->offset, arena->before + region->offset, region->bytes) != 0) {
            check_fail(checker, "%s is written, which is not an output here", region->name);
            return false;
        }
    }
    return true;
}

bool check_logits(struct checker *checker, const float *logits)
{
    const struct test_case *c = checker->c;
    double *expected = must_alloc((size_t)c->experts * 2 * sizeof(double)), *tolerance = expected + c->experts;
    bool fine = true;

    for (int64_t t = 0; fine && t < c->tokens; t++) {
        logits64(c, t, expected, tolerance);
        for (int32_t e = 0; fine && e < c->experts; e++) {
            float got = logits[t * c->experts + e];
            double allowed = tolerance[e] + 0.51 * budget_ulp(fabs(expected[e]) + tolerance[e], c->logits_dtype);

            if (!(fabs(got - expected[e]) <= allowed) || got != moe_round_f32(got, c->logits_dtype)) {
                check_fail(checker, "logits[token %" PRId64 "][expert %d] is %.9g, expected %.9g within %.3g, as %s", t,
                           e, got, expected[e], allowed, moe_dtype_name(c->logits_dtype));
                fine = false;
            }
        }
    }
    free(expected);
    return fine;
}

/* The definition of top-k, apart from moe_topk_ref, which is checked too: each time the best expert that is not taken
 * yet; NaN is the largest, ties go to the lowest id. */
static void best_experts(const float *logits, int32_t experts, int32_t *ids, int32_t top_k)
{
    bool taken[MOE_MAX_EXPERTS] = {false};

    for (int32_t k = 0; k < top_k; k++) {
        int32_t best = -1;

        for (int32_t e = 0; e < experts; e++)
            if (!taken[e] && (best < 0 || (isnan(logits[e]) && !isnan(logits[best])) || logits[e] > logits[best]))
                best = e;
        taken[best] = true;
        ids[k] = best;
    }
}

bool check_topk(struct checker *checker, const float *logits, const int32_t *ids, const float *weights)
{
    const struct test_case *c = checker->c;
    int32_t expected_ids[MOE_MAX_TOP_K];
    double expected[MOE_MAX_TOP_K];

    for (int64_t t = 0; t < c->tokens; t++) {
        const float *row = logits + t * c->experts;
        best_experts(row, c->experts, expected_ids, c->top_k);
        softmax64(c, row, expected_ids, expected);
        for (int32_t k = 0; k < c->top_k; k++) {
            int32_t id = ids[t * c->top_k + k];
            float got = weights[t * c->top_k + k];
            double allowed =
                1e-5 * expected[k] + 1e-9 + 0.51 * budget_ulp(expected[k] * (1 + 1e-5), c->topk_weight_dtype);

            if (id != expected_ids[k]) {
                check_fail(checker, "ids[token %" PRId64 "][%d] is %d, expected %d by these logits", t, k, id,
                           expected_ids[k]);
                return false;
            }
            if (!isfinite(row[expected_ids[0]])) /* no softmax: the weights are not defined */
                continue;
            if (!(fabs(got - expected[k]) <= allowed) || got != moe_round_f32(got, c->topk_weight_dtype)) {
                check_fail(checker, "weights[token %" PRId64 "][%d] is %.9g, expected %.9g (expert %d), as %s", t, k,
                           got, expected[k], id, moe_dtype_name(c->topk_weight_dtype));
                return false;
            }
        }
    }
    return true;
}

/* The column of the largest element of a row of the output; -1 if all are zero. */
static int64_t largest(const void *output, const struct test_case *c, int64_t row)
{
    int64_t column = -1;
    float best = 0;

    for (int64_t h = 0; h < c->hidden; h++) {
        float size = fabsf(moe_load_f32(output, c->io_dtype, row * c->hidden + h));
        if (size > best) {
            best = size;
            column = h;
        }
    }
    return column;
}

void plant_output(struct checker *checker, int region, const struct test_case *c, int run)
{
    uint8_t *output = arena_host(&checker->arena, region);
    const int64_t last = c->tokens - 1, row = c->tokens > 0 ? (int64_t)(c->seed % (uint64_t)c->tokens) : 0;
    const size_t row_bytes = (size_t)c->hidden * moe_dtype_size(c->io_dtype);

    /* In rows shorter than these a wrong element may be a right one but for rounding. */
    if (c->tokens == 0 || c->hidden < 8)
        return;
    int64_t column = largest(output, c, row);
    if (checker->broken == BREAK_ELEMENT && column >= 0) {
        float value = moe_load_f32(output, c->io_dtype, row * c->hidden + column);
        moe_store_f32(output, c->io_dtype, row * c->hidden + column, -value);
        checker->planted = true;
    }
    if (checker->broken == BREAK_LAST_ROW && largest(output, c, last) >= 0) {
        memset(output + last * row_bytes, 0, row_bytes);
        checker->planted = true;
    }
    if (checker->broken == BREAK_STALE_ROW && row > 0 && column >= 0) {
        memcpy(output + row * row_bytes, output + (row - 1) * row_bytes, row_bytes);
        checker->planted = true;
    }
    if (checker->broken == BREAK_REPEAT && run > 0) {
        output[last * row_bytes] ^= 1;
        checker->planted = true;
    }
}

void check_layouts(struct checker *checker, int region)
{
    const size_t bytes = checker->arena.regions[region].bytes;
    uint8_t *output = arena_host(&checker->arena, region);

    if (checker->other_layout == NULL) {
        checker->other_layout = memcpy(must_alloc(bytes), output, bytes);
        return;
    }
    if (checker->broken == BREAK_LAYOUT && bytes > 0) {
        output[bytes - 1] ^= 1;
        checker->planted = true;
    }
    if (memcmp(output, checker->other_layout, bytes) != 0)
        check_fail(checker, "output differs from that of row-major weights from byte %zu on",
                   first_difference(output, checker->other_layout, bytes));
}
