// NEON, with the products of Apple's Accelerate, the only way to the matrix units of Apple's CPUs. Its gemm takes blocks of C as our
// own do, and what is done to C afterwards is ours (epilogue). Products of bf16 are made in f32, from widened copies of the operands.
// Attention and products of few rows keep our micro-kernels.
//
// Accelerate promises no order of sums. Tasks are therefore cut by shape alone, so that the same calls are made on any number of
// threads; and it is asked to use no threads of its own, which it would otherwise choose as it likes.
#if !defined(LLMC_ACCELERATE_EMULATION)
#include <dlfcn.h>
#endif
#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd/unroll.h"
#if defined(__AVX2__)  // emulated
#include "cpu/simd/vec_avx2.h"
#else
#include "cpu/simd/vec_neon.h"
#endif
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"

namespace {
constexpr int kMR = 8, kNV = 3;
constexpr i64 kPart = 512, kStretch = 768;
}  // namespace

#include "cpu/simd/gemm.h"
#include "cpu/simd/attention.h"

namespace {
using MultiplyBf16 = MultiplyWidened;
}
#include "cpu/simd/table.h"

#if defined(LLMC_ACCELERATE_EMULATION)
namespace {
// What Accelerate may do is done here, so that tests see who relies on more: the order of a sum, which is cut in two, depends on the
// size of the block; and a product of one row or column reads C though it is multiplied by 0.
void cblas_sgemm(int, int transA, int transB, int M, int N, int K, float, const float* a, int lda,
                 const float* b, int ldb, float beta, float* c, int ldc) {
    const auto dot = [=](i64 m, i64 n, i64 begin, i64 end) {
        double sum = 0.0;
        for (i64 k = begin; k < end; ++k)
            sum += double{a[transA == 112 ? k * lda + m : m * lda + k]} *
                   b[transB == 112 ? n * ldb + k : k * ldb + n];
        return static_cast<float>(sum);
    };
    const i64 cut = (i64{7} * M + N) % K;
    for (i64 m = 0; m < M; ++m)
        for (i64 n = 0; n < N; ++n) {
            const float sum = dot(m, n, 0, cut) + dot(m, n, cut, K);
            float& x = c[m * ldc + n];
            x = beta != 0.0f || M == 1 || N == 1 ? beta * x + sum : sum;
        }
}
struct OneThread {
    OneThread() {}
};
}  // namespace
#else
// As <Accelerate/Accelerate.h> declares it without ACCELERATE_NEW_LAPACK; enumerations are int.
extern "C" void cblas_sgemm(int order, int transA, int transB, int M, int N, int K, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);

namespace {
// While one lives, Accelerate uses no other threads for the calls of this one. The setting belongs to the thread, which may be the
// user's and call Accelerate for other things, so it is put back. The functions are looked up because macOS has them from 15 on.
struct OneThread {
    using Get = unsigned (*)();
    using Set = int (*)(unsigned);
    Set set;
    unsigned before = 0;
    OneThread() {
        static const Get get_threading = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "BLASGetThreading"));
        static const Set set_threading = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "BLASSetThreading"));
        set = get_threading ? set_threading : nullptr;
        if (!set) return;
        before = get_threading();
        set(1);  // BLAS_THREADING_SINGLE_THREADED
    }
    ~OneThread() {
        if (set) set(before);
    }
    OneThread(const OneThread&) = delete;
};
}  // namespace
#endif

namespace {

constexpr i64 kBlock = 512;     // rows and columns of a task, at most
constexpr i64 kWidened = 1024;  // elements of the reduction that are widened at a time

// Lengths are int there: no Mac has the memory for an operand whose are not.
template <class T>
llmc::GemmTask accelerate_task(const Gemm&) {
    return {kBlock, kBlock, 8, 8, kBlock, kBlock};
}

// C of the task, and of bf16 operands the rows of A and columns of B.
template <class T>
i64 accelerate_scratch(const Gemm&, i64, i64, i64, i64) {
    return (kBlock * kBlock + (sizeof(T) == 2 ? 2 * kBlock * kWidened : 0)) * 4;
}

// rows x columns of a matrix, as f32.
inline const float* widened(float* out, const bf16* x, i64 ld, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; ++r) to_f32(out + r * columns, x + r * ld, columns);
    return out;
}

template <class T>
void accelerate_gemm(const Gemm& g, i64 m0, i64 m1, i64 n0, i64 n1, void* scratch) {
    constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
    const i64 M = m1 - m0, N = n1 - n0;
    const bool plain = g.c_f32 && !g.bias && !g.accumulate && !g.pre && !g.dgelu;
    float* const strip = static_cast<float*>(scratch);
    float* const c = plain ? static_cast<float*>(g.c) + m0 * g.ldc + n0 : strip;
    const i64 ldc = plain ? g.ldc : N;
    const OneThread one_thread;
    const auto multiply = [&](const float* a, i64 lda, const float* b, i64 ldb, i64 K, float beta) {
        cblas_sgemm(kRowMajor, g.a_kmajor ? kTrans : kNoTrans, g.b_kmajor ? kNoTrans : kTrans,
                    static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), 1.0f, a,
                    static_cast<int>(lda), b, static_cast<int>(ldb), beta, c, static_cast<int>(ldc));
    };
    const T* const a = static_cast<const T*>(g.a) + (g.a_kmajor ? m0 : m0 * g.lda);
    const T* const b = static_cast<const T*>(g.b) + (g.b_kmajor ? n0 : n0 * g.ldb);
    // A product of one row has been seen to read C though beta is 0, and to find NaN there (ml-explore/mlx#3563).
    if (g.K == 0 || M == 1 || N == 1)
        for (i64 r = 0; r < M; ++r) clear(c + r * ldc, N);
    if constexpr (sizeof(T) == 4) {
        if (g.K > 0) multiply(a, g.lda, b, g.ldb, g.K, 0.0f);
    } else {
        float *const a_f32 = strip + kBlock * kBlock, *const b_f32 = a_f32 + kBlock * kWidened;
        for (i64 k = 0; k < g.K; k += kWidened) {
            const i64 K = smaller(kWidened, g.K - k);
            const float* const left =
                g.a_kmajor ? widened(a_f32, a + k * g.lda, g.lda, K, M) : widened(a_f32, a + k, g.lda, M, K);
            const float* const right =
                g.b_kmajor ? widened(b_f32, b + k * g.ldb, g.ldb, K, N) : widened(b_f32, b + k, g.ldb, N, K);
            multiply(left, g.a_kmajor ? M : K, right, g.b_kmajor ? N : K, K, k > 0 ? 1.0f : 0.0f);
        }
    }
    if (plain) return;
    if (g.c_f32)
        epilogue<T, float>(g, strip, N, m0, n0, M, N);
    else
        epilogue<T, T>(g, strip, N, m0, n0, M, N);
}

// The peak of a matrix unit, of which these registers are no part: products of matrices that stay in L2.
double sgemm_multiply_adds(i64 rounds, float*) {
    constexpr int kSide = 256;
    struct Matrices {
        float* const zeros = new float[2 * kSide * kSide]();
        ~Matrices() { delete[] zeros; }
    };
    thread_local const Matrices matrices;
    const OneThread one_thread;
    const i64 products = rounds / 500;  // 1000 rounds are the fewest that are asked for
    for (i64 i = 0; i < products; ++i)
        cblas_sgemm(101, 111, 111, kSide, kSide, kSide, 1.0f, matrices.zeros, kSide, matrices.zeros, kSide,
                    0.0f, matrices.zeros + kSide * kSide, kSide);
    return 2.0 * kSide * kSide * kSide * static_cast<double>(products);
}

template <class T>
constexpr void use_accelerate(llmc::TypedKernels<T>& t) {
    t.gemm = accelerate_gemm<T>;
    t.gemm_scratch = accelerate_scratch<T>;
    t.gemm_task = accelerate_task<T>;
    t.multiply_adds = sgemm_multiply_adds;
}
constexpr llmc::Kernels with_accelerate(llmc::Kernels k) {
    use_accelerate(k.f32);
    use_accelerate(k.bf16_);
    return k;
}
constexpr llmc::Kernels table = with_accelerate(make_kernels("accelerate"));
}  // namespace
const llmc::Kernels* llmc::kernels_accelerate() { return &table; }
