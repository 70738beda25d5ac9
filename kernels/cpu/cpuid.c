/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu/cpuid.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdbool.h>
#include <stdint.h>

/* Which registers the system saves for us: a processor may have what its system does not switch. */
static uint32_t saved_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool all(uint32_t bits, uint32_t wanted)
{
    return (bits & wanted) == wanted;
}

unsigned moe_cpu_flags(void)
{
    enum { YMM_STATE = 1 << 1 | 1 << 2, ZMM_STATE = YMM_STATE | 1 << 5 | 1 << 6 | 1 << 7, LEAF1_F16C = 1 << 29 };
    const uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    uint32_t a, b, c, d, features;

    if (!__get_cpuid(1, &a, &b, &features, &d) || !all(features, bit_OSXSAVE | bit_FMA | LEAF1_F16C))
        return 0;
    uint32_t state = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !all(b, bit_AVX2) || !all(state, YMM_STATE))
        return 0;
    if (!all(b, avx512) || !all(state, ZMM_STATE))
        return MOE_CPU_AVX2;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !all(a, bit_AVX512BF16))
        return MOE_CPU_AVX2 | MOE_CPU_AVX512;
    return MOE_CPU_AVX2 | MOE_CPU_AVX512 | MOE_CPU_AVX512_BF16;
}
#else
unsigned moe_cpu_flags(void)
{
    return 0;
}
#endif
