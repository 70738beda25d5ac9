/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that run one function together. The caller's thread is number 0 of the pool. */
#ifndef MOE_KERNELS_CPU_POOL_H
#define MOE_KERNELS_CPU_POOL_H

#include "moe.h"

struct moe_pool;

/* threads 0: as many CPUs as the process may use. MOE_ERROR_OUT_OF_MEMORY if threads cannot be made. */
moe_status moe_pool_create(int32_t threads, struct moe_pool **pool);
void moe_pool_destroy(struct moe_pool *pool);
int32_t moe_pool_threads(const struct moe_pool *pool);

/* Runs fn(argument, thread, threads) on every thread and returns when all are done. Calls from several threads take
 * turns. Allocates nothing. */
void moe_pool_run(struct moe_pool *pool, void (*fn)(void *argument, int32_t thread, int32_t threads), void *argument);

/* Inside fn: takes the next chunk of a shared counter, and meets all threads of the run. */
int64_t moe_pool_next(struct moe_pool *pool, int64_t chunk); /* starts at 0 with each moe_pool_run and each barrier */
void moe_pool_barrier(struct moe_pool *pool);

/* The instruction sets that the kernels use here, e.g. "avx512 avx512_bf16"; "none" for plain C. */
const char *moe_cpu_features(void);

#endif
