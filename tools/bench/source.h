/* SPDX-License-Identifier: Apache-2.0 */
/* The layer, the token counts and the machine that the command line of `moe bench` or `moe tune` asks for. */
#ifndef MOE_TOOLS_BENCH_SOURCE_H
#define MOE_TOOLS_BENCH_SOURCE_H

#include "tools/bench/bench.h"
#include "tools/cli.h"

#define BENCH_TOKENS "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384"

/* Of the help texts: the names in the table of shapes. */
#define BENCH_FIRST_NAME(name, ...) name
#define BENCH_NEXT_NAME(name, ...)  ", " name
#define BENCH_SHAPES                "Shapes: " BENCH_SHAPE_MAP(BENCH_FIRST_NAME, BENCH_NEXT_NAME) ".\n"

struct bench_source {
    const char *command;              /* for messages */
    const char *model, *like, *shape; /* at most one */
    int64_t layer;                    /* of the model; -1: the first MoE layer */
    moe_dtype dtype;                  /* NONE: bf16, or the model's */
    int routing;                      /* enum bench_routing; below 0: uniform */
    char title[128];                  /* once the layer is there: what reports call it */
};
#define BENCH_SOURCE_OPTIONS(source)                                                                                   \
    {.name = "like",                                                                                                   \
     .kind = CLI_STRING,                                                                                               \
     .value = &(source).like,                                                                                          \
     .argument = "NAME",                                                                                               \
     .help = "a random layer of a known shape (default mixtral-8x7b)"},                                                \
        {.name = "shape",                                                                                              \
         .kind = CLI_STRING,                                                                                           \
         .value = &(source).shape,                                                                                     \
         .argument = "H,I,E,K",                                                                                        \
         .help = "a random layer: hidden, intermediate, experts, top_k"},                                              \
        {.name = "dtype",                                                                                              \
         .kind = CLI_DTYPE,                                                                                            \
         .value = &(source).dtype,                                                                                     \
         .argument = "D",                                                                                              \
         .help = "of a random layer: bf16 (default), f16 or f32"},                                                     \
        {.name = "model",                                                                                              \
         .letter = 'm',                                                                                                \
         .kind = CLI_STRING,                                                                                           \
         .value = &(source).model,                                                                                     \
         .argument = "DIR",                                                                                            \
         .help = "a layer of this checkpoint"},                                                                        \
    {                                                                                                                  \
        .name = "layer", .letter = 'l', .kind = CLI_INTEGER, .value = &(source).layer, .argument = "N",                \
        .help = "which (default: the first MoE layer)", .low = 0, .high = INT32_MAX                                    \
    }

enum { BENCH_MAX_POINTS = 64 };
struct bench_counts {
    int64_t tokens[BENCH_MAX_POINTS]; /* rising */
    int count;
};

/* Each returns CLI_GO or, the line written, an exit code. */
int bench_counts_parse(struct bench_counts *counts, const char *command, const char *list);
int bench_source_check(const struct bench_source *source);
/* Opens the checkpoint, and settles which layer it is. */
int bench_source_model(struct bench_source *source, moe_context *ctx, moe_checkpoint **checkpoint,
                       moe_layer_desc *desc);
/* Loads the layer or makes it, row-major; bench_workload_free cleans up in any case. */
int bench_source_open(struct bench_source *source, moe_context *ctx, struct bench_workload *w);
/* The machine of the context's device. */
int bench_machine_open(moe_context *ctx, struct bench_machine **machine);
/* What a status comes to; its text is in err or, if there is none, the context's. */
int bench_settle(const moe_context *ctx, moe_status status, const struct moe_error *err);

#endif
