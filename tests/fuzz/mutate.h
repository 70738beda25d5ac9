/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mutations of JSON text that keep most of it valid: a value is swapped for an edge case or for another value of the
 * document, a member is deleted, doubled or renamed, a value is nested. They work on the text itself, so that they are
 * fast, and can make what a JSON library would not write, such as duplicate keys.
 */
#ifndef MOE_FUZZ_MUTATE_H
#define MOE_FUZZ_MUTATE_H

#include <stddef.h>
#include <stdint.h>

struct mutate {
    uint64_t random;          /* state; any number */
    const char *const *words; /* JSON values that the format has a meaning for, ends with NULL */
    const char *const *keys;  /* the same for keys, without quotes */
};

/* A number below n, n >= 1. */
uint32_t mutate_random(struct mutate *m, uint32_t n);

/* Changes `size` bytes of JSON in place, within max_size. Text that is no JSON comes back as it is. */
size_t mutate_json(struct mutate *m, char *text, size_t size, size_t max_size);

#endif
