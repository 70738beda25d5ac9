/* SPDX-License-Identifier: Apache-2.0 */
/* moe.h as a C99 and as a C++17 program sees it: header.py compiles this file as both, links it to the library and runs
 * it. It is included twice on purpose, and first, so that it must bring what it needs. */
#include "moe.h"

#include <stdio.h>

#include "moe.h"

/* Each initialiser sets the size and zeroes the rest. */
#define CHECK_INIT(type, init, field)                                                                                  \
    do {                                                                                                               \
        type value = init;                                                                                             \
        if (value.size != sizeof value || value.field != 0) {                                                          \
            printf("%s is wrong\n", #init);                                                                            \
            return 1;                                                                                                  \
        }                                                                                                              \
    } while (0)

int main(void)
{
    CHECK_INIT(moe_context_options, moe_context_options_init(), threads);
    CHECK_INIT(moe_device_info, moe_device_info_init(), cores);
    CHECK_INIT(moe_checkpoint_info, moe_checkpoint_info_init(), num_files);
    CHECK_INIT(moe_load_options, moe_load_options_init(), layout);
    CHECK_INIT(moe_layer_desc, moe_layer_desc_init(MOE_BF16), hidden_size);
    CHECK_INIT(moe_layer_weights, moe_layer_weights_init(), layout);
    CHECK_INIT(moe_batch, moe_batch_init(), config);
    CHECK_INIT(moe_limits, moe_limits_init(), max_tokens);
    CHECK_INIT(moe_record, moe_record_init(), output);

    if (moe_version() != MOE_VERSION) {
        printf("the library says version %d, the header %d\n", moe_version(), MOE_VERSION);
        return 1;
    }
    if (strcmp(moe_status_string(MOE_OK), "success") != 0 || strcmp(moe_path_name(MOE_PATH_SIMPLE), "simple") != 0) {
        printf("the library knows other names than the header\n");
        return 1;
    }
    moe_context_destroy(NULL);
    return 0;
}
