/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fuzz target is one file, fuzz_NAME.c, with the three functions below. With clang and -Dfuzzers=true it is a
 * libFuzzer program; in every build driver.c runs it as an ordinary test, over its seeds and mutations of them.
 */
#ifndef MOE_FUZZ_FUZZ_H
#define MOE_FUZZ_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tests/fuzz/mutate.h"

/* Writes the i-th valid input and returns its size; 0 past the last. */
size_t fuzz_seed(size_t i, uint8_t *data, size_t max_size);
/* Changes the input in one or a few places that the format has names for. */
size_t fuzz_mutate(struct mutate *m, uint8_t *data, size_t size, size_t max_size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What libFuzzer calls (mutate.c): mostly fuzz_mutate, at times a seed, or noise in the bytes. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
/* Noise in the bytes, from libFuzzer or from driver.c. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* For seeds that are text: as much of it as there is room for; returns its size. */
size_t fuzz_copy(const char *text, uint8_t *data, size_t max_size);

/* Some inputs, chosen by their bytes, also go through a file: true for those, and the path of a file in memory that
 * holds the input until the next call. */
bool fuzz_file(const uint8_t *data, size_t size, const char **path);

/* Stops the run: the target found the library to be wrong. */
#define FUZZ_CHECK(condition)                                                                                          \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            fuzz_failed(#condition, __FILE__, __LINE__);                                                               \
    } while (0)
_Noreturn void fuzz_failed(const char *condition, const char *file, int line);

#endif
