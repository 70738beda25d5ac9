/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parts of `moe bench`: a workload (a layer and its tokens, and the chain of layers that it may stand for), a
 * machine (a clock, and the two ceilings that it measures), the plan of what to time, the meter that brings them
 * together at each token count, and the report. Loading is measured by itself.
 */
#ifndef MOE_TOOLS_BENCH_BENCH_H
#define MOE_TOOLS_BENCH_BENCH_H

#include <stdbool.h>

#include "models/model.h"

/* ---- Workload (workload.c) ---- */

struct bench_shape {
    const char *name;
    int64_t hidden, intermediate;
    int32_t experts, top_k;
};

/* One device's share of well-known layers, as plain SwiGLU: name, hidden, intermediate, experts, top_k. FIRST is X for
 * the first one, so that X can begin with what goes between two. */
#define BENCH_SHAPE_MAP(FIRST, X)                                                                                      \
    FIRST("mixtral-8x7b", 4096, 14336, 8, 2)                                                                           \
    X("phi3.5-moe", 4096, 6400, 16, 2)                                                                                 \
    X("dsv3-ep4", 7168, 2048, 64, 8)                                                                                   \
    X("gpt-oss", 2880, 2880, 32, 4)                                                                                    \
    X("qwen2-moe-a2.7b", 2048, 1408, 60, 4)                                                                            \
    X("qwen3-30b-a3b", 2048, 768, 128, 8)                                                                              \
    X("olmoe", 2048, 1024, 64, 8)

/* The i-th shape known by name, NULL past the last; the one called `name`, or NULL. */
const struct bench_shape *bench_shape_at(size_t i);
const struct bench_shape *bench_shape_find(const char *name);

enum bench_routing {
    BENCH_UNIFORM, /* as a random router spreads random tokens */
    BENCH_ZIPF,    /* log(1 / rank) added to the logits: expert 0 is the most wanted */
    BENCH_SINGLE,  /* every token goes to experts 0 to top_k - 1 */
};

enum { BENCH_LAYOUTS = MOE_LAYOUT_PACKED + 1 };

struct bench_chain;

struct bench_workload {
    moe_context *ctx;
    moe_layer *layers[BENCH_LAYOUTS]; /* the same weights by moe_layout: row-major, and packed or NULL */
    moe_layer_desc desc;
    moe_layer_weights weights;   /* where the row-major layer's are, for the read ceiling */
    void *parts[MOE_PART_COUNT]; /* weights that the workload owns, on the device */
    uint64_t part_bytes[MOE_PART_COUNT];
    /* For as many tokens as bench_workload_tokens was asked for. */
    void *hidden_states, *output; /* [max_tokens, hidden], the layer's dtype; on the device */
    int32_t *ids;                 /* [max_tokens, top_k], on the device */
    float *topk_weights;          /* [max_tokens, top_k], on the device */
    struct bench_chain *chain;    /* NULL: the layer stands alone */
};

/* Memory on the context's device of the kind that a loaded layer's weights are in. The text of a failure is the
 * context's. Free with the same `bytes`; NULL is accepted. */
moe_status bench_weights_alloc(moe_context *ctx, uint64_t bytes, void **pointer);
void bench_weights_free(moe_context *ctx, void *pointer, uint64_t bytes);

/* A layer of random weights on the context's device. The text of a failure is the context's; bench_workload_free cleans
 * up in any case. */
moe_status bench_workload_create(struct bench_workload *w, moe_context *ctx, const struct bench_shape *shape,
                                 moe_dtype dtype, enum bench_routing routing);
/* Takes a row-major layer that was loaded; the workload destroys it. */
moe_status bench_workload_adopt(struct bench_workload *w, moe_context *ctx, moe_layer *layer);
/* Adds the packed form of the layer; MOE_ERROR_UNSUPPORTED where no path reads it. */
moe_status bench_workload_pack(struct bench_workload *w);
/* Random hidden states for up to max_tokens tokens; only those that are `biased` are routed with skew. */
moe_status bench_workload_tokens(struct bench_workload *w, int64_t max_tokens, bool biased);
/* Gives the gate of a layer of random weights, and those of its chain, another routing. */
moe_status bench_workload_route(struct bench_workload *w, enum bench_routing routing);
void bench_workload_free(struct bench_workload *w);

/* ---- Chain (chain.c): the workload's layer as the layers of a model that decodes ---- */

/* In a chain, so many layers run one after the other. */
enum { BENCH_CHAIN_LAYERS = 32 };

/* Adds a chain of copies of the workload's layer, in these of the layouts that it is there in. A failure's text is in
 * err, or if err stays empty, the context's; bench_workload_free cleans up in any case. */
moe_status bench_chain_create(struct bench_workload *w, const bool layouts[BENCH_LAYOUTS], struct moe_error *err);
/* Takes over the routing of the workload's layer. */
moe_status bench_chain_route(struct bench_chain *chain, const struct bench_workload *w);
/* The layer at a place in the chain, from 0; NULL in a layout that the chain does not have. Where the workload's layer
 * routes to expert e, the one at place i routes to expert e + i, counted round. */
const moe_layer *bench_chain_layer(const struct bench_chain *chain, moe_layout layout, int32_t place);
/* How many copies of the weights the layers share. */
int32_t bench_chain_copies(const struct bench_chain *chain);
void bench_chain_free(struct bench_chain *chain); /* accepts NULL */

/* ---- A point: the workload with a number of tokens ---- */

struct bench_point {
    int64_t tokens, rows; /* rows = tokens * top_k */
    int64_t hidden, intermediate;
    moe_dtype dtype;
    const void *w13, *w2;                         /* [E, 2I, H] and [E, H, I], on the device */
    uint64_t matrix_bytes;                        /* of an expert's gate, up or down */
    int32_t touched;                              /* experts with at least one token */
    int32_t touched_ids[MOE_MAX_EXPERTS];         /* the first `touched` */
    double chain_touched;                         /* by a layer of the chain, on average */
    double weight_bytes, activation_bytes, flops; /* that any implementation must move and do */
};

/* Routes the first `tokens` tokens, which leaves ids and weights in the workload, and counts what that needs. */
moe_status bench_point_set(struct bench_point *p, const struct bench_workload *w, int64_t tokens);

/* ---- Machine: probe_cpu.c, probe_cuda.cu (probe_cuda_none.c in a build without CUDA) ---- */

/* Something to time. `graph` belongs to the machine: what `run` enqueues, if that could be captured. */
struct bench_call {
    moe_status (*run)(void *argument, void *stream);
    void *argument;
    void *graph;
};

/* A failure's text is in err; if err stays empty, it is the context's. Times are in seconds. */
struct bench_machine {
    /* Called once a point, before the ceilings; *p stays until the next one. */
    moe_status (*point)(struct bench_machine *m, const struct bench_point *p, struct moe_error *err);
    /* How long reading the point's bytes takes, and a dense matrix product of its FLOPs; one sample each, begun with
     * caches that hold nothing of the layer. */
    moe_status (*read)(struct bench_machine *m, double *seconds, struct moe_error *err);
    moe_status (*dense)(struct bench_machine *m, double *seconds, struct moe_error *err);
    /* Runs the call once and, where there are graphs, captures it; a call that refuses capture is timed as it is. */
    moe_status (*prepare)(struct bench_machine *m, struct bench_call *call, struct moe_error *err);
    /* One sample, begun with such caches. */
    moe_status (*time)(struct bench_machine *m, struct bench_call *call, double *seconds, struct moe_error *err);
    void (*release)(struct bench_machine *m, struct bench_call *call); /* what prepare made */
    void (*close)(struct bench_machine *m);
    double read_bytes;     /* of the point: what takes as long as `read` says */
    const char *read_how;  /* what the ceilings are, for people */
    const char *dense_how; /* NULL: there is none */
    const char *dense_why; /* why there is none, or `point` found none for its point; then `dense` must not be called */
};

moe_status bench_cpu_open(moe_context *ctx, struct bench_machine **machine, struct moe_error *err);
moe_status bench_cuda_open(int32_t device, struct bench_machine **machine, struct moe_error *err);

/* ---- Plan (plan.c): what to time ---- */

enum bench_part {
    BENCH_LAYER, /* of a workload with a chain, its first one */
    BENCH_ROUTE,
    BENCH_EXPERTS,
    BENCH_CHAIN, /* all layers of the chain; times are those of one */
    BENCH_PARTS,
};

/* One thing to time, a row of the report. */
struct bench_run {
    moe_path path;
    enum bench_part part;
    moe_layout layout; /* of the weights it gets */
    bool other_layout; /* not the one that the path gets by default: people want to read its name */
    int32_t config;    /* of the path; 0: the path's own choice */
    int32_t max_sms;   /* 0: all */
};

enum { BENCH_MAX_BOUNDS = 32, BENCH_MAX_CONFIGS = 64 };

/* What the command line asks for. Configurations and bounds are for the paths that have configurations, and bounds for
 * `auto`. */
struct bench_plan {
    bool paths[MOE_PATH_COUNT];
    bool layouts[BENCH_LAYOUTS]; /* for paths that read both; none: packed where there is such a layer */
    bool configs[MOE_PATH_COUNT][BENCH_MAX_CONFIGS + 1];
    int32_t max_sms[BENCH_MAX_BOUNDS];
    int bounds;
    bool stages; /* also the router and the experts alone */
    bool chain;  /* after each whole layer, the chain in the same way */
};

/* Takes the next word of a comma-separated list; false at its end. */
bool bench_word(const char **list, char *word, size_t bytes);
/* A whole number from 1 to `high`. */
bool bench_count(const char *text, int64_t high, int64_t *value);

struct bench_meter;
struct bench_report;

/* The lists of --paths, --layouts, --configs (after --paths) and --max-sms; the last three may be NULL. CLI_GO, or, a
 * line written, an exit code. */
int bench_plan_parse(struct bench_plan *plan, const char *paths, const char *layouts, const char *configs,
                     const char *max_sms);
/* Whether it has a path that reads packed weights. */
bool bench_plan_packs(const struct bench_plan *plan);
/* Adds to the meter all that can run here; of paths that cannot, the report says why. CLI_GO or an exit code. */
int bench_plan_add(const struct bench_plan *plan, const struct bench_workload *w, struct bench_meter *meter,
                   struct bench_report *report);

/* ---- Meter (measure.c): the samples of one point after another ---- */

/* A point gets up to `reps` samples of everything, and after `seconds` no more than it must have. NULL: no memory. */
struct bench_meter *bench_meter_open(const struct bench_workload *workload, struct bench_machine *machine, int64_t reps,
                                     double seconds);
void bench_meter_close(struct bench_meter *m); /* accepts NULL */
/* Before the first point. False: no memory. */
bool bench_meter_add(struct bench_meter *m, const struct bench_run *run);
/* Measures one point and reports it (report NULL: not). Small token counts come first, because what takes long is known
 * from them. On failure the text is in err, or if err stays empty, the context's. */
moe_status bench_meter_point(struct bench_meter *m, int64_t tokens, struct bench_report *report, struct moe_error *err);

/* What the last point gave for the i-th run added; NULL past the last. Stays until the next point. */
const struct bench_result *bench_meter_result(const struct bench_meter *m, int i);

/* ---- Report (report.c): a table, CSV or JSON on stdout ---- */

struct bench_time {
    double median, p99;
    int32_t samples; /* 0: not measured */
};

struct bench_result {
    struct bench_run run;
    moe_path ran;
    bool graph; /* timed as a CUDA graph */
    struct bench_time time;
    char note[512]; /* not measured: why; of `auto`: the reason for its choice */
};

enum bench_format { BENCH_TABLE, BENCH_CSV, BENCH_JSON };

/* Sorts the samples. */
struct bench_time bench_time_of(double *samples, int32_t count);

/* `title` names the layer; `routing` the distribution, NULL for a report on decode. NULL: out of memory. */
struct bench_report *bench_report_open(enum bench_format format, const struct bench_workload *w, const char *title,
                                       const char *routing, const struct bench_machine *machine);
/* Of a report on decode: what chain it is about, and with which routing the points are that follow (report_decode.c).
 * Each result of a layer has that of the chain next to it. */
void bench_report_chain(struct bench_report *r, const struct bench_workload *w);
void bench_report_routing(struct bench_report *r, const char *routing);
/* A path that cannot run at any point (CSV has no place for it: it goes to stderr). */
void bench_report_without(struct bench_report *r, moe_path path, const char *why);
void bench_report_point(struct bench_report *r, const struct bench_point *p, const struct bench_time *read,
                        const struct bench_time *dense, const struct bench_result *results, int count);
/* Writes what is left to write if the bench is whole, frees, and returns an exit code. */
int bench_report_close(struct bench_report *r, bool whole);

/* ---- Loading (load.c) ---- */

struct bench_load {
    uint64_t bytes; /* of the layer */
    struct bench_time plain, load;
};

/* Loads the layer `reps` times, and as often reads its bytes plainly. A failure's text is in err, or if err stays
 * empty, the context's. */
moe_status bench_load(struct bench_load *result, moe_context *ctx, moe_checkpoint *checkpoint, int32_t layer,
                      int64_t reps, struct moe_error *err);
/* A table or JSON on stdout (report.c); returns an exit code. */
int bench_report_load(enum bench_format format, const struct bench_load *result, const moe_context *ctx,
                      const char *title, const moe_layer_desc *desc);

#endif
