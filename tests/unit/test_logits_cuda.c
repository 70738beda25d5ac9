/* SPDX-License-Identifier: Apache-2.0 */
/* On a GPU of compute capability 9.0: the kernel that makes logits of many tokens, of few as well, on all SMs and on
 * few, in clusters and without: each logit is within what fp32 sums allow of the fp64 one, the same bits in every run,
 * and nothing else is written but what is to be zero. With two arguments: so many cases, from this seed on. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "config/convert.h"
#include "router/logits_wgmma.h"
#include "runtime/internal.h"

enum { SKIP = 77, BAND = 1024, POISON = 0xa5, ZEROED = 4096, CHECKED = 24, MOST = 4 << 20 };

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

static void check_case(void)
{
    static const int64_t token_counts[] = {1, 8, 63, 64, 65, 127, 128, 129, 200, 300, 1000, 2111, 4096, 9000};
    static const int64_t hidden_sizes[] = {8, 56, 64, 72, 136, 520, 1024, 2880, 7168};
    static const int32_t expert_counts[] = {1, 3, 8, 31, 32, 33, 60, 64, 65, 128, 129, 160, 255, 256, 257, 400, 512};
    static const int32_t sm_counts[] = {0, 0, 0, 1, 2, 17, 66, 70, 1000};
    static const moe_dtype dtypes[] = {MOE_F32, MOE_BF16, MOE_F16};
    const moe_dtype dtype = draw(2) ? MOE_BF16 : MOE_F16;
    struct moe_gate_args args = {.tokens = ONE_OF(token_counts),
                                 .hidden = ONE_OF(hidden_sizes),
                                 .experts = ONE_OF(expert_counts),
                                 .x_dtype = dtype,
                                 .gate_dtype = dtype,
                                 .logits_dtype = ONE_OF(dtypes)};
    const struct moe_gpu gpu = {.sms = ctx->exec.sms,
                                .max_sms = ONE_OF(sm_counts),
                                .cluster = draw(3) ? ctx->exec.cluster : 1 << draw(4),
                                .dependent = true};
    while (args.tokens * (args.hidden > args.experts ? args.hidden : args.experts) > MOST)
        args.tokens /= 2;
    const int64_t hidden = args.hidden, experts = args.experts;
    const size_t logits_bytes = (size_t)(args.tokens * experts) * sizeof(float);

    struct buffer x = make_matrix(args.tokens, hidden, dtype, 1e-3f);
    struct buffer gate = make_matrix(experts, hidden, dtype, 3e-5f);
    struct buffer out = make(BAND + logits_bytes + BAND + ZEROED + BAND);
    const size_t zeroed_at = (BAND + logits_bytes + BAND - 1) / 16 * 16;
    const size_t zeroed_bytes = draw(3) * 16 * (1 + draw(100));
    char *before = malloc(out.bytes);
    assert_non_null(before);
    args.x = x.device;
    args.gate = gate.device;
    /* Vectors are stored only where both the address and the number of experts allow it. */
    args.logits = (float *)((char *)out.device + (draw(4) ? BAND : BAND - 4));
    const size_t logits_at = (size_t)((char *)args.logits - (char *)out.device);
    args.zeroed = (char *)out.device + zeroed_at;
    args.zeroed_bytes = zeroed_bytes;
    for (int run = 0; run < 2; run++) {
        memset(out.host, POISON, out.bytes);
        send(&out);
        for (int again = 0; again <= run; again++) /* one behind the other */
            assert_true(moe_logits_wgmma(&args, &gpu));
        fetch(&out);
        if (run == 0)
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
                fail_msg("%lld tokens, hidden %lld, %lld experts, max_sms %d, clusters of up to %d: logit of token "
                         "%lld, expert %lld is %.9g, expected %.9g",
                         (long long)args.tokens, (long long)hidden, (long long)experts, gpu.max_sms, gpu.cluster,
                         (long long)t, (long long)e, got, sum);
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
        draw(2);
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
    int32_t previous;
    bool capturing;
    if (ctx->exec.compute_capability != 90)
        return SKIP;
    if (moe_cuda_enter(ctx->info.device_index, NULL, &previous, &capturing, NULL) != MOE_OK)
        return 1;
    const struct CMUnitTest tests[] = {cmocka_unit_test(logits_of_many)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    moe_context_destroy(ctx);
    return failed;
}
