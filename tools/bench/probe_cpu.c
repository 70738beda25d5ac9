/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU's two ceilings. Reading: all threads sum 64-bit words of a large private buffer, which also drives everything
 * else out of the caches. Multiplying: OpenBLAS sgemm, if it is on the machine. Both are rates, taken at a size where
 * they are at their best, and applied to a point's bytes and FLOPs.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tools/bench/bench.h"
#include "tools/cli.h"

/* 1 GB lasts tens of milliseconds and is larger than any cache but the largest servers': those get 4 times their own.
 */
static const size_t least_read_bytes = (size_t)1 << 30;

enum { HUGE_PAGE = 2 << 20, FIRST_N = 1024, LAST_N = 8192 };
static const double least_dense_seconds = 0.03;
/* OpenBLAS's idle threads spin before they sleep; what is timed next must not share the cores with them. */
static const useconds_t dense_rest_us = 60000;

/* cblas.h is not needed on the machine that builds this. */
enum { CBLAS_ROW_MAJOR = 101, CBLAS_NO_TRANS = 111, CBLAS_TRANS = 112 };
typedef void (*sgemm_fn)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                         const float *b, int ldb, float beta, float *c, int ldc);

struct cpu_machine {
    struct bench_machine base;
    int32_t threads;
    uint64_t *words;
    size_t bytes;
    pthread_t *handles;
    struct reader *readers;
    void *blas;
    sgemm_fn sgemm;
    int n; /* of the n x n x n product */
    float *a, *b, *c;
    const struct bench_point *point;
    char why[256];
};

struct reader {
    const uint64_t *words;
    size_t count;
    uint64_t sum;
};

static void *read_words(void *argument)
{
    struct reader *r = argument;
    uint64_t sums[8] = {0};
    for (size_t i = 0; i < r->count; i += 8) {
        for (int j = 0; j < 8; j++)
            sums[j] += r->words[i + (size_t)j];
    }
    for (int j = 0; j < 8; j++)
        r->sum += sums[j];
    return NULL;
}

static void *write_words(void *argument)
{
    struct reader *r = argument;
    for (size_t i = 0; i < r->count; i++)
        ((uint64_t *)r->words)[i] = i * 0x9e3779b97f4a7c15u;
    return NULL;
}

/* Runs fn on every thread's share of the buffer, the calling thread included. */
static moe_status run_threads(struct cpu_machine *m, void *(*fn)(void *), struct moe_error *err)
{
    int32_t started = 1;
    int error = 0;
    for (; started < m->threads && error == 0; started++)
        error = pthread_create(&m->handles[started], NULL, fn, &m->readers[started]);
    started -= error != 0;
    fn(&m->readers[0]);
    for (int32_t t = 1; t < started; t++)
        pthread_join(m->handles[t], NULL);
    return error == 0 ? MOE_OK : moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "cannot start a thread: %s", strerror(error));
}

static moe_status cpu_point(struct bench_machine *base, const struct bench_point *p, struct moe_error *err)
{
    (void)err;
    ((struct cpu_machine *)base)->point = p;
    return MOE_OK;
}

static moe_status cpu_read(struct bench_machine *base, double *seconds, struct moe_error *err)
{
    struct cpu_machine *m = (struct cpu_machine *)base;
    double start = cli_now();
    moe_status status = run_threads(m, read_words, err);
    double rate = (double)m->bytes / (cli_now() - start);
    *seconds = (m->point->weight_bytes + m->point->activation_bytes) / rate;
    return status;
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
    (void)base;
    (void)err;
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
    if (m->words)
        munmap(m->words, m->bytes);
    /* The BLAS stays loaded: its threads do not survive having their code unmapped. */
    free(m->a);
    free(m->b);
    free(m->c);
    free(m->handles);
    free(m->readers);
    free(m);
}

static moe_status make_buffer(struct cpu_machine *m, struct moe_error *err)
{
    long last_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t share = (size_t)m->threads * HUGE_PAGE; /* every thread's part is whole pages */
    m->bytes = last_cache > 0 && (size_t)last_cache * 4 > least_read_bytes ? (size_t)last_cache * 4 : least_read_bytes;
    m->bytes = (m->bytes + share - 1) / share * share;
    m->readers = calloc((size_t)m->threads, sizeof *m->readers);
    m->handles = calloc((size_t)m->threads, sizeof *m->handles);
    void *memory = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED)
        m->words = memory;
    if (!m->readers || !m->handles || !m->words)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for a buffer of %zu bytes to read", m->bytes);
    madvise(memory, m->bytes, MADV_HUGEPAGE); /* a hint: without it the rate is a little lower */
    size_t count = m->bytes / sizeof *m->words / (size_t)m->threads;
    for (int32_t t = 0; t < m->threads; t++)
        m->readers[t] = (struct reader){.words = m->words + (size_t)t * count, .count = count};
    return run_threads(m, write_words, err);
}

/* False, with a reason in m->why, if there is no OpenBLAS here. */
static bool find_blas(struct cpu_machine *m)
{
    m->blas = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!m->blas) {
        snprintf(m->why, sizeof m->why, "%s", dlerror());
        return false;
    }
    void (*set_threads)(int);
    *(void **)&set_threads = dlsym(m->blas, "openblas_set_num_threads");
    *(void **)&m->sgemm = dlsym(m->blas, "cblas_sgemm");
    if (!set_threads || !m->sgemm) {
        snprintf(m->why, sizeof m->why, "libopenblas.so.0 has no cblas_sgemm or openblas_set_num_threads");
        return false;
    }
    set_threads(m->threads);
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

moe_status bench_cpu_open(int32_t threads, struct bench_machine **machine, struct moe_error *err)
{
    *machine = NULL;
    struct cpu_machine *m = calloc(1, sizeof *m);
    if (!m)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for the probes");
    m->threads = threads;
    m->base = (struct bench_machine){.point = cpu_point,
                                     .read = cpu_read,
                                     .dense = cpu_dense,
                                     .prepare = cpu_prepare,
                                     .time = cpu_time,
                                     .release = cpu_release,
                                     .close = cpu_close,
                                     .read_how = "plain read of 1 GiB or more by all threads",
                                     .dense_how = "OpenBLAS sgemm"};
    moe_status status = make_buffer(m, err);
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
