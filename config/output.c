/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bytes go to a file without a name where the file system has such (O_TMPFILE): then a process that is killed
 * leaves nothing. Elsewhere they go to .NAME.XXXXXX beside the path. Either way the name comes last, in one step.
 */
#include "config/output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

struct moe_output {
    char *path;
    char *temporary; /* room for the name */
    bool named;      /* the file stands at `temporary` */
    int fd;
    char link[sizeof "/proc/self/fd/" + 3 * sizeof(int)]; /* how linkat finds a file without a name */
};

static moe_status failed(const struct moe_output *output, const char *what, struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_WRITE, "%s: cannot %s: %s", output->path, what, strerror(errno));
}

/* Length of the directory part of path, its last slash included; 0 without one. */
static size_t directory_length(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? (size_t)(slash - path) + 1 : 0;
}

/* Opens the directory that the file stands in. */
static int open_directory(const struct moe_output *output, int flags, mode_t mode)
{
    size_t length = directory_length(output->path);
    /* The name's room is free until the file has one. */
    if (length)
        memcpy(output->temporary, output->path, length);
    strcpy(output->temporary + length, ".");
    return open(output->temporary, flags | O_CLOEXEC, mode);
}

static bool open_unnamed(struct moe_output *output)
{
    /* Without /proc the file could not get a name later. */
    if (access("/proc/self/fd", X_OK))
        return false;
    output->fd = open_directory(output, O_TMPFILE | O_WRONLY, 0666);
    snprintf(output->link, sizeof output->link, "/proc/self/fd/%d", output->fd);
    return output->fd >= 0;
}

/* Makes the file at .NAME.XXXXXX, with the permissions that open() gives (mkstemp would give 0600), or links the one
 * without a name there. */
static bool name_temporary(struct moe_output *output)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    size_t directory = directory_length(output->path), bytes = strlen(output->path) + sizeof "..XXXXXX";
    for (int attempt = 0; attempt < 100; attempt++) {
        unsigned char random[6];
        char suffix[7] = "";
        if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
            return false;
        for (int i = 0; i < 6; i++)
            suffix[i] = letters[random[i] % (sizeof letters - 1)];
        snprintf(output->temporary, bytes, "%.*s.%s.%s", (int)directory, output->path, output->path + directory,
                 suffix);
        if (output->fd < 0) {
            output->fd = open(output->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
            output->named = output->fd >= 0;
        } else {
            output->named = !linkat(AT_FDCWD, output->link, AT_FDCWD, output->temporary, AT_SYMLINK_FOLLOW);
        }
        if (output->named)
            return true;
        if (errno != EEXIST)
            return false;
    }
    return false;
}

static moe_status check_target(const char *path, struct moe_error *err)
{
    struct stat st;
    size_t directory = directory_length(path);
    if (!path[directory])
        return moe_fail(err, MOE_ERROR_WRITE, "%s: names no file", *path ? path : "output path");
    /* A rename would put a file in the place of a device or a FIFO. */
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode))
        return moe_fail(err, MOE_ERROR_WRITE, "%s: is %s, expected a file or nothing", path,
                        S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
    return MOE_OK;
}

moe_status moe_output_open(const char *path, struct moe_output **out, struct moe_error *err)
{
    *out = NULL;
    moe_status status = check_target(path, err);
    if (status != MOE_OK)
        return status;
    struct moe_output *output = calloc(1, sizeof *output);
    if (output) {
        output->fd = -1;
        output->path = strdup(path);
        output->temporary = malloc(strlen(path) + sizeof "..XXXXXX");
    }
    if (!output || !output->path || !output->temporary)
        status = moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "%s: out of memory", path);
    else if (!open_unnamed(output) && !name_temporary(output))
        status = failed(output, "create a temporary file beside it", err);
    if (status != MOE_OK) {
        moe_output_abort(output);
        return status;
    }
    *out = output;
    return MOE_OK;
}

moe_status moe_output_write(struct moe_output *output, const void *data, size_t bytes, struct moe_error *err)
{
    const char *from = data;
    while (bytes) {
        /* Linux moves at most 2 GiB a call. */
        ssize_t done = write(output->fd, from, bytes < (1u << 30) ? bytes : 1u << 30);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return failed(output, "write", err);
        from += done;
        bytes -= (size_t)done;
    }
    return MOE_OK;
}

/* Makes the name last. A file system that cannot sync a directory keeps its own promises. */
static void sync_directory(const struct moe_output *output)
{
    int fd = open_directory(output, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return;
    fsync(fd);
    close(fd);
}

/* A link cannot replace a file, a rename can; so over an old file the new one gets a temporary name first. */
static bool name_file(struct moe_output *output)
{
    if (!output->named) {
        if (linkat(AT_FDCWD, output->link, AT_FDCWD, output->path, AT_SYMLINK_FOLLOW) == 0)
            return true;
        if (errno != EEXIST || !name_temporary(output))
            return false;
    }
    if (rename(output->temporary, output->path))
        return false;
    output->named = false;
    return true;
}

moe_status moe_output_commit(struct moe_output *output, struct moe_error *err)
{
    moe_status status = MOE_OK;
    if (fsync(output->fd))
        status = failed(output, "flush", err);
    else if (!name_file(output))
        status = failed(output, "give the file its name", err);
    if (status == MOE_OK)
        sync_directory(output);
    moe_output_abort(output); /* unless it failed, no temporary name is left to remove */
    return status;
}

void moe_output_abort(struct moe_output *output)
{
    if (!output)
        return;
    if (output->named)
        unlink(output->temporary);
    if (output->fd >= 0)
        close(output->fd); /* fsync has told what this could */
    free(output->path);
    free(output->temporary);
    free(output);
}

moe_status moe_output_put(const char *path, const void *data, size_t bytes, struct moe_error *err)
{
    struct moe_output *output;
    moe_status status = moe_output_open(path, &output, err);
    if (status != MOE_OK)
        return status;
    status = moe_output_write(output, data, bytes, err);
    if (status == MOE_OK)
        return moe_output_commit(output, err);
    moe_output_abort(output);
    return status;
}
