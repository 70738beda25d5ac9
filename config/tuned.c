/* SPDX-License-Identifier: Apache-2.0 */
#include "config/tuned.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config.h"
#include "config/json.h"

/* A shape takes about a KB. Comparing every pair of as many as fit here takes no time. */
#define MAX_TABLE_BYTES (1u << 20)
#define MAX_CORES       65536

/* ---- Reading ---- */

/* What every field is read with. */
struct reader {
    const char *name;
    struct moe_error *err;
    const cJSON *object; /* that holds the fields */
    char where[64];      /* the object: "", "device.", "entries[3].points[0]." */
};

static moe_status bad(const struct reader *r, const char *key, const cJSON *item, const char *expected)
{
    char value[128];
    return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%s%s' is %s, expected %s", r->name, r->where, key,
                    moe_json_show(item, value, sizeof value), expected);
}

static moe_status no_memory(const struct reader *r)
{
    return moe_fail(r->err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory for the table", r->name);
}

/* Fields are spelled out in full, so that one with a slip in its name is not passed over. */
static moe_status check_keys(const struct reader *r, const char *const *keys)
{
    for (const cJSON *item = r->object->child; item; item = item->next) {
        int i = 0;
        while (keys[i] && strcmp(keys[i], item->string))
            i++;
        if (!keys[i])
            return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%s%.60s' is no field of a tuned table", r->name, r->where,
                            item->string);
    }
    return MOE_OK;
}

static moe_status read_integer(const struct reader *r, const char *key, int64_t low, int64_t high, int64_t *value)
{
    const cJSON *item = moe_json_get(r->object, key);
    char expected[96];
    if (moe_json_integer(item, low, high, value))
        return MOE_OK;
    snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)low, (long long)high);
    return bad(r, key, item, expected);
}

static moe_status read_small(const struct reader *r, const char *key, int32_t low, int32_t high, int32_t *value)
{
    int64_t wide = 0;
    moe_status status = read_integer(r, key, low, high, &wide);
    *value = (int32_t)wide;
    return status;
}

static moe_status read_text(const struct reader *r, const char *key, char *text, size_t bytes)
{
    const cJSON *item = moe_json_get(r->object, key);
    char expected[64];
    snprintf(expected, sizeof expected, "a string of 1 to %zu bytes", bytes - 1);
    if (!cJSON_IsString(item) || !item->valuestring[0] || strlen(item->valuestring) >= bytes)
        return bad(r, key, item, expected);
    strcpy(text, item->valuestring);
    return MOE_OK;
}

/* One of name(first) to name(last). */
static moe_status read_choice(const struct reader *r, const char *key, const char *(*name)(int), int first, int last,
                              int *value)
{
    const cJSON *item = moe_json_get(r->object, key);
    char expected[256] = "one of";
    for (int i = first; i <= last; i++) {
        if (cJSON_IsString(item) && !strcmp(item->valuestring, name(i))) {
            *value = i;
            return MOE_OK;
        }
        size_t used = strlen(expected);
        snprintf(expected + used, sizeof expected - used, "%s \"%s\"", i > first ? "," : "", name(i));
    }
    return bad(r, key, item, expected);
}

static const char *dtype_name(int dtype)
{
    return moe_dtype_name((moe_dtype)dtype);
}

static const char *layout_name(int layout)
{
    return moe_layouts_name((unsigned)layout);
}

static const char *path_name(int path)
{
    return moe_path_name((moe_path)path);
}

static moe_status read_device(struct reader r, struct moe_tuned *table)
{
    static const char *const keys[] = {"name", "compute_capability", "cores", NULL};
    const cJSON *item = moe_json_get(r.object, "device");
    if (!cJSON_IsObject(item))
        return bad(&r, "device", item, "an object");
    r.object = item;
    strcpy(r.where, "device.");
    moe_status status = check_keys(&r, keys);
    if (status == MOE_OK)
        status = read_text(&r, "name", table->device, sizeof table->device);
    if (status == MOE_OK)
        status = read_small(&r, "compute_capability", 0, 1000, &table->compute_capability);
    return status == MOE_OK ? read_small(&r, "cores", 1, MAX_CORES, &table->cores) : status;
}

/* The reader is at the point; `before` is the one before it, or NULL. */
static moe_status read_point(const struct reader *r, struct moe_tuned_point *point,
                             const struct moe_tuned_point *before)
{
    static const char *const keys[] = {"tokens", "path", "config", NULL};
    int path = MOE_PATH_AUTO;
    moe_status status = check_keys(r, keys);
    if (status == MOE_OK)
        status = read_integer(r, "tokens", 1, INT32_MAX, &point->tokens);
    if (status == MOE_OK && before && point->tokens <= before->tokens)
        return moe_fail(r->err, MOE_ERROR_FILE, "%s: '%stokens' is %lld, expected more than the %lld before it",
                        r->name, r->where, (long long)point->tokens, (long long)before->tokens);
    if (status == MOE_OK)
        status = read_choice(r, "path", path_name, MOE_PATH_AUTO + 1, MOE_PATH_COUNT - 1, &path);
    point->path = (moe_path)path;
    if (status == MOE_OK && moe_json_get(r->object, "config"))
        status = read_text(r, "config", point->name, sizeof point->name);
    return status;
}

static moe_status read_points(struct reader r, struct moe_tuned_entry *entry)
{
    const cJSON *list = moe_json_get(r.object, "points");
    if (!cJSON_IsArray(list) || !list->child)
        return bad(&r, "points", list, "an array of one point or more");
    entry->points = calloc((size_t)cJSON_GetArraySize(list), sizeof *entry->points);
    if (!entry->points)
        return no_memory(&r);
    moe_status status = MOE_OK;
    size_t length = strlen(r.where);
    for (const cJSON *item = list->child; item && status == MOE_OK; item = item->next) {
        snprintf(r.where + length, sizeof r.where - length, "points[%d]", entry->count);
        if (!cJSON_IsObject(item))
            return bad(&r, "", item, "an object");
        strcat(r.where, ".");
        r.object = item;
        struct moe_tuned_point *point = &entry->points[entry->count];
        status = read_point(&r, point, entry->count ? point - 1 : NULL);
        entry->count++;
    }
    return status;
}

static bool same_shape(const struct moe_tuned_entry *a, const struct moe_tuned_entry *b)
{
    return a->hidden_size == b->hidden_size && a->intermediate_size == b->intermediate_size &&
           a->num_experts == b->num_experts && a->top_k == b->top_k && a->dtype == b->dtype && a->layout == b->layout;
}

static struct moe_tuned_entry *find(const struct moe_tuned *table, const struct moe_tuned_entry *shape)
{
    for (int32_t i = 0; i < table->count; i++)
        if (same_shape(&table->entries[i], shape))
            return &table->entries[i];
    return NULL;
}

static moe_status read_entry(const struct reader *r, struct moe_tuned_entry *entry)
{
    static const char *const keys[] = {
        "hidden_size", "intermediate_size", "num_experts", "top_k", "dtype", "layout", "points", NULL};
    int dtype = MOE_DTYPE_NONE, layout = MOE_LAYOUT_AUTO;
    moe_status status = check_keys(r, keys);
    if (status == MOE_OK)
        status = read_integer(r, "hidden_size", 1, MOE_MAX_SIZE, &entry->hidden_size);
    if (status == MOE_OK)
        status = read_integer(r, "intermediate_size", 1, MOE_MAX_SIZE, &entry->intermediate_size);
    if (status == MOE_OK)
        status = read_small(r, "num_experts", 1, MOE_MAX_EXPERTS, &entry->num_experts);
    if (status == MOE_OK)
        status = read_small(r, "top_k", 1, entry->num_experts < MOE_MAX_TOP_K ? entry->num_experts : MOE_MAX_TOP_K,
                            &entry->top_k);
    if (status == MOE_OK)
        status = read_choice(r, "dtype", dtype_name, MOE_BF16, MOE_F32, &dtype);
    if (status == MOE_OK)
        status = read_choice(r, "layout", layout_name, MOE_LAYOUT_ROW_MAJOR, MOE_LAYOUT_PACKED, &layout);
    entry->dtype = (moe_dtype)dtype;
    entry->layout = (moe_layout)layout;
    return status == MOE_OK ? read_points(*r, entry) : status;
}

static moe_status read_entries(struct reader r, struct moe_tuned *table)
{
    const cJSON *list = moe_json_get(r.object, "entries");
    if (!cJSON_IsArray(list))
        return bad(&r, "entries", list, "an array");
    table->entries = calloc((size_t)cJSON_GetArraySize(list) + 1, sizeof *table->entries);
    if (!table->entries)
        return no_memory(&r);
    for (const cJSON *item = list->child; item; item = item->next) {
        struct moe_tuned_entry *entry = &table->entries[table->count];
        snprintf(r.where, sizeof r.where, "entries[%d]", table->count);
        if (!cJSON_IsObject(item))
            return bad(&r, "", item, "an object");
        strcat(r.where, ".");
        r.object = item;
        moe_status status = read_entry(&r, entry);
        const struct moe_tuned_entry *twin = status == MOE_OK ? find(table, entry) : NULL;
        table->count++; /* so that what the entry owns is freed */
        if (twin)
            return moe_fail(r.err, MOE_ERROR_FILE, "%s: 'entries[%d]' has the shape of 'entries[%d]', expected another",
                            r.name, table->count - 1, (int)(twin - table->entries));
        if (status != MOE_OK)
            return status;
    }
    return MOE_OK;
}

static moe_status read_tree(const cJSON *root, const char *name, struct moe_tuned *table, struct moe_error *err)
{
    static const char *const keys[] = {"device", "entries", NULL};
    struct reader r = {.name = name, .err = err, .object = root};
    table->file = strdup(name);
    moe_status status = table->file ? check_keys(&r, keys) : no_memory(&r);
    if (status == MOE_OK)
        status = read_device(r, table);
    if (status == MOE_OK)
        status = read_entries(r, table);
    if (status != MOE_OK)
        moe_tuned_free(table);
    return status;
}

moe_status moe_tuned_parse(const char *text, size_t length, const char *name, struct moe_tuned *table,
                           struct moe_error *err)
{
    cJSON *root;
    memset(table, 0, sizeof *table);
    moe_status status = moe_json_parse(text, length, name, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, name, table, err);
    cJSON_Delete(root);
    return status;
}

moe_status moe_tuned_load(const char *path, struct moe_tuned *table, struct moe_error *err)
{
    cJSON *root;
    memset(table, 0, sizeof *table);
    moe_status status = moe_json_load(path, MAX_TABLE_BYTES, &root, err);
    if (status == MOE_OK)
        status = read_tree(root, path, table, err);
    cJSON_Delete(root);
    return status;
}

void moe_tuned_free(struct moe_tuned *table)
{
    for (int32_t i = 0; i < table->count; i++)
        free(table->entries[i].points);
    free(table->entries);
    free(table->file);
    memset(table, 0, sizeof *table);
}

/* ---- Looking up ---- */

bool moe_tuned_fits(const struct moe_tuned *table, const moe_device_info *device, struct moe_error *err)
{
    if (strcmp(table->device, device->name) == 0 && table->compute_capability == device->compute_capability &&
        table->cores == device->cores)
        return true;
    moe_fail(err, MOE_OK,
             "%s: was measured on '%s', compute capability %d, %d cores; this is '%s', compute capability %d, %d cores",
             table->file, table->device, (int)table->compute_capability, (int)table->cores, device->name,
             (int)device->compute_capability, (int)device->cores);
    return false;
}

const struct moe_tuned_entry *moe_tuned_find(const struct moe_tuned *table, const moe_layer_desc *desc,
                                             moe_layout layout)
{
    const struct moe_tuned_entry shape = {.hidden_size = desc->hidden_size,
                                          .intermediate_size = desc->intermediate_size,
                                          .num_experts = desc->num_experts,
                                          .top_k = desc->top_k,
                                          .dtype = desc->dtype,
                                          .layout = layout};
    return find(table, &shape);
}

const struct moe_tuned_point *moe_tuned_at(const struct moe_tuned_entry *entry, int64_t tokens)
{
    int32_t i = entry->count;
    while (i > 0 && entry->points[i - 1].tokens > tokens)
        i--;
    return i > 0 ? &entry->points[i - 1] : NULL;
}

/* ---- Making and writing ---- */

/* Times grow by factors, and so the middle is the geometric one. */
int64_t moe_tuned_between(const struct moe_tuned_entry *entry)
{
    for (int32_t i = 1; i < entry->count; i++) {
        const struct moe_tuned_point *low = &entry->points[i - 1], *high = &entry->points[i];
        const int64_t gap = high->tokens - low->tokens;
        if (low->path != high->path && gap > 1 && 10 * gap > low->tokens)
            return llrint(sqrt((double)low->tokens * (double)high->tokens));
    }
    return 0;
}

static bool same_choice(const struct moe_tuned_point *a, const struct moe_tuned_point *b)
{
    return a->path == b->path && strcmp(a->name, b->name) == 0;
}

moe_status moe_tuned_set(struct moe_tuned *table, const struct moe_tuned_entry *entry)
{
    struct moe_tuned_entry *place = find(table, entry);
    struct moe_tuned_point *points = calloc((size_t)entry->count, sizeof *points);
    if (!points)
        return MOE_ERROR_OUT_OF_MEMORY;
    if (!place) {
        struct moe_tuned_entry *entries = realloc(table->entries, ((size_t)table->count + 1) * sizeof *entries);
        if (!entries) {
            free(points);
            return MOE_ERROR_OUT_OF_MEMORY;
        }
        table->entries = entries;
        place = &entries[table->count++];
        place->points = NULL;
    }
    free(place->points);
    *place = *entry;
    place->points = points;
    place->count = 0;
    for (int32_t i = 0; i < entry->count; i++) {
        const struct moe_tuned_point *point = &entry->points[i];
        if (i == 0 || !same_choice(point, &points[place->count - 1]))
            points[place->count++] = *point;
    }
    return MOE_OK;
}

static cJSON *append(cJSON *array)
{
    cJSON *object = array ? cJSON_CreateObject() : NULL;
    if (object)
        cJSON_AddItemToArray(array, object);
    return object;
}

/* Without memory any of these is NULL, and what goes into a NULL too. */
static bool add_entry(cJSON *entries, const struct moe_tuned_entry *entry)
{
    cJSON *object = append(entries);
    bool fine = cJSON_AddNumberToObject(object, "hidden_size", (double)entry->hidden_size) &&
                cJSON_AddNumberToObject(object, "intermediate_size", (double)entry->intermediate_size) &&
                cJSON_AddNumberToObject(object, "num_experts", entry->num_experts) &&
                cJSON_AddNumberToObject(object, "top_k", entry->top_k) &&
                cJSON_AddStringToObject(object, "dtype", moe_dtype_name(entry->dtype)) &&
                cJSON_AddStringToObject(object, "layout", moe_layouts_name(entry->layout));
    cJSON *points = cJSON_AddArrayToObject(object, "points");
    for (int32_t i = 0; fine && i < entry->count; i++) {
        const struct moe_tuned_point *point = &entry->points[i];
        object = append(points);
        fine = cJSON_AddNumberToObject(object, "tokens", (double)point->tokens) &&
               cJSON_AddStringToObject(object, "path", moe_path_name(point->path)) &&
               (!point->name[0] || cJSON_AddStringToObject(object, "config", point->name));
    }
    return fine;
}

moe_status moe_tuned_write(const struct moe_tuned *table, struct moe_output *output, struct moe_error *err)
{
    cJSON *root = cJSON_CreateObject(), *device = cJSON_AddObjectToObject(root, "device");
    bool fine = cJSON_AddStringToObject(device, "name", table->device) &&
                cJSON_AddNumberToObject(device, "compute_capability", table->compute_capability) &&
                cJSON_AddNumberToObject(device, "cores", table->cores);
    cJSON *entries = cJSON_AddArrayToObject(root, "entries");
    for (int32_t i = 0; fine && i < table->count; i++)
        fine = add_entry(entries, &table->entries[i]);
    char *text = fine && entries ? cJSON_Print(root) : NULL;
    cJSON_Delete(root);
    if (!text)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "out of memory for a tuned table");
    moe_status status = moe_output_write(output, text, strlen(text), err);
    if (status == MOE_OK)
        status = moe_output_write(output, "\n", 1, err);
    cJSON_free(text);
    return status;
}
