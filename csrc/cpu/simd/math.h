// Functions of Vec, and loops over elements whose last step is masked.
#pragma once

namespace {

using llmc::i64;

// A full vector, or the first n lanes of one: load(p, All{}) and load(p, n) read alike, so a loop body is
// written once.
struct All {};
template <class T>
inline Vec load(const T* p, All) {
    return load(p);
}
template <class T>
inline void store(T* p, Vec a, All) {
    store(p, a);
}
inline Vec keep_first(Vec a, All, float) { return a; }
inline int lanes(All) { return Vec::W; }
inline int lanes(int n) { return n; }

template <class Body>
inline void each(i64 n, Body body) {
    i64 i = 0;
    for (; i + Vec::W <= n; i += Vec::W) body(i, All{});
    if (i < n) body(i, static_cast<int>(n - i));
}

// The sum of term(i, lanes) over n elements; four partial sums hide the latency of the addition. In the last,
// masked step, term must give 0 in the other lanes.
template <class Term>
inline Vec reduce(i64 n, Term term) {
    Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
    i64 i = 0;
    for (; i + 4 * Vec::W <= n; i += 4 * Vec::W) {
        s0 = s0 + term(i, All{});
        s1 = s1 + term(i + Vec::W, All{});
        s2 = s2 + term(i + 2 * Vec::W, All{});
        s3 = s3 + term(i + 3 * Vec::W, All{});
    }
    for (; i + Vec::W <= n; i += Vec::W) s0 = s0 + term(i, All{});
    if (i < n) s1 = s1 + term(i, static_cast<int>(n - i));
    return (s0 + s1) + (s2 + s3);
}

// The sums of W vectors, in the order of sum().
inline Vec sums_of(Vec* r) {
    transpose(r);
    LLMC_UNROLL
    for (int half = Vec::W / 2; half > 0; half /= 2) {
        LLMC_UNROLL
        for (int i = 0; i < half; ++i) r[i] = r[i] + r[i + half];
    }
    return r[0];
}

// The value that a load gives after a store to T.
template <class T>
inline Vec as_stored(Vec a);
template <>
inline Vec as_stored<float>(Vec a) {
    return a;
}
template <>
inline Vec as_stored<bf16>(Vec a) {
    bf16 t[Vec::W];
    store(t, a);
    return load(t);
}

inline float first_lane(Vec a) {
    float x;
    store(&x, a, 1);
    return x;
}

// e^(x + tail) = (1 + q) 2^n, for a tail far below x: x = n ln2 + r, and the polynomial of degree 6 of Cephes' expf
// on |r| <= ln2/2. Saturates outside of [-87.3, 88.3]; a NaN comes through (which is why the constants are the first
// operands).
struct Power {
    Vec q, n;
};
template <class... Tail>
inline Power power(Vec x, Tail... tail) {
    x = min(set1(88.3762588f), max(set1(-87.3365402f), x));
    const Vec n = round(x * set1(1.44269504f));
    Vec r = fnma(n, set1(0.693359375f), x);
    r = fnma(n, set1(-2.12194440e-4f), r);
    r = (r + ... + tail);
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return {fma(p * r, r, r), n};
}
// Accurate to 1 ulp.
inline Vec exp(Vec x) {
    const Power e = power(x);
    return scale2(e.q + set1(1.0f), e.n);
}

// gelu(x) = x/2 (1 + tanh u) = x / (1 + e^-2u),  2u = 2 sqrt(2/pi) (x + 0.044715 x^3): one exponential, and
// none of the cancellation of 1 + tanh u at negative x.
constexpr float kGelu1 = 1.59576912f, kGelu3 = 0.07135481387376785f;  // 2 sqrt(2/pi), and 0.044715 of it
inline Vec gelu_exponential(Vec x) { return exp(x * fma(x * x, set1(-kGelu3), set1(-kGelu1))); }  // e^-2u

template <class T>
inline Vec gelu(Vec x);
template <>
inline Vec gelu<bf16>(Vec x) {
    return x / (set1(1.0f) + gelu_exponential(x));
}
// Accurate to 2 ulp if fma is fused. A relative error of 2u becomes one of e^-2u that is 2u times as large: at x = -5,
// rounding 2u alone costs 28 ulp. So it is computed to twice the precision, as h + t; t sums the errors of all steps.
template <>
inline Vec gelu<float>(Vec x) {
    constexpr float k1 = 1.59576416015625f,
                    k1_rest = 4.96144948e-06f;  // 16 bits of kGelu1, for an exact a - p; the rest
    constexpr float k3_rest = 2.3988324e-09f;   // what f32 cuts off of kGelu3
    const Vec a = set1(-k1), b = set1(-kGelu3);
    const Vec xx = x * x, p = fma(b, xx, a);
    Vec t = fma(b, xx, a - p);       // the rounding error of p
    t = fnma(b, fnma(x, x, xx), t);  // and that of xx
    t = t - fma(set1(k3_rest), xx, set1(k1_rest));
    const Vec h = x * p;
    t = fma(x, t, fma(x, p, zero() - h));
    // If h is outside of the range of exp, t is large or NaN; it must not undo the saturation.
    t = max(min(t, set1(1.0f)), set1(-1.0f));
    const Power e = power(h, t);
    // 1 + e, rounded as little as possible: both terms of e are added to 1 apart.
    return x / ((scale2(e.q, e.n) + set1(1.0f)) + scale2(set1(1.0f), e.n));
}

inline Vec gelu_gradient(Vec x) {
    const Vec e = gelu_exponential(x), s = set1(1.0f) / (set1(1.0f) + e);
    const Vec slope = fma(x * x, set1(3.0f * kGelu3), set1(kGelu1));
    return fma(x * slope * s, e * s, s);  // e s is 1 - s, without its cancellation
}

}  // namespace
