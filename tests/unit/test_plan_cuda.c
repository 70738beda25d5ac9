/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU: the plan of ids that a caller brings, of ids just chosen, and by a tally, is the plain C plan bit for bit,
 * for numbers of tokens and experts on both sides of where the kernels change; and nothing else is written. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "runtime/internal.h"

enum { SKIP = 77, BAND = 256, POISON = 0xa5, MAX_REGIONS = 16 };

static moe_context *ctx;
static uint64_t seed;

static uint32_t draw(uint32_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 32) % below);
}

/* ---- Memory: regions with a band before and behind each, the same on the host and on the device ---- */

static struct {
    size_t offset[MAX_REGIONS], bytes;
    int regions;
    char *host, *expected, *device;
} memory;

static int add(size_t bytes)
{
    memory.offset[memory.regions] = memory.bytes + BAND;
    memory.bytes += BAND + (bytes + BAND - 1) / BAND * BAND;
    return memory.regions++;
}

static void memory_make(void)
{
    memory.bytes += BAND;
    memory.host = malloc(memory.bytes);
    memory.expected = malloc(memory.bytes);
    assert_true(memory.host != NULL && memory.expected != NULL);
    memset(memory.expected, POISON, memory.bytes);
    assert_int_equal(moe_buffer_alloc(ctx, memory.bytes, (void **)&memory.device), MOE_OK);
}

static void memory_send(void)
{
    assert_int_equal(moe_copy_in(ctx, memory.device, memory.expected, memory.bytes, NULL), MOE_OK);
}

static void memory_fetch(void)
{
    assert_int_equal(moe_copy_out(ctx, memory.host, memory.device, memory.bytes, NULL), MOE_OK);
    assert_int_equal(moe_synchronize(ctx, NULL), MOE_OK);
}

static void memory_free(void)
{
    moe_buffer_free(ctx, memory.device);
    free(memory.host);
    free(memory.expected);
    memset(&memory, 0, sizeof memory);
}

/* Region `i` where `base` is the host's, the device's or the expected memory. */
static void *at(char *base, int i)
{
    return base + memory.offset[i];
}

/* What came back becomes what is expected: of regions that are not compared, or were already. */
static void take_over(int i, size_t bytes)
{
    memcpy(at(memory.expected, i), at(memory.host, i), bytes);
}

/* ---- A plan ---- */

enum { NEXT_BYTES = 16 * 700 };

struct plan_case {
    int64_t tokens;
    int32_t slots, experts, groups, max_sms, cluster;
    moe_dtype ids_dtype;
    const char *what;
};

/* Regions. */
static struct {
    int logits, ids, weights, expert_group, counts, offsets, row_token, row_slot, row_weight, slot_row, scratch, next;
} in;

static size_t scratch_bytes(const struct plan_case *c)
{
    return moe_plan_scratch_bytes(c->tokens, c->slots, c->groups);
}

static void regions_make(const struct plan_case *c, bool logits)
{
    const size_t pairs = (size_t)(c->tokens * c->slots), groups = (size_t)c->groups;
    in.logits = add(logits ? (size_t)(c->tokens * c->experts) * sizeof(float) : 0);
    in.ids = add(pairs * moe_dtype_size(c->ids_dtype));
    in.weights = add(pairs * sizeof(float));
    in.expert_group = add((size_t)c->experts * sizeof(int32_t));
    in.counts = add(groups * sizeof(int32_t));
    in.offsets = add((groups + 1) * sizeof(int32_t));
    in.row_token = add(pairs * sizeof(int32_t));
    in.row_slot = add(pairs * sizeof(int32_t));
    in.row_weight = add(pairs * sizeof(float));
    in.slot_row = add(pairs * sizeof(int32_t));
    in.scratch = add(scratch_bytes(c));
    in.next = add(NEXT_BYTES);
    memory_make();
}

static struct moe_plan_args plan_args(const struct plan_case *c, char *base)
{
    return (struct moe_plan_args){
        .tokens = c->tokens,
        .slots = c->slots,
        .experts = c->experts,
        .groups = c->groups,
        .expert_group = c->groups != c->experts ? at(base, in.expert_group) : NULL,
        .ids = at(base, in.ids),
        .ids_dtype = c->ids_dtype,
        .weights = at(base, in.weights),
        .plan = {.counts = at(base, in.counts),
                 .offsets = at(base, in.offsets),
                 .row_token = at(base, in.row_token),
                 .row_slot = at(base, in.row_slot),
                 .row_weight = at(base, in.row_weight),
                 .slot_row = at(base, in.slot_row)},
        .scratch = at(base, in.scratch),
        .zeroed = at(base, in.next),
        .zeroed_bytes = (size_t)(c->tokens % 7) * NEXT_BYTES / 14 / 16 * 16, /* none, up to nearly half */
    };
}

static struct moe_gpu gpu_of(const struct plan_case *c)
{
    return (struct moe_gpu){
        .sms = ctx->exec.sms,
        .max_sms = c->max_sms,
        .cluster = c->cluster,
        .dependent = ctx->exec.compute_capability == 90,
    };
}

/* All memory is as the plain C plan of the ids and weights in `expected` leaves it; the scratch may hold anything. */
static void check(const struct plan_case *c)
{
    static const char *const names[] = {"logits",    "ids",      "weights",    "expert_group", "counts",  "offsets",
                                        "row_token", "row_slot", "row_weight", "slot_row",     "scratch", "next"};
    const struct moe_plan_args args = plan_args(c, memory.expected);
    take_over(in.scratch, scratch_bytes(c));
    moe_plan_ref(&args);
    if (memcmp(memory.host, memory.expected, memory.bytes) == 0)
        return;
    for (size_t i = 0; i < memory.bytes; i++)
        if (memory.host[i] != memory.expected[i]) {
            int region = 0;
            while (region + 1 < memory.regions && memory.offset[region + 1] <= i)
                region++;
            fail_msg("%s, %lld tokens, %d slots, %d experts, %d groups, max_sms %d, clusters of up to %d: byte %lld of "
                     "%s is %02x, expected %02x",
                     c->what, (long long)c->tokens, c->slots, c->experts, c->groups, c->max_sms, c->cluster,
                     (long long)i - (long long)memory.offset[region], names[region], (unsigned char)memory.host[i],
                     (unsigned char)memory.expected[i]);
        }
}

static const int64_t token_counts[] = {1,   7,   33,   129,  255,  256,  257,   511,
                                       512, 513, 1000, 1025, 4096, 5000, 16384, 65537};
static const int32_t expert_counts[] = {1, 8, 60, 64, 128, 160, 256, 512, 513, 1024, MOE_MAX_EXPERTS};
static const int32_t slot_counts[] = {8, 1, 2, 10, 4, 16, 33, MOE_MAX_TOP_K};
static const int32_t sm_counts[] = {0, 0, 1, 3, 17, 1000};
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* Each number of tokens with each number of experts, as long as there are no more pairs than `most`, or logits where
 * ids differ; slots and SMs take turns. */
static void for_each_case(int64_t most, bool differ, void (*run)(struct plan_case *c, size_t number))
{
    size_t number = 0;
    memory_free(); /* what a failure has left */
    for (size_t t = 0; t < COUNT(token_counts); t++)
        for (size_t e = 0; e < COUNT(expert_counts); e++) {
            struct plan_case c = {.tokens = token_counts[t],
                                  .experts = expert_counts[e],
                                  .groups = expert_counts[e],
                                  .slots = slot_counts[number % COUNT(slot_counts)],
                                  .max_sms = sm_counts[number / 2 % COUNT(sm_counts)],
                                  .cluster = ctx->exec.cluster,
                                  .ids_dtype = MOE_I32};
            number++;
            if (differ && c.slots > c.experts)
                c.slots = c.experts;
            if (c.tokens * c.slots > most)
                c.slots = differ && c.experts < 8 ? c.experts : 8;
            if (differ && c.tokens * c.experts > most)
                continue;
            seed = number;
            run(&c, number);
        }
}

/* ---- Ids that a caller brings ---- */

static const char *const routings[] = {"random ids", "one expert", "repeated ids", "bad ids", "same experts"};

static int64_t draw_id(const struct plan_case *c, size_t routing, int64_t pair)
{
    const int64_t token = pair / c->slots, slot = pair % c->slots;
    if (routing == 1)
        return c->experts / 2;
    if (routing == 2)
        return (token + slot / 2) % c->experts;
    if (routing == 3 && draw(3) == 0)
        return (int64_t[]){-1, c->experts, INT32_MAX, INT32_MIN}[draw(4)];
    if (routing == 4)
        return slot * 3 % c->experts;
    return draw((uint32_t)c->experts);
}

static void run_given(struct plan_case *c, size_t number)
{
    const size_t routing = number % COUNT(routings);
    c->what = routings[routing];
    c->ids_dtype = number % 3 == 0 ? MOE_I64 : MOE_I32;
    if (number % 4 == 0)
        c->groups = c->experts / 2 + 1;
    regions_make(c, false);
    int32_t *expert_group = at(memory.expected, in.expert_group);
    for (int32_t e = 0; e < c->experts; e++)
        expert_group[e] = (int32_t)draw((uint32_t)c->groups + 1) - 1;
    float *weights = at(memory.expected, in.weights);
    for (int64_t i = 0; i < c->tokens * c->slots; i++) {
        const int64_t id = draw_id(c, routing, i);
        weights[i] = (float)draw(1000000);
        if (c->ids_dtype == MOE_I64) /* not to be taken for its low half */
            ((int64_t *)at(memory.expected, in.ids))[i] = id + (draw(9) == 0 ? INT64_C(1) << 32 : 0);
        else
            ((int32_t *)at(memory.expected, in.ids))[i] = (int32_t)id;
    }
    memory_send();
    const struct moe_plan_args args = plan_args(c, memory.device);
    const struct moe_gpu gpu = gpu_of(c);
    for (int run = 0; run < 3; run++) /* one behind the other */
        assert_int_equal(moe_plan_cuda(&args, &gpu), MOE_OK);
    memory_fetch();
    check(c);
    memory_free();
}

static void given_ids(void **state)
{
    (void)state;
    for_each_case(1 << 20, false, run_given);
}

/* ---- Ids just chosen ---- */

static void run_chosen(struct plan_case *c, size_t number)
{
    static const char *const gatings[] = {"random logits", "equal logits", "ties"};
    const size_t gating = number % COUNT(gatings), pairs = (size_t)(c->tokens * c->slots);
    c->what = gatings[gating];
    regions_make(c, true);
    struct moe_gate_args gate = {.tokens = c->tokens,
                                 .experts = c->experts,
                                 .top_k = c->slots,
                                 .logits_dtype = MOE_F32,
                                 .topk_weight_dtype = MOE_F32,
                                 .renormalize = 1,
                                 .logits = at(memory.expected, in.logits)};
    for (int64_t i = 0; i < c->tokens * c->experts; i++)
        gate.logits[i] = gating == 0 ? (float)draw(1 << 24) * 0x1p-21f : gating == 1 ? 0.5f : (float)draw(5);
    memory_send();
    struct moe_gate_args on_device = gate;
    on_device.logits = at(memory.device, in.logits);
    on_device.ids = at(memory.device, in.ids);
    on_device.weights = at(memory.device, in.weights);
    const struct moe_plan_args args = plan_args(c, memory.device);
    const struct moe_gpu gpu = gpu_of(c);
    for (int run = 0; run < 3; run++)
        assert_int_equal(moe_topk_plan_cuda(&on_device, &args, &gpu), MOE_OK);
    memory_fetch();

    /* Weights may differ in their last bits from those of plain C, ids not. */
    gate.ids = at(memory.expected, in.ids);
    gate.weights = at(memory.expected, in.weights);
    moe_topk_ref(&gate, 0, c->tokens);
    const float *weights = at(memory.host, in.weights);
    for (size_t i = 0; i < pairs; i++)
        if (!(weights[i] - gate.weights[i] < 1e-5f && gate.weights[i] - weights[i] < 1e-5f))
            fail_msg("%s, %lld tokens, %d experts: weight %zu is %.9g, expected %.9g", c->what, (long long)c->tokens,
                     c->experts, i, weights[i], gate.weights[i]);
    take_over(in.weights, pairs * sizeof(float));
    check(c);
    memory_free();
}

/* By clusters of whatever size the device has, and by those that every device with clusters has. */
static void run_clusters(struct plan_case *c, size_t number)
{
    run_chosen(c, number);
    if (c->cluster > 8 && c->max_sms == 0 && c->tokens <= 1000) {
        c->cluster = 8;
        run_chosen(c, number);
    }
}

static void chosen_ids(void **state)
{
    (void)state;
    for_each_case(17 << 20, true, run_clusters);
}

/* At the bounds of what a cluster takes: in tokens and pairs, with a block that has no tokens or one, with experts that
 * are no multiple of a warp. */
static void chosen_by_all_sms(void **state)
{
    (void)state;
    static const struct {
        int64_t tokens;
        int32_t slots, experts;
    } shapes[] = {{512, 16, 512}, {512, 16, 60}, {512, 17, 60}, {513, 1, 60}, {257, 8, 8},   {130, 1, 1},
                  {129, 32, 160}, {300, 10, 60}, {128, 8, 60},  {256, 8, 60}, {256, 32, 33}, {481, 4, 128}};
    /* On a whole GPU of this kind it is known. */
    if (ctx->exec.compute_capability == 90 && ctx->exec.sms >= 132)
        assert_int_equal(ctx->exec.cluster, 16);
    for (size_t number = 0; number < 3 * COUNT(shapes); number++) { /* with logits of each kind */
        const size_t s = number / 3;
        struct plan_case c = {.tokens = shapes[s].tokens,
                              .experts = shapes[s].experts,
                              .groups = shapes[s].experts,
                              .slots = shapes[s].slots,
                              .cluster = ctx->exec.cluster,
                              .ids_dtype = MOE_I32};
        seed = number;
        run_clusters(&c, number);
    }
}

/* ---- By a tally, whose ranges are whatever its writer likes ---- */

static void run_tally(struct plan_case *c, size_t number)
{
    static const int32_t ranges[] = {MOE_TALLY_RANGE, 255, 24, 64, 100};
    if (c->experts > MOE_TALLY_EXPERTS || c->slots > MOE_TALLY_TOP_K)
        return;
    c->what = "a tally";
    regions_make(c, false);
    const int32_t step = c->experts / c->slots; /* a token's ids differ */
    const int64_t words = (c->experts + 3) / 4;
    int32_t *ids = at(memory.expected, in.ids);
    float *weights = at(memory.expected, in.weights);
    struct moe_tally tally = {at(memory.expected, in.scratch), ranges[number % COUNT(ranges)]};
    memset(tally.counts, 0, (size_t)((c->tokens + tally.range - 1) / tally.range * words) * sizeof(uint32_t));
    for (int64_t t = 0; t < c->tokens; t++) {
        const int32_t first = (int32_t)draw((uint32_t)c->experts);
        for (int32_t s = 0; s < c->slots; s++) {
            const int32_t id = (first + s * step) % c->experts;
            ids[t * c->slots + s] = id;
            weights[t * c->slots + s] = (float)draw(1000000);
            tally.counts[t / tally.range * words + id / 4] += UINT32_C(1) << id % 4 * 8;
        }
    }
    memory_send();
    tally.counts = at(memory.device, in.scratch);
    const struct moe_plan_args args = plan_args(c, memory.device);
    const struct moe_gpu gpu = gpu_of(c);
    for (int run = 0; run < 3; run++)
        assert_int_equal(moe_plan_tally_cuda(&args, &tally, &gpu), MOE_OK);
    memory_fetch();
    check(c);
    memory_free();
}

static void by_tally(void **state)
{
    (void)state;
    for_each_case(34 << 20, true, run_tally);
}

int main(void)
{
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &ctx) != MOE_OK)
        return SKIP;
    int32_t previous;
    bool capturing;
    if (moe_cuda_enter(ctx->info.device_index, NULL, &previous, &capturing, NULL) != MOE_OK)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(given_ids),
        cmocka_unit_test(chosen_ids),
        cmocka_unit_test(chosen_by_all_sms),
        cmocka_unit_test(by_tally),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe_context_destroy(ctx);
    return failed;
}
