/* SPDX-License-Identifier: Apache-2.0 */
/* Compares a batch's results with recorded ones, and says where they first differ. */
#ifndef MOE_TOOLS_COMPARE_H
#define MOE_TOOLS_COMPARE_H

#include <stdbool.h>

#include "moe.h"

/* The largest relative error of a token row, ||got - expected|| / ||expected||, that counts as the same. A path may be
 * off the exact result by 1e-5 in f32, 1.5e-3 in f16 and 1e-2 in bf16, and so may what recorded the other: twice that.
 */
double compare_budget(moe_dtype dtype);

struct row_mismatch {
    int64_t token, column; /* the column is the one that is furthest off */
    double got, expected;
    double error; /* of the row; infinite where one of the two is not a number */
};

/* Compares [tokens, hidden] arrays of one dtype row by row, skipping tokens whose `skip` is set (skip may be NULL).
 * *worst becomes the largest row error seen before and including the first mismatch. False: *mismatch is the first row
 * over the budget. */
bool compare_rows(const void *got, const void *expected, moe_dtype dtype, int64_t tokens, int64_t hidden,
                  const bool *skip, double budget, double *worst, struct row_mismatch *mismatch);

struct id_mismatch {
    int64_t token;
    int32_t slot, got, expected;
};

/* Compares routing [tokens, k]. Ids may differ where the logits of the two experts are less than 2 ulps of logits_dtype
 * apart: rounding decides there. tied[token] is set where they do. False: *mismatch is the first other difference. */
bool compare_ids(const int32_t *got, const int32_t *expected, const float *logits, moe_dtype logits_dtype,
                 int32_t experts, int64_t tokens, int32_t k, bool *tied, struct id_mismatch *mismatch);

#endif
