/* SPDX-License-Identifier: Apache-2.0 */
/* Takes samples: ceilings and paths in turns, until there are enough of each or the time is up. */
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { PARTS = 3, MAX_RUNS = PARTS * MOE_PATH_COUNT, LEAST_SAMPLES = 3 };
static const double longest_call = 10; /* seconds; a path that would take longer at a point is skipped */
static const int64_t pilot_step = 4;   /* an estimate reaches from one token count to this many times as many */

enum part { PART_LAYER, PART_ROUTE, PART_EXPERTS };
static const char *const part_names[PARTS] = {"layer", "route", "experts"};

/* A path, or a part of it, and its samples at the current point. */
struct run {
    struct bench_meter *meter;
    moe_path path;
    enum part part;
    moe_batch batch;
    struct bench_call call;
    struct bench_result result;
    double *samples; /* [reps] */
    int32_t count;
    bool done; /* takes no more samples at this point */
    /* The last time at another point, from which the next is estimated; 0 tokens: none yet. */
    double known_seconds;
    int64_t known_tokens;
};

struct bench_meter {
    const struct bench_workload *workload;
    struct bench_machine *machine;
    int64_t reps;
    double seconds;
    struct bench_point point;
    struct run runs[MAX_RUNS];
    int count;
    double *read, *dense; /* [reps * MAX_RUNS] and [reps] */
    int32_t read_count, dense_count;
    void *workspace; /* one for all runs: they take turns */
    size_t workspace_bytes;
};

struct bench_meter *bench_meter_open(const struct bench_workload *workload, struct bench_machine *machine, int64_t reps,
                                     double seconds)
{
    struct bench_meter *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->workload = workload;
    m->machine = machine;
    m->reps = reps;
    m->seconds = seconds;
    m->read = calloc((size_t)reps * MAX_RUNS, sizeof *m->read);
    m->dense = calloc((size_t)reps, sizeof *m->dense);
    if (m->read && m->dense)
        return m;
    bench_meter_close(m);
    return NULL;
}

void bench_meter_close(struct bench_meter *m)
{
    if (!m)
        return;
    for (int i = 0; i < m->count; i++)
        free(m->runs[i].samples);
    free(m->read);
    free(m->dense);
    moe_buffer_free(m->workload->ctx, m->workspace);
    free(m);
}

bool bench_meter_add(struct bench_meter *m, moe_path path, bool stages)
{
    for (int part = 0; part < (stages ? PARTS : 1); part++) {
        struct run *r = &m->runs[m->count];
        r->samples = calloc((size_t)m->reps, sizeof *r->samples);
        if (!r->samples)
            return false;
        m->count++;
        r->meter = m;
        r->path = r->result.wanted = r->result.ran = path;
        r->part = (enum part)part;
        r->result.part = part_names[part];
    }
    return true;
}

static moe_status run_part(void *argument, void *stream)
{
    const struct run *r = argument;
    const struct bench_meter *m = r->meter;
    const moe_layer *layer = m->workload->layer;
    switch (r->part) {
    case PART_ROUTE:
        return moe_route(layer, &r->batch, m->workspace, m->workspace_bytes, stream);
    case PART_EXPERTS:
        return moe_experts_forward(layer, &r->batch, m->workspace, m->workspace_bytes, stream);
    default:
        return moe_forward(layer, &r->batch, m->workspace, m->workspace_bytes, stream);
    }
}

static void set_batch(struct run *r, int64_t tokens)
{
    const struct bench_workload *w = r->meter->workload;
    r->batch = moe_batch_init();
    r->batch.tokens = tokens;
    r->batch.dtype = w->desc.dtype;
    r->batch.path = r->path;
    r->batch.hidden_states = w->hidden_states;
    r->batch.output = w->output;
    if (r->part == PART_ROUTE) {
        r->batch.topk_ids_out = w->ids;
        r->batch.topk_weights_out = w->topk_weights;
    } else if (r->part == PART_EXPERTS) {
        r->batch.topk_ids = w->ids;
        r->batch.topk_weights = w->topk_weights;
    }
    r->call.run = run_part;
    r->call.argument = r;
}

/* Makes the common workspace large enough for the run; if that fails, it stays as large as it was. */
static moe_status grow_workspace(const struct run *r, int64_t tokens)
{
    struct bench_meter *m = r->meter;
    moe_context *ctx = m->workload->ctx;
    moe_limits limits = moe_limits_init();
    limits.max_tokens = tokens;
    limits.path = r->path;
    size_t bytes;
    moe_status status = moe_workspace_size(m->workload->layer, &limits, &bytes);
    if (status != MOE_OK || (m->workspace && bytes <= m->workspace_bytes))
        return status;
    moe_buffer_free(ctx, m->workspace);
    m->workspace = NULL;
    status = moe_buffer_alloc(ctx, bytes, &m->workspace);
    if (status == MOE_OK)
        m->workspace_bytes = bytes;
    else if (m->workspace_bytes && moe_buffer_alloc(ctx, m->workspace_bytes, &m->workspace) != MOE_OK)
        m->workspace_bytes = 0;
    return status;
}

/* A run that cannot go on at this point says so in its note. Only the device failing ends the bench. */
static moe_status give_up(struct run *r, moe_status status, const struct moe_error *err)
{
    struct moe_error text = *err;
    r->done = true;
    r->count = 0;
    if (status == MOE_ERROR_DEVICE)
        return status;
    if (!text.text[0])
        moe_last_error(r->meter->workload->ctx, text.text, sizeof text.text);
    snprintf(r->result.note, sizeof r->result.note, "cannot run: %.400s",
             text.text[0] ? text.text : moe_status_string(status));
    return MOE_OK;
}

static void learn(struct run *r, int64_t tokens, double seconds)
{
    r->known_tokens = tokens;
    r->known_seconds = seconds;
}

/* As if time grew with the tokens, which is the most that it does. */
static double estimate(const struct run *r, int64_t tokens)
{
    return r->known_tokens ? r->known_seconds * (double)tokens / (double)r->known_tokens : 0;
}

/* Climbs from what is known towards `tokens` by single runs, until the estimate is near or too long. */
static moe_status pilot(struct run *r, int64_t tokens, struct moe_error *err)
{
    struct bench_machine *machine = r->meter->machine;
    while (r->known_tokens * pilot_step < tokens && tokens > 1) {
        int64_t next = r->known_tokens ? r->known_tokens * pilot_step : 1;
        if (estimate(r, next) > longest_call)
            break;
        double seconds = 0;
        set_batch(r, next);
        moe_status status = grow_workspace(r, next);
        if (status == MOE_OK)
            status = machine->time(machine, &r->call, &seconds, err);
        if (status != MOE_OK)
            return status;
        learn(r, next, seconds);
    }
    return MOE_OK;
}

/* Decides whether the run takes part in this point, and makes room for it. */
static moe_status begin_run(struct run *r, int64_t tokens)
{
    struct moe_error err = {{0}};
    struct bench_result *result = &r->result;
    r->count = 0;
    r->done = false;
    result->graph = false;
    moe_status status =
        moe_path_choose(r->meter->workload->layer, r->path, tokens, &result->ran, result->note, sizeof result->note);
    if (status == MOE_ERROR_UNSUPPORTED) { /* the note says why */
        r->done = true;
        return MOE_OK;
    }
    result->note[0] = 0;
    if (status == MOE_OK)
        status = pilot(r, tokens, &err);
    if (status == MOE_OK && estimate(r, tokens) > longest_call) {
        char text[32];
        snprintf(result->note, sizeof result->note, "skipped: would take about %s",
                 cli_show_seconds(estimate(r, tokens), text, sizeof text));
        r->done = true;
        return MOE_OK;
    }
    if (status == MOE_OK)
        status = grow_workspace(r, tokens);
    set_batch(r, tokens);
    return status == MOE_OK ? MOE_OK : give_up(r, status, &err);
}

static moe_status prepare_run(struct run *r)
{
    struct bench_machine *machine = r->meter->machine;
    struct moe_error err = {{0}};
    moe_status status = machine->prepare(machine, &r->call, &err);
    r->result.graph = r->call.graph != NULL;
    return status == MOE_OK ? MOE_OK : give_up(r, status, &err);
}

static moe_status sample_run(struct run *r, double start)
{
    struct bench_meter *m = r->meter;
    struct moe_error err = {{0}};
    double seconds;
    moe_status status = m->machine->time(m->machine, &r->call, &seconds, &err);
    if (status != MOE_OK)
        return give_up(r, status, &err);
    r->samples[r->count++] = seconds;
    bool enough = r->count >= LEAST_SAMPLES && cli_now() - start > m->seconds;
    r->done = enough || seconds > m->seconds;
    return MOE_OK;
}

/* The ceilings, and one sample of every run that is not done. Reading stands before each, so that all start with the
 * same caches. */
static moe_status sample_round(struct bench_meter *m, double start, struct moe_error *err)
{
    struct bench_machine *machine = m->machine;
    moe_status status = MOE_OK;
    if (!machine->dense_why)
        status = machine->dense(machine, &m->dense[m->dense_count++], err);
    for (int i = 0; status == MOE_OK && i < m->count; i++) {
        bool run = !m->runs[i].done;
        if (run || i == 0)
            status = machine->read(machine, &m->read[m->read_count++], err);
        if (run && status == MOE_OK)
            status = sample_run(&m->runs[i], start);
    }
    return status;
}

static bool all_done(const struct bench_meter *m)
{
    for (int i = 0; i < m->count; i++) {
        if (!m->runs[i].done)
            return false;
    }
    return true;
}

static moe_status sample_all(struct bench_meter *m, struct moe_error *err)
{
    moe_status status = MOE_OK;
    double start = cli_now();
    m->read_count = m->dense_count = 0;
    for (int64_t rep = 0; status == MOE_OK && rep < m->reps; rep++) {
        if (rep >= LEAST_SAMPLES && all_done(m))
            break;
        status = sample_round(m, start, err);
    }
    return status;
}

moe_status bench_meter_point(struct bench_meter *m, int64_t tokens, struct bench_report *report, struct moe_error *err)
{
    moe_status status = bench_point_set(&m->point, m->workload, tokens);
    if (status == MOE_OK)
        status = m->machine->point(m->machine, &m->point, err);
    for (int i = 0; status == MOE_OK && i < m->count; i++)
        status = begin_run(&m->runs[i], tokens);
    /* From here on the workspace stays where it is, so that graphs can hold its address. */
    for (int i = 0; status == MOE_OK && i < m->count; i++) {
        if (!m->runs[i].done)
            status = prepare_run(&m->runs[i]);
    }
    if (status == MOE_OK)
        status = sample_all(m, err);

    struct bench_result results[MAX_RUNS];
    for (int i = 0; i < m->count; i++) {
        struct run *r = &m->runs[i];
        m->machine->release(m->machine, &r->call);
        r->result.time = bench_time_of(r->samples, r->count);
        if (r->count > 0)
            learn(r, tokens, r->result.time.median);
        results[i] = r->result;
    }
    struct bench_time read = bench_time_of(m->read, m->read_count), dense = bench_time_of(m->dense, m->dense_count);
    if (status == MOE_OK)
        bench_report_point(report, &m->point, &read, &dense, results, m->count);
    return status;
}
