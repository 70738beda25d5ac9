/* SPDX-License-Identifier: Apache-2.0 */
/* Output files: whole or absent, where the file system has files without a name and where it has not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

#include <cmocka.h>
#include <dirent.h>

#include "config/output.h"
#include "tests/unit/files.h"

/* Linked in the place of access(), which moe_output_open asks whether it can name a file later. */
static bool named;
int __real_access(const char *path, int mode);
int __wrap_access(const char *path, int mode);
int __wrap_access(const char *path, int mode)
{
    return named ? -1 : __real_access(path, mode);
}

/* The files in the directory, hidden ones too. */
static int count_files(void)
{
    int count = -2; /* . and .. */
    DIR *directory = opendir(files_path("out"));
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void check_file(const char *path, const char *expected)
{
    char text[64] = "";
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    assert_int_equal(length, strlen(expected));
    assert_string_equal(text, expected);
    struct stat st;
    stat(path, &st);
    assert_int_equal(st.st_mode & 0777, 0640); /* 0666 less the umask */
}

static void appears_whole(void **state)
{
    (void)state;
    struct moe_output *output;
    struct moe_error err = {""};
    char path[512];
    strcpy(path, files_path("out/file"));
    umask(0027);
    for (int i = 0; i < 2; i++) {
        named = i;
        assert_int_equal(moe_output_open(path, &output, &err), MOE_OK);
        assert_int_equal(moe_output_write(output, "first", 5, &err), MOE_OK);
        assert_int_equal(access(path, F_OK), -1);
        if (named)
            assert_int_equal(count_files(), 1);
        assert_int_equal(moe_output_commit(output, &err), MOE_OK);
        check_file(path, "first");

        /* Over a file, which stays as it is until the commit. */
        assert_int_equal(moe_output_open(path, &output, &err), MOE_OK);
        assert_int_equal(moe_output_write(output, "the second", 10, &err), MOE_OK);
        check_file(path, "first");
        assert_int_equal(moe_output_commit(output, &err), MOE_OK);
        check_file(path, "the second");
        assert_int_equal(moe_output_open(path, &output, &err), MOE_OK);
        assert_int_equal(moe_output_write(output, "a third", 7, &err), MOE_OK);
        moe_output_abort(output);
        check_file(path, "the second");
        assert_int_equal(count_files(), 1);

        /* Another file came up in the meantime. */
        unlink(path);
        assert_int_equal(moe_output_open(path, &output, &err), MOE_OK);
        files_write("out/file", "x", 1);
        assert_int_equal(moe_output_commit(output, &err), MOE_OK);
        check_file(path, "");
        unlink(path);
        assert_int_equal(count_files(), 0);
    }
    moe_output_abort(NULL);
}

static void names_without_a_directory(void **state)
{
    (void)state;
    char before[4096];
    assert_non_null(getcwd(before, sizeof before));
    assert_int_equal(chdir(files_path("out")), 0);
    for (int i = 0; i < 2; i++) {
        named = i;
        assert_int_equal(moe_output_put("plain", "text", 4, NULL), MOE_OK);
        check_file("plain", "text");
        unlink("plain");
    }
    assert_int_equal(chdir(before), 0);
}

static void failures_leave_nothing(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct moe_output *output;
        struct moe_error err = {""};
        named = i;
        /* The name is taken by a directory while the file is written. */
        assert_int_equal(moe_output_open(files_path("out/taken"), &output, &err), MOE_OK);
        mkdir(files_path("out/taken"), 0700);
        assert_int_equal(moe_output_commit(output, &err), MOE_ERROR_WRITE);
        assert_non_null(strstr(err.text, "/out/taken: cannot give the file its name: Is a directory"));
        rmdir(files_path("out/taken"));
        assert_int_equal(count_files(), 0);

        assert_int_equal(moe_output_put(files_path("absent/file"), "x", 1, &err), MOE_ERROR_WRITE);
        assert_non_null(strstr(err.text, "/absent/file: cannot create a temporary file beside it: No such file"));
        assert_int_equal(moe_output_put("/dev/null", "x", 1, &err), MOE_ERROR_WRITE);
        assert_string_equal(err.text, "/dev/null: is not a regular file, expected a file or nothing");
    }
}

static int setup(void **state)
{
    return files_setup(state) || mkdir(files_path("out"), 0700);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(appears_whole),
        cmocka_unit_test(names_without_a_directory),
        cmocka_unit_test(failures_leave_nothing),
    };
    return cmocka_run_group_tests(tests, setup, files_teardown);
}
