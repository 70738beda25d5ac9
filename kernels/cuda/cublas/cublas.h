/* SPDX-License-Identifier: Apache-2.0 */
/* cuBLAS, found at run time, so that the library loads and runs on machines that have none. */
#ifndef MOE_KERNELS_CUDA_CUBLAS_H
#define MOE_KERNELS_CUDA_CUBLAS_H

#include "config/error.h"

struct moe_cublas;

/* Opens libcublas and makes a handle for the current device. MOE_ERROR_UNSUPPORTED, with why, if there is none. */
moe_status moe_cublas_create(struct moe_cublas **blas, struct moe_error *err);
void moe_cublas_destroy(struct moe_cublas *blas);

#endif
