/* SPDX-License-Identifier: Apache-2.0 */
/* What the processor and the operating system let us use. */
#ifndef MOE_KERNELS_CPU_CPUID_H
#define MOE_KERNELS_CPU_CPUID_H

enum moe_cpu_flag {
    MOE_CPU_AVX2 = 1,        /* AVX2, FMA and F16C */
    MOE_CPU_AVX512 = 2,      /* AVX-512 F, BW, DQ and VL */
    MOE_CPU_AVX512_BF16 = 4, /* vdpbf16ps */
};

/* A set of the above; 0 on other processors. Each flag implies those before it. */
unsigned moe_cpu_flags(void);

#endif
