/* SPDX-License-Identifier: Apache-2.0 */
#include "models/safetensors.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "config/file.h"
#include "config/json.h"
#include "models/st_dtypes.h"

#define PREFIX      8 /* bytes of the header's length, little endian, before the header */
#define MAX_INTEGER ((1ll << 53) - 1)

struct moe_st_file {
    char *path;
    int fd;
    const uint8_t *bytes; /* the whole file */
    uint64_t size;
    uint64_t data; /* offset of the data */
    size_t count;
    struct moe_st_tensor *tensors;        /* [count], in data order */
    const struct moe_st_tensor **by_name; /* [count], sorted by name */
    char *names;                          /* what the tensors' names point into */
};

static moe_status out_of_memory(const char *path, struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for the header", path);
}

/* ---- One entry of the header ---- */

static moe_status read_shape(const cJSON *shape, const char *path, struct moe_st_tensor *tensor, struct moe_error *err)
{
    if (!cJSON_IsArray(shape))
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s': 'shape' is %s, expected an array", path,
                        tensor->name, shape ? "no array" : "missing");
    for (const cJSON *item = shape->child; item; item = item->next) {
        char value[128];
        if (tensor->rank == MOE_ST_MAX_RANK)
            return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s': 'shape' has more than %d dimensions", path,
                            tensor->name, MOE_ST_MAX_RANK);
        if (!moe_json_integer(item, 0, MAX_INTEGER, &tensor->shape[tensor->rank]))
            return moe_fail(err, MOE_ERROR_FILE,
                            "%s: tensor '%.200s': 'shape' has %s, expected integers from 0 to 2^53 - 1", path,
                            tensor->name, moe_json_show(item, value, sizeof value));
        tensor->rank++;
    }
    return MOE_OK;
}

/* The offsets count from the start of the data, which `size` bytes follow. */
static moe_status read_offsets(const cJSON *offsets, const char *path, uint64_t data, uint64_t size,
                               struct moe_st_tensor *tensor, struct moe_error *err)
{
    int64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !moe_json_integer(offsets->child, 0, MAX_INTEGER, &begin) ||
        !moe_json_integer(offsets->child->next, 0, MAX_INTEGER, &end))
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor '%.200s': 'data_offsets' is %s, expected two integers from 0 to 2^53 - 1", path,
                        tensor->name, offsets ? "something else" : "missing");
    if (begin > end)
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor '%.200s': 'data_offsets' is [%lld, %lld], which ends before "
                        "it begins",
                        path, tensor->name, (long long)begin, (long long)end);
    if ((uint64_t)end > size)
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor '%.200s': 'data_offsets' is [%lld, %lld], but the file holds %llu bytes of data: "
                        "cut short?",
                        path, tensor->name, (long long)begin, (long long)end, (unsigned long long)size);
    tensor->offset = data + (uint64_t)begin;
    tensor->bytes = (uint64_t)(end - begin);
    return MOE_OK;
}

static moe_status read_tensor(const cJSON *entry, const char *path, uint64_t data, uint64_t size,
                              struct moe_st_tensor *tensor, struct moe_error *err)
{
    if (!cJSON_IsObject(entry))
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s': entry is no object", path, tensor->name);

    const cJSON *name = moe_json_get(entry, "dtype");
    const struct moe_st_dtype *dtype = cJSON_IsString(name) ? moe_st_dtype_by_name(name->valuestring) : NULL;
    char value[128];
    if (!dtype)
        return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s': 'dtype' is %s, expected one of safetensors' names",
                        path, tensor->name, moe_json_show(name, value, sizeof value));
    tensor->dtype = dtype->name;
    tensor->type = dtype->type;

    moe_status status = read_shape(moe_json_get(entry, "shape"), path, tensor, err);
    if (status == MOE_OK)
        status = read_offsets(moe_json_get(entry, "data_offsets"), path, data, size, tensor, err);
    if (status != MOE_OK)
        return status;

    uint64_t bytes;
    if (!moe_st_shape_bytes(dtype, tensor->rank, tensor->shape, &bytes))
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor '%.200s': 'shape' of %s makes no whole number of bytes below "
                        "2^61",
                        path, tensor->name, dtype->name);
    if (bytes != tensor->bytes)
        return moe_fail(err, MOE_ERROR_FILE,
                        "%s: tensor '%.200s': 'shape' and 'dtype' make %llu bytes, but "
                        "'data_offsets' spans %llu",
                        path, tensor->name, (unsigned long long)bytes, (unsigned long long)tensor->bytes);
    return MOE_OK;
}

static moe_status check_metadata(const cJSON *metadata, const char *path, struct moe_error *err)
{
    if (!cJSON_IsObject(metadata))
        return moe_fail(err, MOE_ERROR_FILE, "%s: '__metadata__' is no object", path);
    for (const cJSON *item = metadata->child; item; item = item->next)
        if (!cJSON_IsString(item))
            return moe_fail(err, MOE_ERROR_FILE, "%s: '__metadata__' holds '%.200s', which is no string", path,
                            item->string);
    return MOE_OK;
}

/* ---- All entries ---- */

static bool is_metadata(const cJSON *entry)
{
    return !strcmp(entry->string, "__metadata__");
}

static int by_offset(const void *a, const void *b)
{
    const struct moe_st_tensor *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    /* An empty tensor stands before one that begins at the same byte. */
    if (x->bytes != y->bytes)
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b)
{
    const struct moe_st_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* The tensors, sorted, must follow on each other from the first byte of data to the last. */
static moe_status check_tiling(const struct moe_st_file *file, struct moe_error *err)
{
    uint64_t at = file->data;
    for (size_t i = 0; i < file->count; i++) {
        const struct moe_st_tensor *t = &file->tensors[i];
        if (t->offset < at)
            return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s' overlaps '%.200s'", file->path, t->name,
                            file->tensors[i - 1].name);
        if (t->offset > at)
            return moe_fail(err, MOE_ERROR_FILE, "%s: %llu bytes before tensor '%.200s' belong to no tensor",
                            file->path, (unsigned long long)(t->offset - at), t->name);
        at += t->bytes;
    }
    if (at != file->size)
        return moe_fail(err, MOE_ERROR_FILE, "%s: %llu bytes after the last tensor belong to no tensor", file->path,
                        (unsigned long long)(file->size - at));
    return MOE_OK;
}

static moe_status read_entries(struct moe_st_file *file, const cJSON *root, struct moe_error *err)
{
    size_t entries = 0, name_bytes = 0;
    for (const cJSON *entry = root->child; entry; entry = entry->next) {
        entries++;
        name_bytes += strlen(entry->string) + 1;
    }
    file->tensors = calloc(entries + 1, sizeof *file->tensors);
    file->by_name = calloc(entries + 1, sizeof *file->by_name);
    file->names = malloc(name_bytes + 1);
    if (!file->tensors || !file->by_name || !file->names)
        return out_of_memory(file->path, err);

    char *name = file->names;
    for (const cJSON *entry = root->child; entry; entry = entry->next) {
        moe_status status;
        if (is_metadata(entry)) {
            status = check_metadata(entry, file->path, err);
        } else {
            struct moe_st_tensor *tensor = &file->tensors[file->count++];
            size_t length = strlen(entry->string) + 1;
            tensor->name = memcpy(name, entry->string, length);
            name += length;
            status = read_tensor(entry, file->path, file->data, file->size - file->data, tensor, err);
        }
        if (status != MOE_OK)
            return status;
    }

    /* By name a sorted array, not a hash: a hostile file can choose colliding names, but not make sorting slow. */
    qsort(file->tensors, file->count, sizeof *file->tensors, by_offset);
    for (size_t i = 0; i < file->count; i++)
        file->by_name[i] = &file->tensors[i];
    qsort(file->by_name, file->count, sizeof *file->by_name, by_name);
    return check_tiling(file, err);
}

/* ---- The file ---- */

static moe_status check_length(struct moe_st_file *file, const uint8_t prefix[PREFIX], struct moe_error *err)
{
    uint64_t length = 0;
    for (int i = PREFIX - 1; i >= 0; i--)
        length = length << 8 | prefix[i];
    if (!memcmp(prefix, "version ", PREFIX))
        return moe_fail(err, MOE_ERROR_FILE, "%s: is a Git LFS pointer, not the file that it stands for", file->path);
    if (length > MOE_ST_MAX_HEADER)
        return moe_fail(err, MOE_ERROR_FILE, "%s: header length is %llu, expected at most %u", file->path,
                        (unsigned long long)length, MOE_ST_MAX_HEADER);
    if (length > file->size - PREFIX)
        return moe_fail(err, MOE_ERROR_FILE, "%s: header length is %llu, but the file has only %llu bytes", file->path,
                        (unsigned long long)length, (unsigned long long)file->size);
    file->data = PREFIX + length;
    return MOE_OK;
}

static moe_status read_header(struct moe_st_file *file, const char *header, struct moe_error *err)
{
    size_t length = (size_t)(file->data - PREFIX);
    if (length == 0)
        return moe_fail(err, MOE_ERROR_FILE, "%s: header length is 0, expected at least 2", file->path);
    if (header[0] != '{')
        return moe_fail(err, MOE_ERROR_FILE, "%s: header begins with byte 0x%02x, expected '{'", file->path,
                        (unsigned char)header[0]);
    while (header[length - 1] == ' ')
        length--;
    if (header[length - 1] != '}')
        return moe_fail(err, MOE_ERROR_FILE, "%s: header ends with byte 0x%02x, expected '}' or spaces", file->path,
                        (unsigned char)header[length - 1]);

    cJSON *root;
    moe_status status = moe_json_parse(header, length, file->path, &root, err);
    if (status == MOE_OK)
        status = read_entries(file, root, err);
    cJSON_Delete(root);
    return status;
}

static moe_status new_file(const char *path, int fd, uint64_t size, struct moe_st_file **out, struct moe_error *err)
{
    struct moe_st_file *file = calloc(1, sizeof *file);
    char *copy = strdup(path);
    if (!file || !copy) {
        free(file);
        free(copy);
        return out_of_memory(path, err);
    }
    file->path = copy;
    file->fd = fd;
    file->size = size;
    *out = file;
    if (size == 0)
        return moe_fail(err, MOE_ERROR_FILE, "%s: is empty, expected safetensors", path);
    if (size < PREFIX)
        return moe_fail(err, MOE_ERROR_FILE, "%s: has %llu bytes, expected at least %d", path, (unsigned long long)size,
                        PREFIX);
    return MOE_OK;
}

/* The header is read rather than mapped: if another process cuts the file short meanwhile, that is an error, not a
 * SIGBUS. */
static moe_status load(struct moe_st_file *file, struct moe_error *err)
{
    uint8_t prefix[PREFIX];
    moe_status status = moe_file_read(file->fd, file->path, 0, prefix, PREFIX, err);
    if (status == MOE_OK)
        status = check_length(file, prefix, err);
    if (status != MOE_OK)
        return status;

    char *header = malloc((size_t)(file->data - PREFIX) + 1);
    if (!header)
        return out_of_memory(file->path, err);
    status = moe_file_read(file->fd, file->path, PREFIX, header, file->data - PREFIX, err);
    if (status == MOE_OK)
        status = read_header(file, header, err);
    free(header);
    if (status != MOE_OK)
        return status;

    void *bytes = mmap(NULL, (size_t)file->size, PROT_READ, MAP_SHARED, file->fd, 0);
    if (bytes == MAP_FAILED)
        return moe_fail(err, errno == ENOMEM ? MOE_ERROR_OUT_OF_MEMORY : MOE_ERROR_FILE, "%s: cannot map: %s",
                        file->path, strerror(errno));
    file->bytes = bytes;
    return MOE_OK;
}

moe_status moe_st_open(const char *path, struct moe_st_file **out, struct moe_error *err)
{
    int fd;
    uint64_t size;
    struct moe_st_file *file = NULL;
    *out = NULL;
    moe_status status = moe_file_open(path, &fd, &size, err);
    if (status != MOE_OK)
        return status;
    status = new_file(path, fd, size, &file, err);
    if (!file)
        close(fd);
    if (status == MOE_OK)
        status = load(file, err);
    if (status != MOE_OK) {
        moe_st_close(file);
        return status;
    }
    *out = file;
    return MOE_OK;
}

moe_status moe_st_open_memory(const void *bytes, size_t length, const char *name, struct moe_st_file **out,
                              struct moe_error *err)
{
    struct moe_st_file *file = NULL;
    *out = NULL;
    moe_status status = new_file(name, -1, length, &file, err);
    if (status == MOE_OK) {
        file->bytes = bytes;
        status = check_length(file, file->bytes, err);
    }
    if (status == MOE_OK)
        status = read_header(file, (const char *)file->bytes + PREFIX, err);
    if (status != MOE_OK) {
        moe_st_close(file);
        return status;
    }
    *out = file;
    return MOE_OK;
}

void moe_st_close(struct moe_st_file *file)
{
    if (!file)
        return;
    if (file->fd >= 0) {
        if (file->bytes)
            munmap((void *)file->bytes, (size_t)file->size);
        close(file->fd);
    }
    free(file->tensors);
    free(file->by_name);
    free(file->names);
    free(file->path);
    free(file);
}

const char *moe_st_path(const struct moe_st_file *file)
{
    return file->path;
}

int moe_st_descriptor(const struct moe_st_file *file)
{
    return file->fd;
}

uint64_t moe_st_size(const struct moe_st_file *file)
{
    return file->size;
}

size_t moe_st_count(const struct moe_st_file *file)
{
    return file->count;
}

const struct moe_st_tensor *moe_st_at(const struct moe_st_file *file, size_t i)
{
    return &file->tensors[i];
}

const struct moe_st_tensor *moe_st_find(const struct moe_st_file *file, const char *name)
{
    const struct moe_st_tensor wanted = {.name = name}, *key = &wanted;
    const struct moe_st_tensor **found = bsearch(&key, file->by_name, file->count, sizeof key, by_name);
    return found ? *found : NULL;
}

const char *moe_st_show_shape(int32_t rank, const int64_t *shape, char buffer[MOE_ST_SHAPE_TEXT])
{
    char *at = buffer;
    *at++ = '[';
    for (int32_t i = 0; i < rank; i++)
        at += sprintf(at, i ? ", %lld" : "%lld", (long long)shape[i]);
    strcpy(at, "]");
    return buffer;
}

const void *moe_st_data(const struct moe_st_file *file, const struct moe_st_tensor *tensor)
{
    return file->bytes + tensor->offset;
}
