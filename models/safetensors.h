/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Strict safetensors reader and writer. The reader checks everything that can be checked without the data: header size
 * and syntax, names, dtypes, shapes, and offsets that tile the data exactly (no hole, no overlap, no byte left over).
 * The data is mapped, not read. Tensors may be unaligned: copy before use as typed values.
 */
#ifndef MOE_MODELS_SAFETENSORS_H
#define MOE_MODELS_SAFETENSORS_H

#include "config/error.h"

#define MOE_ST_MAX_HEADER 100000000u
#define MOE_ST_MAX_RANK   16
#define MOE_ST_SHAPE_TEXT (MOE_ST_MAX_RANK * 22 + 3) /* bytes that show the longest shape */

struct moe_st_file;

struct moe_st_tensor {
    const char *name;
    const char *dtype; /* as the file spells it: "BF16", "F8_E4M3", ... */
    moe_dtype type;    /* MOE_DTYPE_NONE for a dtype that is valid here but unknown to libmoe */
    int32_t rank;
    int64_t shape[MOE_ST_MAX_RANK];
    uint64_t offset; /* of the data, from the start of the file */
    uint64_t bytes;
};

/* MOE_ERROR_FILE, MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe_st_open(const char *path, struct moe_st_file **file, struct moe_error *err);
/* The same on bytes in memory, which must outlive *file; `name` is for messages. What fuzzers call. */
moe_status moe_st_open_memory(const void *bytes, size_t length, const char *name, struct moe_st_file **file,
                              struct moe_error *err);
void moe_st_close(struct moe_st_file *file);

const char *moe_st_path(const struct moe_st_file *file);
/* For pread past the mapping (loaders); -1 for a file opened from memory. */
int moe_st_descriptor(const struct moe_st_file *file);
uint64_t moe_st_size(const struct moe_st_file *file);
size_t moe_st_count(const struct moe_st_file *file);
const struct moe_st_tensor *moe_st_at(const struct moe_st_file *file, size_t i); /* in data order */
/* By binary search; NULL if there is none. */
const struct moe_st_tensor *moe_st_find(const struct moe_st_file *file, const char *name);
/* Writes a shape for messages, "[8, 4096]"; returns buffer. */
const char *moe_st_show_shape(int32_t rank, const int64_t *shape, char buffer[MOE_ST_SHAPE_TEXT]);
const void *moe_st_data(const struct moe_st_file *file, const struct moe_st_tensor *tensor);

/* ---- Writer: the file appears whole under its name, or not at all. ---- */

struct moe_st_write_tensor {
    const char *name;
    moe_dtype dtype;
    int32_t rank;
    int64_t shape[MOE_ST_MAX_RANK];
    const void *data; /* NULL: delivered later, in order, with moe_st_writer_data */
};

/* One call for data in memory, flushed to disk (config/output.h). MOE_ERROR_WRITE. */
moe_status moe_st_write(const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                        struct moe_error *err);

/* Streaming form for files larger than memory: open with all the tensors (data unused), then append their bytes in
 * order in pieces of any size, then commit (checks that all bytes came) or abort. */
struct moe_st_writer;
moe_status moe_st_writer_open(const char *path, const struct moe_st_write_tensor *tensors, size_t count,
                              struct moe_st_writer **writer, struct moe_error *err);
moe_status moe_st_writer_data(struct moe_st_writer *writer, const void *data, size_t bytes, struct moe_error *err);
moe_status moe_st_writer_commit(struct moe_st_writer *writer, struct moe_error *err); /* frees, also on failure */
/* Appends the data of all the tensors, then commits. Frees, also on failure. */
moe_status moe_st_writer_finish(struct moe_st_writer *writer, const struct moe_st_write_tensor *tensors, size_t count,
                                struct moe_error *err);
void moe_st_writer_abort(struct moe_st_writer *writer); /* accepts NULL */

#endif
