/* SPDX-License-Identifier: Apache-2.0 */
/* Takes samples: one of each ceiling and each run a round, until there are enough or the time is up. Every round has an
 * order of its own, because a card that is limited by its power carries over what one sample did to the next: so
 * nothing always follows the same neighbour. */
#include <stdio.h>
#include <stdlib.h>

#include "tools/bench/bench.h"
#include "tools/cli.h"

enum { LEAST_SAMPLES = 3, ORDER_SEED = 1 };
static const double longest_call = 10; /* seconds; a path that would take longer at a point is skipped */
static const int64_t pilot_step = 4;   /* an estimate reaches from one token count to this many times as many */

/* What a round does in some order: the runs, by their index, and these. */
enum { READ = -1, DENSE = -2, CEILINGS = 2 };

/* One thing to time, and its samples at the current point. */
struct run {
    struct bench_run what;
    struct bench_meter *meter;
    moe_batch batch;
    struct bench_call call;
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
    struct run *runs;             /* [count]; they stay where they are from the first point on */
    struct bench_result *results; /* [count] */
    int *order;                   /* [count + CEILINGS] */
    int count;
    double *read, *dense; /* [reps] */
    int32_t read_count, dense_count;
    uint64_t random; /* of the order */
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
    m->random = ORDER_SEED;
    m->read = calloc((size_t)reps, sizeof *m->read);
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
    free(m->runs);
    free(m->results);
    free(m->order);
    free(m->read);
    free(m->dense);
    moe_buffer_free(m->workload->ctx, m->workspace);
    free(m);
}

/* Makes room for one run more. */
static bool grow(struct bench_meter *m)
{
    size_t count = (size_t)m->count + 1;
    void *runs = realloc(m->runs, count * sizeof *m->runs);
    m->runs = runs ? runs : m->runs;
    void *results = realloc(m->results, count * sizeof *m->results);
    m->results = results ? results : m->results;
    void *order = realloc(m->order, (count + CEILINGS) * sizeof *m->order);
    m->order = order ? order : m->order;
    return runs && results && order;
}

bool bench_meter_add(struct bench_meter *m, const struct bench_run *run)
{
    double *samples = calloc((size_t)m->reps, sizeof *samples);
    if (!samples || !grow(m)) {
        free(samples);
        return false;
    }
    m->runs[m->count] = (struct run){.what = *run, .meter = m, .samples = samples};
    m->results[m->count++] = (struct bench_result){.run = *run, .ran = run->path};
    return true;
}

static struct bench_result *result_of(const struct run *r)
{
    return &r->meter->results[r - r->meter->runs];
}

/* How many layers a call of the run is. */
static int32_t layers_of(const struct run *r)
{
    return r->what.part == BENCH_CHAIN ? BENCH_CHAIN_LAYERS : 1;
}

static const moe_layer *layer_of(const struct run *r, int32_t place)
{
    const struct bench_workload *w = r->meter->workload;
    return w->chain ? bench_chain_layer(w->chain, r->what.layout, place) : w->layers[r->what.layout];
}

static moe_status run_part(void *argument, void *stream)
{
    const struct run *r = argument;
    const struct bench_meter *m = r->meter;
    if (r->what.part == BENCH_ROUTE)
        return moe_route(layer_of(r, 0), &r->batch, m->workspace, m->workspace_bytes, stream);
    if (r->what.part == BENCH_EXPERTS)
        return moe_experts_forward(layer_of(r, 0), &r->batch, m->workspace, m->workspace_bytes, stream);
    moe_status status = MOE_OK;
    for (int32_t i = 0; status == MOE_OK && i < layers_of(r); i++)
        status = moe_forward(layer_of(r, i), &r->batch, m->workspace, m->workspace_bytes, stream);
    return status;
}

static void set_batch(struct run *r, int64_t tokens)
{
    const struct bench_workload *w = r->meter->workload;
    r->batch = moe_batch_init();
    r->batch.tokens = tokens;
    r->batch.dtype = w->desc.dtype;
    r->batch.path = r->what.path;
    r->batch.config = r->what.config;
    r->batch.max_sms = r->what.max_sms;
    r->batch.hidden_states = w->hidden_states;
    r->batch.output = w->output;
    if (r->what.part == BENCH_ROUTE) {
        r->batch.topk_ids_out = w->ids;
        r->batch.topk_weights_out = w->topk_weights;
    } else if (r->what.part == BENCH_EXPERTS) {
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
    limits.path = r->what.path;
    size_t bytes;
    moe_status status = moe_workspace_size(layer_of(r, 0), &limits, &bytes);
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
    struct bench_result *result = result_of(r);
    struct moe_error text = *err;
    r->done = true;
    r->count = 0;
    if (status == MOE_ERROR_DEVICE)
        return status;
    if (!text.text[0])
        moe_last_error(r->meter->workload->ctx, text.text, sizeof text.text);
    snprintf(result->note, sizeof result->note, "cannot run: %.400s",
             text.text[0] ? text.text : moe_status_string(status));
    return MOE_OK;
}

static void learn(struct run *r, int64_t tokens, double seconds)
{
    r->known_tokens = tokens;
    r->known_seconds = seconds;
}

/* As if time grew with the tokens, which is the most that it does, and never fell. */
static double estimate(const struct run *r, int64_t tokens)
{
    return tokens > r->known_tokens && r->known_tokens ? r->known_seconds * (double)tokens / (double)r->known_tokens
                                                       : r->known_seconds;
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
    struct bench_result *result = result_of(r);
    r->count = 0;
    r->done = false;
    result->graph = false;
    moe_status status =
        moe_path_choose(layer_of(r, 0), r->what.path, tokens, &result->ran, result->note, sizeof result->note);
    if (status == MOE_ERROR_UNSUPPORTED) { /* the note says why */
        r->done = true;
        return MOE_OK;
    }
    if (r->what.path != MOE_PATH_AUTO)
        result->note[0] = 0; /* "asked for by name" */
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
    result_of(r)->graph = r->call.graph != NULL;
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

/* Both ceilings and the runs that are not done, in a random order. Returns how many these are. */
static int shuffle(struct bench_meter *m)
{
    int count = 0;
    m->order[count++] = READ;
    if (!m->machine->dense_why)
        m->order[count++] = DENSE;
    for (int i = 0; i < m->count; i++) {
        if (!m->runs[i].done)
            m->order[count++] = i;
    }
    for (int i = count - 1; i > 0; i--) {
        m->random = m->random * 6364136223846793005u + 1442695040888963407u;
        int j = (int)((m->random >> 33) % (uint64_t)(i + 1)), item = m->order[i];
        m->order[i] = m->order[j];
        m->order[j] = item;
    }
    return count;
}

static moe_status sample_round(struct bench_meter *m, double start, struct moe_error *err)
{
    struct bench_machine *machine = m->machine;
    moe_status status = MOE_OK;
    for (int i = 0, count = shuffle(m); status == MOE_OK && i < count; i++) {
        if (m->order[i] == READ)
            status = machine->read(machine, &m->read[m->read_count++], err);
        else if (m->order[i] == DENSE)
            status = machine->dense(machine, &m->dense[m->dense_count++], err);
        else
            status = sample_run(&m->runs[m->order[i]], start);
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

    for (int i = 0; i < m->count; i++) {
        struct run *r = &m->runs[i];
        m->machine->release(m->machine, &r->call);
        struct bench_time time = bench_time_of(r->samples, r->count);
        if (r->count > 0)
            learn(r, tokens, time.median);
        time.median /= layers_of(r);
        time.p99 /= layers_of(r);
        m->results[i].time = time;
    }
    struct bench_time read = bench_time_of(m->read, m->read_count), dense = bench_time_of(m->dense, m->dense_count);
    if (status == MOE_OK && report)
        bench_report_point(report, &m->point, &read, &dense, m->results, m->count);
    return status;
}

const struct bench_result *bench_meter_result(const struct bench_meter *m, int i)
{
    return i < m->count ? &m->results[i] : NULL;
}
