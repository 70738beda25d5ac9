/* SPDX-License-Identifier: Apache-2.0 */
/* The driver's function is looked up at run time: linked to libcuda, the library would not load without a driver. */
#include "kernels/cuda/common/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

static PFN_cuTensorMapEncodeTiled_v12000 encode;

static void find_encode(void)
{
    void *function = NULL;
    enum cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ==
            cudaSuccess &&
        found == cudaDriverEntryPointSuccess)
        encode = (PFN_cuTensorMapEncodeTiled_v12000)function;
    else
        cudaGetLastError(); /* clears it for the calls to come */
}

moe_status moe_tensor_map(CUtensorMap *map, moe_dtype dtype, uint32_t rank, const void *base, const uint64_t *sizes,
                          const uint64_t *strides, const uint32_t *box, struct moe_error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    static const cuuint32_t steps[5] = {1, 1, 1, 1, 1};

    pthread_once(&once, find_encode);
    if (encode == NULL)
        return moe_fail(err, MOE_ERROR_UNSUPPORTED, "the CUDA driver has no tensor maps: it is older than 12.0");
    CUresult result =
        encode(map, dtype == MOE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
               (void *)base, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return moe_fail(err, MOE_ERROR_DEVICE, "a tensor map of %llu x %llu elements was refused (CUDA error %d)",
                        (unsigned long long)sizes[1], (unsigned long long)sizes[0], (int)result);
    return MOE_OK;
}
