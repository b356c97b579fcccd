/* An LSTM layer over time, forward and back, for float32 on a CPU.
 *
 * Only what goes from step to step is done here: the product with the hidden state, the gates, the
 * states; and back, the gradient of the gates and its product with the recurrent weights. Sequences
 * do not meet, so every thread takes some of them through all steps and waits for nobody. A tile of
 * ROWS sequences and LANES units stays in registers from its product to its states, and every
 * sequence is computed in the same order of operations, whichever others are in the batch.
 *
 * Shapes, all dense: directions D, steps T, sequences B, units H; gates in torch's order i, f, g, o.
 * `inside` stands for (D, T, B, 4H), `states` for (D, T + 1, B, H) whose first entry is given.
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
    int64_t directions, steps, sequences, units, parts; /* sequences are cut into so many parts */
    float *inside;         /* forward: products with the input -> gates; back: the gates */
    float *hidden, *cells; /* states */
    const float *packed;   /* weights, as pack_ahead or pack_back leaves them, of each direction */
    const float *d_hidden, *d_cells; /* back: (D, T, B, H) gradients of the states after each step, or 0 */
    float *delta;                    /* back: inside, gradients of the gates */
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
int64_t packed_size(int64_t units) { return panels(units) * LANES * 4 * units; }

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

/* ---- forward */

/* W (4H, H) -> for each panel of LANES units, for each k, the four gates' weights of h_k. */
void pack_ahead(const float *weights, int64_t units, float *packed) {
    for (int64_t first = 0; first < units; first += LANES)
        for (int64_t k = 0; k < units; k++)
            for (int gate = 0; gate < 4; gate++)
                for (int lane = 0; lane < LANES; lane++) {
                    int64_t unit = first + lane;
                    *packed++ = unit < units ? weights[(gate * units + unit) * units + k] : 0;
                }
}

INLINE void step_ahead(const float *panel, int64_t units, int64_t first, const int rows, float *inside,
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

static void ahead(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units);
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
#define STEP(count) step_ahead(panel, units, first, count, gates, h, h + each, c, c + each)
                OF_SO_MANY(rows, STEP)
            }
        }
}

void scan_ahead(struct scan *scan, int threads, team parallel) {
    scan->work = ahead;
    run(scan, threads, parallel);
}

/* ---- back */

/* W (4H, H) -> for each panel of up to COLUMNS vectors of its columns, row by row. */
void pack_back(const float *weights, int64_t units, float *packed) {
    for (int64_t first = 0; first < units; first += COLUMNS * LANES) {
        int64_t left = panels(units - first), vectors = left < COLUMNS ? left : COLUMNS;
        for (int64_t k = 0; k < 4 * units; k++)
            for (int64_t column = first; column < first + vectors * LANES; column++)
                *packed++ = column < units ? weights[k * units + column] : 0;
    }
}

/* to (rows, H), `vectors` of its columns from `first` on = delta (rows, 4H) times a panel. */
INLINE void product(const float *panel, int64_t units, int64_t first, const int rows, const int vectors,
                    const float *delta, float *to) {
    vec sum[ROWS][COLUMNS];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sum[row][v] = spread(0);
    for (int64_t k = 0; k < 4 * units; k++, panel += vectors * LANES)
        for (int row = 0; row < rows; row++) {
            vec left = spread(delta[row * 4 * units + k]);
            for (int v = 0; v < vectors; v++) sum[row][v] += left * *(const vec *)(panel + v * LANES);
        }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) {
            int64_t column = first + v * LANES;
            store(to + row * units + column, sum[row][v], units - column);
        }
}

INLINE void products(const float *panel, int64_t units, int64_t first, const int vectors, int64_t left,
                     const float *delta, float *to) {
    for (int64_t rows; left > 0; left -= rows, delta += rows * 4 * units, to += rows * units) {
        rows = left < ROWS ? left : ROWS;
#define PRODUCT(count) product(panel, units, first, count, vectors, delta, to)
        OF_SO_MANY(rows, PRODUCT)
    }
}

/* The gradient of one sequence's gates at one step; dh of the state after it is in `to_hidden`, dc in
 * `to_cell`, where that of the state before it is left. */
INLINE void gates_back(int64_t units, const float *gates, const float *c, const float *c_next,
                       const float *d_hidden, const float *d_cell, float *delta, const float *to_hidden,
                       float *to_cell) {
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

static void back(const struct scan *scan, int64_t direction, int64_t from, int64_t to) {
    int64_t units = scan->units, each = scan->sequences * units;
    const float *packed = scan->packed + direction * packed_size(units);
    const float *cells = scan->cells + direction * (scan->steps + 1) * each;
    float *to_hidden = scan->to_hidden + direction * each, *to_cell = scan->to_cell + direction * each;
    for (int64_t t = scan->steps - 1; t >= 0; t--) {
        int64_t step = (direction * scan->steps + t) * each;
        for (int64_t row = from; row < to; row++) {
            int64_t state = row * units, at = step + state;
            gates_back(units, scan->inside + 4 * at, cells + t * each + state,
                       cells + (t + 1) * each + state, scan->d_hidden ? scan->d_hidden + at : 0,
                       scan->d_cells ? scan->d_cells + at : 0, scan->delta + 4 * at, to_hidden + state,
                       to_cell + state);
        }
        const float *delta = scan->delta + 4 * (step + from * units), *panel = packed;
        for (int64_t first = 0; first < units; first += COLUMNS * LANES) {
            int64_t rows = to - from, left = panels(units - first);
            float *into = to_hidden + from * units;
            if (left >= 4) products(panel, units, first, 4, rows, delta, into);
            else if (left == 3) products(panel, units, first, 3, rows, delta, into);
            else if (left == 2) products(panel, units, first, 2, rows, delta, into);
            else products(panel, units, first, 1, rows, delta, into);
            panel += (left < COLUMNS ? left : COLUMNS) * LANES * 4 * units;
        }
    }
}

void scan_back(struct scan *scan, int threads, team parallel) {
    scan->work = back;
    run(scan, threads, parallel);
}
