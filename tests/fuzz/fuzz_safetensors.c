/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "models/safetensors.h"
#include "tests/fuzz/fuzz.h"

/* Headers and how many bytes of data follow them. */
static const struct {
    const char *header;
    size_t data_bytes;
} seeds[] = {
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
     "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},\"__metadata__\":{\"format\":\"pt\"}}   ",
     32},
    {"{\"z\":{\"dtype\":\"F4\",\"shape\":[2,2],\"data_offsets\":[3,5]},"
     "\"y\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
     "\"x\":{\"dtype\":\"I64\",\"shape\":[0,9],\"data_offsets\":[3,3]},"
     "\"w\":{\"dtype\":\"F6_E3M2\",\"shape\":[4],\"data_offsets\":[5,8]}}",
     8},
    {"{\"\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}", 8},
    {"{}", 0},
};

static const char *const words[] = {
    "\"F32\"",
    "\"F16\"",
    "\"BF16\"",
    "\"I32\"",
    "\"I64\"",
    "\"U8\"",
    "\"BOOL\"",
    "\"F4\"",
    "\"F6_E2M3\"",
    "\"C64\"",
    "\"f32\"",
    "[0,0]",
    "[0,8]",
    "[8,0]",
    "[0,8,8]",
    "[1]",
    "[0]",
    "[3]",
    "[4294967296,4294967296]",
    "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
    "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
    "{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}",
    "{\"format\":\"pt\"}",
    NULL,
};

static const char *const keys[] = {"dtype", "shape", "data_offsets", "__metadata__", "a", "\\u0061", "a\\u0000", NULL};

static void put_length(uint8_t *data, uint64_t length)
{
    for (int i = 0; i < 8; i++)
        data[i] = (uint8_t)(length >> (8 * i));
}

static size_t assemble(uint8_t *data, size_t max_size, const char *header, size_t data_bytes)
{
    size_t length = strlen(header), size = 8 + length + data_bytes;
    if (size > max_size)
        return 0;
    put_length(data, length);
    memcpy(data + 8, header, length);
    memset(data + 8 + length, 0, data_bytes);
    return size;
}

size_t fuzz_seed(size_t i, uint8_t *data, size_t max_size)
{
    return i < sizeof seeds / sizeof *seeds ? assemble(data, max_size, seeds[i].header, seeds[i].data_bytes) : 0;
}

/* A valid file of a few tensors that no seed has. */
static size_t generate(struct mutate *m, uint8_t *data, size_t max_size)
{
    static const struct {
        const char *name;
        uint32_t bytes;
    } dtypes[] = {{"U8", 1}, {"I16", 2}, {"BF16", 2}, {"F32", 4}, {"I64", 8}, {"F8_E5M2", 1}};
    char header[2048];
    uint32_t tensors = mutate_random(m, 9), end = 0;
    size_t at = (size_t)sprintf(header, "{");
    for (uint32_t i = 0; i < tensors; i++) {
        uint32_t dtype = mutate_random(m, 6), rank = mutate_random(m, 4), begin = end, bytes = dtypes[dtype].bytes;
        at += (size_t)sprintf(header + at, "%s\"t%u\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "",
                              (unsigned)(i * 7 % 10), dtypes[dtype].name);
        for (uint32_t d = 0; d < rank; d++) {
            uint32_t extent = mutate_random(m, 4);
            bytes *= extent;
            at += (size_t)sprintf(header + at, d ? ",%u" : "%u", (unsigned)extent);
        }
        end += bytes;
        at += (size_t)sprintf(header + at, "],\"data_offsets\":[%u,%u]}", (unsigned)begin, (unsigned)end);
    }
    sprintf(header + at, "}%*s", (int)mutate_random(m, 9), "");
    return assemble(data, max_size, header, end);
}

size_t fuzz_mutate(struct mutate *m, uint8_t *data, size_t size, size_t max_size)
{
    m->words = words;
    m->keys = keys;
    if (size < 8 || mutate_random(m, 16) == 0) {
        size_t made = generate(m, data, max_size);
        return made ? made : size;
    }

    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | data[i];
    if (length > size - 8)
        length = size - 8;
    size_t data_bytes = size - 8 - (size_t)length;
    char *header = (char *)data + 8;
    switch (mutate_random(m, 16)) {
    case 0: /* only the length */
        put_length(data, mutate_random(m, 2) ? length + mutate_random(m, 5) - 2 : (uint64_t)1 << mutate_random(m, 64));
        return size;
    case 1: /* only the data */
        data_bytes = mutate_random(m, 64);
        break;
    default: { /* the header; its data moves along */
        uint8_t tail[256];
        size_t kept = data_bytes < sizeof tail ? data_bytes : sizeof tail;
        memcpy(tail, header + length, kept);
        length = mutate_json(m, header, (size_t)length, max_size - 8 - kept);
        memcpy(header + length, tail, kept);
        data_bytes = kept;
        put_length(data, length);
        return 8 + (size_t)length + kept;
    }
    }
    if (8 + length + data_bytes > max_size)
        return size;
    if (8 + length + data_bytes > size)
        memset(data + size, 0, 8 + (size_t)length + data_bytes - size);
    put_length(data, length);
    return 8 + (size_t)length + data_bytes;
}

/* The same bytes as a file must read the same. */
static void check_file(const char *path, moe_status status, const struct moe_st_file *file)
{
    struct moe_st_file *same;
    FUZZ_CHECK(moe_st_open(path, &same, NULL) == status);
    if (status != MOE_OK)
        return;
    FUZZ_CHECK(!strcmp(moe_st_path(same), path) && moe_st_descriptor(same) >= 0 && moe_st_descriptor(file) == -1);
    FUZZ_CHECK(moe_st_count(same) == moe_st_count(file));
    for (size_t i = 0; i < moe_st_count(file); i++) {
        const struct moe_st_tensor *t = moe_st_at(file, i);
        FUZZ_CHECK(!memcmp(moe_st_data(file, t), moe_st_data(same, moe_st_at(same, i)), t->bytes));
    }
    moe_st_close(same);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct moe_st_file *file;
    struct moe_error err = {""};
    const char *path;
    moe_status status = moe_st_open_memory(data, size, "x.safetensors", &file, &err);
    if (fuzz_file(data, size, &path))
        check_file(path, status, file);
    if (status != MOE_OK) {
        FUZZ_CHECK(status == MOE_ERROR_FILE && !file);
        FUZZ_CHECK(!strncmp(err.text, "x.safetensors: ", 15) && !strchr(err.text, '\n'));
        return 0;
    }
    FUZZ_CHECK(moe_st_size(file) == size);
    uint64_t sum = 0;
    for (size_t i = 0; i < moe_st_count(file); i++) {
        const struct moe_st_tensor *t = moe_st_at(file, i);
        FUZZ_CHECK(t->rank >= 0 && t->rank <= MOE_ST_MAX_RANK);
        FUZZ_CHECK(t->offset <= size && t->bytes <= size - t->offset);
        FUZZ_CHECK(moe_st_find(file, t->name) == t);
        FUZZ_CHECK((const uint8_t *)moe_st_data(file, t) == data + t->offset);
        FUZZ_CHECK(i == 0 || t[-1].offset + t[-1].bytes == t->offset);
        sum += t->bytes;
    }
    FUZZ_CHECK(sum <= size);
    moe_st_find(file, "not there");
    moe_st_close(file);
    return 0;
}
