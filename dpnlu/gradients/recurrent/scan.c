/* A layer of LSTM, GRU or plain recurrent cells over time, forward and back, for float32 on a CPU.
 *
 * Only what goes from step to step is done here: the product with the hidden state, the gates, the
 * states; and back, the gradient of the gates and its product with the recurrent weights. Sequences
 * do not meet, so every thread takes some of them through all steps and waits for nobody. A tile of
 * ROWS sequences and LANES units stays in registers from its product to its states, and every
 * sequence is computed in the same order of operations, whichever others are in the batch.
 *
 * Shapes, all dense: directions D, steps T, sequences B, units H; G gates in torch's order, those of
 * an LSTM i, f, g, o, of a GRU r, z, n. `inside` stands for (D, T, B, G H), `states` for
 * (D, T + 1, B, H) whose first entry is given.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 6
#elif defined(__AVX__)
#define LANES 8
#define ROWS 2
#else
#define LANES 4
#define ROWS 3
#endif
#define COLUMNS 4 /* vectors in a tile */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec spread(float x) { return x - (vec){0}; }
INLINE vec choose(ints where, vec yes, vec no) {
    return (vec)((where & (ints)yes) | (~where & (ints)no));
}

/* `count` numbers, and zeros in the other lanes. */
INLINE vec load(const float *from, int64_t count) {
    if (count >= LANES) return *(const vec *)from;
    vec x = {0};
    memcpy(&x, from, count * sizeof(float));
    return x;
}

INLINE void store(float *to, vec x, int64_t count) {
    if (count >= LANES) *(vec *)to = x;
    else memcpy(to, &x, count * sizeof(float));
}

/* e^x to about one unit in the last place; x is kept within [-87, 88], NaN stays NaN. */
INLINE vec exponential(vec x) {
    x = choose(x > 88.0f, spread(88.0f), x);
    x = choose(x < -87.0f, spread(-87.0f), x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: rounds to an integer */
    vec n = shifted - 12582912.0f;
    vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f; /* ln 2 in two parts */
    vec p = spread(1.98756915e-4f);
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345191e-3f;
    p = p * r + 4.16657959e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * (r * r) + r + 1.0f;
    ints power = (ints)shifted - 0x4B400000; /* the bits of 12582912 */
    return p * (vec)((power + 127) << 23);
}

INLINE vec logistic(vec x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE vec hyperbolic(vec x) {
    vec large = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
    vec y = x * x; /* near 0, where the difference above loses digits, the Taylor series */
    vec series = x + x * y * (-0.333333333f + y * (0.133333333f - y * 0.0539682540f));
    return choose(y < 0.04f, series, large);
}

/* ---- work for threads */

typedef void (*team)(void (*)(void *), void *, unsigned, unsigned); /* as GOMP_parallel */

struct scan {
    int64_t directions, steps, sequences, units;
    int64_t parts;           /* sequences are cut into so many */
    int64_t rectifies;       /* plain cells: max(0, x) in place of tanh */
    float *inside;           /* forward: products with the input -> gates; back: the gates */
    float *hidden, *cells;   /* states */
    float *products;         /* GRU: (D, T, B, H) what r is multiplied with */
    const float *bias;       /* GRU: (D, H) of these, or 0 */
    const float *packed;     /* weights, as pack_ahead or pack_back leaves them, of each direction */
    const float *d_hidden, *d_cells; /* back: (D, T, B, H) gradients of the states after each step, or 0 */
    float *delta;                    /* back: inside, gradients of the products with the state */
    float *delta_inputs;             /* back, GRU: inside, gradients of those with the input */
    float *to_hidden, *to_cell;      /* back: (D, B, H) gradients of the states before the first step */
    void (*work)(const struct scan *, int64_t direction, int64_t first, int64_t last);
    int64_t next;
};

static void take(void *data) {
    struct scan *scan = data;
    int64_t all = scan->directions * scan->parts, item;
    while ((item = __atomic_fetch_add(&scan->next, 1, __ATOMIC_RELAXED)) < all) {
        int64_t part = item % scan->parts;
        scan->work(scan, item / scan->parts, scan->sequences * part / scan->parts,
                   scan->sequences * (part + 1) / scan->parts);
    }
}

static void run(struct scan *scan, int threads, team parallel) {
    scan->next = 0;
    if (threads > 1 && parallel) parallel(take, scan, threads, 0);
    else take(scan);
}

INLINE int64_t panels(int64_t units) { return (units + LANES - 1) / LANES; }

/* Numbers that pack_ahead and pack_back each write. */
int64_t packed_size(int64_t units, int64_t gates) { return panels(units) * LANES * gates * units; }

/* `call(n)` with a constant n for `rows`, so that its loops are unrolled into registers. */
#define OF_SO_MANY(rows, call) \
    switch (rows) {            \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    ROWS_FROM_3(call)          \
    }
#if ROWS == 6
#define ROWS_FROM_3(call)   \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: call(6);
#elif ROWS == 3
#define ROWS_FROM_3(call) \
    default: call(3);
#else
#define ROWS_FROM_3(call)
#endif

/* ---- weights */

/* W (G H, H) -> for each panel of LANES units, for each k, the gates' weights of h_k. */
void pack_ahead(const float *weights, int64_t units, int64_t gates, float *packed) {
    for (int64_t first = 0; first < units; first += LANES)
        for (int64_t k = 0; k < units; k++)
            for (int64_t gate = 0; gate < gates; gate++)
                for (int lane = 0; lane < LANES; lane++) {
                    int64_t unit = first + lane;
                    *packed++ = unit < units ? weights[(gate * units + unit) * units + k] : 0;
                }
}

/* W (depth, H) -> for each panel of up to COLUMNS vectors of its columns, row by row. */
void pack_back(const float *weights, int64_t units, int64_t depth, float *packed) {
    for (int64_t first = 0; first < units; first += COLUMNS * LANES) {
        int64_t left = panels(units - first), vectors = left < COLUMNS ? left : COLUMNS;
        for (int64_t k = 0; k < depth; k++)
            for (int64_t column = first; column < first + vectors * LANES; column++)
                *packed++ = column < units ? weights[k * units + column] : 0;
    }
}

/* to (rows, H), `vectors` of its columns from `first` on = left (rows, depth) times a panel. */
INLINE void product(const float *panel, int64_t units, int64_t depth, int64_t first, const int rows,
                    const int vectors, const float *left, float *to) {
    vec sum[ROWS][COLUMNS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sum[row][v] = spread(0);
    for (int64_t k = 0; k < depth; k++, panel += vectors * LANES)
        for (int row = 0; row < rows; row++) {
            vec factor = spread(left[row * depth + k]);
            for (int v = 0; v < vectors; v++) sum[row][v] += factor * *(const vec *)(panel + v * LANES);
        }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) {
            int64_t column = first + v * LANES;
            store(to + row * units + column, sum[row][v], units - column);
        }
}

INLINE void products_of(const float *panel, int64_t units, int64_t depth, int64_t first, const int vectors,
                        int64_t count, const float *left, float *to) {
    for (int64_t rows; count > 0; count -= rows, left += rows * depth, to += rows * units) {
        rows = count < ROWS ? count : ROWS;
#define PRODUCT(n) product(panel, units, depth, first, n, vectors, left, to)
        OF_SO_MANY(rows, PRODUCT)
    }
}

/* to (count, H) = left (count, depth) times what pack_back has packed. */
static void multiply(const float *packed, int64_t units, int64_t depth, int64_t count, const float *left,
                     float *to) {
    for (int64_t first = 0; first < units; first += COLUMNS * LANES) {
        int64_t vectors = panels(units - first);
        if (vectors >= 4) products_of(packed, units, depth, first, 4, count, left, to);
        else if (vectors == 3) products_of(packed, units, depth, first, 3, count, left, to);
        else if (vectors == 2) products_of(packed, units, depth, first, 2, count, left, to);
        else products_of(packed, units, depth, first, 1, count, left, to);
        packed += (vectors < COLUMNS ? vectors : COLUMNS) * LANES * depth;
    }
}

/* ---- LSTM */

INLINE void lstm_step(const float *panel, int64_t units, int64_t first, const int rows, float *inside,
                      const float *h, float *h_next, const float *c, float *c_next) {
    int64_t count = units - first;
    vec sum[ROWS][4];
    for (int row = 0; row < rows; row++)
        for (int gate = 0; gate < 4; gate++)
            sum[row][gate] = load(inside + row * 4 * units + gate * units + first, count);
    for (int64_t k = 0; k < units; k++, panel += 4 * LANES)
        for (int row = 0; row < rows; row++) {
            vec left = spread(h[row * units + k]);
            for (int gate = 0; gate < 4; gate++)
                sum[row][gate] += left * *(const vec *)(panel + gate * LANES);
        }
    for (int row = 0; row < rows; row++) {
        vec i = logistic(sum[row][0]), f = logistic(sum[row][1]);
        vec g = hyperbolic(sum[row][2]), o = logistic(sum[row][3]);
        vec cell = f * load(c + row * units + first, count) + i * g;
        float *gates = inside + row * 4 * units + first;
        store(gates, i, count);
        store(gates + units, f, count);
        store(gates + 2 * units, g, count);
        store(gates + 3 * units, o, count);
        store(c_next + row * units + first, cell, count);
        store(h_next + row * units + first, o * hyperbolic(cell), count);
    }
}

static void lstm_forward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units, 4);
    float *inside = scan->inside + direction * scan->steps * 4 * each;
    float *hidden = scan->hidden + direction * (scan->steps + 1) * each;
    float *cells = scan->cells + direction * (scan->steps + 1) * each;
    for (int64_t t = 0; t < scan->steps; t++)
        for (int64_t first = 0; first < units; first += LANES) {
            const float *panel = packed + first * units * 4;
            for (int64_t row = from, rows; row < to; row += rows) {
                rows = to - row < ROWS ? to - row : ROWS;
                float *gates = inside + t * 4 * each + row * 4 * units;
                float *h = hidden + t * each + row * units, *c = cells + t * each + row * units;
#define LSTM_STEP(n) lstm_step(panel, units, first, n, gates, h, h + each, c, c + each)
                OF_SO_MANY(rows, LSTM_STEP)
            }
        }
}

void lstm_ahead(struct scan *scan, int threads, team parallel) {
    scan->work = lstm_forward;
    run(scan, threads, parallel);
}

/* The gradient of one sequence's gates at one step; dh of the state after it is in `to_hidden`, dc in
 * `to_cell`, where that of the state before it is left. */
INLINE void lstm_gates_back(int64_t units, const float *gates, const float *c, const float *c_next,
                            const float *d_hidden, const float *d_cell, float *delta,
                            const float *to_hidden, float *to_cell) {
    for (int64_t first = 0; first < units; first += LANES) {
        int64_t count = units - first;
        vec i = load(gates + first, count), f = load(gates + units + first, count);
        vec g = load(gates + 2 * units + first, count), o = load(gates + 3 * units + first, count);
        vec dh = load(to_hidden + first, count), dc = load(to_cell + first, count);
        if (d_hidden) dh += load(d_hidden + first, count);
        if (d_cell) dc += load(d_cell + first, count);
        vec squashed = hyperbolic(load(c_next + first, count));
        dc += dh * o * (1.0f - squashed * squashed);
        store(delta + first, dc * g * i * (1.0f - i), count);
        store(delta + units + first, dc * load(c + first, count) * f * (1.0f - f), count);
        store(delta + 2 * units + first, dc * i * (1.0f - g * g), count);
        store(delta + 3 * units + first, dh * squashed * o * (1.0f - o), count);
        store(to_cell + first, dc * f, count);
    }
}

static void lstm_backward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units, 4);
    const float *cells = scan->cells + direction * (scan->steps + 1) * each;
    float *to_hidden = scan->to_hidden + direction * each, *to_cell = scan->to_cell + direction * each;
    for (int64_t t = scan->steps - 1; t >= 0; t--) {
        int64_t step = (direction * scan->steps + t) * each;
        for (int64_t row = from; row < to; row++) {
            int64_t state = row * units, at = step + state;
            lstm_gates_back(units, scan->inside + 4 * at, cells + t * each + state,
                            cells + (t + 1) * each + state, scan->d_hidden ? scan->d_hidden + at : 0,
                            scan->d_cells ? scan->d_cells + at : 0, scan->delta + 4 * at,
                            to_hidden + state, to_cell + state);
        }
        multiply(packed, units, 4 * units, to - from, scan->delta + 4 * (step + from * units),
                 to_hidden + from * units);
    }
}

void lstm_back(struct scan *scan, int threads, team parallel) {
    scan->work = lstm_backward;
    run(scan, threads, parallel);
}

/* ---- GRU: n = tanh(inside_n + r p), h' = n + z (h - n) with p = W_n h + bias, which is kept */

INLINE void gru_step(const float *panel, int64_t units, int64_t first, const int rows, float *inside,
                     const float *bias, const float *h, float *h_next, float *products) {
    int64_t count = units - first;
    vec sum[ROWS][3];
    for (int row = 0; row < rows; row++) {
        for (int gate = 0; gate < 2; gate++)
            sum[row][gate] = load(inside + row * 3 * units + gate * units + first, count);
        sum[row][2] = bias ? load(bias + first, count) : spread(0);
    }
    for (int64_t k = 0; k < units; k++, panel += 3 * LANES)
        for (int row = 0; row < rows; row++) {
            vec left = spread(h[row * units + k]);
            for (int gate = 0; gate < 3; gate++)
                sum[row][gate] += left * *(const vec *)(panel + gate * LANES);
        }
    for (int row = 0; row < rows; row++) {
        float *gates = inside + row * 3 * units + first;
        vec r = logistic(sum[row][0]), z = logistic(sum[row][1]);
        vec n = hyperbolic(load(gates + 2 * units, count) + r * sum[row][2]);
        vec before = load(h + row * units + first, count);
        store(gates, r, count);
        store(gates + units, z, count);
        store(gates + 2 * units, n, count);
        store(products + row * units + first, sum[row][2], count);
        store(h_next + row * units + first, n + z * (before - n), count);
    }
}

static void gru_forward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units, 3);
    const float *bias = scan->bias ? scan->bias + direction * units : 0;
    float *hidden = scan->hidden + direction * (scan->steps + 1) * each;
    for (int64_t t = 0; t < scan->steps; t++)
        for (int64_t first = 0; first < units; first += LANES) {
            const float *panel = packed + first * units * 3;
            for (int64_t row = from, rows; row < to; row += rows) {
                rows = to - row < ROWS ? to - row : ROWS;
                int64_t at = (direction * scan->steps + t) * each + row * units;
                float *gates = scan->inside + 3 * at, *kept = scan->products + at;
                float *h = hidden + t * each + row * units;
#define GRU_STEP(n) gru_step(panel, units, first, n, gates, bias, h, h + each, kept)
                OF_SO_MANY(rows, GRU_STEP)
            }
        }
}

void gru_ahead(struct scan *scan, int threads, team parallel) {
    scan->work = gru_forward;
    run(scan, threads, parallel);
}

/* The gradients of one sequence's gates at one step; dh of the state after it is in `to_hidden`, where
 * what goes straight to the state before it, z dh, is left. */
INLINE void gru_gates_back(int64_t units, const float *gates, const float *h, const float *products,
                           const float *d_hidden, float *delta, float *delta_inputs, float *to_hidden) {
    for (int64_t first = 0; first < units; first += LANES) {
        int64_t count = units - first;
        vec r = load(gates + first, count), z = load(gates + units + first, count);
        vec n = load(gates + 2 * units + first, count), dh = load(to_hidden + first, count);
        if (d_hidden) dh += load(d_hidden + first, count);
        vec to_new = dh * (1.0f - z) * (1.0f - n * n);
        vec to_reset = to_new * load(products + first, count) * r * (1.0f - r);
        vec to_update = dh * (load(h + first, count) - n) * z * (1.0f - z);
        store(delta + first, to_reset, count);
        store(delta_inputs + first, to_reset, count);
        store(delta + units + first, to_update, count);
        store(delta_inputs + units + first, to_update, count);
        store(delta + 2 * units + first, to_new * r, count);
        store(delta_inputs + 2 * units + first, to_new, count);
        store(to_hidden + first, dh * z, count);
    }
}

static void gru_backward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units, 3);
    const float *hidden = scan->hidden + direction * (scan->steps + 1) * each;
    float *to_hidden = scan->to_hidden + direction * each;
    float *through = scan->to_cell + direction * each; /* what goes through the gates */
    for (int64_t t = scan->steps - 1; t >= 0; t--) {
        int64_t step = (direction * scan->steps + t) * each;
        for (int64_t row = from; row < to; row++) {
            int64_t state = row * units, at = step + state;
            gru_gates_back(units, scan->inside + 3 * at, hidden + t * each + state, scan->products + at,
                           scan->d_hidden ? scan->d_hidden + at : 0, scan->delta + 3 * at,
                           scan->delta_inputs + 3 * at, to_hidden + state);
        }
        multiply(packed, units, 3 * units, to - from, scan->delta + 3 * (step + from * units),
                 through + from * units);
        for (int64_t i = from * units; i < to * units; i++) to_hidden[i] += through[i];
    }
}

void gru_back(struct scan *scan, int threads, team parallel) {
    scan->work = gru_backward;
    run(scan, threads, parallel);
}

/* ---- plain cells: h' = tanh(inside + W h), or max(0, inside + W h) */

static void plain_forward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units, count = (to - from) * units;
    const float *packed = scan->packed + direction * packed_size(units, 1);
    float *hidden = scan->hidden + direction * (scan->steps + 1) * each + from * units;
    const float *inside = scan->inside + direction * scan->steps * each + from * units;
    for (int64_t t = 0; t < scan->steps; t++, hidden += each, inside += each) {
        float *next = hidden + each;
        multiply(packed, units, units, to - from, hidden, next);
        for (int64_t i = 0; i < count; i += LANES) {
            vec x = load(inside + i, count - i) + load(next + i, count - i);
            store(next + i, scan->rectifies ? choose(x < 0.0f, spread(0), x) : hyperbolic(x), count - i);
        }
    }
}

void plain_ahead(struct scan *scan, int threads, team parallel) {
    scan->work = plain_forward;
    run(scan, threads, parallel);
}

static void plain_backward(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units, count = (to - from) * units;
    const float *packed = scan->packed + direction * packed_size(units, 1);
    const float *hidden = scan->hidden + direction * (scan->steps + 1) * each + from * units;
    float *to_hidden = scan->to_hidden + direction * each + from * units;
    for (int64_t t = scan->steps - 1; t >= 0; t--) {
        int64_t at = (direction * scan->steps + t) * each + from * units;
        const float *after = hidden + (t + 1) * each;
        for (int64_t i = 0; i < count; i += LANES) {
            vec h = load(after + i, count - i), dh = load(to_hidden + i, count - i);
            if (scan->d_hidden) dh += load(scan->d_hidden + at + i, count - i);
            vec delta = scan->rectifies ? choose(h <= 0.0f, spread(0), dh) : dh * (1.0f - h * h);
            store(scan->delta + at + i, delta, count - i);
        }
        multiply(packed, units, units, to - from, scan->delta + at, to_hidden);
    }
}

void plain_back(struct scan *scan, int threads, team parallel) {
    scan->work = plain_backward;
    run(scan, threads, parallel);
}
