/* Vectors of 16 floats in the compiler's vector extensions (GCC, Clang): it lowers them to what the processor has. */

#ifndef RUBRIC_VECTOR_H
#define RUBRIC_VECTOR_H

#include <stdint.h>

#define LANES 16

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef float vec_u __attribute__((vector_size(64), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec_u *)p; }
static inline void store(float *p, vec v) { *(vec_u *)p = v; }
static inline vec splat(float x) { return x - (vec){0}; }

static inline vec choose(ivec where, vec yes, vec no) {
    return (vec)(((ivec)yes & where) | ((ivec)no & ~where));
}

/* 2^x for x <= 0 (a rounding error above is harmless); 0 below -126. Relative error about 1e-7. */
static inline vec exp2_of(vec x) {
    ivec keep = ~(x <= splat(-126.0f)); /* true for NaN, which stays */
    x = choose(keep, x, splat(-126.0f));
    ivec whole = __builtin_convertvector(x - 0.5f, ivec); /* truncation: the nearest integer, as x <= 0 */
    vec f = x - __builtin_convertvector(whole, vec);
    vec p = splat(1.5252734e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return choose(keep, p * (vec)((whole + 127) << 23), (vec){0});
}

static inline float sum_of(vec v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

static inline float max_of(vec v) {
    float most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
}

/* bfloat16 is the upper half of a float; to nearest, ties to even, and NaN stays NaN. */
static inline float from_bfloat16(uint16_t half) {
    union { uint32_t bits; float value; } x = {(uint32_t)half << 16};
    return x.value;
}

static inline uint16_t to_bfloat16(float number) {
    union { float value; uint32_t bits; } x = {number};
    uint32_t rounded = (x.bits + 0x7fff + ((x.bits >> 16) & 1)) >> 16, quiet_nan = 0x7fc0;
    return (uint16_t)((x.bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

/* `count` numbers at `at` of an array of float32 or bfloat16, times `factor`, as floats; and back. */
static inline void read_numbers(int bfloat16, const void *from, int64_t at, int count, float *to, float factor) {
    if (bfloat16) {
        const uint16_t *source = (const uint16_t *)from + at;
        for (int d = 0; d < count; d++) to[d] = from_bfloat16(source[d]) * factor;
    } else {
        const float *source = (const float *)from + at;
        for (int d = 0; d < count; d++) to[d] = source[d] * factor;
    }
}

static inline void write_numbers(int bfloat16, void *to, int64_t at, int count, const float *from, float factor) {
    if (bfloat16) {
        uint16_t *target = (uint16_t *)to + at;
        for (int d = 0; d < count; d++) target[d] = to_bfloat16(from[d] * factor);
    } else {
        float *target = (float *)to + at;
        for (int d = 0; d < count; d++) target[d] = from[d] * factor;
    }
}

#endif
