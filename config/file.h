/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOE_CONFIG_FILE_H
#define MOE_CONFIG_FILE_H

#include <stdbool.h>

#include "config/error.h"

/* Opens a regular file for reading, without waiting on anything that is none; *fd is the caller's. MOE_ERROR_FILE. */
moe_status moe_file_open(const char *path, int *fd, uint64_t *size, struct moe_error *err);

/* Reads exactly `bytes` at `offset`; a file that ends before is MOE_ERROR_FILE. `path` is for messages. */
moe_status moe_file_read(int fd, const char *path, uint64_t offset, void *destination, uint64_t bytes,
                         struct moe_error *err);

/* "directory/name", for free(); NULL without memory. */
char *moe_file_join(const char *directory, const char *name);

/* Whether a name that stands in a file, joined to a directory, cannot lead out of it. */
bool moe_file_name_plain(const char *name);

#endif
