/* The masked step on a CPU, in one pass over the weights. cpu.py calls it; plain.py is the reference, in torch.
 *
 * A weight's byte in `opened` is 0 while it is closed, otherwise the generation in which it was opened. Values are
 * fp32; sums are fp32 within a tile and double over the tiles. AVX-512 processes 16 weights at a time; without it, the
 * loops go weight by weight. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 1024 /* weights whose intermediate values fit in the L1 cache */
#define INLINE static inline __attribute__((always_inline))

enum { NONE, ABS_SUM, SUM_ABS, SUM_SQ }; /* the saliency statistic */

typedef struct {
    float scale, lr, beta1, beta2, epsilon, decay;
    int32_t statistic, packed, generations;
    const float *first, *second; /* [generations], factors of the first moment and of the second's square root */
} Rule;

typedef struct {
    double squares; /* sum of squares of the open weights' gradient, before scaling */
    double moves;   /* sum of squares of the moves, without lr */
} Sums;

#ifdef __AVX512F__
#include <immintrin.h>
#define LANES 16

typedef struct {
    __m512 scale1, beta1, scale2, beta2, epsilon, first[2], second[2];
    const float *all_first, *all_second; /* set when there are more generations than two registers hold */
} Constants;

INLINE __m512i generations_of(const uint8_t *o) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)o)); }

INLINE __mmask16 are_open(const uint8_t *opened) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)opened);
    return _mm_test_epi8_mask(bytes, bytes);
}

INLINE void add(float *saliency, __m512 g, int statistic) {
    __m512 s = _mm512_loadu_ps(saliency);
    if (statistic == ABS_SUM) s = _mm512_add_ps(s, g);
    if (statistic == SUM_ABS) s = _mm512_add_ps(s, _mm512_abs_ps(g));
    if (statistic == SUM_SQ) s = _mm512_fmadd_ps(g, g, s);
    _mm512_storeu_ps(saliency, s);
}

INLINE Constants constants(const Rule *rule) {
    Constants c = {
        .scale1 = _mm512_set1_ps((1 - rule->beta1) * rule->scale),
        .beta1 = _mm512_set1_ps(rule->beta1),
        .scale2 = _mm512_set1_ps((1 - rule->beta2) * rule->scale * rule->scale),
        .beta2 = _mm512_set1_ps(rule->beta2),
        .epsilon = _mm512_set1_ps(rule->epsilon),
    };
    float first[2 * LANES] = {0}, second[2 * LANES] = {0};
    if (rule->generations <= 2 * LANES) {
        memcpy(first, rule->first, sizeof(float) * (size_t)rule->generations);
        memcpy(second, rule->second, sizeof(float) * (size_t)rule->generations);
    } else {
        c.all_first = rule->first;
        c.all_second = rule->second;
    }
    for (int i = 0; i < 2; i++) {
        c.first[i] = _mm512_loadu_ps(first + i * LANES);
        c.second[i] = _mm512_loadu_ps(second + i * LANES);
    }
    return c;
}

/* Updates the moments; returns the move without lr and decay. */
INLINE __m512 adam(const Constants *c, __m512 g, __m512i generation, float *momentum, float *variance,
                   __mmask16 live) {
    __m512 first, second, m = _mm512_loadu_ps(momentum), v = _mm512_loadu_ps(variance);
    if (c->all_first) {
        first = _mm512_i32gather_ps(generation, c->all_first, 4);
        second = _mm512_i32gather_ps(generation, c->all_second, 4);
    } else {
        first = _mm512_permutex2var_ps(c->first[0], generation, c->first[1]);
        second = _mm512_permutex2var_ps(c->second[0], generation, c->second[1]);
    }
    m = _mm512_fmadd_ps(g, c->scale1, _mm512_mul_ps(m, c->beta1));
    v = _mm512_fmadd_ps(_mm512_mul_ps(g, g), c->scale2, _mm512_mul_ps(v, c->beta2));
    if (live == 0xffff) { /* masked stores are slow */
        _mm512_storeu_ps(momentum, m);
        _mm512_storeu_ps(variance, v);
    } else {
        _mm512_mask_storeu_ps(momentum, live, m);
        _mm512_mask_storeu_ps(variance, live, v);
    }
    return _mm512_div_ps(_mm512_mul_ps(m, first), _mm512_fmadd_ps(_mm512_sqrt_ps(v), second, c->epsilon));
}

INLINE __m512 moved(const Rule *rule, float *weights, __m512 move, __mmask16 open) {
    __m512 w = _mm512_loadu_ps(weights);
    move = _mm512_mask3_fmadd_ps(w, _mm512_set1_ps(rule->decay), move, open);
    _mm512_storeu_ps(weights, _mm512_fnmadd_ps(move, _mm512_set1_ps(rule->lr), w));
    return _mm512_mul_ps(move, move);
}

/* n must be a multiple of LANES. Reads up to 15 packed moments past the end: their owner leaves room for that. */
INLINE Sums update_lanes(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, float *momentum,
                         float *variance, float *weights, const Rule *rule, int statistic, int packed) {
    const Constants c = constants(rule);
    const int several = rule->generations > 2; /* generations of open weights */
    float values[TILE + LANES]; /* of a tile's open weights: first gradients, then moves */
    int32_t generations[TILE + LANES];
    Sums sums = {0, 0};
    for (int64_t at = 0; at < n; at += TILE) {
        const int64_t end = n - at < TILE ? n : at + TILE;
        __m512 squares = _mm512_setzero_ps(), moves = squares;
        if (!packed) {
            for (int64_t i = at; i < end; i += LANES) {
                __m512 g = _mm512_loadu_ps(gradient + i);
                if (statistic) add(saliency + i, g, statistic);
                __mmask16 open = are_open(opened + i);
                g = _mm512_maskz_mov_ps(open, g);
                squares = _mm512_fmadd_ps(g, g, squares);
                __m512 move = adam(&c, g, generations_of(opened + i), momentum + i, variance + i, 0xffff);
                moves = _mm512_add_ps(moves, moved(rule, weights + i, move, open));
            }
        } else {
            int64_t count = 0, expanded = 0;
            for (int64_t i = at; i < end; i += LANES) {
                __m512 g = _mm512_loadu_ps(gradient + i);
                if (statistic) add(saliency + i, g, statistic);
                __mmask16 open = are_open(opened + i);
                _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(open, g));
                __m512i generation = generations_of(opened + i);
                if (several) _mm512_storeu_si512(generations + count, _mm512_maskz_compress_epi32(open, generation));
                count += __builtin_popcount(open);
            }
            for (int64_t i = 0; i < count; i += LANES) {
                __mmask16 live = count - i < LANES ? (__mmask16)((1u << (count - i)) - 1) : 0xffff;
                __m512 g = _mm512_maskz_mov_ps(live, _mm512_loadu_ps(values + i));
                squares = _mm512_fmadd_ps(g, g, squares);
                __m512i generation = several ? _mm512_maskz_loadu_epi32(live, generations + i) : _mm512_set1_epi32(1);
                _mm512_storeu_ps(values + i, adam(&c, g, generation, momentum + i, variance + i, live));
            }
            for (int64_t i = at; i < end; i += LANES) {
                __mmask16 open = are_open(opened + i);
                __m512 move = _mm512_maskz_expand_ps(open, _mm512_loadu_ps(values + expanded));
                expanded += __builtin_popcount(open);
                moves = _mm512_add_ps(moves, moved(rule, weights + i, move, open));
            }
            momentum += count;
            variance += count;
        }
        sums.squares += _mm512_reduce_add_ps(squares);
        sums.moves += _mm512_reduce_add_ps(moves);
    }
    return sums;
}

INLINE double collect_lanes(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, int statistic) {
    double total = 0;
    for (int64_t at = 0; at < n; at += TILE) {
        const int64_t end = n - at < TILE ? n : at + TILE;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = at; i < end; i += LANES) {
            __m512 g = _mm512_loadu_ps(gradient + i);
            if (statistic) add(saliency + i, g, statistic);
            g = _mm512_maskz_mov_ps(are_open(opened + i), g);
            squares = _mm512_fmadd_ps(g, g, squares);
        }
        total += _mm512_reduce_add_ps(squares);
    }
    return total;
}

double collect(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, int32_t statistic) {
    const int64_t whole = n - n % LANES;
    double total = statistic == ABS_SUM ? collect_lanes(whole, gradient, opened, saliency, ABS_SUM)
                                        : collect_lanes(whole, gradient, opened, saliency, statistic);
    if (whole < n) { /* the rest, in zero-padded arrays */
        const size_t rest = (size_t)(n - whole);
        float g[LANES] = {0}, s[LANES] = {0};
        uint8_t o[LANES] = {0};
        memcpy(g, gradient + whole, rest * sizeof(float));
        memcpy(o, opened + whole, rest);
        if (statistic) memcpy(s, saliency + whole, rest * sizeof(float));
        total += collect_lanes(LANES, g, o, s, statistic);
        if (statistic) memcpy(saliency + whole, s, rest * sizeof(float));
    }
    return total;
}

void update(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, float *momentum,
            float *variance, float *weights, const Rule *rule, Sums *sums) {
    const int64_t whole = n - n % LANES;
    const int statistic = rule->statistic;
    if (statistic == ABS_SUM && !rule->packed)
        *sums = update_lanes(whole, gradient, opened, saliency, momentum, variance, weights, rule, ABS_SUM, 0);
    else if (statistic == ABS_SUM)
        *sums = update_lanes(whole, gradient, opened, saliency, momentum, variance, weights, rule, ABS_SUM, 1);
    else if (!rule->packed)
        *sums = update_lanes(whole, gradient, opened, saliency, momentum, variance, weights, rule, statistic, 0);
    else
        *sums = update_lanes(whole, gradient, opened, saliency, momentum, variance, weights, rule, statistic, 1);
    if (whole < n) { /* the rest, in zero-padded arrays */
        const size_t rest = (size_t)(n - whole), size = rest * sizeof(float);
        int64_t from = whole, held = (int64_t)rest;
        float g[LANES] = {0}, s[LANES] = {0}, m[2 * LANES] = {0}, v[2 * LANES] = {0}, w[LANES] = {0};
        uint8_t o[LANES] = {0};
        memcpy(o, opened + whole, rest);
        if (rule->packed) {
            from = held = 0;
            for (int64_t i = 0; i < whole; i++) from += opened[i] > 0;
            for (size_t i = 0; i < rest; i++) held += o[i] > 0;
        }
        memcpy(g, gradient + whole, size);
        memcpy(w, weights + whole, size);
        memcpy(m, momentum + from, (size_t)held * sizeof(float));
        memcpy(v, variance + from, (size_t)held * sizeof(float));
        if (statistic) memcpy(s, saliency + whole, size);
        Sums last = update_lanes(LANES, g, o, s, m, v, w, rule, statistic, rule->packed);
        memcpy(weights + whole, w, size);
        memcpy(momentum + from, m, (size_t)held * sizeof(float));
        memcpy(variance + from, v, (size_t)held * sizeof(float));
        if (statistic) memcpy(saliency + whole, s, size);
        sums->squares += last.squares;
        sums->moves += last.moves;
    }
}

/* Repacks a moment after some weights were opened and closed; the opened ones get 0. `to` needs room for 15 elements
 * more than are open. */
void repack(int64_t n, const uint8_t *swapped, const uint8_t *opened, const float *from, float *to) {
    for (int64_t i = 0; i < n; i += LANES) {
        uint8_t padded[2][LANES] = {{0}};
        const uint8_t *o = opened + i, *s = swapped + i;
        if (n - i < LANES) { /* the rest, in zero-padded arrays */
            o = memcpy(padded[0], o, (size_t)(n - i));
            s = memcpy(padded[1], s, (size_t)(n - i));
        }
        __mmask16 open = are_open(o), was = open ^ are_open(s);
        __m512 kept = _mm512_maskz_expand_ps(was, _mm512_loadu_ps(from));
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(open, _mm512_maskz_mov_ps(open & was, kept)));
        from += __builtin_popcount(was);
        to += __builtin_popcount(open);
    }
}

#else

void repack(int64_t n, const uint8_t *swapped, const uint8_t *opened, const float *from, float *to) {
    for (int64_t i = 0; i < n; i++) {
        const int open = opened[i] > 0, was = open ^ swapped[i];
        if (open) *to++ = was ? *from : 0;
        from += was;
    }
}

INLINE void add(float *saliency, float g, int statistic) {
    if (statistic == ABS_SUM) *saliency += g;
    if (statistic == SUM_ABS) *saliency += fabsf(g);
    if (statistic == SUM_SQ) *saliency += g * g;
}

double collect(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, int32_t statistic) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
        if (statistic) add(saliency + i, gradient[i], statistic);
        float g = opened[i] ? gradient[i] : 0;
        total += (double)g * g;
    }
    return total;
}

INLINE Sums update_each(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, float *momentum,
                        float *variance, float *weights, const Rule *rule, int packed) {
    const Rule r = *rule;
    Sums sums = {0, 0};
    for (int64_t i = 0, k = 0; i < n; i++) {
        if (r.statistic) add(saliency + i, gradient[i], r.statistic);
        if (packed && !opened[i]) continue;
        const int64_t at = packed ? k++ : i;
        const float g = opened[i] ? gradient[i] : 0;
        const float m = momentum[at] = r.beta1 * momentum[at] + (1 - r.beta1) * r.scale * g;
        const float v = variance[at] = r.beta2 * variance[at] + (1 - r.beta2) * r.scale * r.scale * g * g;
        float move = m * r.first[opened[i]] / (sqrtf(v) * r.second[opened[i]] + r.epsilon);
        if (opened[i]) move += r.decay * weights[i];
        weights[i] -= r.lr * move;
        sums.squares += (double)g * g;
        sums.moves += (double)move * move;
    }
    return sums;
}

void update(int64_t n, const float *gradient, const uint8_t *opened, float *saliency, float *momentum,
            float *variance, float *weights, const Rule *rule, Sums *sums) {
    if (rule->packed)
        *sums = update_each(n, gradient, opened, saliency, momentum, variance, weights, rule, 1);
    else
        *sums = update_each(n, gradient, opened, saliency, momentum, variance, weights, rule, 0);
}
#endif
