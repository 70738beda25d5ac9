/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU's two ceilings. Reading: all threads sum the 64-bit words of the weights that the point touches: of those
 * weights themselves, because not all memory of a machine is equally fast to read. Multiplying: OpenBLAS sgemm, if it
 * is on the machine; a rate, taken at a size where it is at its best, and applied to the point's FLOPs.
 */
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cpu/pool.h"
#include "runtime/load.h"
#include "tools/bench/bench.h"
#include "tools/cli.h"

/* What drives everything else out of the caches: larger than any but the largest servers', for which it is 4 times
 * their own. */
static const size_t least_flush_bytes = (size_t)1 << 30;

enum { LINE_WORDS = 8, FIRST_N = 1024, LAST_N = 8192 };
static const double least_dense_seconds = 0.03;
/* OpenBLAS's idle threads spin before they sleep; what is timed next must not share the cores with them. */
static const useconds_t dense_rest_us = 60000;

/* cblas.h is not needed on the machine that builds this. */
enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111, CBLAS_TRANS = 112 };
typedef void (*sgemm_fn)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                         const float *b, int ldb, float beta, float *c, int ldc);

struct cpu_machine {
    struct bench_machine base;
    struct moe_pool *pool; /* the context's */
    void *flush;
    size_t flush_bytes;
    atomic_ullong sum; /* of all that was read: so that the loads are needed */
    sgemm_fn sgemm;
    int n; /* of the n x n x n product */
    float *a, *b, *c;
    const struct bench_point *point;
    char why[256];
};

/* Sums a thread's share of the whole cache lines in `bytes`. */
static void read_share(struct cpu_machine *m, const void *data, uint64_t bytes, int32_t thread, int32_t threads)
{
    const uintptr_t line = LINE_WORDS * sizeof(uint64_t), begin = (uintptr_t)data, end = begin + bytes;
    uint64_t first = (begin + line - 1) / line, lines = end / line > first ? end / line - first : 0;
    uint64_t at = lines * (uint64_t)thread / (uint64_t)threads;
    uint64_t stop = lines * (uint64_t)(thread + 1) / (uint64_t)threads;
    const uint64_t *words = (const uint64_t *)(first * line) + at * LINE_WORDS;
    uint64_t sums[LINE_WORDS] = {0};
    for (; at < stop; at++, words += LINE_WORDS) {
        for (int j = 0; j < LINE_WORDS; j++)
            sums[j] += words[j];
    }
    for (int j = 1; j < LINE_WORDS; j++)
        sums[0] += sums[j];
    atomic_fetch_add(&m->sum, sums[0]);
}

static void read_weights(void *argument, int32_t thread, int32_t threads)
{
    struct cpu_machine *m = argument;
    const struct bench_point *p = m->point;
    const uint64_t matrix = p->matrix_bytes;
    for (int32_t i = 0; i < p->touched; i++) {
        uint64_t e = (uint64_t)p->touched_ids[i];
        read_share(m, (const char *)p->w13 + e * 2 * matrix, 2 * matrix, thread, threads);
        read_share(m, (const char *)p->w2 + e * matrix, matrix, thread, threads);
    }
}

static void read_flush(void *argument, int32_t thread, int32_t threads)
{
    struct cpu_machine *m = argument;
    read_share(m, m->flush, m->flush_bytes, thread, threads);
}

static moe_status cpu_point(struct bench_machine *base, const struct bench_point *p, struct moe_error *err)
{
    (void)err;
    ((struct cpu_machine *)base)->point = p;
    base->read_bytes = p->weight_bytes + p->activation_bytes;
    return MOE_OK;
}

static moe_status cpu_read(struct bench_machine *base, double *seconds, struct moe_error *err)
{
    (void)err;
    struct cpu_machine *m = (struct cpu_machine *)base;
    moe_pool_run(m->pool, read_flush, m);
    double start = cli_now();
    moe_pool_run(m->pool, read_weights, m);
    double rate = 3 * (double)m->point->matrix_bytes * m->point->touched / (cli_now() - start);
    *seconds = base->read_bytes / rate;
    return MOE_OK;
}

/* Seconds of one n x n x n product. */
static double multiply(struct cpu_machine *m, int n)
{
    double start = cli_now();
    m->sgemm(CBLAS_ROW_MAJOR, CBLAS_NO_TRANS, CBLAS_TRANS, n, n, n, 1, m->a, n, m->b, n, 0, m->c, n);
    return cli_now() - start;
}

static moe_status cpu_dense(struct bench_machine *base, double *seconds, struct moe_error *err)
{
    (void)err;
    struct cpu_machine *m = (struct cpu_machine *)base;
    double n = m->n;
    *seconds = m->point->flops * multiply(m, m->n) / (2 * n * n * n);
    usleep(dense_rest_us);
    return MOE_OK;
}

static moe_status cpu_time(struct bench_machine *base, struct bench_call *call, double *seconds, struct moe_error *err)
{
    (void)err;
    struct cpu_machine *m = (struct cpu_machine *)base;
    moe_pool_run(m->pool, read_flush, m);
    double start = cli_now();
    moe_status status = call->run(call->argument, NULL);
    *seconds = cli_now() - start;
    return status;
}

static moe_status cpu_prepare(struct bench_machine *base, struct bench_call *call, struct moe_error *err)
{
    double seconds;
    return cpu_time(base, call, &seconds, err);
}

static void cpu_release(struct bench_machine *base, struct bench_call *call)
{
    (void)base;
    (void)call;
}

static void cpu_close(struct bench_machine *base)
{
    struct cpu_machine *m = (struct cpu_machine *)base;
    moe_host_free(m->flush, m->flush_bytes);
    /* The BLAS stays loaded: its threads do not survive having their code unmapped. */
    free(m->a);
    free(m->b);
    free(m->c);
    free(m);
}

static moe_status make_flush(struct cpu_machine *m, struct moe_error *err)
{
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    m->flush_bytes = cache > 0 && (size_t)cache * 4 > least_flush_bytes ? (size_t)cache * 4 : least_flush_bytes;
    if (moe_host_alloc(m->flush_bytes, &m->flush) != MOE_OK)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for a buffer of %zu bytes to read", m->flush_bytes);
    memset(m->flush, 1, m->flush_bytes); /* or all its pages would be the same one */
    return MOE_OK;
}

/* False, with a reason in m->why, if there is no OpenBLAS here. */
static bool find_blas(struct cpu_machine *m)
{
    void *blas = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL); /* until the process ends: see cpu_close */
    if (!blas) {
        snprintf(m->why, sizeof m->why, "%s", dlerror());
        return false;
    }
    void (*set_threads)(int);
    *(void **)&set_threads = dlsym(blas, "openblas_set_num_threads");
    *(void **)&m->sgemm = dlsym(blas, "cblas_sgemm");
    if (!set_threads || !m->sgemm) {
        snprintf(m->why, sizeof m->why, "libopenblas.so.0 has no cblas_sgemm or openblas_set_num_threads");
        return false;
    }
    set_threads(moe_pool_threads(m->pool));
    return true;
}

/* Grows the product until it lasts long enough to be at its full rate. */
static moe_status make_product(struct cpu_machine *m, struct moe_error *err)
{
    for (int n = FIRST_N; n <= LAST_N; n *= 2) {
        size_t count = (size_t)n * (size_t)n;
        free(m->a);
        free(m->b);
        free(m->c);
        m->a = malloc(count * sizeof(float));
        m->b = malloc(count * sizeof(float));
        m->c = malloc(count * sizeof(float));
        if (!m->a || !m->b || !m->c)
            return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for a product of %d", n);
        for (size_t i = 0; i < count; i++)
            m->a[i] = m->b[i] = (float)(i % 251) / 251 - 0.5f;
        m->n = n;
        multiply(m, n);
        if (multiply(m, n) >= least_dense_seconds)
            break;
    }
    return MOE_OK;
}

moe_status bench_cpu_open(moe_context *ctx, struct bench_machine **machine, struct moe_error *err)
{
    *machine = NULL;
    struct cpu_machine *m = calloc(1, sizeof *m);
    if (!m)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for the probes");
    m->pool = ctx->exec.pool;
    m->base = (struct bench_machine){.point = cpu_point,
                                     .read = cpu_read,
                                     .dense = cpu_dense,
                                     .prepare = cpu_prepare,
                                     .time = cpu_time,
                                     .release = cpu_release,
                                     .close = cpu_close,
                                     .read_how = "plain read of the touched experts' weights by all threads",
                                     .dense_how = "OpenBLAS sgemm"};
    moe_status status = make_flush(m, err);
    if (status == MOE_OK && !find_blas(m)) {
        m->base.dense_how = NULL;
        m->base.dense_why = m->why;
    } else if (status == MOE_OK) {
        status = make_product(m, err);
    }
    if (status != MOE_OK)
        cpu_close(&m->base);
    else
        *machine = &m->base;
    return status;
}
