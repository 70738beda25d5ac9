/* SPDX-License-Identifier: Apache-2.0 */
/* One line of text for a failure, carried from where it happened to the handle that the caller asks. */
#ifndef MOE_CONFIG_ERROR_H
#define MOE_CONFIG_ERROR_H

#include "moe.h"

#ifdef __cplusplus
extern "C" {
#endif

struct moe_error {
    char text[1024];
};

/* Writes the line and returns `status`, so that a failing function ends in `return moe_fail(...)`. The text names the
 * file and the field: "config.json: 'num_local_experts' is -3, expected an integer from 1 to 4096". err may be NULL.
 * Bytes that are no printable text (from hostile files) are shown as '?'. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
moe_status moe_fail(struct moe_error *err, moe_status status, const char *format, ...);

#ifdef __cplusplus
}
#endif

#endif
