/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu/ops.h"

#include <pthread.h>
#include <string.h>

#include "kernels/cpu/cpuid.h"
#include "kernels/cpu/pool.h"

static struct moe_cpu_ops table;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill(unsigned flags)
{
    memset(&table, 0, sizeof table);
    moe_cpu_fill_c(&table);
#if defined(__x86_64__)
    if (flags & MOE_CPU_AVX2)
        moe_cpu_fill_avx2(&table);
    if (flags & MOE_CPU_AVX512)
        moe_cpu_fill_avx512(&table);
    if (flags & MOE_CPU_AVX512_BF16)
        moe_cpu_fill_avx512_bf16(&table);
#else
    (void)flags;
#endif
}

static void fill_best(void)
{
    fill(moe_cpu_flags());
}

const struct moe_cpu_ops *moe_cpu_ops(void)
{
    pthread_once(&once, fill_best);
    return &table;
}

bool moe_cpu_force(const char *isa)
{
    static const struct {
        const char *name;
        unsigned flags;
    } rungs[] = {
        {"c", 0},
        {"avx2", MOE_CPU_AVX2},
        {"avx512", MOE_CPU_AVX2 | MOE_CPU_AVX512},
        {"avx512_bf16", MOE_CPU_AVX2 | MOE_CPU_AVX512 | MOE_CPU_AVX512_BF16},
    };
    unsigned have = moe_cpu_flags();

    pthread_once(&once, fill_best);
    if (isa == NULL) {
        fill(have);
        return true;
    }
    for (size_t i = 0; i < sizeof rungs / sizeof rungs[0]; i++)
        if (strcmp(isa, rungs[i].name) == 0 && (rungs[i].flags & ~have) == 0) {
            fill(rungs[i].flags);
            return true;
        }
    return false;
}

const char *moe_cpu_features(void)
{
    return moe_cpu_ops()->features;
}
