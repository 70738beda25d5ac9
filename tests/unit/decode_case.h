/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the decode path on a GPU, and of chains of forwards, share: three layers of random weights, single
 * forwards of them with what they give alone, and an end for a test that hangs. */
#ifndef MOE_TESTS_UNIT_DECODE_CASE_H
#define MOE_TESTS_UNIT_DECODE_CASE_H

#include <cuda_runtime.h>

#include "runtime/internal.h"
#include "tests/unit/device.h"

enum { CASE_LAYOUTS = 2, CASE_STREAMS = 4 };
enum { CASE_EVEN, CASE_ODD, CASE_MANY, CASE_SHAPES };

struct case_shape {
    const char *name;
    moe_dtype dtype;
    int64_t hidden, intermediate;
    int32_t experts, top_k;
};

struct case_model {
    const struct case_shape *shape;
    void *gate, *w13, *w2;            /* host */
    void *on_device[3];               /* the same */
    moe_layer *layouts[CASE_LAYOUTS]; /* packed, row-major */
};

/* From case_open to case_close. */
extern moe_context *case_ctx;
extern moe_device_info case_device;
/* From case_setup to case_teardown. The streams are the same for all tests, so that no two of them share a queue, where
 * one would wait for the other. */
extern struct case_model case_models[CASE_SHAPES];
extern cudaStream_t case_streams[CASE_STREAMS];

/* Before the tests. 0, or the status that the program ends with: 77 without a GPU. */
int case_open(void);
void case_close(void);
/* The group's setup and teardown, and the setup of each test: one that takes longer than 100 s ends the program. */
int case_setup(void **state);
int case_teardown(void **state);
int case_watch(void **state);

moe_layer_desc case_desc(const struct case_shape *s);
uint64_t case_random(uint64_t *seed); /* 32 bits */
/* `count` numbers in [-scale, scale]; the second to be freed. */
void case_fill(void *to, moe_dtype dtype, int64_t count, uint64_t seed, double scale);
void *case_numbers(const struct case_shape *s, int64_t count, uint64_t seed, double scale);
/* Memory on the device, the second with what lies at `host`. To be freed with moe_buffer_free. */
void *case_alloc(size_t bytes);
void *case_copy(const void *host, size_t bytes);
void *case_workspace(const moe_layer *layer, moe_path path, int64_t tokens, size_t *bytes);

/* From *config on, the path's first configuration that this GPU can run; false: none. */
bool case_next_config(moe_path path, int32_t *config);
/* What the stream captured, ready to be launched. */
cudaGraphExec_t case_end_capture(cudaStream_t stream);

/* For test_compare, without differences yet; on the device. */
struct test_differences *case_differences(void);
/* What it has found, after all that is in the stream. */
struct test_differences case_found(const struct test_differences *found, cudaStream_t stream);

/* A forward on random tokens, and what it gives while nothing else runs. */
struct case_run {
    const moe_layer *layer;
    bool routed; /* by the caller: moe_experts_forward; else the gate says ids and weights */
    moe_batch batch;
    void *x, *y, *ids, *weights, *workspace, *expected; /* expected is on the device too */
    size_t workspace_bytes, y_bytes;
    cudaStream_t stream;
};

/* Also loads every kernel that it needs, which could not be while another one has the GPU. `layout` is an index of the
 * model's layouts. */
struct case_run case_run_make(const struct case_model *m, int layout, moe_path path, int32_t config, int32_t max_sms,
                              bool routed, int64_t tokens, uint64_t seed, cudaStream_t stream);
void case_run_free(struct case_run *r);
/* Each in the run's stream: the forward; before it, workspace and output that hold nothing of use; after it, the
 * comparison of the output with the one expected. */
void case_run_enqueue(const struct case_run *r);
void case_run_poison(const struct case_run *r);
void case_run_compare(const struct case_run *r, struct test_differences *found, unsigned long long number);

#endif
