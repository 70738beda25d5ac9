/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a fuzz target without libFuzzer: over its seeds and so many mutations of them, or over the files given (to look
 * at a crash).  fuzz_NAME_run [count [seed]]  |  fuzz_NAME_run FILE...
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fuzz/fuzz.h"

enum { MAX_SIZE = 4096, POOL = 64 };

static struct mutate noise;

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size)
{
    for (uint32_t rounds = 1 + mutate_random(&noise, 4); rounds; rounds--) {
        uint32_t at = size ? mutate_random(&noise, (uint32_t)size) : 0;
        switch (mutate_random(&noise, 4)) {
        case 0: /* cut */
            size = at;
            break;
        case 1: /* grow */
            if (size < max_size)
                data[size++] = (uint8_t)mutate_random(&noise, 256);
            break;
        default:
            if (size)
                data[at] ^= (uint8_t)(1u << mutate_random(&noise, 8));
        }
    }
    return size;
}

/* On a copy of its size, so that a read past the end is seen. */
static void run(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size + !size);
    if (!copy)
        exit(1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static int run_file(const char *path)
{
    static uint8_t data[1 << 20];
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        return 1;
    }
    run(data, fread(data, 1, sizeof data, file));
    fclose(file);
    return 0;
}

int main(int argc, char **argv)
{
    char *end = "";
    unsigned long count = argc > 1 ? strtoul(argv[1], &end, 10) : 10000;
    if (*end) {
        int failed = 0;
        for (int i = 1; i < argc; i++)
            failed |= run_file(argv[i]);
        return failed;
    }
    unsigned first = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 1;
    noise.random = first;

    /* A pool of inputs that mutations are made from and go back to, so that they pile up. */
    static uint8_t pool[POOL][MAX_SIZE];
    static size_t sizes[POOL];
    uint8_t data[MAX_SIZE];
    size_t size;
    for (size_t i = 0; (size = fuzz_seed(i, data, MAX_SIZE)) != 0; i++)
        run(data, size);
    for (unsigned i = 0; i < count; i++) {
        size_t slot = mutate_random(&noise, POOL);
        memcpy(data, pool[slot], sizes[slot]);
        size = LLVMFuzzerCustomMutator(data, sizes[slot], MAX_SIZE, first + i);
        run(data, size);
        memcpy(pool[slot], data, size);
        /* Long chains end in inputs that are refused at once. */
        sizes[slot] = mutate_random(&noise, 4) ? size : 0;
    }
    return 0;
}
