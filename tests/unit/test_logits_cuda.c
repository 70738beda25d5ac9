/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU of compute capability 9.0: the kernel that makes logits of many tokens, of few as well, however its work is
 * cut, on all SMs and on few. What fp32 sums allow of the fp64 logit, of some tokens; the same bits in every run;
 * nothing else is written but what is to be zero; and x is not read before the kernel ahead has ended. With two
 * arguments: so many cases, from this seed on. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "config/convert.h"
#include "router/logits_wgmma.h"
#include "runtime/internal.h"

enum { SKIP = 77, BAND = 1024, POISON = 0xa5, ZEROED = 4096, CHECKED = 24, MOST = 4 << 20, MOST_GATE = 8 << 20 };

static moe_context *ctx;
static uint64_t cases = 150, first_seed = 1, seed;

static uint32_t draw(uint32_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((seed >> 32) % below);
}

#define ONE_OF(array) (array)[draw(sizeof(array) / sizeof(array)[0])]

/* A buffer on the device, with its like on the host. */
struct buffer {
    char *host;
    void *device;
    size_t bytes;
};

static struct buffer make(size_t bytes)
{
    struct buffer b = {malloc(bytes), NULL, bytes};
    assert_non_null(b.host);
    assert_int_equal(moe_buffer_alloc(ctx, bytes, &b.device), MOE_OK);
    return b;
}

static void send(const struct buffer *b)
{
    assert_int_equal(moe_copy_in(ctx, b->device, b->host, b->bytes, NULL), MOE_OK);
}

static void fetch(const struct buffer *b)
{
    assert_int_equal(moe_copy_out(ctx, b->host, b->device, b->bytes, NULL), MOE_OK);
    assert_int_equal(moe_synchronize(ctx, NULL), MOE_OK);
}

static void drop(struct buffer *b)
{
    moe_buffer_free(ctx, b->device);
    free(b->host);
}

static struct buffer make_matrix(int64_t rows, int64_t cols, moe_dtype dtype, float scale)
{
    struct buffer b = make((size_t)(rows * cols) * moe_dtype_size(dtype));
    for (int64_t i = 0; i < rows * cols; i++)
        moe_store_f32(b.host, dtype, i, ((float)draw(4001) - 2000) * scale);
    send(&b);
    return b;
}

/* What a sum of `terms` products, whose sizes add up to `size`, may be off in fp32, and then by half a step of dtype.
 */
static double allowed(double sum, double size, int64_t terms, moe_dtype dtype)
{
    const double off = 0x1p-24 * (4 + 2 * sqrt((double)terms)) * size;
    const double half = dtype == MOE_BF16 ? 0x1p-8 : dtype == MOE_F16 ? 0x1p-11 : 0;
    return off + half * (fabs(sum) + off) + (dtype == MOE_F16 ? 0x1p-25 : 0);
}

/* What is drawn, one after the other: the order is part of what a seed means. */
struct gate_case {
    struct moe_gate_args args;
    struct moe_gpu gpu;
    struct moe_logits_tile tile;
    bool chosen; /* the tile is the kernel's choice */
};

static struct gate_case draw_case(void)
{
    static const int64_t token_counts[] = {1, 8, 63, 64, 65, 127, 128, 129, 200, 300, 1000, 2111, 4096, 9000};
    static const int64_t hidden_sizes[] = {8, 56, 64, 72, 136, 520, 1024, 2880, 7168};
    static const int32_t expert_counts[] = {1,   3,   8,   31,  32,  33,  60,  64,  65,
                                            128, 129, 160, 255, 256, 257, 400, 512, 1100};
    static const int32_t sm_counts[] = {0, 0, 0, 1, 2, 9, 17, 66, 70, 1000};
    static const moe_dtype dtypes[] = {MOE_F32, MOE_BF16, MOE_F16};
    struct gate_case c = {.gpu = {.sms = ctx->exec.sms, .dependent = true}};
    c.args.tokens = ONE_OF(token_counts);
    c.args.hidden = ONE_OF(hidden_sizes);
    c.args.experts = ONE_OF(expert_counts);
    c.args.x_dtype = c.args.gate_dtype = draw(2) ? MOE_BF16 : MOE_F16;
    c.args.logits_dtype = ONE_OF(dtypes);
    while (c.args.experts * c.args.hidden > MOST_GATE)
        c.args.experts /= 2;
    while (c.args.tokens * (c.args.hidden > c.args.experts ? c.args.hidden : c.args.experts) > MOST)
        c.args.tokens /= 2;

    c.gpu.max_sms = ONE_OF(sm_counts);
    c.gpu.cluster = ctx->exec.cluster;
    c.chosen = draw(3) == 0;
    c.tile.groups = 1 + (int32_t)draw(2);
    c.tile.slices = 1 << draw(4);
    const int32_t sms = c.gpu.max_sms > 0 && c.gpu.max_sms < c.gpu.sms ? c.gpu.max_sms : c.gpu.sms;
    while (c.tile.slices > sms || c.tile.slices > c.gpu.cluster)
        c.tile.slices /= 2;
    if (c.chosen && draw(2))
        c.gpu.cluster = 1 << draw(4);
    return c;
}

static bool run(const struct gate_case *c)
{
    return moe_logits_wgmma(&c->args, &c->gpu, c->chosen ? NULL : &c->tile);
}

/* x is NaN until the kernel ahead, on two SMs, has set it to zero, with the rest of what it does: so all logits are 0.
 */
static void check_order(struct gate_case c, const struct buffer *x, const struct buffer *gate)
{
    struct gate_case ahead = c;
    struct buffer first = make((size_t)c.args.experts * (size_t)c.args.experts * sizeof(float));
    struct buffer second = make((size_t)(c.args.tokens * c.args.experts) * sizeof(float));
    ahead.args.x = gate->device;
    ahead.args.tokens = c.args.experts;
    ahead.args.logits = first.device;
    ahead.args.zeroed = x->device;
    ahead.args.zeroed_bytes = x->bytes;
    ahead.gpu.max_sms = 2;
    ahead.chosen = true;
    c.args.logits = second.device;
    c.args.zeroed_bytes = 0;
    memset(x->host, 0xff, x->bytes);
    memset(second.host, POISON, second.bytes);
    send(x);
    send(&second);
    assert_true(run(&ahead) && run(&c));
    fetch(&second);
    for (size_t i = 0; i < second.bytes / sizeof(float); i++)
        if (((const float *)second.host)[i] != 0.0f)
            fail_msg("%lld tokens, hidden %lld, %d experts: logit %zu is %.9g before x is there",
                     (long long)c.args.tokens, (long long)c.args.hidden, c.args.experts, i,
                     ((const float *)second.host)[i]);
    drop(&second);
    drop(&first);
}

static void check_case(void)
{
    struct gate_case c = draw_case();
    struct moe_gate_args args = c.args;
    const struct moe_gpu gpu = c.gpu;
    const moe_dtype dtype = args.x_dtype;
    const int64_t hidden = args.hidden, experts = args.experts;
    const size_t logits_bytes = (size_t)(args.tokens * experts) * sizeof(float);

    struct buffer x = make_matrix(args.tokens, hidden, dtype, 1e-3f);
    struct buffer gate = make_matrix(experts, hidden, dtype, 3e-5f);
    struct buffer out = make(BAND + logits_bytes + BAND + ZEROED + BAND);
    const size_t zeroed_at = (BAND + logits_bytes + BAND - 1) / 16 * 16;
    const size_t zeroed_bytes = draw(3) == 0 ? 0 : 16 * (1 + draw(ZEROED / 16));
    char *before = malloc(out.bytes);
    assert_non_null(before);
    args.x = x.device;
    args.gate = gate.device;
    /* Vectors are stored only where both the address and the number of experts allow it. */
    args.logits = (float *)((char *)out.device + (draw(4) ? BAND : BAND - 4));
    const size_t logits_at = (size_t)((char *)args.logits - (char *)out.device);
    args.zeroed = (char *)out.device + zeroed_at;
    args.zeroed_bytes = zeroed_bytes;
    c.args = args;
    for (int runs = 1; runs <= 2; runs++) {
        memset(out.host, POISON, out.bytes);
        send(&out);
        for (int i = 0; i < runs; i++) /* one behind the other */
            assert_true(run(&c));
        fetch(&out);
        if (runs == 1)
            memcpy(before, out.host, out.bytes);
    }
    assert_memory_equal(out.host, before, out.bytes);

    const float *logits = (const float *)(out.host + logits_at);
    for (int64_t i = 0; i < args.tokens && i < CHECKED; i++) { /* the first, the last, and some between */
        const int64_t t = args.tokens <= CHECKED || i == 0 ? i
                          : i == 1                         ? args.tokens - 1
                                                           : (int64_t)draw((uint32_t)args.tokens);
        for (int64_t e = 0; e < experts; e++) {
            double sum = 0, size = 0;
            for (int64_t h = 0; h < hidden; h++) {
                const double product = (double)moe_load_f32(x.host, dtype, t * hidden + h) *
                                       moe_load_f32(gate.host, dtype, e * hidden + h);
                sum += product;
                size += fabs(product);
            }
            const float got = logits[t * experts + e];
            if (!(fabs(got - sum) <= allowed(sum, size, hidden, args.logits_dtype)) ||
                got != moe_round_f32(got, args.logits_dtype))
                fail_msg("%lld tokens, hidden %lld, %lld experts, max_sms %d, %d groups, %d slices%s: logit of token "
                         "%lld, expert %lld is %.9g, expected %.9g",
                         (long long)args.tokens, (long long)hidden, (long long)experts, gpu.max_sms, c.tile.groups,
                         c.tile.slices, c.chosen ? " or others" : "", (long long)t, (long long)e, got, sum);
        }
    }
    for (size_t i = 0; i < out.bytes; i++) {
        const bool zero = i >= zeroed_at && i < zeroed_at + zeroed_bytes;
        const bool logit = i >= logits_at && i < logits_at + logits_bytes;
        if (!logit && (unsigned char)out.host[i] != (zero ? 0 : POISON))
            fail_msg("%lld tokens, hidden %lld, %lld experts, max_sms %d: byte %zu of %zu is %02x",
                     (long long)args.tokens, (long long)hidden, (long long)experts, gpu.max_sms, i, out.bytes,
                     (unsigned char)out.host[i]);
    }
    check_order(c, &x, &gate);
    free(before);
    drop(&out);
    drop(&gate);
    drop(&x);
}

static void logits_of_many(void **state)
{
    (void)state;
    for (uint64_t i = 0; i < cases; i++) {
        seed = first_seed + i;
        draw(2); /* the first number of neighbouring seeds is nearly the same */
        check_case();
    }
}

int main(int argc, char **argv)
{
    if (argc == 3) {
        cases = strtoull(argv[1], NULL, 10);
        first_seed = strtoull(argv[2], NULL, 10);
    }
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CUDA;
    if (moe_context_create(&options, &ctx) != MOE_OK)
        return SKIP;
    const struct moe_gate_args many = {.tokens = 1 << 20, .hidden = 4096, .experts = 64};
    const struct moe_gpu gpu = {.sms = ctx->exec.sms, .dependent = ctx->exec.compute_capability == 90};
    if (!moe_logits_wgmma_pays(&many, &gpu))
        return SKIP; /* another GPU, or a build for others */
    int32_t previous;
    bool capturing;
    if (moe_cuda_enter(ctx->info.device_index, NULL, &previous, &capturing, NULL) != MOE_OK)
        return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(logits_of_many)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe_context_destroy(ctx);
    return failed;
}
