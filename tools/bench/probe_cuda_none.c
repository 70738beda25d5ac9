/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

moe_status bench_cuda_open(int32_t device, struct bench_machine **machine, struct moe_error *err)
{
    *machine = NULL;
    return moe_fail(err, MOE_ERROR_UNSUPPORTED, "cuda:%d: this build has no CUDA", device);
}
