/* SPDX-License-Identifier: Apache-2.0 */
/* The safetensors reader and writer: what is taken, and that writing is all or nothing. test_malformed.c has the
 * messages of the reader. */
#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "models/safetensors.h"
#include "tests/unit/files.h"

/* A file of `header` and `data_bytes` of data, data byte i being i; the caller frees it. */
static void *make(const char *header, size_t data_bytes, size_t *length)
{
    size_t n = strlen(header);
    unsigned char *bytes = malloc(8 + n + data_bytes + 1);
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++)
        bytes[8 + n + i] = (unsigned char)i;
    *length = 8 + n + data_bytes;
    return bytes;
}

static void reads_what_the_format_allows(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data_bytes, count;
    } cases[] = {
        {"{}", 0, 0},
        {"{}     ", 0, 0},
        {"{\"__metadata__\":{}}", 0, 0},
        {"{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\"}}", 0, 0},
        {"{\"\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1, 1},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1],\"extra\":[{}]}}", 1, 1},
        {"{\"z\":{\"dtype\":\"F32\",\"shape\":[9007199254740991,0],\"data_offsets\":[0,0]}}", 0, 1},
        {"{\"z\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]}}", 0, 1},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
         "\"e\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[3,3]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[3,7]}}",
         7, 3},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[2,3],\"data_offsets\":[0,3]},"
         "\"b\":{\"dtype\":\"F6_E2M3\",\"shape\":[4],\"data_offsets\":[3,6]}}",
         6, 2},
        {"{\"a\":{\"dtype\":\"BOOL\",\"shape\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,2]}}", 2, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t length;
        void *bytes = make(cases[i].header, cases[i].data_bytes, &length);
        struct moe_st_file *file;
        struct moe_error err = {""};
        if (moe_st_open_memory(bytes, length, "x", &file, &err) != MOE_OK)
            fail_msg("%s: %s", cases[i].header, err.text);
        assert_int_equal(moe_st_count(file), cases[i].count);
        assert_int_equal(moe_st_descriptor(file), -1);
        moe_st_close(file);
        free(bytes);
    }
}

static void finds_tensors(void **state)
{
    (void)state;
    size_t length;
    /* b lies before a, and a's data is not aligned. */
    void *bytes = make("{\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[3,11]},"
                       "\"b\":{\"dtype\":\"F8_E4M3\",\"shape\":[3],\"data_offsets\":[0,3]}}   ",
                       11, &length);
    const char *path = files_write("a.safetensors", bytes, length);
    struct moe_st_file *file;
    assert_int_equal(moe_st_open(path, &file, NULL), MOE_OK);
    assert_string_equal(moe_st_path(file), path);
    assert_int_equal(moe_st_size(file), length);
    assert_true(moe_st_descriptor(file) >= 0);
    assert_true(fcntl(moe_st_descriptor(file), F_GETFD) & FD_CLOEXEC);
    assert_int_equal(moe_st_count(file), 2);

    const struct moe_st_tensor *a = moe_st_find(file, "a"), *b = moe_st_find(file, "b");
    assert_ptr_equal(moe_st_at(file, 0), b);
    assert_ptr_equal(moe_st_at(file, 1), a);
    assert_null(moe_st_find(file, "c"));
    assert_null(moe_st_find(file, "__metadata__"));
    assert_int_equal(a->type, MOE_F32);
    assert_int_equal(a->rank, 2);
    assert_int_equal(a->shape[0], 2);
    assert_int_equal(a->bytes, 8);
    assert_int_equal(b->type, MOE_DTYPE_NONE);
    assert_string_equal(b->dtype, "F8_E4M3");
    assert_int_equal(a->offset, length - 8);
    assert_memory_equal(moe_st_data(file, a), "\3\4\5\6\7\10\11\12", 8);
    assert_memory_equal(moe_st_data(file, b), "\0\1\2", 3);
    moe_st_close(file);
    moe_st_close(NULL);
    free(bytes);
}

static void refuses_what_is_no_file(void **state)
{
    (void)state;
    mkfifo(files_path("fifo"), 0600);
    files_write("empty", "", 0);
    files_write("short", "1234567", 7);
    static const struct {
        const char *name, *message;
    } cases[] = {
        {"absent", "cannot open: No such file or directory"},
        {".", "is a directory, expected a file"},
        {"fifo", "is not a regular file"},
        {"empty", "is empty, expected safetensors"},
        {"short", "has 7 bytes, expected at least 8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_st_file *file = (void *)&cases;
        struct moe_error err = {""};
        assert_int_equal(moe_st_open(files_path(cases[i].name), &file, &err), MOE_ERROR_FILE);
        assert_null(file);
        if (!strstr(err.text, cases[i].message))
            fail_msg("%s: '%s'", cases[i].name, err.text);
    }
}

/* ---- Writing ---- */

static const float f32_data[6] = {1, 2, 3, 4, 5, 6};
static const uint16_t bf16_data[3] = {0x3F80, 0x4000, 0x4040};
static const struct moe_st_write_tensor some[] = {
    {"x", MOE_F32, 2, {2, 3}, f32_data},
    {"nothing", MOE_I64, 1, {0}, NULL},
    {"\"q\\\x01\xC3\xA9", MOE_BF16, 1, {3}, bf16_data},
};

static int count_files(void)
{
    int count = 0;
    DIR *dir = opendir(files_path("out"));
    for (struct dirent *entry; (entry = readdir(dir));)
        count += strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..");
    closedir(dir);
    return count;
}

static void writes_and_reads_back(void **state)
{
    (void)state;
    mkdir(files_path("out"), 0700);
    const char *path = files_path("out/x.safetensors");
    mode_t mask = umask(022);
    for (int round = 0; round < 2; round++) { /* the second replaces the first */
        struct moe_error err = {""};
        struct moe_st_file *file = NULL;
        if (moe_st_write(path, some, 3, &err) != MOE_OK || moe_st_open(path, &file, &err) != MOE_OK)
            fail_msg("%s", err.text);
        assert_int_equal(moe_st_count(file), 3);
        const struct moe_st_tensor *x = moe_st_find(file, "x"), *q = moe_st_find(file, "\"q\\\x01\xC3\xA9");
        assert_int_equal(x->offset % 8, 0);
        assert_memory_equal(moe_st_data(file, x), f32_data, sizeof f32_data);
        assert_memory_equal(moe_st_data(file, q), bf16_data, sizeof bf16_data);
        assert_int_equal(q->type, MOE_BF16);
        assert_int_equal(moe_st_find(file, "nothing")->bytes, 0);
        moe_st_close(file);
        assert_int_equal(count_files(), 1);
    }
    umask(mask);
    struct stat st;
    stat(path, &st);
    assert_int_equal(st.st_mode & 0777, 0644);
    unlink(path);
}

static void streams(void **state)
{
    (void)state;
    const char *path = files_path("out/s.safetensors");
    const char *bytes = (const char *)f32_data;
    struct moe_st_writer *writer;
    struct moe_error err = {""};

    assert_int_equal(moe_st_writer_open(path, some, 1, &writer, &err), MOE_OK);
    assert_int_equal(access(path, F_OK), -1);
    for (size_t i = 0; i < sizeof f32_data; i += 5)
        assert_int_equal(moe_st_writer_data(writer, bytes + i, sizeof f32_data - i < 5 ? sizeof f32_data - i : 5, &err),
                         MOE_OK);
    assert_int_equal(moe_st_writer_data(writer, bytes, 1, &err), MOE_ERROR_INVALID_ARGUMENT);
    assert_int_equal(moe_st_writer_commit(writer, &err), MOE_OK);
    assert_int_equal(count_files(), 1);
    unlink(path);

    assert_int_equal(moe_st_writer_open(path, some, 1, &writer, &err), MOE_OK);
    assert_int_equal(moe_st_writer_data(writer, bytes, 23, &err), MOE_OK);
    assert_int_equal(moe_st_writer_commit(writer, &err), MOE_ERROR_INVALID_ARGUMENT);
    assert_non_null(strstr(err.text, "1 bytes of data did not come"));
    assert_int_equal(count_files(), 0);

    assert_int_equal(moe_st_writer_open(path, some, 1, &writer, &err), MOE_OK);
    moe_st_writer_abort(writer);
    moe_st_writer_abort(NULL);
    assert_int_equal(count_files(), 0);
}

static void write_failures_leave_nothing(void **state)
{
    (void)state;
    mkdir(files_path("out/dir"), 0700);
    mkfifo(files_path("fifo2"), 0600);
    const struct {
        const char *path, *message;
    } cases[] = {
        {"/dev/full", "/dev/full: is not a regular file"},
        {files_path("absent/x"), "/absent/x: cannot create a temporary file beside it: No such file or directory"},
        {files_path("out/dir"), "/out/dir: is a directory"},
        {files_path("fifo2"), "/fifo2: is not a regular file"},
        {"", "output path: names no file"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_error err = {""};
        assert_int_equal(moe_st_write(cases[i].path, some, 3, &err), MOE_ERROR_WRITE);
        if (!strstr(err.text, cases[i].message))
            fail_msg("%s: '%s'", cases[i].path, err.text);
    }
    assert_int_equal(moe_st_write(files_path("out/dir/"), some, 3, NULL), MOE_ERROR_WRITE);
    rmdir(files_path("out/dir"));

    /* The file system refuses the data: a size limit stands in for a full disk. */
    struct rlimit before, limit;
    struct moe_error err = {""};
    getrlimit(RLIMIT_FSIZE, &before);
    limit = (struct rlimit){.rlim_cur = 200, .rlim_max = before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    static const char data[4096];
    const struct moe_st_write_tensor large = {"large", MOE_F32, 1, {1024}, data};
    moe_status status = moe_st_write(files_path("out/big"), &large, 1, &err);
    setrlimit(RLIMIT_FSIZE, &before);
    assert_int_equal(status, MOE_ERROR_WRITE);
    assert_non_null(strstr(err.text, "/out/big: cannot write: File too large"));
    assert_int_equal(count_files(), 0);
}

static void refuses_bad_tensors(void **state)
{
    (void)state;
    static const struct {
        struct moe_st_write_tensor tensors[2];
        const char *message;
    } cases[] = {
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"a", MOE_F32, 1, {1}, f32_data}}, "'a' appears twice"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"__metadata__", MOE_F32, 1, {1}, f32_data}}, "twice"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"\xFF", MOE_F32, 1, {1}, f32_data}}, "UTF-8"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"b", MOE_DTYPE_NONE, 1, {1}, f32_data}}, "dtype is 0"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"b", MOE_F32, 17, {1}, f32_data}}, "rank is 17"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"b", MOE_F32, 1, {-1}, f32_data}}, "shape is negative"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"b", MOE_F32, 2, {1ll << 31, 1ll << 31}, f32_data}}, "too large"},
        {{{"a", MOE_F32, 1, {1}, f32_data}, {"b", MOE_F32, 1, {1}, NULL}}, "'b' has no data"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct moe_error err = {""};
        assert_int_equal(moe_st_write(files_path("out/bad"), cases[i].tensors, 2, &err), MOE_ERROR_INVALID_ARGUMENT);
        if (!strstr(err.text, cases[i].message))
            fail_msg("case %zu: '%s', expected '%s'", i, err.text, cases[i].message);
        assert_int_equal(count_files(), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_what_the_format_allows),
        cmocka_unit_test(finds_tensors),
        cmocka_unit_test(refuses_what_is_no_file),
        cmocka_unit_test(writes_and_reads_back),
        cmocka_unit_test(streams),
        cmocka_unit_test(write_failures_leave_nothing),
        cmocka_unit_test(refuses_bad_tensors),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
