/* SPDX-License-Identifier: Apache-2.0 */
#include "config/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

moe_status moe_file_open(const char *path, int *fd, uint64_t *size, struct moe_error *err)
{
    /* O_NONBLOCK: opening a FIFO would wait for a writer. It means nothing for regular files. */
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (*fd < 0)
        return moe_fail(err, MOE_ERROR_FILE, "%s: cannot open: %s", path, strerror(errno));

    struct stat st;
    const char *what = NULL;
    if (fstat(*fd, &st))
        what = strerror(errno);
    else if (S_ISDIR(st.st_mode))
        what = "is a directory, expected a file";
    else if (!S_ISREG(st.st_mode))
        what = "is not a regular file";
    if (what) {
        close(*fd);
        *fd = -1;
        return moe_fail(err, MOE_ERROR_FILE, "%s: %s", path, what);
    }
    *size = (uint64_t)st.st_size;
    return MOE_OK;
}

moe_status moe_file_read(int fd, const char *path, uint64_t offset, void *destination, uint64_t bytes,
                         struct moe_error *err)
{
    char *to = destination;
    while (bytes) {
        /* Linux moves at most 2 GiB a call. */
        size_t piece = bytes < (1u << 30) ? (size_t)bytes : (size_t)1 << 30;
        ssize_t got = pread(fd, to, piece, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return moe_fail(err, MOE_ERROR_FILE, "%s: cannot read at byte %llu: %s", path, (unsigned long long)offset,
                            strerror(errno));
        if (got == 0)
            return moe_fail(err, MOE_ERROR_FILE, "%s: ends at byte %llu, %llu bytes early", path,
                            (unsigned long long)offset, (unsigned long long)bytes);
        to += got;
        offset += (uint64_t)got;
        bytes -= (uint64_t)got;
    }
    return MOE_OK;
}

char *moe_file_join(const char *directory, const char *name)
{
    size_t length = strlen(directory), bytes = length + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path)
        snprintf(path, bytes, "%s%s%s", directory, length && directory[length - 1] == '/' ? "" : "/", name);
    return path;
}

bool moe_file_name_plain(const char *name)
{
    return *name && strlen(name) <= NAME_MAX && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}
