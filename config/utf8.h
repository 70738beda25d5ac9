/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MOE_CONFIG_UTF8_H
#define MOE_CONFIG_UTF8_H

#include <stddef.h>

/* Length of the UTF-8 sequence that starts at s, of which `left` >= 1 bytes may be read; 0 if it is cut short,
 * overlong, a surrogate or past U+10FFFF. */
static inline size_t moe_utf8_sequence(const char *text, size_t left)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t length = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    if (length > left)
        return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xC0) != 0x80)
            return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
        (s[0] == 0xF4 && s[1] > 0x8F))
        return 0;
    return length;
}

#endif
