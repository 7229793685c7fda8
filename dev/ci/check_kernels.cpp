// Every op of the CPU backend, on every kernel set that runs here (or on the one that LLMC_ISA names), against the
// same formula in double, on odd shapes; on one thread and on three, which must agree bit for bit. Needs nothing
// but the core: for machines without Python, and for emulators (CONTRIBUTING.md).
//
//   check_kernels [op...]      one line per set, dtype and op: the error, relative to the largest value, and a hash of
//                              all results; exit status 1 if any is wrong
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "backends.h"
#include "core/random.h"
#include "cpu/isa.h"
#include "core/master.h"

using namespace llmc;
using i64 = std::int64_t;
using Numbers = std::vector<double>;

namespace {

void choose(const std::string& isa) {
#if defined(_WIN32)
    _putenv_s("LLMC_ISA", isa.c_str());
#else
    setenv("LLMC_ISA", isa.c_str(), 1);
#endif
}

// One run of one op: makes its operands, remembers the bits of its results, and how far they are from what they
// should be, relative to the largest.
class Run {
    std::shared_ptr<Backend> backend_;

  public:
    Run(DType dtype, int threads) : backend_(make_backend("cpu", threads)), ops(*backend_), dtype(dtype) {}

    Backend& ops;
    const DType dtype;
    double worst = 0;
    std::vector<char> bits;

    Numbers random(i64 n, double scale = 1, DType as = DType::f32) {
        std::vector<float> x(static_cast<std::size_t>(n));
        rng_.normal_(x.data(), n, 0.0f, static_cast<float>(scale));
        Numbers y(x.begin(), x.end());
        if (as == DType::bf16)
            for (double& v : y) v = to_float(from_float<bf16>(static_cast<float>(v)));
        return y;
    }
    // Normal numbers that the dtype holds exactly.
    Numbers values(i64 n, double scale = 1) { return random(n, scale, dtype); }

    Tensor tensor(const Numbers& x, std::initializer_list<i64> shape, DType type) {
        Tensor t = empty(shape, type);
        for (i64 i = 0; i < t.numel(); ++i) {
            const double v = x[static_cast<std::size_t>(i)];
            if (type == DType::f32) t.as<float>()[i] = static_cast<float>(v);
            if (type == DType::bf16) t.as<bf16>()[i] = from_float<bf16>(static_cast<float>(v));
            if (type == DType::i32) t.as<std::int32_t>()[i] = static_cast<std::int32_t>(v);
            if (type == DType::i16) t.as<std::int16_t>()[i] = static_cast<std::int16_t>(v);
        }
        return t;
    }
    Tensor tensor(const Numbers& x, std::initializer_list<i64> shape) { return tensor(x, shape, dtype); }
    // Filled with NaN: an element that is not written shows.
    Tensor output(std::initializer_list<i64> shape, DType type) {
        return tensor(Numbers(static_cast<std::size_t>(empty(shape, type).numel()), std::nan("")), shape,
                      type);
    }
    Tensor output(std::initializer_list<i64> shape) { return output(shape, dtype); }

    static Numbers read(Tensor t) {
        Numbers x;
        for (i64 i = 0; i < t.numel(); ++i)
            x.push_back(t.dtype == DType::f32 ? t.as<float>()[i] : to_float(t.as<bf16>()[i]));
        return x;
    }
    // least: what to call large if all of `want` is small.
    void expect(Tensor got, const Numbers& want, double least = 1e-3) {
        bits.insert(bits.end(), got.as<char>(), got.as<char>() + got.bytes());
        const Numbers x = read(got);
        double largest = least, error = 0;
        for (const double w : want) largest = std::max(largest, std::fabs(w));
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double e = std::fabs(x[i] - want[i]) / largest;
            error = e <= error ? error : e;  // a NaN stays
            if (std::isnan(e)) error = std::numeric_limits<double>::infinity();
        }
        worst = std::max(worst, error);
    }
    void expect_same(Tensor a, Tensor b) {
        if (!std::equal(a.as<char>(), a.as<char>() + a.bytes(), b.as<char>()))
            worst = std::numeric_limits<double>::infinity();
    }

  private:
    Tensor empty(std::initializer_list<i64> shape, DType type) {
        Tensor t(nullptr, type, shape);
        const std::shared_ptr<Backend> owner = backend_;
        memory_.emplace_back(owner->allocate(static_cast<std::size_t>(t.bytes() + 64)),
                             [owner](void* p) { owner->release(p); });
        t.data = memory_.back().get();
        return t;
    }
    Mt19937 rng_{1337};
    std::vector<std::shared_ptr<void>> memory_;
};

double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}
double gelu_gradient(double x) { return (gelu(x + 1e-6) - gelu(x - 1e-6)) / 2e-6; }

// out (M,N) = a b + bias, where a(m,k) = a[m*am + k*ak] and so on.
Numbers matmul(i64 M, i64 N, i64 K, const Numbers& a, i64 am, i64 ak, const Numbers& b, i64 bk, i64 bn,
               const Numbers& bias = {}) {
    Numbers c(static_cast<std::size_t>(M * N));
    for (i64 m = 0; m < M; ++m)
        for (i64 n = 0; n < N; ++n) {
            double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(n)];
            for (i64 k = 0; k < K; ++k)
                sum += a[static_cast<std::size_t>(m * am + k * ak)] *
                       b[static_cast<std::size_t>(k * bk + n * bn)];
            c[static_cast<std::size_t>(m * N + n)] = sum;
        }
    return c;
}
template <class F>
Numbers map(const Numbers& x, F f) {
    Numbers y;
    for (const double v : x) y.push_back(f(v));
    return y;
}
Numbers add(Numbers a, const Numbers& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
}
Numbers times(Numbers a, const Numbers& b) {
    for (std::size_t i = 0; i < a.size(); ++i) a[i] *= b[i];
    return a;
}
Numbers column_sums(const Numbers& x, i64 N) {
    Numbers sum(static_cast<std::size_t>(N));
    for (std::size_t i = 0; i < x.size(); ++i) sum[i % static_cast<std::size_t>(N)] += x[i];
    return sum;
}

// ---- matmuls ----

struct MatmulShape {
    i64 N, C, OC;
};
// Few rows, one block and less, edges in every direction, several blocks, and reductions in several stretches.
const MatmulShape kMatmuls[] = {{1, 1, 1},    {1, 33, 20},   {7, 96, 5},     {8, 65, 200},   {9, 64, 64},
                                {31, 5, 33},  {33, 31, 17},  {64, 96, 96},   {70, 130, 97},  {200, 257, 66},
                                {290, 48, 9}, {65, 800, 40}, {40, 1570, 33}, {193, 192, 768}};

void matmul_forward(Run& r) {
    for (const auto& [N, C, OC] : kMatmuls) {
        const Numbers x = r.values(N * C), w = r.values(OC * C), b = r.values(OC);
        const Tensor inp = r.tensor(x, {N, C}), weight = r.tensor(w, {OC, C}), bias = r.tensor(b, {OC});
        const Tensor out = r.output({N, OC}), exact = r.output({N, OC}, DType::f32);
        const Tensor pre = r.output({N, OC}), activated = r.output({N, OC}), again = r.output({N, OC});
        const Numbers y = matmul(N, OC, C, x, C, 1, w, 1, C, b);
        r.ops.matmul_forward(out, inp, weight, bias);
        r.expect(out, y);
        r.ops.matmul_forward(exact, inp, weight, Tensor());
        r.expect(exact, matmul(N, OC, C, x, C, 1, w, 1, C));
        r.ops.matmul_gelu_forward(activated, pre, inp, weight, bias);
        r.expect_same(pre, out);
        r.ops.gelu_forward(again, out);
        r.expect_same(activated, again);
        r.expect(activated, map(Run::read(out), gelu));
        // Packed ahead, and after the weight has changed.
        r.ops.weights_changed(weight);
        for (int i = 0; i < 2; ++i) {
            r.ops.matmul_forward(again, inp, weight, bias);
            r.expect_same(again, out);
        }
        r.ops.zero(weight);
        r.ops.matmul_forward(again, inp, weight, Tensor());
        r.expect(again, Numbers(y.size(), 0.0));
    }
}

void matmul_backward(Run& r) {
    for (const auto& [N, C, OC] : kMatmuls) {
        const Numbers x = r.values(N * C), w = r.values(OC * C), dy = r.values(N * OC), p = r.values(N * C);
        const Tensor inp = r.tensor(x, {N, C}), weight = r.tensor(w, {OC, C}), dout = r.tensor(dy, {N, OC});
        const Tensor pre = r.tensor(p, {N, C});
        const Numbers dx = matmul(N, C, OC, dy, OC, 1, w, C, 1), dw = matmul(OC, C, N, dy, 1, OC, x, C, 1);
        for (const DType type : {DType::f32, r.dtype}) {
            const Tensor dinp = r.output({N, C}), dweight = r.output({OC, C}, type),
                         dbias = r.output({OC}, type);
            r.ops.matmul_backward(dinp, dweight, dbias, dout, inp, weight, false);
            r.expect(dinp, dx);
            r.expect(dweight, dw);
            r.expect(dbias, column_sums(dy, OC));
            const Numbers before = Run::read(dweight);
            r.ops.matmul_backward(Tensor(), dweight, dbias, dout, inp, weight, true);
            r.expect(dweight, add(before, dw));
            const Tensor fused = r.output({N, C}), composed = r.output({N, C});
            r.ops.weights_changed(weight);
            r.ops.matmul_gelu_backward(fused, Tensor(), Tensor(), dout, inp, weight, pre, true);
            r.ops.gelu_backward(composed, pre, dinp);
            r.expect_same(fused, composed);
            r.expect(fused, times(Run::read(dinp), map(p, gelu_gradient)));
        }
    }
    // No rows: gradients are overwritten with zeros all the same.
    const Tensor dweight = r.output({5, 7}, DType::f32), dbias = r.output({5}, DType::f32);
    r.ops.matmul_backward(Tensor(), dweight, dbias, r.output({0, 5}), r.output({0, 7}), r.output({5, 7}),
                          false);
    r.expect(dweight, Numbers(35, 0.0));
    r.expect(dbias, Numbers(5, 0.0));
}

// ---- attention ----

struct AttentionShape {
    i64 B, T, NH, HS;
};
const AttentionShape kAttentions[] = {{1, 1, 1, 1},    {1, 2, 1, 3},   {2, 5, 3, 7},   {1, 31, 2, 16},
                                      {1, 33, 1, 64},  {2, 64, 2, 64}, {1, 65, 1, 80}, {1, 130, 1, 96},
                                      {1, 97, 1, 128}, {1, 260, 2, 33}};

struct HeadResult {
    Numbers out, lse, dqkv;
};
HeadResult attention(const AttentionShape& s, const Numbers& qkv, const Numbers& dout) {
    const auto [B, T, NH, HS] = s;
    const i64 C = NH * HS;
    HeadResult y{Numbers(static_cast<std::size_t>(B * T * C)), Numbers(static_cast<std::size_t>(B * NH * T)),
                 Numbers(static_cast<std::size_t>(B * T * 3 * C))};
    const double scale = 1 / std::sqrt(static_cast<double>(HS));
    for (i64 bh = 0; bh < B * NH; ++bh) {
        const auto at = [&, C = C, T = T, HS = HS, NH = NH](i64 t, i64 which, i64 c) {
            return static_cast<std::size_t>((bh / NH * T + t) * 3 * C + which * C + bh % NH * HS + c);
        };
        const auto to = [&, C = C, T = T, HS = HS, NH = NH](i64 t, i64 c) {
            return static_cast<std::size_t>((bh / NH * T + t) * C + bh % NH * HS + c);
        };
        for (i64 t = 0; t < T; ++t) {
            Numbers p(static_cast<std::size_t>(t + 1)), dp(p.size());
            double highest = -1e300, total = 0, D = 0;
            for (i64 u = 0; u <= t; ++u) {
                double& score = p[static_cast<std::size_t>(u)];
                for (i64 c = 0; c < HS; ++c) score += qkv[at(t, 0, c)] * qkv[at(u, 1, c)] * scale;
                highest = std::max(highest, score);
            }
            for (double& v : p) total += v = std::exp(v - highest);
            y.lse[static_cast<std::size_t>(bh * T + t)] = highest + std::log(total);
            for (double& v : p) v /= total;
            for (i64 u = 0; u <= t; ++u)
                for (i64 c = 0; c < HS; ++c) {
                    y.out[to(t, c)] += p[static_cast<std::size_t>(u)] * qkv[at(u, 2, c)];
                    dp[static_cast<std::size_t>(u)] += dout[to(t, c)] * qkv[at(u, 2, c)];
                }
            for (i64 c = 0; c < HS; ++c) D += y.out[to(t, c)] * dout[to(t, c)];
            for (i64 u = 0; u <= t; ++u) {
                const double prob = p[static_cast<std::size_t>(u)];
                const double ds = prob * (dp[static_cast<std::size_t>(u)] - D) * scale;
                for (i64 c = 0; c < HS; ++c) {
                    y.dqkv[at(t, 0, c)] += ds * qkv[at(u, 1, c)];
                    y.dqkv[at(u, 1, c)] += ds * qkv[at(t, 0, c)];
                    y.dqkv[at(u, 2, c)] += prob * dout[to(t, c)];
                }
            }
        }
    }
    return y;
}

void attention(Run& r) {
    for (const AttentionShape& s : kAttentions) {
        const auto [B, T, NH, HS] = s;
        const i64 C = NH * HS;
        const Numbers x = r.values(B * T * 3 * C, 1.5), dy = r.values(B * T * C);
        const HeadResult want = attention(s, x, dy);
        const Tensor qkv = r.tensor(x, {B, T, 3 * C}), dout = r.tensor(dy, {B, T, C}),
                     out = r.output({B, T, C});
        const Tensor lse = r.output({B, NH, T}, DType::f32), dqkv = r.output({B, T, 3 * C});
        r.ops.attention_forward(out, lse, qkv, NH);
        r.expect(out, want.out);
        r.expect(lse, want.lse, 1);
        r.ops.attention_backward(dqkv, dout, qkv, out, lse, NH);
        r.expect(dqkv, want.dqkv);
        // Generation: all but the last position at once, then the last.
        const i64 maxT = T + 3;
        const Tensor k = r.output({B, NH, maxT, HS}), v = r.output({B, NH, maxT, HS}),
                     y = r.output({B, T, C});
        r.ops.attention_decode(y, k, v, qkv, r.tensor(Numbers(static_cast<std::size_t>(B)), {B}, DType::i32),
                               NH);
        r.expect(y, want.out);
    }
}

// ---- the rest ----

void gelu_ops(Run& r) {
    for (const i64 n : {1, 3, 17, 1000, 40000}) {
        const Numbers x = r.values(n, 2), dy = r.values(n);
        const Tensor inp = r.tensor(x, {n}), dout = r.tensor(dy, {n}), out = r.output({n}),
                     dinp = r.output({n});
        r.ops.gelu_forward(out, inp);
        r.expect(out, map(x, gelu), 1);
        r.ops.gelu_backward(dinp, inp, dout);
        r.expect(dinp, times(map(x, gelu_gradient), dy), 1);
        r.ops.residual_forward(dinp, inp, dout);
        r.expect(dinp, add(x, dy), 1);
    }
}

void layernorm(Run& r) {
    for (const auto& [N, C] : {std::pair<i64, i64>{1, 1}, {3, 5}, {7, 48}, {40, 100}, {300, 33}}) {
        const Numbers a = r.values(N * C), b = r.values(N * C), w = r.values(C), bias = r.values(C),
                      dy = r.values(N * C), dx0 = r.values(N * C);
        const Tensor residual = r.output({N, C}), out = r.output({N, C}), plain = r.output({N, C});
        const Tensor mean = r.output({N}, DType::f32), rstd = r.output({N}, DType::f32);
        const Tensor weight = r.tensor(w, {C}), biases = r.tensor(bias, {C});
        r.ops.fused_residual_layernorm_forward(residual, out, mean, rstd, r.tensor(a, {N, C}),
                                               r.tensor(b, {N, C}), weight, biases);
        r.expect(residual, add(a, b));
        r.ops.layernorm_forward(plain, mean, rstd, residual, weight, biases);
        r.expect_same(plain, out);
        const Numbers x = Run::read(residual);
        Numbers y, means, rstds, dx = dx0, dw(static_cast<std::size_t>(C)), db = dw;
        for (i64 n = 0; n < N; ++n) {
            const double* row = x.data() + n * C;
            double mu = 0, var = 0, avg_g = 0, avg_gn = 0;
            for (i64 c = 0; c < C; ++c) mu += row[c] / static_cast<double>(C);
            for (i64 c = 0; c < C; ++c) var += (row[c] - mu) * (row[c] - mu) / static_cast<double>(C);
            const double rs = 1 / std::sqrt(var + 1e-5);
            means.push_back(mu), rstds.push_back(rs);
            for (i64 c = 0; c < C; ++c) {
                const std::size_t at = static_cast<std::size_t>(n * C + c), cc = static_cast<std::size_t>(c);
                const double norm = (row[c] - mu) * rs, g = dy[at] * w[cc];
                y.push_back(norm * w[cc] + bias[cc]);
                dw[cc] += dy[at] * norm, db[cc] += dy[at];
                avg_g += g / static_cast<double>(C), avg_gn += g * norm / static_cast<double>(C);
            }
            for (i64 c = 0; c < C; ++c) {
                const std::size_t at = static_cast<std::size_t>(n * C + c);
                dx[at] +=
                    rs * (dy[at] * w[static_cast<std::size_t>(c)] - avg_g - (row[c] - mu) * rs * avg_gn);
            }
        }
        r.expect(out, y);
        r.expect(mean, means);
        if (C > 1) r.expect(rstd, rstds);
        const Tensor dinp = r.tensor(dx0, {N, C}), dweight = r.tensor(Numbers(dw.size()), {C}, DType::f32),
                     dbias = r.tensor(Numbers(dw.size()), {C}, DType::f32),
                     dinp_sum = r.tensor(Numbers(dw.size()), {C}, DType::f32);
        if (C == 1) continue;  // rstd is 316: nothing but cancellation
        r.ops.layernorm_backward(dinp, dweight, dbias, dinp_sum, r.tensor(dy, {N, C}), residual, weight, mean,
                                 rstd);
        r.expect(dinp, dx);
        r.expect(dweight, dw);
        r.expect(dbias, db);
        r.expect(dinp_sum, column_sums(dx, C));
    }
}

void encoder(Run& r) {
    const i64 B = 3, T = 5, C = 37, Vp = 11, maxT = 9;
    const Numbers e = r.values(Vp * C), p = r.values(maxT * C), dy = r.values(B * T * C);
    Numbers tokens, out, dwte(static_cast<std::size_t>(Vp * C)), dwpe(static_cast<std::size_t>(maxT * C));
    for (i64 i = 0; i < B * T; ++i) {
        const i64 token = i * i % 7;
        tokens.push_back(static_cast<double>(token));
        for (i64 c = 0; c < C; ++c) {
            const auto w = static_cast<std::size_t>(token * C + c),
                       q = static_cast<std::size_t>(i % T * C + c);
            out.push_back(e[w] + p[q]);
            dwte[w] += dy[static_cast<std::size_t>(i * C + c)],
                dwpe[q] += dy[static_cast<std::size_t>(i * C + c)];
        }
    }
    const Tensor inp = r.tensor(tokens, {B, T}, DType::i32), y = r.output({B, T, C});
    r.ops.encoder_forward(y, inp, r.tensor(e, {Vp, C}), r.tensor(p, {maxT, C}), Tensor());
    r.expect(y, out);
    const Tensor ge = r.tensor(Numbers(dwte.size()), {Vp, C}, DType::f32),
                 gp = r.tensor(Numbers(dwpe.size()), {maxT, C}, DType::f32);
    r.ops.encoder_backward(ge, gp, r.tensor(dy, {B, T, C}), inp);
    r.expect(ge, dwte);
    r.expect(gp, dwpe);
}

void classifier(Run& r) {
    for (const auto& [N, V, Vp] :
         {std::tuple<i64, i64, i64>{1, 1, 1}, {3, 17, 24}, {9, 50, 50}, {5, 1000, 1024}}) {
        const Numbers x = r.values(N * Vp, 3);
        const float dloss = 0.25f;
        Numbers targets, losses, dx;
        for (i64 n = 0; n < N; ++n) {
            const i64 target = n == 2 ? -1 : n * 5 % V;
            targets.push_back(static_cast<double>(target));
            double total = 0;
            for (i64 v = 0; v < V; ++v) total += std::exp(x[static_cast<std::size_t>(n * Vp + v)]);
            losses.push_back(target < 0 ? 0 : std::log(total) - x[static_cast<std::size_t>(n * Vp + target)]);
            for (i64 v = 0; v < Vp; ++v) {
                const double p = std::exp(x[static_cast<std::size_t>(n * Vp + v)]) / total;
                dx.push_back(target < 0 || v >= V ? 0 : (p - (v == target)) * dloss);
            }
        }
        const Tensor logits = r.tensor(x, {N, Vp}), t = r.tensor(targets, {N}, DType::i32);
        const Tensor loss = r.output({N}, DType::f32), same = r.output({N}, DType::f32);
        r.ops.crossentropy_forward(loss, logits, t, V);
        r.expect(loss, losses);
        r.ops.fused_classifier(same, logits, t, dloss, V);
        r.expect_same(same, loss);
        r.expect(logits, dx);
    }
}

void norms(Run& r) {
    for (const i64 n : {1, 5, 1000, 600001}) {
        const Numbers x = r.values(n), y = r.random(n);
        double squares = 0, sum = 0;
        for (const double v : x) squares += v * v;
        for (const double v : y) sum += v;
        const Tensor out = r.tensor({2.0}, {1}, DType::f32);
        r.ops.global_norm_squared(out, r.tensor(x, {n}));
        r.expect(out, {2.0 + squares});
        const Tensor total = r.tensor({2.0}, {1}, DType::f32);
        r.ops.sum(total, r.tensor(y, {n}, DType::f32), 0.5f);
        r.expect(total, {2.0 + 0.5 * sum}, std::sqrt(static_cast<double>(n)));

        // Of two tensors, in digits, which must be the same if the first is cut in two.
        const Tensor digits = r.tensor(Numbers(kNormDigits), {kNormDigits}, DType::f32),
                     cut = r.tensor(Numbers(kNormDigits), {kNormDigits}, DType::f32);
        const Tensor first = r.tensor(x, {n}), second = r.tensor(y, {n}, DType::f32);
        const i64 middle = n / 2 / kNormBlock * kNormBlock;
        double both = squares;
        for (const double v : y) both += v * v;
        r.ops.gradient_norm_squared(digits, std::vector{first, second});
        r.ops.gradient_norm_squared(cut, std::vector{second, first.slice(middle, n), first.slice(0, middle)});
        r.expect_same(cut, digits);
        const Tensor norm = r.output({1}, DType::f32), factor = r.output({1}, DType::f32);
        r.ops.clip_factor(norm, factor, digits, 0.125f);
        r.expect(norm, {std::sqrt(both)});
        r.expect(factor, {std::min(1.0, 0.125 / std::sqrt(both))});
    }
}

void adamw(Run& r) {
    for (const i64 n : {1, 19, 20001})
        for (const DType grad_type : {DType::f32, r.dtype}) {
            const Numbers p = r.values(n), g = r.random(n, 1, grad_type), m0 = r.random(n),
                          v0 = map(r.random(n), [](double x) { return x * x; });
            const AdamWStep s{1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 0.25f, 7};
            Numbers want, ms, vs;
            for (i64 i = 0; i < n; ++i) {
                const auto at = static_cast<std::size_t>(i);
                const double grad = g[at] * 0.5;
                ms.push_back(0.1 * grad + 0.9 * static_cast<float>(m0[at]));
                vs.push_back(0.05 * grad * grad + 0.95 * static_cast<float>(v0[at]));
                want.push_back(p[at] -
                               1e-2 * (ms.back() / 0.5 / (std::sqrt(vs.back() / 0.25) + 1e-8) + 0.1 * p[at]));
            }
            const Tensor param = r.tensor(p, {n}), m = r.tensor(m0, {n}, DType::f32),
                         v = r.tensor(v0, {n}, DType::f32);
            const bool bf = r.dtype == DType::bf16;
            const Tensor master = bf ? r.tensor(Numbers(p.size()), {n}, DType::i16) : Tensor();
            const Tensor grad = r.tensor(g, {n}, grad_type), factor = r.tensor({0.5}, {1}, DType::f32);
            r.ops.adamw(param, master, m, v, grad, factor, s);
            r.expect(m, ms, 1);
            r.expect(v, vs, 1);
            r.expect(param, want, 1);
            // In two parts: the same.
            const i64 middle = n / 2;
            const Tensor halves[] = {r.tensor(p, {n}),
                                     bf ? r.tensor(Numbers(p.size()), {n}, DType::i16) : Tensor(),
                                     r.tensor(m0, {n}, DType::f32), r.tensor(v0, {n}, DType::f32), grad};
            const auto part = [&](i64 begin, i64 end) {
                const auto of = [&](int i) { return halves[i] ? halves[i].slice(begin, end) : Tensor(); };
                return AdamWOperands{of(0), of(1), of(2), of(3), of(4), s.weight_decay, s.seed, begin};
            };
            r.ops.adamw_many(std::vector{part(0, middle), part(middle, n)}, factor, s);
            r.expect_same(halves[0], param);
            r.expect_same(halves[2], m);
            r.expect_same(halves[3], v);
            if (!bf) continue;
            r.expect_same(halves[1], master);
            // The master and the parameter together are the f32 weight.
            const Tensor whole = r.output({n}, DType::f32);
            for (i64 i = 0; i < n; ++i)
                whole.as<float>()[i] = join_master(param.as<bf16>()[i], master.as<std::int16_t>()[i]);
            const double before = r.worst;
            r.worst = 0;
            r.expect(whole, want, 1);
            r.worst = r.worst > 1e-6 ? std::numeric_limits<double>::infinity() : before;
            // Without a master: rounded up or down.
            const Tensor rounded = r.tensor(p, {n});
            r.ops.adamw(rounded, Tensor(), r.tensor(m0, {n}, DType::f32), r.tensor(v0, {n}, DType::f32), grad,
                        factor, s);
            r.expect(rounded, want, 1);
        }
}

void muon(Run& r) {
    for (const i64 n : {1, 19, 20001})
        for (const DType grad_type : {DType::f32, r.dtype}) {
            const Numbers p = r.values(n), d = r.values(n), g = r.random(n, 1, grad_type), m0 = r.random(n);
            Numbers want, ms, directions;
            for (i64 i = 0; i < n; ++i) {
                const auto at = static_cast<std::size_t>(i);
                const double grad = g[at] * 0.5;
                ms.push_back(0.1 * grad + 0.9 * static_cast<float>(m0[at]));
                directions.push_back(0.1 * grad + 0.9 * ms.back());
                want.push_back(p[at] - 1e-2 * (3 * d[at] + 0.1 * p[at]));
            }
            const Tensor m = r.tensor(m0, {n}, DType::f32), out = r.output({n}), param = r.tensor(p, {n});
            const Tensor direction = r.tensor(d, {n}), factor = r.tensor({0.5}, {1}, DType::f32);
            const bool bf = r.dtype == DType::bf16;
            const Tensor master = bf ? r.tensor(Numbers(p.size()), {n}, DType::i16) : Tensor();
            r.ops.muon_momentum(out, m, r.tensor(g, {n}, grad_type), factor, 0.9f, true);
            r.expect(m, ms, 1);
            r.expect(out, directions, 1);
            const MuonStep s{1e-2f, 3.0f, 0.1f, 7};
            r.ops.muon_update(param, master, direction, factor, s);
            r.expect(param, want, 1);
            if (!bf) continue;
            const Tensor rounded = r.tensor(p, {n});  // up or down
            r.ops.muon_update(rounded, Tensor(), direction, factor, s);
            r.expect(rounded, want, 1);
        }
}

void newton_schulz(Run& r) {
    for (const auto& [R, C] : {std::pair<i64, i64>{3, 50}, {50, 3}, {20, 130}}) {
        // X of orthogonal rows or columns, each of norm 1 / sqrt(k): a step makes it p(1 / k) X.
        const i64 k = std::min(R, C), n = std::max(R, C);
        Numbers x(static_cast<std::size_t>(R * C)), want(x.size());
        for (i64 i = 0; i < k; ++i)
            for (i64 j = i; j < n; j += k)
                x[static_cast<std::size_t>(R < C ? i * C + j : j * C + i)] =
                    1 / std::sqrt(static_cast<double>((n - i + k - 1) / k));
        const double a = 1 / static_cast<double>(k), root = std::sqrt(a);
        for (std::size_t i = 0; i < x.size(); ++i)
            want[i] = (3.4445 - 4.7750 * a + 2.0315 * a * a) * root * x[i];
        const Tensor out = r.output({R, C}), gram = r.output({k, k}), polynomial = r.output({k, k});
        r.ops.newton_schulz(out, r.tensor(x, {R, C}), gram, polynomial,
                            r.output({kNormDigits + 2}, DType::f32), 1);
        r.expect(out, want);
    }
}

void copies(Run& r) {
    for (const i64 n : {1, 13, 30000}) {
        const Numbers x = r.values(n);
        const Tensor a = r.tensor(x, {n}), wide = r.output({n}, DType::f32), back = r.output({n}),
                     zero = r.output({n});
        r.ops.copy(wide, a);
        r.expect(wide, x);
        r.ops.copy(back, wide);
        r.expect_same(back, a);
        r.ops.zero(zero);
        r.expect(zero, Numbers(x.size()));
    }
}

unsigned hash(const std::vector<char>& bytes) {  // FNV-1a
    std::uint32_t h = 2166136261u;
    for (const char byte : bytes) h = (h ^ static_cast<unsigned char>(byte)) * 16777619u;
    return h;
}

struct Check {
    const char* name;
    void (*run)(Run&);
    double f32, bf16;  // tolerances
};
const Check kChecks[] = {{"copy", copies, 0, 0},
                         {"gelu, residual", gelu_ops, 5e-7, 4e-3},
                         {"layernorm", layernorm, 2e-6, 8e-3},
                         {"encoder", encoder, 1e-6, 4e-3},
                         {"matmul_forward", matmul_forward, 2e-6, 4e-3},
                         {"matmul_backward", matmul_backward, 2e-6, 6e-3},
                         {"attention", attention, 4e-6, 1e-2},
                         {"classifier", classifier, 1e-6, 4e-3},
                         {"sum, norm", norms, 5e-7, 5e-7},
                         {"adamw", adamw, 5e-7, 8e-3},
                         {"muon", muon, 5e-7, 8e-3},
                         {"newton_schulz", newton_schulz, 4e-6, 4e-2}};

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> sets = {choose_isa().kernels->isa};
    const char* forced = std::getenv("LLMC_ISA");
    if (!forced || !*forced) sets = choose_isa().usable;
    bool all_well = true;
    for (const std::string& isa : sets) {
        choose(isa);
        for (const Check& check : kChecks) {
            if (argc > 1 && std::find(argv + 1, argv + argc, std::string(check.name)) == argv + argc)
                continue;
            for (const DType dtype : {DType::f32, DType::bf16}) {
                Run one(dtype, 1), three(dtype, 3);
                check.run(one);
                check.run(three);
                const bool right = one.worst <= (dtype == DType::f32 ? check.f32 : check.bf16);
                const bool same = one.bits == three.bits && one.worst == three.worst;
                all_well = all_well && right && same;
                std::printf("%-12s %-5s %-16s %.1e  %08x%s%s\n", isa.c_str(), name_of(dtype), check.name,
                            one.worst, hash(one.bits), right ? "" : "  WRONG",
                            same ? "" : "  DIFFERS ON THREE THREADS");
                std::fflush(stdout);
            }
        }
    }
    return all_well ? 0 : 1;
}
