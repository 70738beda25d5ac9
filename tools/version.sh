#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints the version that runtime/include/moe.h declares.
awk '/define MOE_VERSION_(MAJOR|MINOR|PATCH)/ { printf "%s%s", sep, $3; sep = "." } END { print "" }' \
    "$(dirname "$0")/../runtime/include/moe.h"
