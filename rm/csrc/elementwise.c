/* RMS normalisation, gated SiLU and rotary positions, forward and backward, each in one pass over memory.

   Rows of D values, float32 or bfloat16; arithmetic in float32, rounded once at the end. */

#include <math.h>
#include <stdint.h>

#include "vector.h"

#define CHUNK 1024 /* values converted at once, on the stack */

typedef struct {
    int64_t rows;
    int32_t width, bfloat16, threads, heads, back;
    float epsilon;
    const void *x, *weight, *grad; /* (rows, D), (D,), (rows, D) */
    void *out;                     /* (rows, D): the result, or the gradient of x */
    float *inverse;                /* (rows,) 1 / root mean square: written forward, read backward */
    const void *cosine, *sine;     /* (rows / heads, D) */
    const void *gate, *up;         /* (rows, D) */
    void *grad_gate, *grad_up;     /* (rows, D) */
} elementwise;

static inline void read_some(const elementwise *p, const void *from, int64_t at, int count, float *to) {
    read_numbers(p->bfloat16, from, at, count, to, 1.0f);
}

static inline void write_some(const elementwise *p, void *to, int64_t at, int count, const float *from) {
    write_numbers(p->bfloat16, to, at, count, from, 1.0f);
}

/* out = weight * x / sqrt(mean(x^2) + epsilon) */
void rms_norm_forward(const elementwise *p) {
    int width = p->width;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t row = 0; row < p->rows; row++) {
        float x[width], w[width], total = 0;
        read_some(p, p->x, row * width, width, x);
        read_some(p, p->weight, 0, width, w);
        for (int d = 0; d < width; d++) total += x[d] * x[d];
        float inverse = 1.0f / sqrtf(total / width + p->epsilon);
        for (int d = 0; d < width; d++) x[d] *= inverse * w[d];
        write_some(p, p->out, row * width, width, x);
        p->inverse[row] = inverse;
    }
}

/* out = r * (w * grad) - x * r^3 / D * sum(w * grad * x), r the inverse of the forward pass */
void rms_norm_backward(const elementwise *p) {
    int width = p->width;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t row = 0; row < p->rows; row++) {
        float x[width], w[width], g[width], dot = 0, inverse = p->inverse[row];
        read_some(p, p->x, row * width, width, x);
        read_some(p, p->weight, 0, width, w);
        read_some(p, p->grad, row * width, width, g);
        for (int d = 0; d < width; d++) {
            g[d] *= w[d];
            dot += g[d] * x[d];
        }
        float back = dot * inverse * inverse * inverse / width;
        for (int d = 0; d < width; d++) g[d] = inverse * g[d] - back * x[d];
        write_some(p, p->out, row * width, width, g);
    }
}

/* 1 / (1 + e^-x) through e^-|x|, which cannot overflow */
static inline vec sigmoid_of(vec x) {
    vec size = choose(x < (vec){0}, x, -x); /* -|x| */
    vec small = exp2_of(size * (float)M_LOG2E);
    return choose(x < (vec){0}, small, splat(1.0f)) / (1.0f + small);
}

/* out = gate * sigmoid(gate) * up */
void silu_mul_forward(const elementwise *p) {
    int64_t total = p->rows * p->width;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t at = 0; at < total; at += CHUNK) {
        int count = total - at < CHUNK ? (int)(total - at) : CHUNK;
        float gate[CHUNK], up[CHUNK];
        read_some(p, p->gate, at, count, gate);
        read_some(p, p->up, at, count, up);
        for (int d = count; d % LANES; d++) gate[d] = up[d] = 0;
        for (int d = 0; d < count; d += LANES) {
            vec g = load(gate + d);
            store(up + d, load(up + d) * g * sigmoid_of(g));
        }
        write_some(p, p->out, at, count, up);
    }
}

/* s = sigmoid(gate): grad_up = grad * gate * s, grad_gate = grad * up * s * (1 + gate * (1 - s)) */
void silu_mul_backward(const elementwise *p) {
    int64_t total = p->rows * p->width;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t at = 0; at < total; at += CHUNK) {
        int count = total - at < CHUNK ? (int)(total - at) : CHUNK;
        float gate[CHUNK], up[CHUNK], grad[CHUNK];
        read_some(p, p->gate, at, count, gate);
        read_some(p, p->up, at, count, up);
        read_some(p, p->grad, at, count, grad);
        for (int d = count; d % LANES; d++) gate[d] = up[d] = grad[d] = 0;
        for (int d = 0; d < count; d += LANES) {
            vec g = load(gate + d), u = load(up + d), y = load(grad + d), s = sigmoid_of(g);
            store(gate + d, y * u * s * (1.0f + g * (1.0f - s)));
            store(up + d, y * g * s);
        }
        write_some(p, p->grad_gate, at, count, gate);
        write_some(p, p->grad_up, at, count, up);
    }
}

/* Rows are (token, head). Forward: out = x * cosine + half_turn(x) * sine, where half_turn(x) is minus x's second half,
   then its first. With `back`, the gradient of x from that of out. */
void rotate(const elementwise *p) {
    int width = p->width, half = width / 2;
    float turn = p->back ? 1.0f : -1.0f;
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t token = 0; token < p->rows / p->heads; token++) {
        float c[width], s[width], x[width], y[width];
        read_some(p, p->cosine, token * width, width, c);
        read_some(p, p->sine, token * width, width, s);
        if (p->back)
            for (int d = 0; d < half; d++) { /* the sine goes with the number it multiplied */
                float first = s[d];
                s[d] = s[d + half];
                s[d + half] = first;
            }
        for (int64_t row = token * p->heads; row < (token + 1) * p->heads; row++) {
            read_some(p, p->x, row * width, width, x);
            for (int d = 0; d < half; d++) {
                y[d] = x[d] * c[d] + turn * x[d + half] * s[d];
                y[d + half] = x[d + half] * c[d + half] - turn * x[d] * s[d + half];
            }
            write_some(p, p->out, row * width, width, y);
        }
    }
}
