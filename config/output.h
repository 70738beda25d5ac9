/* SPDX-License-Identifier: Apache-2.0 */
/* Output files that appear whole under their name, or not at all. */
#ifndef MOE_CONFIG_OUTPUT_H
#define MOE_CONFIG_OUTPUT_H

#include "config/error.h"

struct moe_output;

/* Begins a file that will stand at `path`, in the place of the file that is there, if any: until the commit that one
 * stays as it is. Anything but a file at `path`, a device for instance, is refused. MOE_ERROR_WRITE,
 * MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_output_open(const char *path, struct moe_output **output, struct moe_error *err);
moe_status moe_output_write(struct moe_output *output, const void *data, size_t bytes, struct moe_error *err);
/* Flushes the file to disk and gives it its name. Frees, also on failure. */
moe_status moe_output_commit(struct moe_output *output, struct moe_error *err);
void moe_output_abort(struct moe_output *output); /* accepts NULL */

/* All of it at once. */
moe_status moe_output_put(const char *path, const void *data, size_t bytes, struct moe_error *err);

#endif
