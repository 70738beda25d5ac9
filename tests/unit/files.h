/* SPDX-License-Identifier: Apache-2.0 */
/* A temporary directory for tests that need files. */
#ifndef MOE_TESTS_FILES_H
#define MOE_TESTS_FILES_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char files_directory[64];

static inline int files_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

/* cmocka group setup and teardown. */
static inline int files_setup(void **state)
{
    (void)state;
    strcpy(files_directory, "/tmp/moe-test.XXXXXX");
    return mkdtemp(files_directory) ? 0 : -1;
}

static inline int files_teardown(void **state)
{
    (void)state;
    return nftw(files_directory, files_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* directory/name in one of four rotating buffers. */
static inline const char *files_path(const char *name)
{
    static char paths[4][512];
    static int next;
    char *path = paths[next++ & 3];
    snprintf(path, sizeof paths[0], "%s/%s", files_directory, name);
    return path;
}

static inline void files_write_at(const char *path, const void *bytes, size_t length)
{
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, length, file) != length || fclose(file)) {
        perror(path);
        exit(1);
    }
}

/* Writes the file and returns its path. */
static inline const char *files_write(const char *name, const void *bytes, size_t length)
{
    const char *path = files_path(name);
    files_write_at(path, bytes, length);
    return path;
}

#endif
