// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup, compute capability 9.0a: wgmma, of bf16 or f16 with sums in fp32. For code that is
// compiled for sm_90a alone.
#ifndef MOE_KERNELS_CUDA_COMMON_WGMMA_CUH
#define MOE_KERNELS_CUDA_COMMON_WGMMA_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// What a matrix in shared memory is to wgmma: rows of 128 bytes, eight of them after another 1024 bytes, 16-byte chunks
// placed by chunk ^ (row % 8). Of the 64 bits that say so the lower half, in which `address` is: a multiple of 1024. 2
// more are 16 elements further along the row, 64 more eight rows further down.
static __device__ __forceinline__ uint32_t moe_wgmma_matrix(uint32_t address)
{
    return 1 << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product after registers of d were touched.
static __device__ inline void moe_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ inline void moe_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all products of the closed groups are finished, but for the last N groups.
template <int N = 0> __device__ inline void moe_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d[64][N] (+)= a[64][16] . b[N][16]^T in fp32, by a warpgroup; a and b as moe_wgmma_matrix describes them. Without
// `accumulate` d is only written. Of thread t, with lane l = t % 32: d[4 j + 2 i + c] is row 16 (t / 32) + l / 4 + 8 i
// and column 8 j + 2 (l % 4) + c. The first N / 2 registers are used.
template <typename T, int N> struct moe_wgmma;

#define MOE_D0   "%0, %1, %2, %3"
#define MOE_D1   "%4, %5, %6, %7"
#define MOE_D2   "%8, %9, %10, %11"
#define MOE_D3   "%12, %13, %14, %15"
#define MOE_D4   "%16, %17, %18, %19"
#define MOE_D5   "%20, %21, %22, %23"
#define MOE_D6   "%24, %25, %26, %27"
#define MOE_D7   "%28, %29, %30, %31"
#define MOE_D8   "%32, %33, %34, %35"
#define MOE_D9   "%36, %37, %38, %39"
#define MOE_D10  "%40, %41, %42, %43"
#define MOE_D11  "%44, %45, %46, %47"
#define MOE_D12  "%48, %49, %50, %51"
#define MOE_D13  "%52, %53, %54, %55"
#define MOE_D14  "%56, %57, %58, %59"
#define MOE_D15  "%60, %61, %62, %63"
#define MOE_D16  "%64, %65, %66, %67"
#define MOE_D17  "%68, %69, %70, %71"
#define MOE_D18  "%72, %73, %74, %75"
#define MOE_D19  "%76, %77, %78, %79"
#define MOE_D20  "%80, %81, %82, %83"
#define MOE_D21  "%84, %85, %86, %87"
#define MOE_D22  "%88, %89, %90, %91"
#define MOE_D23  "%92, %93, %94, %95"
#define MOE_D24  "%96, %97, %98, %99"
#define MOE_D25  "%100, %101, %102, %103"
#define MOE_D26  "%104, %105, %106, %107"
#define MOE_D27  "%108, %109, %110, %111"
#define MOE_D28  "%112, %113, %114, %115"
#define MOE_D29  "%116, %117, %118, %119"
#define MOE_D30  "%120, %121, %122, %123"
#define MOE_D31  "%124, %125, %126, %127"
#define MOE_L1   MOE_D0
#define MOE_L2   MOE_L1 ", " MOE_D1
#define MOE_L3   MOE_L2 ", " MOE_D2
#define MOE_L4   MOE_L3 ", " MOE_D3
#define MOE_L5   MOE_L4 ", " MOE_D4
#define MOE_L6   MOE_L5 ", " MOE_D5
#define MOE_L7   MOE_L6 ", " MOE_D6
#define MOE_L8   MOE_L7 ", " MOE_D7
#define MOE_L9   MOE_L8 ", " MOE_D8
#define MOE_L10  MOE_L9 ", " MOE_D9
#define MOE_L11  MOE_L10 ", " MOE_D10
#define MOE_L12  MOE_L11 ", " MOE_D11
#define MOE_L13  MOE_L12 ", " MOE_D12
#define MOE_L14  MOE_L13 ", " MOE_D13
#define MOE_L15  MOE_L14 ", " MOE_D14
#define MOE_L16  MOE_L15 ", " MOE_D15
#define MOE_L17  MOE_L16 ", " MOE_D16
#define MOE_L18  MOE_L17 ", " MOE_D17
#define MOE_L19  MOE_L18 ", " MOE_D18
#define MOE_L20  MOE_L19 ", " MOE_D19
#define MOE_L21  MOE_L20 ", " MOE_D20
#define MOE_L22  MOE_L21 ", " MOE_D21
#define MOE_L23  MOE_L22 ", " MOE_D22
#define MOE_L24  MOE_L23 ", " MOE_D23
#define MOE_L25  MOE_L24 ", " MOE_D24
#define MOE_L26  MOE_L25 ", " MOE_D25
#define MOE_L27  MOE_L26 ", " MOE_D26
#define MOE_L28  MOE_L27 ", " MOE_D27
#define MOE_L29  MOE_L28 ", " MOE_D28
#define MOE_L30  MOE_L29 ", " MOE_D29
#define MOE_L31  MOE_L30 ", " MOE_D30
#define MOE_L32  MOE_L31 ", " MOE_D31
#define MOE_O(i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define MOE_R1   MOE_O(0)
#define MOE_R2   MOE_R1, MOE_O(1)
#define MOE_R3   MOE_R2, MOE_O(2)
#define MOE_R4   MOE_R3, MOE_O(3)
#define MOE_R5   MOE_R4, MOE_O(4)
#define MOE_R6   MOE_R5, MOE_O(5)
#define MOE_R7   MOE_R6, MOE_O(6)
#define MOE_R8   MOE_R7, MOE_O(7)
#define MOE_R9   MOE_R8, MOE_O(8)
#define MOE_R10  MOE_R9, MOE_O(9)
#define MOE_R11  MOE_R10, MOE_O(10)
#define MOE_R12  MOE_R11, MOE_O(11)
#define MOE_R13  MOE_R12, MOE_O(12)
#define MOE_R14  MOE_R13, MOE_O(13)
#define MOE_R15  MOE_R14, MOE_O(14)
#define MOE_R16  MOE_R15, MOE_O(15)
#define MOE_R17  MOE_R16, MOE_O(16)
#define MOE_R18  MOE_R17, MOE_O(17)
#define MOE_R19  MOE_R18, MOE_O(18)
#define MOE_R20  MOE_R19, MOE_O(19)
#define MOE_R21  MOE_R20, MOE_O(20)
#define MOE_R22  MOE_R21, MOE_O(21)
#define MOE_R23  MOE_R22, MOE_O(22)
#define MOE_R24  MOE_R23, MOE_O(23)
#define MOE_R25  MOE_R24, MOE_O(24)
#define MOE_R26  MOE_R25, MOE_O(25)
#define MOE_R27  MOE_R26, MOE_O(26)
#define MOE_R28  MOE_R27, MOE_O(27)
#define MOE_R29  MOE_R28, MOE_O(28)
#define MOE_R30  MOE_R29, MOE_O(29)
#define MOE_R31  MOE_R30, MOE_O(30)
#define MOE_R32  MOE_R31, MOE_O(31)
// The inputs are numbered after the n / 2 registers: a, b, p. The upper half of what describes a matrix is the same for
// all: this swizzle, and 1024 bytes from eight rows to the next.
#define MOE_WGMMA(type, name, n, fours, a_, b_, p_)                                                                    \
    template <> struct moe_wgmma<type, n> {                                                                            \
        static __device__ __forceinline__ void run(float *d, uint32_t a, uint32_t b, int accumulate)                   \
        {                                                                                                              \
            asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #p_ ", 0;\n"                            \
                         "mov.b64 a, {%" #a_ ", 0x40000040};\nmov.b64 b, {%" #b_ ", 0x40000040};\n"                    \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" MOE_L##fours             \
                         "}, a, b, p, 1, 1, 0, 0;\n}"                                                                  \
                         : MOE_R##fours                                                                                \
                         : "r"(a), "r"(b), "r"(accumulate));                                                           \
        }                                                                                                              \
    };
#define MOE_WGMMA_BOTH(n, fours, a, b, p)                                                                              \
    MOE_WGMMA(__nv_bfloat16, "bf16", n, fours, a, b, p)                                                                \
    MOE_WGMMA(__half, "f16", n, fours, a, b, p)
MOE_WGMMA_BOTH(8, 1, 4, 5, 6)
MOE_WGMMA_BOTH(16, 2, 8, 9, 10)
MOE_WGMMA_BOTH(24, 3, 12, 13, 14)
MOE_WGMMA_BOTH(32, 4, 16, 17, 18)
MOE_WGMMA_BOTH(40, 5, 20, 21, 22)
MOE_WGMMA_BOTH(48, 6, 24, 25, 26)
MOE_WGMMA_BOTH(56, 7, 28, 29, 30)
MOE_WGMMA_BOTH(64, 8, 32, 33, 34)
MOE_WGMMA_BOTH(72, 9, 36, 37, 38)
MOE_WGMMA_BOTH(80, 10, 40, 41, 42)
MOE_WGMMA_BOTH(88, 11, 44, 45, 46)
MOE_WGMMA_BOTH(96, 12, 48, 49, 50)
MOE_WGMMA_BOTH(104, 13, 52, 53, 54)
MOE_WGMMA_BOTH(112, 14, 56, 57, 58)
MOE_WGMMA_BOTH(120, 15, 60, 61, 62)
MOE_WGMMA_BOTH(128, 16, 64, 65, 66)
MOE_WGMMA_BOTH(136, 17, 68, 69, 70)
MOE_WGMMA_BOTH(144, 18, 72, 73, 74)
MOE_WGMMA_BOTH(152, 19, 76, 77, 78)
MOE_WGMMA_BOTH(160, 20, 80, 81, 82)
MOE_WGMMA_BOTH(168, 21, 84, 85, 86)
MOE_WGMMA_BOTH(176, 22, 88, 89, 90)
MOE_WGMMA_BOTH(184, 23, 92, 93, 94)
MOE_WGMMA_BOTH(192, 24, 96, 97, 98)
MOE_WGMMA_BOTH(200, 25, 100, 101, 102)
MOE_WGMMA_BOTH(208, 26, 104, 105, 106)
MOE_WGMMA_BOTH(216, 27, 108, 109, 110)
MOE_WGMMA_BOTH(224, 28, 112, 113, 114)
MOE_WGMMA_BOTH(232, 29, 116, 117, 118)
MOE_WGMMA_BOTH(240, 30, 120, 121, 122)
MOE_WGMMA_BOTH(248, 31, 124, 125, 126)
MOE_WGMMA_BOTH(256, 32, 128, 129, 130)

#undef MOE_D0
#undef MOE_D1
#undef MOE_D2
#undef MOE_D3
#undef MOE_D4
#undef MOE_D5
#undef MOE_D6
#undef MOE_D7
#undef MOE_D8
#undef MOE_D9
#undef MOE_D10
#undef MOE_D11
#undef MOE_D12
#undef MOE_D13
#undef MOE_D14
#undef MOE_D15
#undef MOE_D16
#undef MOE_D17
#undef MOE_D18
#undef MOE_D19
#undef MOE_D20
#undef MOE_D21
#undef MOE_D22
#undef MOE_D23
#undef MOE_D24
#undef MOE_D25
#undef MOE_D26
#undef MOE_D27
#undef MOE_D28
#undef MOE_D29
#undef MOE_D30
#undef MOE_D31
#undef MOE_L1
#undef MOE_R1
#undef MOE_L2
#undef MOE_R2
#undef MOE_L3
#undef MOE_R3
#undef MOE_L4
#undef MOE_R4
#undef MOE_L5
#undef MOE_R5
#undef MOE_L6
#undef MOE_R6
#undef MOE_L7
#undef MOE_R7
#undef MOE_L8
#undef MOE_R8
#undef MOE_L9
#undef MOE_R9
#undef MOE_L10
#undef MOE_R10
#undef MOE_L11
#undef MOE_R11
#undef MOE_L12
#undef MOE_R12
#undef MOE_L13
#undef MOE_R13
#undef MOE_L14
#undef MOE_R14
#undef MOE_L15
#undef MOE_R15
#undef MOE_L16
#undef MOE_R16
#undef MOE_L17
#undef MOE_R17
#undef MOE_L18
#undef MOE_R18
#undef MOE_L19
#undef MOE_R19
#undef MOE_L20
#undef MOE_R20
#undef MOE_L21
#undef MOE_R21
#undef MOE_L22
#undef MOE_R22
#undef MOE_L23
#undef MOE_R23
#undef MOE_L24
#undef MOE_R24
#undef MOE_L25
#undef MOE_R25
#undef MOE_L26
#undef MOE_R26
#undef MOE_L27
#undef MOE_R27
#undef MOE_L28
#undef MOE_R28
#undef MOE_L29
#undef MOE_R29
#undef MOE_L30
#undef MOE_R30
#undef MOE_L31
#undef MOE_R31
#undef MOE_L32
#undef MOE_R32
#undef MOE_O
#undef MOE_WGMMA
#undef MOE_WGMMA_BOTH

#endif
