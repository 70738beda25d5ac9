/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checkmoe: random and adversarial layers, run on every path of a device and compared with fp64. A case is wholly made
 * from one 64-bit seed, so that a failure can be run again by that number alone.
 *
 *   case.c    seed -> shape, dtypes, weights, hidden states, routing
 *   fp64.c    the same layer in double
 *   budget.c  how large an error may be, and against what it is measured
 *   arena.c   device memory with guard bands, poisoned
 *   packed.c  packs a case's weights, and checks them
 *   check.c   what the checks share
 *   layer.c   checks moe_experts_forward, moe_forward and moe_route
 *   steps.c   checks each step of a path against the contract of the operations that it covers
 *   bench.c   times paths and their steps
 *   large.c   buffers of more than 2^31 elements (GPU)
 */
#ifndef CHECKMOE_H
#define CHECKMOE_H

#include <stdbool.h>
#include <stdio.h>

#include "config/convert.h"
#include "runtime/internal.h"

/* ---- Random numbers: splitmix64 ---- */

struct random {
    uint64_t state;
};

uint64_t random_u64(struct random *random);
int64_t random_between(struct random *random, int64_t low, int64_t high); /* both ends included */
bool random_one_in(struct random *random, int64_t n);
double random_unit(struct random *random);  /* [0, 1) */
float random_normal(struct random *random); /* mean 0, variance 1, never beyond 3.5 */

/* ---- A case ---- */

enum { LAYOUTS = MOE_LAYOUT_PACKED + 1 };
extern const char *const layout_names[LAYOUTS]; /* of AUTO: "both" */

enum level { LEVEL_EXPERTS, LEVEL_FORWARD, LEVEL_STEPS };

/* T tokens, H hidden, I intermediate, E experts, K top_k of the layer, S slots of the caller's ids. All host memory. */
struct test_case {
    uint64_t seed;
    enum level level;
    int64_t tokens, hidden, intermediate;
    int32_t experts, top_k, slots;
    moe_dtype dtype, io_dtype, gate_dtype, logits_dtype, topk_weight_dtype, ids_dtype;
    int32_t renormalize, max_sms;
    moe_layout layout;    /* of the weights, on paths that read either; AUTO: one after the other, to the same bits */
    uint32_t config;      /* modulo how many the path has, and none */
    bool outputs_given;   /* moe_forward is asked for logits, ids and weights as well */
    bool misaligned;      /* buffers begin on the smallest alignment that the interface allows */
    int64_t spare_tokens; /* the workspace is sized for so many more */
    int repeats;          /* runs that must give the same bits */
    const char *routing, *gating, *activation;

    void *input;    /* [T, H] io_dtype */
    void *x;        /* [T, H] dtype: what the experts see */
    void *gate;     /* [E, H] gate_dtype */
    void *w13;      /* [E, 2I, H] dtype */
    void *w2;       /* [E, H, I] dtype */
    void *ids;      /* [T, S] ids_dtype */
    float *weights; /* [T, S] */
    float *logits;  /* [T, E], adversarial: what the top-k step is given */
};

/* How large, and for which device: most cases for a GPU have sizes that the paths on its tensor cores take. `cut`: all
 * are layers whose last items prefill may cut. */
struct case_kind {
    bool small, gpu, cut;
};

/* Shape and dtypes only, then the memory. */
void case_draw(struct test_case *c, uint64_t seed, struct case_kind kind);
void case_fill(struct test_case *c);
void case_free(struct test_case *c);
void case_print(const struct test_case *c, FILE *file);
moe_layer_desc case_desc(const struct test_case *c);
/* Expert of pair i of ids [T, S]; -1 if the id is none. */
int32_t expert_of(const void *ids, moe_dtype ids_dtype, int64_t i, int32_t experts);

/* ---- fp64 ---- */

enum { BLOCK_ROWS = 32 };

/*
 * Carries `count` <= BLOCK_ROWS rows of one expert through `stages` (a run of GEMM1, ACTIVATION, GEMM2) in double.
 * in is [count, width of the first stage's input], out and typical [count, width of the last stage's output]. typical
 * is what each element would measure if the terms of its sums had random signs: the yardstick where a sum cancels. work
 * holds at least rows64_work(c) doubles.
 */
size_t rows64_work(const struct test_case *c);
void rows64(const struct test_case *c, int32_t expert, unsigned stages, int count, const double *in, double *out,
            double *typical, double *work);

/* The experts' results of every (token, slot), kept as long as ids are the same. */
struct expert_rows {
    int32_t slots;
    int32_t *expert; /* [T, S], -1: none */
    double *down;    /* [T, S, H]; not set where there is no expert */
    double *typical; /* [T, S, H]; likewise */
};
void expert_rows_make(struct expert_rows *rows, const struct test_case *c, const void *ids, moe_dtype ids_dtype,
                      int32_t slots);
void expert_rows_free(struct expert_rows *rows);

/* logits[e] of one token in double, and how far fp32 accumulation may be off before the rounding. */
void logits64(const struct test_case *c, int64_t token, double *logits, double *tolerance);
/* The weight of each of `ids` by softmax over `logits`. */
void softmax64(const struct test_case *c, const float *logits, const int32_t *ids, double *weights);

/* ---- Budgets (budget.c) ---- */

double budget_layer(moe_path path, const struct test_case *c, moe_dtype result);
double budget_operation(moe_dtype result);
/* Of gate and up: the cuBLAS paths keep them in the layer's dtype, all others in fp32 up to the activation. */
bool budget_rounds_inside(moe_path path);
double budget_ulp(double value, moe_dtype dtype);

/* A row of a result: `count` elements of `dtype` in `got`, from element `first` on; `expected` and `typical` begin with
 * the row. any_f16: of what it was made from, something is f16. */
struct result_row {
    const void *got;
    moe_dtype dtype;
    int64_t first, count;
    const double *expected, *typical;
    bool any_f16;
};
/* ||got - expected|| / max(||expected||, floor); infinite where got is no number or expected is zero and got is not.
 * *column: where they differ most. */
double row_error(const struct result_row *row, int64_t *column);

/* ---- Memory ---- */

/* Ends the program where there is none: a check that could not be made must not look like one that found nothing. */
void *must_alloc(size_t bytes);
/* The first byte in which a and b differ; `bytes`: none. */
size_t first_difference(const void *a, const void *b, size_t bytes);

enum { GUARD_BYTES = 256, MAX_REGIONS = 40 };

struct region {
    const char *name;
    size_t offset, bytes;
    const void *initial; /* NULL: poisoned */
};

struct arena {
    moe_context *ctx;
    char *device;
    uint8_t *image, *before; /* host copies of the whole: the present one, and that of the last arena_send or _keep */
    size_t used, capacity;
    int count;
    struct region regions[MAX_REGIONS];
};

void arena_begin(struct arena *arena, moe_context *ctx);
/* Returns the region's number. `offset`: bytes past a multiple of 256 at which it begins. */
int arena_add(struct arena *arena, const char *name, size_t bytes, const void *initial, size_t offset);
/* Makes the memory, after the last add. */
moe_status arena_ready(struct arena *arena);
/* Everything gets the poison byte, then regions their initial contents; all goes to the device. */
moe_status arena_send(struct arena *arena, uint8_t poison);
moe_status arena_fetch(struct arena *arena);
/* What is there now is what later changes are told by. */
void arena_keep(struct arena *arena);
/* Overwrites one region on the device. */
moe_status arena_write(struct arena *arena, int region, const void *data);
void *arena_device(const struct arena *arena, int region);
void *arena_host(const struct arena *arena, int region);
void arena_free(struct arena *arena);

/* ---- Running and reporting ---- */

double seconds_now(void); /* on a clock that only goes forward */

/* What is counted of each path, layout and configuration. */
struct totals {
    int64_t cases, unsupported, failures;
    double worst; /* share of budget used, 1 is all */
};

enum { MAX_CONFIGS = 32 }; /* of a path, the choice among them included */

/* Bugs that --break plants into what came back from the device, to show that the checks see them. */
#define BREAK_MAP(X)                                                                                                   \
    X(BREAK_ELEMENT, "element")                                                                                        \
    X(BREAK_LAST_ROW, "last-row")                                                                                      \
    X(BREAK_STALE_ROW, "stale-row")                                                                                    \
    X(BREAK_GUARD, "guard")                                                                                            \
    X(BREAK_INPUT, "input")                                                                                            \
    X(BREAK_REPEAT, "repeat")                                                                                          \
    X(BREAK_LAYOUT, "layout")                                                                                          \
    X(BREAK_PACKED, "packed")                                                                                          \
    X(BREAK_ACT, "act")                                                                                                \
    X(BREAK_TAIL, "tail")                                                                                              \
    X(BREAK_ID, "id")                                                                                                  \
    X(BREAK_WEIGHT, "weight")                                                                                          \
    X(BREAK_PLAN, "plan")

enum break_kind {
    BREAK_NONE,
#define BREAK_ENUM(name, text) name,
    BREAK_MAP(BREAK_ENUM)
#undef BREAK_ENUM
        BREAK_COUNT
};

struct checker {
    moe_context *ctx;
    struct arena arena;
    const char *device_name; /* as --device takes it */
    struct case_kind kind;
    moe_path only_path;      /* MOE_PATH_COUNT: all */
    const char *only_op;     /* NULL: all */
    int only_layout;         /* -1: as the case says; AUTO: each */
    const char *only_config; /* NULL: as the case says; "all": each */
    int32_t max_sms;         /* -1: as the case says */

    enum break_kind broken;
    bool planted; /* the bug fitted this case */

    /* the case and path at work */
    const struct test_case *c;
    moe_path path;
    moe_layout layout; /* never AUTO */
    int32_t config;
    const char *op;
    void *other_layout; /* the output with row-major weights, while the same case runs with packed ones */

    int64_t failures;
    struct totals totals[MOE_PATH_COUNT][LAYOUTS][MAX_CONFIGS];
};

/* Sets the path, layout and configuration at work, and finds their counts. */
void check_begin(struct checker *checker, moe_path path, moe_layout layout, int32_t config);
struct totals *check_totals(struct checker *checker);
void print_totals(const struct checker *checker);

/* Reports a failure of the present case; the text says what differs and where. */
void check_fail(struct checker *checker, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Guard bands, and regions of which `may_write` (bit = region) is not set, against the image before the run. */
bool check_arena(struct checker *checker, uint64_t may_write);
/* A row's error against its budget, of which the share used is counted. The text names the row. */
bool check_row(struct checker *checker, const struct result_row *row, double budget, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* On the path, the layout and the configuration at work. */
void check_layer(struct checker *checker, const struct test_case *c, struct expert_rows *rows);
void check_steps(struct checker *checker, const struct test_case *c);
/* The output of one layout is kept, that of the other must be the same. */
void check_layouts(struct checker *checker, int region);
/* Exact ids for these logits, weights within their tolerance. */
bool check_topk(struct checker *checker, const float *logits, const int32_t *ids, const float *weights);
/* Each logit against fp64. */
bool check_logits(struct checker *checker, const float *logits);
/* What a call of the public interface returned; the text of a failure is the context's. */
bool check_call(struct checker *checker, moe_status status, const char *what);
/* Runs a step; the text of a failure is in *call->error, which must be there. */
bool call_step(struct checker *checker, const struct moe_step *step, const struct moe_call *call);
/* Plants the output bug asked for, if it fits. `run` counts the repeats. */
void plant_output(struct checker *checker, int region, const struct test_case *c, int run);

/* Which layouts and configurations of a path are asked for, of those that it has. */
bool wants_path(const struct checker *checker, moe_path path);
bool wants_layout(const struct checker *checker, moe_path path, const moe_layer_desc *desc, moe_layout layout);
bool wants_config(const struct checker *checker, moe_path path, int32_t config);
int32_t count_configs(moe_path path);
/* Whether the path and this configuration of it can run layers of this shape here. */
bool can_run(const struct checker *checker, moe_path path, const moe_layer_desc *desc, int32_t config);

/* A layer on the weights in regions of the arena (gate -1: none), which has been sent. In the layout at work: *packed
 * is NULL or a packed copy, which is what it should be. */
bool make_layers(struct checker *checker, const struct test_case *c, int gate, int w13, int w2, moe_layer **layer,
                 moe_layer **packed);
/* The weights on the device are those of the case, in packed form. */
bool check_packed(struct checker *checker, const struct test_case *c, const moe_layer *packed);

int bench(struct checker *checker, const char *shape, moe_dtype dtype);
int large(struct checker *checker);

#endif
