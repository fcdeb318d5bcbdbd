/* Attention of packed tokens along rubric trees, forward and backward, on CPU.

   A segment's tokens see all tokens of its ancestors and, causally, their own segment. Segments with the same parent
   form a family: they share the keys of the path that leads to them. The unit of work is one family (forward) or one
   whole tree (backward: it alone adds to the tree's key gradients, so sums have a fixed order) for one key/value head
   and the H / G query heads that read it.

   All arithmetic here is float32; inputs and outputs are float32 or bfloat16. Where the processor has matrix tiles,
   amx_attention.c takes bfloat16 over. Keys are packed in panels of 16 (`[D][16]`),
   a score row holds path keys and then own keys, each padded to whole panels. Rows are (token, head) pairs, `ROWS`
   at a time. Widths D are padded with zeros to multiples of 16. No memory grows with the square of anything.

   GCC and Clang vector extensions only: the compiler lowers a 16-float vector to what the processor has. */

#include <math.h>

#include "tree.h"

#define ROWS 4        /* rows of a register block */
#define TILE 32       /* rows whose scores are held at once, about */

static inline int whole_blocks(int rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

/* --- matrix products on packed operands ------------------------------------------------------------------------- */

/* to[i][n] (+)= sum over j of a[i * step_i + j * step_j] * b[j * step_b + n * apart], for ROWS i, `inner` j and
   `vectors` (a constant, 1 or 4) vectors n; rows of `to` are `stride` floats apart. */
static inline __attribute__((always_inline)) void block_product(
    const float *a, int64_t step_i, int64_t step_j, int inner, const float *b, int64_t step_b, int64_t apart,
    const int vectors, float *to, int64_t stride, const int add
) {
    vec acc[ROWS][4] = {{{0}}};
    for (int j = 0; j < inner; j++) {
        vec right[4];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) right[n] = load(b + j * step_b + n * apart);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            float left = a[r * step_i + j * step_j];
#pragma GCC unroll 4
            for (int n = 0; n < vectors; n++) acc[r][n] += left * right[n];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; n++) {
            float *place = to + r * stride + n * LANES;
            store(place, add ? load(place) + acc[r][n] : acc[r][n]);
        }
}

/* scores[r][n] = rows[r] . keys[n] for `rows` (a multiple of ROWS) and n in panels; keys in panels [W][16]. */
static void times_panels(const float *a, int rows, int W, const float *panels, int keys, float *scores, int stride) {
    int64_t panel = (int64_t)W * LANES;
    for (int first = 0; first < keys; first += 4 * LANES) {
        int count = least(4, (keys - first) / LANES);
        const float *base = panels + (int64_t)first * W;
        for (int row = 0; row < rows; row += ROWS) {
            const float *x = a + (int64_t)row * W;
            float *y = scores + (int64_t)row * stride + first;
            if (count == 4)
                block_product(x, W, 1, W, base, LANES, panel, 4, y, stride, 0);
            else
                for (int n = 0; n < count; n++)
                    block_product(x, W, 1, W, base + n * panel, LANES, 0, 1, y + n * LANES, stride, 0);
        }
    }
}

/* to[i][d] (+)= sum over j of coefficient(i, j) * b[j][d], for `count` (a multiple of ROWS) i and `inner` j.
   The coefficient of (i, j) lies at a[i * step_i + j * step_j]; `to` and `b` have rows of W floats. */
static inline __attribute__((always_inline)) void accumulate(
    const float *a, int64_t step_i, int64_t step_j, int count, int inner, const float *b, int W, float *to, int add
) {
    for (int i = 0; i < count; i += ROWS) {
        const float *x = a + i * step_i;
        float *y = to + (int64_t)i * W;
        int d = 0;
        for (; d + 4 * LANES <= W; d += 4 * LANES)
            block_product(x, step_i, step_j, inner, b + d, W, LANES, 4, y + d, W, add);
        for (; d < W; d += LANES) block_product(x, step_i, step_j, inner, b + d, W, 0, 1, y + d, W, add);
    }
}

/* --- packing ---------------------------------------------------------------------------------------------------- */

/* Rows of `from` (T, G, D), tokens [start, start + count) of head g, into zero-padded rows and / or panels. */
static void pack_tokens(
    const problem *p, const void *from, int g, int start, int count, int W, float *rows, float *panels, int at
) {
    float one[W];
    memset(one, 0, sizeof one);
    for (int n = 0; n < count; n++) {
        read_row(p, from, (int64_t)(start + n) * p->kv_heads + g, one, 1.0f);
        if (rows) memcpy(rows + (int64_t)(at + n) * W, one, sizeof one);
        if (panels) {
            float *panel = panels + (int64_t)((at + n) / LANES) * W * LANES + (at + n) % LANES;
            for (int d = 0; d < W; d++) panel[d * LANES] = one[d];
        }
    }
}

static void clear_tokens(int from, int to, int W, float *rows, float *panels) {
    for (int n = from; n < to; n++) {
        if (rows) memset(rows + (int64_t)n * W, 0, W * sizeof(float));
        if (panels) {
            float *panel = panels + (int64_t)(n / LANES) * W * LANES + n % LANES;
            for (int d = 0; d < W; d++) panel[d * LANES] = 0;
        }
    }
}

static void pack_path(
    const problem *p, const void *from, int g, const int *path, int depth, int W, float *rows, float *panels
) {
    int at = 0;
    for (int i = 0; i < depth; i++) {
        pack_tokens(p, from, g, p->start[path[i]], p->length[path[i]], W, rows, panels, at);
        at += p->length[path[i]];
    }
    clear_tokens(at, padded(at), W, rows, panels);
}

/* Keys of the longest score row of family f, whose path takes `above_padded`. */
static int most_keys(const problem *p, int f, int above_padded) {
    int most = 0;
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int own = padded(p->length[p->members[m]]);
        most = own > most ? own : most;
    }
    return above_padded + most;
}

/* --- forward ---------------------------------------------------------------------------------------------------- */

/* Turn a row of scores into exp2(score - max), 0 at keys that are padding or in the future; returns max, sets sum. */
static float softmax_row(float *row, int above, int above_padded, int own, int keys, float *sum) {
    for (int n = above; n < above_padded; n++) row[n] = -INFINITY;
    for (int n = above_padded + own; n < keys; n++) row[n] = -INFINITY;
    vec most = splat(-INFINITY), total = {0};
    for (int n = 0; n < keys; n += LANES) {
        vec x = load(row + n);
        most = choose(x > most, x, most);
    }
    float peak = max_of(most);
    for (int n = 0; n < keys; n += LANES) {
        vec x = exp2_of(load(row + n) - peak);
        store(row + n, x);
        total += x;
    }
    *sum = sum_of(total);
    return peak;
}

static int forward_family(const problem *p, int f, int g) {
    int W = padded(p->width), shared = p->heads / p->kv_heads, tokens = (TILE + shared - 1) / shared;
    int tile_rows = whole_blocks(tokens * shared);
    int path[MAX_DEPTH], depth = path_of(p, p->family_parent[f], path);
    int above = path_length(p, path, depth), above_padded = padded(above), most = most_keys(p, f, above_padded);
    float *panels = workspace((int64_t)most * W * 2 + (int64_t)tile_rows * (2 * W + most));
    if (!panels) return 1;
    float *values = panels + (int64_t)most * W, *queries = values + (int64_t)most * W;
    float *result = queries + (int64_t)tile_rows * W, *scores = result + (int64_t)tile_rows * W;
    float factor = p->scale * (float)M_LOG2E;
    memset(queries, 0, (size_t)tile_rows * W * sizeof(float));
    pack_path(p, p->key, g, path, depth, W, NULL, panels);
    pack_path(p, p->value, g, path, depth, W, values, NULL);
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int start = p->start[p->members[m]], length = p->length[p->members[m]];
        pack_tokens(p, p->key, g, start, length, W, NULL, panels, above_padded);
        pack_tokens(p, p->value, g, start, length, W, values, NULL, above_padded);
        clear_tokens(above_padded + length, above_padded + padded(length), W, values, panels);
        for (int first = 0; first < length; first += tokens) {
            int count = least(tokens, length - first), rows = count * shared;
            int block = whole_blocks(rows), keys = above_padded + padded(first + count);
            float sums[block];
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, shared, start + first, r);
                read_row(p, p->query, row, queries + (int64_t)r * W, factor);
            }
            memset(queries + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(float));
            times_panels(queries, block, W, panels, keys, scores, most);
            for (int r = 0; r < block; r++) {
                int own = r < rows ? first + r / shared + 1 : 1;
                float peak = softmax_row(scores + (int64_t)r * most, above, above_padded, own, keys, &sums[r]);
                if (r < rows) {
                    int64_t row = row_of(p, g, shared, start + first, r);
                    p->lse[row] = peak + log2f(sums[r]);
                }
            }
            accumulate(scores, most, 1, block, keys, values, W, result, 0);
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, shared, start + first, r);
                write_row(p, p->out, row, result + (int64_t)r * W, 1.0f / sums[r]);
            }
        }
    }
    return 0;
}

/* --- backward --------------------------------------------------------------------------------------------------- */

static int backward_family(const problem *p, int f, int g) {
    int W = padded(p->width), shared = p->heads / p->kv_heads, tokens = (TILE + shared - 1) / shared;
    int tile_rows = whole_blocks(tokens * shared);
    int path[MAX_DEPTH], depth = path_of(p, p->family_parent[f], path);
    int above = path_length(p, path, depth), above_padded = padded(above), most = most_keys(p, f, above_padded);
    int64_t side = (int64_t)most * W, tile = (int64_t)tile_rows * W, square = (int64_t)tile_rows * most;
    float *key_panels = workspace(5 * side + 3 * tile + 2 * square);
    if (!key_panels) return 1;
    float *value_panels = key_panels + side, *keys_rows = value_panels + side;
    float *grad_keys = keys_rows + side, *grad_values = grad_keys + side;
    float *queries = grad_values + side, *grads = queries + tile, *result = grads + tile;
    float *probs = result + tile, *slopes = probs + square;
    float factor = p->scale * (float)M_LOG2E, back = (float)M_LN2; /* queries carry scale * log2(e) */
    memset(queries, 0, (size_t)tile * 2 * sizeof(float));
    memset(grad_keys, 0, (size_t)above_padded * W * sizeof(float));
    memset(grad_values, 0, (size_t)above_padded * W * sizeof(float));
    pack_path(p, p->key, g, path, depth, W, keys_rows, key_panels);
    pack_path(p, p->value, g, path, depth, W, NULL, value_panels);
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int start = p->start[p->members[m]], length = p->length[p->members[m]], end = padded(length);
        pack_tokens(p, p->key, g, start, length, W, keys_rows, key_panels, above_padded);
        pack_tokens(p, p->value, g, start, length, W, NULL, value_panels, above_padded);
        clear_tokens(above_padded + length, above_padded + end, W, keys_rows, key_panels);
        clear_tokens(above_padded + length, above_padded + end, W, NULL, value_panels);
        memset(grad_keys + (int64_t)above_padded * W, 0, (size_t)end * W * sizeof(float));
        memset(grad_values + (int64_t)above_padded * W, 0, (size_t)end * W * sizeof(float));
        for (int first = 0; first < length; first += tokens) {
            int count = least(tokens, length - first), rows = count * shared;
            int block = whole_blocks(rows), keys = above_padded + padded(first + count);
            float lse[block], delta[block];
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, shared, start + first, r);
                read_row(p, p->query, row, queries + (int64_t)r * W, factor);
                read_row(p, p->grad_out, row, grads + (int64_t)r * W, 1.0f);
                read_row(p, p->out, row, result, 1.0f);
                float dot = 0;
                for (int d = 0; d < p->width; d++) dot += result[d] * grads[(int64_t)r * W + d];
                lse[r] = p->lse[row];
                delta[r] = dot;
            }
            memset(queries + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(float));
            memset(grads + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(float));
            for (int r = rows; r < block; r++) lse[r] = INFINITY, delta[r] = 0; /* probabilities of 0 */
            times_panels(queries, block, W, key_panels, keys, probs, most);
            times_panels(grads, block, W, value_panels, keys, slopes, most);
            for (int r = 0; r < block; r++) {
                float *prob = probs + (int64_t)r * most, *slope = slopes + (int64_t)r * most;
                int own = r < rows ? first + r / shared + 1 : 1;
                for (int n = above; n < above_padded; n++) prob[n] = -INFINITY;
                for (int n = above_padded + own; n < keys; n++) prob[n] = -INFINITY;
                for (int n = 0; n < keys; n += LANES) {
                    vec x = exp2_of(load(prob + n) - lse[r]);
                    store(prob + n, x);
                    store(slope + n, x * (load(slope + n) - delta[r]));
                }
            }
            accumulate(slopes, most, 1, block, keys, keys_rows, W, result, 0);
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, shared, start + first, r);
                write_row(p, p->grad_query, row, result + (int64_t)r * W, p->scale);
            }
            accumulate(slopes, 1, most, keys, block, queries, W, grad_keys, 1);
            accumulate(probs, 1, most, keys, block, grads, W, grad_values, 1);
        }
        add_rows(p, p->grad_key, g, start, length, grad_keys + (int64_t)above_padded * W, W, back);
        add_rows(p, p->grad_value, g, start, length, grad_values + (int64_t)above_padded * W, W, 1.0f);
    }
    int at = 0;
    for (int i = 0; i < depth; i++) {
        add_rows(p, p->grad_key, g, p->start[path[i]], p->length[path[i]], grad_keys + (int64_t)at * W, W, back);
        add_rows(p, p->grad_value, g, p->start[path[i]], p->length[path[i]], grad_values + (int64_t)at * W, W, 1.0f);
        at += p->length[path[i]];
    }
    return 0;
}

/* --- entry points: 0, or 1 when memory ran out -------------------------------------------------------------------- */

static int forward_unit(const problem *p, int unit) {
    int f = unit / p->kv_heads, g = unit % p->kv_heads;
    return p->amx ? amx_forward_family(p, f, g) : forward_family(p, f, g);
}

static int backward_unit(const problem *p, int unit) {
    int tree = unit / p->kv_heads, g = unit % p->kv_heads, failed = 0;
    for (int f = p->tree_first[tree]; f < p->tree_first[tree + 1]; f++)
        failed |= p->amx ? amx_backward_family(p, f, g) : backward_family(p, f, g);
    return failed;
}

static int share_out(const problem *p, int units, int (*work)(const problem *, int)) {
    int failed = 0;
#pragma omp parallel num_threads(p->threads) reduction(| : failed)
    {
        char saved[64];
        if (p->amx) amx_enter(saved);
#pragma omp for schedule(dynamic, 1)
        for (int unit = 0; unit < units; unit++) failed |= work(p, unit);
        if (p->amx) amx_leave(saved);
    }
    return failed;
}

int tree_attention_forward(const problem *p) { return share_out(p, p->families * p->kv_heads, forward_unit); }

int tree_attention_backward(const problem *p) { return share_out(p, p->trees * p->kv_heads, backward_unit); }
