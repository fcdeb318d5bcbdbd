/* What both attention kernels know of a problem: the tree's segments, rows in memory, buffers. */

#ifndef RUBRIC_TREE_H
#define RUBRIC_TREE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector.h"

#define MAX_DEPTH 64  /* of a tree */

typedef struct {
    int32_t heads, kv_heads, width, bfloat16, threads;
    int32_t amx; /* whether products run on matrix tiles: amx_attention.c, bfloat16 only */
    int32_t families, trees;
    float scale;
    const int32_t *start, *length, *parent; /* (S,) of each segment; parent -1 at a root */
    const int32_t *family_parent;           /* (families,) the segment above, -1 for roots */
    const int32_t *family_first;            /* (families + 1,) into members */
    const int32_t *members;                 /* (S,) segments by family */
    const int32_t *tree_first;              /* (trees + 1,) into families: a tree's families are consecutive */
    const void *query, *key, *value;        /* (T, H, D), (T, G, D), (T, G, D), contiguous */
    void *out;                              /* (T, H, D) */
    float *lse;                             /* (T, H) log2 of the sum of exp2 of scores, scores in base 2 */
    const void *grad_out;                   /* (T, H, D) */
    void *grad_query;                       /* (T, H, D) */
    float *grad_key, *grad_value;           /* (T, G, D), zero on entry */
} problem;

static inline int padded(int n) { return (n + LANES - 1) / LANES * LANES; }
static inline int least(int a, int b) { return a < b ? a : b; }

static inline void read_row(const problem *p, const void *from, int64_t row, float *to, float factor) {
    read_numbers(p->bfloat16, from, row * p->width, p->width, to, factor);
}

static inline void write_row(const problem *p, void *to, int64_t row, const float *from, float factor) {
    write_numbers(p->bfloat16, to, row * p->width, p->width, from, factor);
}

/* Ancestors from the root down; returns how many. */
static inline int path_of(const problem *p, int segment, int *path) {
    int depth = 0, back[MAX_DEPTH];
    for (; segment >= 0 && depth < MAX_DEPTH; segment = p->parent[segment]) back[depth++] = segment;
    for (int i = 0; i < depth; i++) path[i] = back[depth - 1 - i];
    return depth;
}

static inline int path_length(const problem *p, const int *path, int depth) {
    int total = 0;
    for (int i = 0; i < depth; i++) total += p->length[path[i]];
    return total;
}

/* Row of (T, H) that is row r of a tile beginning at `token`: heads of a group follow each other. */
static inline int64_t row_of(const problem *p, int g, int shared, int token, int r) {
    return (int64_t)(token + r / shared) * p->heads + g * shared + r % shared;
}

static inline void add_rows(
    const problem *p, float *to, int g, int start, int count, const float *rows, int W, float factor
) {
    for (int n = 0; n < count; n++) {
        float *target = to + ((int64_t)(start + n) * p->kv_heads + g) * p->width;
        for (int d = 0; d < p->width; d++) target[d] += rows[(int64_t)n * W + d] * factor;
    }
}

/* A buffer of the calling thread that only grows: allocating one in every call would fault its pages in every call. */
static inline float *workspace(int64_t floats) {
    static _Thread_local float *buffer = NULL;
    static _Thread_local int64_t size = 0;
    if (floats > size) {
        free(buffer);
        buffer = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        size = buffer ? floats : 0;
    }
    return buffer;
}

/* amx_attention.c: one family (forward) or one family of a tree (backward) for key/value head g, in bfloat16 tiles.
   `amx_ready`: whether this processor and kernel let us. `amx_enter` and `amx_leave` frame a thread's calls. */
int amx_ready(void);
void amx_enter(void *saved);
void amx_leave(const void *saved);
int amx_forward_family(const problem *p, int f, int g);
int amx_backward_family(const problem *p, int f, int g);

#endif
