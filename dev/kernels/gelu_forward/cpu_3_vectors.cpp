// An exponential for vectors: a power of two, and a polynomial
//
// x = n ln 2 + r with a whole n and |r| <= ln(2)/2, so e^x = 2^n e^r. 2^n is made by writing n into the exponent's bits. e^r is a
// polynomial of degree 7: its coefficients are those of Cephes' expf (S. Moshier), close to 1/k! but better at the ends of the
// interval. n ln 2 is subtracted in two parts, of which the first has so few bits that n times it is exact. No branch, no table, no call:
// a dozen multiply-adds for a whole vector.
#include "vectors.h"

static Vec exponential(Vec x) {
    x = min(set1(88.3762588f), max(set1(-87.3365402f), x));  // beyond, n would not fit into the exponent
    const Vec n = round(x * set1(1.44269504f));              // x / ln 2
    Vec r = fnma(n, set1(0.693359375f), x);
    r = fnma(n, set1(-2.12194440e-4f), r);
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return scale2(fma(p * r, r, r) + set1(1.0f), n);  // (1 + r + r^2 p) 2^n
}

KERNEL void run(float* out, const float* inp, int64_t N) {
    for_vectors(N, [=](int64_t i, int n) {
        const Vec x = load(inp + i, n);
        const Vec minus_2u = x * fma(x * x, set1(-1.5957691216f * 0.044715f), set1(-1.5957691216f));
        store(out + i, x / (set1(1.0f) + exponential(minus_2u)), n);
    });
}
