/* SPDX-License-Identifier: Apache-2.0 */
#include "models/index.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "config/file.h"
#include "config/json.h"
#include "models/safetensors.h"

/* The largest released index (19k tensors) has 2 MB. */
#define MAX_INDEX_BYTES (100u << 20)
#define MAX_FILES       100000

static int compare_files(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int compare_tensors(const void *a, const void *b)
{
    return strcmp(((const struct moe_index_entry *)a)->tensor, ((const struct moe_index_entry *)b)->tensor);
}

/* By tensor, then by file: what a scan finds twice is named in the order of the files. */
static int compare_entries(const void *a, const void *b)
{
    const struct moe_index_entry *x = a, *y = b;
    int order = compare_tensors(a, b);
    return order ? order : (x->file > y->file) - (x->file < y->file);
}

static moe_status check_map(const cJSON *map, const char *name, struct moe_error *err)
{
    char value[128];
    if (!cJSON_IsObject(map))
        return moe_fail(err, MOE_ERROR_FILE, "%s: 'weight_map' is %s, expected an object of tensor: file", name,
                        moe_json_show(map, value, sizeof value));
    if (!map->child)
        return moe_fail(err, MOE_ERROR_FILE, "%s: 'weight_map' is empty, expected at least one tensor", name);
    for (const cJSON *item = map->child; item; item = item->next)
        if (!cJSON_IsString(item) || !moe_file_name_plain(item->valuestring))
            return moe_fail(err, MOE_ERROR_FILE,
                            "%s: 'weight_map' gives tensor '%.200s' the file %s, expected a plain file name", name,
                            item->string, moe_json_show(item, value, sizeof value));
    return MOE_OK;
}

/* Copies `text` to *to, moves *to behind it and returns the copy. */
static const char *keep(char **to, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = memcpy(*to, text, bytes);
    *to += bytes;
    return copy;
}

static moe_status build(const cJSON *map, const char *name, struct moe_index *index, struct moe_error *err)
{
    size_t count = 0, bytes = 0;
    for (const cJSON *item = map->child; item; item = item->next) {
        count++;
        bytes += strlen(item->string) + 1 + strlen(item->valuestring) + 1;
    }
    index->entries = malloc(count * sizeof *index->entries);
    index->files = malloc(count * sizeof *index->files);
    index->text = malloc(bytes);
    if (!index->entries || !index->files || !index->text)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for %zu tensors", name, count);

    /* The files first, sorted and each once, so that an entry can hold a number. */
    char *text = index->text;
    for (const cJSON *item = map->child; item; item = item->next)
        index->files[index->count++] = item->valuestring;
    qsort(index->files, count, sizeof *index->files, compare_files);
    size_t files = 0;
    for (size_t i = 0; i < count; i++)
        if (i == 0 || strcmp(index->files[files - 1], index->files[i]))
            index->files[files++] = index->files[i];
    if (files > MAX_FILES)
        return moe_fail(err, MOE_ERROR_FILE, "%s: 'weight_map' names %zu files, expected at most %d", name, files,
                        MAX_FILES);
    for (size_t i = 0; i < files; i++)
        index->files[i] = keep(&text, index->files[i]);
    index->file_count = (int32_t)files;

    struct moe_index_entry *entry = index->entries;
    for (const cJSON *item = map->child; item; item = item->next, entry++) {
        const char *const file = item->valuestring;
        const char **found = bsearch(&file, index->files, files, sizeof *index->files, compare_files);
        entry->tensor = keep(&text, item->string);
        entry->file = (int32_t)(found - index->files);
    }
    qsort(index->entries, count, sizeof *index->entries, compare_entries);
    return MOE_OK;
}

/* metadata.total_size is advice that some writers get wrong; nothing here depends on it. */
static moe_status read_tree(const cJSON *root, const char *name, struct moe_index *index, struct moe_error *err)
{
    const cJSON *map = moe_json_get(root, "weight_map");
    moe_status status = check_map(map, name, err);
    if (status == MOE_OK)
        status = build(map, name, index, err);
    if (status != MOE_OK)
        moe_index_free(index);
    return status;
}

moe_status moe_index_parse(const char *text, size_t length, const char *name, struct moe_index *index,
                           struct moe_error *err)
{
    cJSON *root;
    memset(index, 0, sizeof *index);
    moe_status status = moe_json_parse(text, length, name, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, name, index, err);
    cJSON_Delete(root);
    return status;
}

moe_status moe_index_load(const char *path, struct moe_index *index, struct moe_error *err)
{
    cJSON *root;
    memset(index, 0, sizeof *index);
    moe_status status = moe_json_load(path, MAX_INDEX_BYTES, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, path, index, err);
    cJSON_Delete(root);
    return status;
}

/* Adds "tensor": "file" for each tensor of the file. */
static moe_status add_file(const char *directory, const char *name, cJSON *map, struct moe_error *err)
{
    struct moe_st_file *file;
    char *path = moe_file_join(directory, name);
    if (!path)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", directory);
    moe_status status = moe_st_open(path, &file, err);
    for (size_t i = 0; status == MOE_OK && i < moe_st_count(file); i++)
        if (!cJSON_AddStringToObject(map, moe_st_at(file, i)->name, name))
            status = moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for its tensors", path);
    moe_st_close(file);
    free(path);
    return status;
}

/* model-00001-of-00019.safetensors and the like; hidden states that lie beside the shards have other names. */
static bool is_shard(const char *name)
{
    static const char prefix[] = "model", suffix[] = ".safetensors";
    size_t length = strlen(name);
    return length >= sizeof prefix + sizeof suffix - 2 && !strncmp(name, prefix, sizeof prefix - 1) &&
           !strcmp(name + length + 1 - sizeof suffix, suffix);
}

static moe_status add_files(const char *directory, cJSON *map, struct moe_error *err)
{
    DIR *entries = opendir(directory);
    if (!entries)
        return moe_fail(err, MOE_ERROR_FILE, "%s: cannot read the directory: %s", directory, strerror(errno));
    moe_status status = MOE_OK;
    for (const struct dirent *entry; status == MOE_OK && (entry = readdir(entries));)
        if (is_shard(entry->d_name))
            status = add_file(directory, entry->d_name, map, err);
    closedir(entries);
    return status;
}

static moe_status check_twice(const struct moe_index *index, const char *directory, struct moe_error *err)
{
    for (size_t i = 1; i < index->count; i++) {
        const struct moe_index_entry *a = &index->entries[i - 1], *b = &index->entries[i];
        if (!strcmp(a->tensor, b->tensor))
            return moe_fail(err, MOE_ERROR_FILE, "%s: tensor '%.200s' is in '%s' and in '%s', expected one of them",
                            directory, a->tensor, index->files[a->file], index->files[b->file]);
    }
    return MOE_OK;
}

moe_status moe_index_scan(const char *directory, struct moe_index *index, struct moe_error *err)
{
    memset(index, 0, sizeof *index);
    cJSON *map = cJSON_CreateObject();
    if (!map)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", directory);
    moe_status status = add_files(directory, map, err);
    if (status == MOE_OK && !map->child)
        status = moe_fail(err, MOE_ERROR_FILE,
                          "%s: has no model.safetensors, no model.safetensors.index.json and no other "
                          "model*.safetensors with a tensor",
                          directory);
    if (status == MOE_OK)
        status = build(map, directory, index, err);
    if (status == MOE_OK)
        status = check_twice(index, directory, err);
    cJSON_Delete(map);
    if (status != MOE_OK)
        moe_index_free(index);
    return status;
}

void moe_index_free(struct moe_index *index)
{
    free(index->entries);
    free(index->files);
    free(index->text);
    memset(index, 0, sizeof *index);
}

int32_t moe_index_find(const struct moe_index *index, const char *tensor)
{
    const struct moe_index_entry wanted = {.tensor = tensor}, *found = NULL;
    if (index->count)
        found = bsearch(&wanted, index->entries, index->count, sizeof wanted, compare_tensors);
    return found ? found->file : -1;
}
