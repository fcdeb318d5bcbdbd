/* The same attention in bfloat16, its products on matrix tiles (AMX): 16 x 16 sums of 32 products an instruction.

   Queries, keys, values and gradients go into the products as they come; scores and sums are float32; probabilities
   and slopes are rounded to bfloat16 before they are multiplied, as flash kernels on GPUs do.

   Operand layouts, all padded with zeros. A left operand is [rows][inner] of bfloat16. A right operand is [inner / 2]
   rows of 32-bit pairs of neighbouring inner indices:

       panels   [key / 16][W / 2][16 keys]   for query . key and gradient . value    inner: width
       pairs    [key / 2][W]                 for probabilities times values          inner: keys
       in place [row / 2][keys]              for the gradients of keys and values    inner: rows

   Widths W are padded to 32, keys and (backward) rows to 32: the inner length of a tile. */

#include <math.h>

#include "tree.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16           /* rows and columns of a tile of sums */
#define INNER 32          /* products an instruction adds up */
#define FORWARD_ROWS 64   /* rows whose scores are held at once, about */
#define BACKWARD_ROWS 96  /* as many, and the inner length of the products that give keys' gradients */
#define ASK_PERMISSION 0x1023
#define TILE_DATA 18

typedef uint16_t half; /* the bits of a bfloat16 */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_config;

int amx_ready(void) { return syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA) == 0; }

void amx_enter(void *saved) {
    static const tile_config eight = {
        .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}
    };
    _tile_storeconfig(saved);
    _tile_loadconfig(&eight);
}

void amx_leave(const void *saved) {
    if (((const tile_config *)saved)->palette)
        _tile_loadconfig(saved);
    else
        _tile_release();
}

static inline int to_inner(int n) { return (n + INNER - 1) / INNER * INNER; }

/* --- products ---------------------------------------------------------------------------------------------------- */

/* A right operand: 16 rows of 64 bytes make a tile; `row`, `inner`, `column`: bytes from one row, from one block of 32
   inner indices and from one block of 16 columns to the next. */
typedef struct {
    const void *at;
    int64_t row, inner, column;
} operand;

static inline operand panels_of(const void *at, int W) { return (operand){at, 64, 1024, (int64_t)W * 32}; }
static inline operand pairs_of(const void *at, int64_t columns) {
    return (operand){at, columns * 4, columns * 64, 64};
}

/* One or two by one or two tiles of sums; `tall` and `wide` are constants. */
static inline __attribute__((always_inline)) void tiles(
    const half *a, int64_t stride_a, operand b, int inner, float *to, int64_t stride, const int tall, const int wide,
    const int add
) {
    const char *right = b.at;
    float *below = to + SIDE * stride;
    __asm__ volatile("" ::: "memory"); /* GCC does not know that tile loads read memory */
    if (add) {
        _tile_loadd(0, to, stride * 4);
        if (wide) _tile_loadd(1, to + SIDE, stride * 4);
        if (tall) _tile_loadd(2, below, stride * 4);
        if (tall && wide) _tile_loadd(3, below + SIDE, stride * 4);
    } else {
        _tile_zero(0);
        if (wide) _tile_zero(1);
        if (tall) _tile_zero(2);
        if (tall && wide) _tile_zero(3);
    }
    for (int k = 0; k < inner; k += INNER) {
        _tile_loadd(4, a + k, stride_a * 2);
        _tile_loadd(6, right, b.row);
        _tile_dpbf16ps(0, 4, 6);
        if (tall) {
            _tile_loadd(5, a + SIDE * stride_a + k, stride_a * 2);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (wide) {
            _tile_loadd(7, right + b.column, b.row);
            _tile_dpbf16ps(1, 4, 7);
            if (tall) _tile_dpbf16ps(3, 5, 7);
        }
        right += b.inner;
    }
    _tile_stored(0, to, stride * 4);
    if (wide) _tile_stored(1, to + SIDE, stride * 4);
    if (tall) _tile_stored(2, below, stride * 4);
    if (tall && wide) _tile_stored(3, below + SIDE, stride * 4);
}

/* to[i][n] (+)= sum over j of a[i][j] * b[j][n]: rows and columns multiples of 16, inner of 32; strides in elements. */
static inline __attribute__((always_inline)) void multiply(
    const half *a, int64_t stride_a, operand b, int rows, int columns, int inner, float *to, int64_t stride,
    const int add
) {
    for (int n = 0; n < columns; n += 2 * SIDE) {
        operand part = b;
        part.at = (const char *)b.at + n / SIDE * b.column;
        int wide = n + SIDE < columns;
        for (int i = 0; i < rows; i += 2 * SIDE) {
            const half *left = a + i * stride_a;
            float *sums = to + i * stride + n;
            if (i + SIDE < rows)
                if (wide)
                    tiles(left, stride_a, part, inner, sums, stride, 1, 1, add);
                else
                    tiles(left, stride_a, part, inner, sums, stride, 1, 0, add);
            else if (wide)
                tiles(left, stride_a, part, inner, sums, stride, 0, 1, add);
            else
                tiles(left, stride_a, part, inner, sums, stride, 0, 0, add);
        }
    }
}

/* --- vectors ----------------------------------------------------------------------------------------------------- */

/* 2^x for x <= 0, about; 0 below -126, relative error 3e-6, far below a bfloat16's. NaN stays.
   Not by vscalefps: a result that underflows, as every masked score does, takes it 150 cycles. */
static inline __m512 power_of_2(__m512 x) {
    __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    __m512i whole = _mm512_cvtps_epi32(x);
    __m512 f = x - _mm512_cvtepi32_ps(whole), y = _mm512_set1_ps(1.3333558e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return (__m512)_mm512_maskz_add_epi32(normal, (__m512i)y, _mm512_slli_epi32(whole, 23));
}

/* Two vectors as 32 bfloat16, the first one's in front. */
static inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

/* What no query of this row may see: keys between the end of the path and its padding, and those after its own. */
static inline void hide(float *row, int above, int above_padded, int own, int keys) {
    for (int n = above; n < above_padded; n++) row[n] = -INFINITY;
    for (int n = above_padded + own; n < keys; n++) row[n] = -INFINITY;
}

/* --- packing ----------------------------------------------------------------------------------------------------- */

static inline const half *row_at(const problem *p, const void *from, int64_t row) {
    return (const half *)from + row * p->width;
}

/* 16 vectors of 16 32-bit numbers, across. */
static inline __attribute__((always_inline)) void across(__m512i x[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            x[4 * i + 2 * k] = _mm512_unpacklo_epi64(y[4 * i + k], y[4 * i + 2 + k]);
            x[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(y[4 * i + k], y[4 * i + 2 + k]);
        }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            y[8 * i + k] = _mm512_shuffle_i32x4(x[8 * i + k], x[8 * i + 4 + k], 0x88);
            y[8 * i + 4 + k] = _mm512_shuffle_i32x4(x[8 * i + k], x[8 * i + 4 + k], 0xdd);
        }
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        x[k] = _mm512_shuffle_i32x4(y[k], y[8 + k], 0x88);
        x[8 + k] = _mm512_shuffle_i32x4(y[k], y[8 + k], 0xdd);
    }
}

/* Rows [from, to) of an operand with rows of W, all multiples of 16 (W of 32), as panels. */
static void to_panels(const half *rows, int from, int to, int W, half *panels) {
    for (int n = from; n < to; n += SIDE)
        for (int d = 0; d < W; d += 2 * SIDE) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(rows + (int64_t)(n + i) * W + d);
            across(x);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(panels + (int64_t)n * W + (d + 2 * i) * SIDE, x[i]);
        }
}

/* The same rows as pairs. */
static void to_pairs(const half *rows, int from, int to, int W, half *pairs) {
    for (int n = from; n < to; n += 2)
        for (int d = 0; d < W; d += SIDE) {
            __m256i even = _mm256_loadu_si256((const __m256i *)(rows + (int64_t)n * W + d));
            __m256i odd = _mm256_loadu_si256((const __m256i *)(rows + (int64_t)(n + 1) * W + d));
            __m512i both = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16) | _mm512_cvtepu16_epi32(even);
            _mm512_storeu_si512(pairs + (int64_t)n * W + 2 * d, both);
        }
}

/* The first `count` rows, (count, W), as columns, (W, count). */
static void to_columns(const half *rows, int count, int W, half *columns) {
    for (int r = 0; r < count; r += SIDE)
        for (int d = 0; d < W; d += 2 * SIDE) {
            __m512i x[16];
            for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(rows + (int64_t)(r + i) * W + d);
            across(x);
            for (int i = 0; i < 16; i++) {
                __m256i *even = (__m256i *)(columns + (int64_t)(d + 2 * i) * count + r);
                __m256i *odd = (__m256i *)(columns + (int64_t)(d + 2 * i + 1) * count + r);
                _mm256_storeu_si256(even, _mm512_cvtepi32_epi16(x[i]));
                _mm256_storeu_si256(odd, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x[i], 16)));
            }
        }
}

/* Tokens [start, start + count) of head g of (T, G, D), as rows `at`, `at` + 1, ...; zeros up to row `end`. */
static void gather(const problem *p, const void *from, int g, int start, int count, int W, half *rows, int at, int end) {
    half *row = rows + (int64_t)at * W;
    for (int n = 0; n < count; n++, row += W)
        memcpy(row, row_at(p, from, (int64_t)(start + n) * p->kv_heads + g), p->width * sizeof(half));
    memset(row, 0, (size_t)(end - at - count) * W * sizeof(half));
}

/* What a family of segments below one path takes: keys of the path (`above`, padded to `base`), and at most `most`. */
typedef struct {
    int path[MAX_DEPTH], depth, above, base, most, W, shared, tokens, rows;
} family;

/* Keys of the path, as rows [0, base). */
static void gather_above(const problem *p, const family *s, const void *from, int g, half *rows) {
    int at = 0;
    for (int i = 0; i < s->depth; i++) {
        int count = p->length[s->path[i]], end = i + 1 < s->depth ? at + count : s->base;
        gather(p, from, g, p->start[s->path[i]], count, s->W, rows, at, end);
        at += count;
    }
}

static family measure(const problem *p, int f, int rows) {
    family s;
    s.depth = path_of(p, p->family_parent[f], s.path);
    s.above = path_length(p, s.path, s.depth);
    s.base = padded(s.above);
    s.W = to_inner(p->width);
    s.shared = p->heads / p->kv_heads;
    s.tokens = rows / s.shared > 1 ? rows / s.shared : 1;
    s.rows = to_inner(s.tokens * s.shared);
    s.most = 0;
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int end = to_inner(s.base + p->length[p->members[m]]);
        s.most = end > s.most ? end : s.most;
    }
    return s;
}

/* --- forward ----------------------------------------------------------------------------------------------------- */

/* Turn a row of raw scores into bfloat16 exp2(score * factor - peak), in its own place; returns peak, sets sum. */
static float softmax_in_place(float *row, int keys, float factor, float *sum) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int n = 0; n < keys; n += LANES) most = _mm512_max_ps(_mm512_loadu_ps(row + n), most);
    float peak = _mm512_reduce_max_ps(most) * factor;
    __m512 times = _mm512_set1_ps(factor), less = _mm512_set1_ps(peak);
    for (int n = 0; n < keys; n += 2 * LANES) {
        __m512 first = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(row + n), times, less));
        __m512 second = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(row + n + LANES), times, less));
        total = total + first + second;
        _mm512_storeu_si512((half *)row + n, rounded(first, second));
    }
    *sum = _mm512_reduce_add_ps(total);
    return peak;
}

int amx_forward_family(const problem *p, int f, int g) {
    family s = measure(p, f, FORWARD_ROWS);
    int W = s.W, most = s.most;
    int64_t side = (int64_t)most * W, tile = (int64_t)s.rows * W;
    float *scores = workspace((int64_t)s.rows * most + tile + (tile + 3 * side) / 2);
    if (!scores) return 1;
    float *result = scores + (int64_t)s.rows * most;
    half *queries = (half *)(result + tile), *packed = queries + tile, *key_panels = packed + side;
    half *value_pairs = key_panels + side;
    float factor = p->scale * (float)M_LOG2E;
    memset(queries, 0, (size_t)tile * sizeof(half)); /* also what lies between the width and W, here and below */
    memset(packed, 0, (size_t)side * sizeof(half));
    gather_above(p, &s, p->key, g, packed);
    to_panels(packed, 0, s.base, W, key_panels);
    gather_above(p, &s, p->value, g, packed);
    to_pairs(packed, 0, s.base, W, value_pairs);
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int start = p->start[p->members[m]], length = p->length[p->members[m]], end = to_inner(s.base + length);
        gather(p, p->key, g, start, length, W, packed, s.base, end);
        to_panels(packed, s.base, end, W, key_panels);
        gather(p, p->value, g, start, length, W, packed, s.base, end);
        to_pairs(packed, s.base, end, W, value_pairs);
        for (int first = 0; first < length; first += s.tokens) {
            int count = least(s.tokens, length - first), rows = count * s.shared, block = padded(rows);
            int keys = to_inner(s.base + first + count);
            float sums[block];
            for (int r = 0; r < rows; r++)
                memcpy(
                    queries + (int64_t)r * W,
                    row_at(p, p->query, row_of(p, g, s.shared, start + first, r)),
                    p->width * sizeof(half)
                );
            memset(queries + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(half));
            multiply(queries, W, panels_of(key_panels, W), block, keys, W, scores, most, 0);
            for (int r = 0; r < block; r++) {
                float *row = scores + (int64_t)r * most;
                hide(row, s.above, s.base, r < rows ? first + r / s.shared + 1 : 1, keys);
                float peak = softmax_in_place(row, keys, factor, &sums[r]);
                if (r < rows) p->lse[row_of(p, g, s.shared, start + first, r)] = peak + log2f(sums[r]);
            }
            multiply((half *)scores, 2 * most, pairs_of(value_pairs, W), block, W, keys, result, W, 0);
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, s.shared, start + first, r);
                write_row(p, p->out, row, result + (int64_t)r * W, 1.0f / sums[r]);
            }
        }
    }
    return 0;
}

/* --- backward ---------------------------------------------------------------------------------------------------- */

/* Two rows of scores and of gradients by probability become, in their own places: `probs` the probabilities and `next`
   the slopes, both as pairs of the two rows; `slopes` and `slopes_next` the rows' slopes in bfloat16. */
static void slopes_in_place(
    float *probs, float *next, float *slopes, float *slopes_next, int keys, float factor, const float *lse,
    const float *delta
) {
    __m512 times = _mm512_set1_ps(factor);
    __m512 lse_0 = _mm512_set1_ps(lse[0]), lse_1 = _mm512_set1_ps(lse[1]);
    __m512 delta_0 = _mm512_set1_ps(delta[0]), delta_1 = _mm512_set1_ps(delta[1]);
    short order[32];
    for (int n = 0; n < 16; n++) order[2 * n] = n, order[2 * n + 1] = 16 + n;
    __m512i interleave = _mm512_loadu_si512(order);
    for (int n = 0; n < keys; n += LANES) {
        __m512 prob_0 = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(probs + n), times, lse_0));
        __m512 prob_1 = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(next + n), times, lse_1));
        __m512i both = rounded(
            prob_0 * (_mm512_loadu_ps(slopes + n) - delta_0), prob_1 * (_mm512_loadu_ps(slopes_next + n) - delta_1)
        );
        _mm512_storeu_si512(probs + n, _mm512_permutexvar_epi16(interleave, rounded(prob_0, prob_1)));
        _mm512_storeu_si512(next + n, _mm512_permutexvar_epi16(interleave, both));
        _mm256_storeu_si256((__m256i *)((half *)slopes + n), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i *)((half *)slopes_next + n), _mm512_extracti64x4_epi64(both, 1));
    }
}

/* Add columns [at, at + count) of `from`, (W, stride), times `factor`, to tokens [start, start + count) of head g. */
static void add_columns(
    const problem *p, float *to, int g, int start, int count, const float *from, int stride, int at, float factor
) {
    __m512 times = _mm512_set1_ps(factor);
    for (int n = 0; n < count; n += SIDE)
        for (int d = 0; d < p->width; d += SIDE) {
            __m512i x[16];
            __mmask16 here = d + SIDE <= p->width ? 0xffff : (1 << (p->width - d)) - 1;
            for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(from + (int64_t)(d + i) * stride + at + n);
            across(x);
            for (int i = 0; i < 16 && n + i < count; i++) {
                float *target = to + ((int64_t)(start + n + i) * p->kv_heads + g) * p->width + d;
                __m512 sum = _mm512_fmadd_ps((__m512)x[i], times, _mm512_maskz_loadu_ps(here, target));
                _mm512_mask_storeu_ps(target, here, sum);
            }
        }
}

static void clear_columns(float *rows, int count, int stride, int from, int to) {
    for (int d = 0; d < count; d++) memset(rows + (int64_t)d * stride + from, 0, (to - from) * sizeof(float));
}

int amx_backward_family(const problem *p, int f, int g) {
    family s = measure(p, f, BACKWARD_ROWS);
    int W = s.W, most = s.most;
    int64_t side = (int64_t)most * W, tile = (int64_t)s.rows * W, square = (int64_t)s.rows * most;
    float *probs = workspace(2 * square + 2 * side + SIDE + tile + (4 * side + 4 * tile) / 2);
    if (!probs) return 1;
    float *slopes = probs + square, *grad_keys = slopes + square, *grad_values = grad_keys + side; /* (W, most) */
    float *result = grad_values + side + SIDE; /* add_columns looks up to 15 numbers further */
    half *key_panels = (half *)(result + tile), *value_panels = key_panels + side, *key_pairs = value_panels + side;
    half *queries = key_pairs + side, *grads = queries + tile, *queries_across = grads + tile;
    half *grads_across = queries_across + tile, *packed = grads_across + tile;
    float factor = p->scale * (float)M_LOG2E;
    memset(queries, 0, (size_t)tile * 2 * sizeof(half));
    memset(packed, 0, (size_t)side * sizeof(half));
    clear_columns(grad_keys, 2 * W, most, 0, s.base);
    gather_above(p, &s, p->key, g, packed);
    to_panels(packed, 0, s.base, W, key_panels);
    to_pairs(packed, 0, s.base, W, key_pairs);
    gather_above(p, &s, p->value, g, packed);
    to_panels(packed, 0, s.base, W, value_panels);
    for (int m = p->family_first[f]; m < p->family_first[f + 1]; m++) {
        int start = p->start[p->members[m]], length = p->length[p->members[m]], end = to_inner(s.base + length);
        clear_columns(grad_keys, 2 * W, most, s.base, end);
        gather(p, p->key, g, start, length, W, packed, s.base, end);
        to_panels(packed, s.base, end, W, key_panels);
        to_pairs(packed, s.base, end, W, key_pairs);
        gather(p, p->value, g, start, length, W, packed, s.base, end);
        to_panels(packed, s.base, end, W, value_panels);
        for (int first = 0; first < length; first += s.tokens) {
            int count = least(s.tokens, length - first), rows = count * s.shared, block = to_inner(rows);
            int keys = to_inner(s.base + first + count);
            float lse[block], delta[block];
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, s.shared, start + first, r);
                const half *grad = row_at(p, p->grad_out, row), *out = row_at(p, p->out, row);
                memcpy(queries + (int64_t)r * W, row_at(p, p->query, row), p->width * sizeof(half));
                memcpy(grads + (int64_t)r * W, grad, p->width * sizeof(half));
                float dot = 0;
                for (int d = 0; d < p->width; d++) dot += from_bfloat16(out[d]) * from_bfloat16(grad[d]);
                lse[r] = p->lse[row];
                delta[r] = dot;
            }
            memset(queries + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(half));
            memset(grads + (int64_t)rows * W, 0, (size_t)(block - rows) * W * sizeof(half));
            for (int r = rows; r < block; r++) lse[r] = INFINITY, delta[r] = 0; /* probabilities of 0 */
            to_columns(queries, block, W, queries_across);
            to_columns(grads, block, W, grads_across);
            multiply(queries, W, panels_of(key_panels, W), block, keys, W, probs, most, 0);
            multiply(grads, W, panels_of(value_panels, W), block, keys, W, slopes, most, 0);
            for (int r = 0; r < block; r++)
                hide(probs + (int64_t)r * most, s.above, s.base, r < rows ? first + r / s.shared + 1 : 1, keys);
            for (int r = 0; r < block; r += 2) {
                float *prob = probs + (int64_t)r * most, *slope = slopes + (int64_t)r * most;
                slopes_in_place(prob, prob + most, slope, slope + most, keys, factor, lse + r, delta + r);
            }
            multiply((half *)slopes, 2 * most, pairs_of(key_pairs, W), block, W, keys, result, W, 0);
            for (int r = 0; r < rows; r++) {
                int64_t row = row_of(p, g, s.shared, start + first, r);
                write_row(p, p->grad_query, row, result + (int64_t)r * W, p->scale);
            }
            operand by_slope = pairs_of(probs + most, 2 * most), by_prob = pairs_of(probs, 2 * most);
            multiply(queries_across, block, by_slope, W, keys, block, grad_keys, most, 1);
            multiply(grads_across, block, by_prob, W, keys, block, grad_values, most, 1);
        }
        add_columns(p, p->grad_key, g, start, length, grad_keys, most, s.base, p->scale);
        add_columns(p, p->grad_value, g, start, length, grad_values, most, s.base, 1.0f);
    }
    int at = 0;
    for (int i = 0; i < s.depth; i++) {
        add_columns(p, p->grad_key, g, p->start[s.path[i]], p->length[s.path[i]], grad_keys, most, at, p->scale);
        add_columns(p, p->grad_value, g, p->start[s.path[i]], p->length[s.path[i]], grad_values, most, at, 1.0f);
        at += p->length[s.path[i]];
    }
    return 0;
}

#else /* no such tiles */

int amx_ready(void) { return 0; }
void amx_enter(void *saved) { (void)saved; }
void amx_leave(const void *saved) { (void)saved; }
int amx_forward_family(const problem *p, int f, int g) { return (void)p, (void)f, (void)g, 1; }
int amx_backward_family(const problem *p, int f, int g) { return (void)p, (void)f, (void)g, 1; }

#endif
