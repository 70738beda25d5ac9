/* SPDX-License-Identifier: Apache-2.0 */
/* The context: a device, what it lends to calls, and where messages go. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cpu/pool.h"
#include "kernels/cuda/cublas/cublas.h"
#include "runtime/internal.h"

/* A CUDA context uses host threads for reading files only; more than this many do not read faster. */
enum { MAX_LOAD_THREADS = 8 };

static _Thread_local struct moe_error thread_error; /* of calls that have no context yet */

moe_status moe_context_report(moe_context *ctx, moe_status status, const struct moe_error *err)
{
    const char *text = status == MOE_OK ? "" : err != NULL && err->text[0] != 0 ? err->text : moe_status_string(status);
    if (ctx == NULL) {
        snprintf(thread_error.text, sizeof thread_error.text, "%s", text);
    } else if (status != MOE_OK) {
        pthread_mutex_lock(&ctx->error_lock);
        snprintf(ctx->error.text, sizeof ctx->error.text, "%s", text);
        pthread_mutex_unlock(&ctx->error_lock);
    }
    return status;
}

void moe_last_error(const moe_context *ctx, char *buffer, size_t bytes)
{
    if (buffer == NULL || bytes == 0)
        return;
    if (ctx == NULL) {
        snprintf(buffer, bytes, "%s", thread_error.text);
        return;
    }
    pthread_mutex_t *lock = &((moe_context *)ctx)->error_lock; /* the lock is not part of what const protects */
    pthread_mutex_lock(lock);
    snprintf(buffer, bytes, "%s", ctx->error.text);
    pthread_mutex_unlock(lock);
}

void moe_context_log(const moe_context *ctx, moe_log_level level, const char *format, ...)
{
    if (ctx->log == NULL)
        return;
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctx->log(ctx->log_user, level, text);
}

static bool struct_ok(const void *given, size_t first, size_t known, const char *name, struct moe_error *err)
{
    if (given == NULL) {
        moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
        return false;
    }
    size_t size;
    memcpy(&size, given, sizeof size); /* every such struct begins with its size */
    if (size < first) {
        moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s.size is %zu, expected at least %zu: use %s_init()", name, size,
                 first, name);
        return false;
    }
    /* A caller with a newer header may ask for what this library does not know; it must not be dropped in silence. */
    for (size_t i = known; i < size; i++) {
        if (((const unsigned char *)given)[i] != 0) {
            moe_fail(err, MOE_ERROR_INVALID_ARGUMENT,
                     "%s: byte %zu is set, but this library knows only %zu bytes of it", name, i, known);
            return false;
        }
    }
    return true;
}

bool moe_struct_ok(const void *given, size_t known, const char *name, struct moe_error *err)
{
    return struct_ok(given, known, known, name, err);
}

bool moe_struct_in(void *ours, const void *given, size_t first, size_t known, const char *name, struct moe_error *err)
{
    size_t size;
    if (!struct_ok(given, first, known, name, err))
        return false;
    memcpy(&size, given, sizeof size);
    memset(ours, 0, known);
    memcpy(ours, given, size < known ? size : known);
    memcpy(ours, &known, sizeof known);
    return true;
}

moe_status moe_struct_out(void *given, const void *filled, size_t first, size_t known, const char *name,
                          struct moe_error *err)
{
    size_t size;
    if (!struct_ok(given, first, known, name, err))
        return MOE_ERROR_INVALID_ARGUMENT;
    memcpy(&size, given, sizeof size);
    memcpy(given, filled, size < known ? size : known);
    memcpy(given, &size, sizeof size);
    return MOE_OK;
}

static moe_status open_cuda(moe_context *ctx, int32_t index, struct moe_error *err)
{
    struct moe_cuda_facts facts;
    int32_t previous;
    bool capturing;
    moe_status status = moe_cuda_open(index, &facts, err);
    if (status == MOE_OK)
        status = moe_cuda_enter(index, NULL, &previous, &capturing, err);
    if (status != MOE_OK)
        return status;
    ctx->info.device = ctx->exec.device = MOE_DEVICE_CUDA;
    ctx->info.device_index = index;
    snprintf(ctx->info.name, sizeof ctx->info.name, "%s", facts.name);
    ctx->info.cores = ctx->exec.sms = facts.sms;
    ctx->info.compute_capability = ctx->exec.compute_capability = facts.compute_capability;
    ctx->exec.shared_bytes = facts.shared_bytes;
    ctx->exec.cluster = facts.cluster;
    ctx->info.memory_bytes = facts.memory_bytes;
    ctx->info.l2_bytes = facts.l2_bytes;

    /* Without cuBLAS only the paths that call it are missing. */
    struct moe_error why = {{0}};
    if (moe_cublas_create(&ctx->exec.cublas, &why) != MOE_OK)
        snprintf(ctx->cublas_why, sizeof ctx->cublas_why, "%.250s", why.text);
    moe_cuda_leave(previous);
    return MOE_OK;
}

static void cpu_name(char *name, size_t bytes)
{
    snprintf(name, bytes, "CPU");
    FILE *f = fopen("/proc/cpuinfo", "re");
    if (f == NULL)
        return;
    char line[256];
    while (fgets(line, sizeof line, f) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            line[strcspn(line, "\n")] = 0;
            snprintf(name, bytes, "%s", colon + 1 + strspn(colon + 1, " "));
            break;
        }
    }
    fclose(f);
}

static void open_cpu(moe_context *ctx)
{
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE), l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    ctx->info.device = ctx->exec.device = MOE_DEVICE_CPU;
    ctx->info.device_index = 0;
    cpu_name(ctx->info.name, sizeof ctx->info.name);
    ctx->info.cores = moe_pool_threads(ctx->exec.pool);
    ctx->info.memory_bytes = pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : 0;
    ctx->info.l2_bytes = l3 > 0 ? (uint64_t)l3 : 0;
    snprintf(ctx->info.features, sizeof ctx->info.features, "%s", moe_cpu_features());
}

static moe_status open_device(moe_context *ctx, const moe_context_options *options, struct moe_error *err)
{
    moe_status status = MOE_ERROR_NO_DEVICE;
    if (options->device != MOE_DEVICE_CPU) {
        status = open_cuda(ctx, options->device_index, err);
        if (status != MOE_OK && options->device == MOE_DEVICE_CUDA)
            return status;
        /* No GPU is the usual case; one that fails is worth a warning. */
        if (status != MOE_OK)
            moe_context_log(ctx, status == MOE_ERROR_NO_DEVICE ? MOE_LOG_INFO : MOE_LOG_WARNING, "using the CPU: %s",
                            err->text);
    }
    int32_t threads = options->threads;
    if (status == MOE_OK && threads == 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        threads = online < 1 ? 1 : online > MAX_LOAD_THREADS ? MAX_LOAD_THREADS : (int32_t)online;
    }
    if (moe_pool_create(threads, &ctx->exec.pool) != MOE_OK)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "cannot start %d threads", (int)threads);
    if (status != MOE_OK)
        open_cpu(ctx);
    return MOE_OK;
}

/* The table that auto chooses by: the caller's, or the one that the environment names. One of another device is no
 * failure, because the environment may be that of a cluster of different machines. */
static moe_status open_tuned(moe_context *ctx, const char *file, struct moe_error *err)
{
    struct moe_tuned table;
    struct moe_error other;
    if (file == NULL)
        file = getenv("MOE_TUNED");
    if (file == NULL || *file == 0)
        return MOE_OK;
    moe_status status = moe_tuned_load(file, &table, err);
    if (status != MOE_OK)
        return status;
    if (moe_tuned_fits(&table, &ctx->info, &other))
        status = moe_choose_from(ctx, &table, err);
    else
        moe_context_log(ctx, MOE_LOG_WARNING, "%s: the table is not used", other.text);
    moe_tuned_free(&table);
    return status;
}

moe_status moe_context_create(const moe_context_options *given, moe_context **out)
{
    struct moe_error err = {{0}};
    moe_context_options whole = moe_context_options_init();
    const moe_context_options *options = &whole;
    if (out == NULL || (given != NULL && !moe_struct_in(&whole, given, MOE_CONTEXT_OPTIONS_FIRST, sizeof whole,
                                                        "moe_context_options", &err)))
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, &err);
    *out = NULL;
    if (options->device < MOE_DEVICE_AUTO || options->device > MOE_DEVICE_CUDA || options->device_index < 0 ||
        options->threads < 0 || options->threads > 4096) {
        moe_fail(&err, MOE_ERROR_INVALID_ARGUMENT,
                 "moe_context_options: device %d, device_index %d, threads %d: out of range", (int)options->device,
                 (int)options->device_index, (int)options->threads);
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, &err);
    }
    moe_context *ctx = calloc(1, sizeof *ctx);
    if (ctx == NULL)
        return moe_context_report(NULL, MOE_ERROR_OUT_OF_MEMORY, NULL);
    ctx->info = moe_device_info_init();
    ctx->log = options->log;
    ctx->log_user = options->log_user;
    pthread_mutex_init(&ctx->error_lock, NULL);

    moe_status status = open_device(ctx, options, &err);
    if (status == MOE_OK)
        status = open_tuned(ctx, options->tuned, &err);
    if (status != MOE_OK) {
        moe_context_destroy(ctx);
        return moe_context_report(NULL, status, &err);
    }
    *out = ctx;
    return moe_context_report(NULL, MOE_OK, NULL);
}

void moe_context_destroy(moe_context *ctx)
{
    if (ctx == NULL)
        return;
    moe_cublas_destroy(ctx->exec.cublas);
    moe_pool_destroy(ctx->exec.pool);
    moe_tuned_free(&ctx->tuned);
    pthread_mutex_destroy(&ctx->error_lock);
    free(ctx);
}

moe_status moe_context_device(const moe_context *ctx, moe_device_info *info)
{
    struct moe_error err = {{0}};
    if (ctx == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_struct_out(info, &ctx->info, sizeof *info, sizeof *info, "moe_device_info", &err);
    return moe_context_report((moe_context *)ctx, status, &err);
}
