// cuBLASLt: each kind of matmul is described, and its algorithm asked for, once; afterwards a matmul is one lookup and
// one call.
#include "cuda/cublaslt.h"

#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "cuda/dynamic_library.h"
#include "cuda/runtime.h"
#include "cuda/tuned_algorithms.h"

namespace llmc {

namespace {

constexpr std::size_t kWorkspaceBytes = MatmulEngine::kWorkspaceBytes;

struct Library {
    DynamicLibrary file{kCublasLt};
#define LLMC_FUNCTION(name)                                                                                  \
    decltype(cublasLt##name)* name = file.function<decltype(cublasLt##name)>("cublasLt" #name)
    LLMC_FUNCTION(Create);
    LLMC_FUNCTION(Destroy);
    LLMC_FUNCTION(Matmul);
    LLMC_FUNCTION(MatmulDescCreate);
    LLMC_FUNCTION(MatmulDescDestroy);
    LLMC_FUNCTION(MatmulDescSetAttribute);
    LLMC_FUNCTION(MatrixLayoutCreate);
    LLMC_FUNCTION(MatrixLayoutDestroy);
    LLMC_FUNCTION(MatmulPreferenceCreate);
    LLMC_FUNCTION(MatmulPreferenceDestroy);
    LLMC_FUNCTION(MatmulPreferenceSetAttribute);
    LLMC_FUNCTION(MatmulAlgoGetHeuristic);
    LLMC_FUNCTION(MatmulAlgoCheck);
    LLMC_FUNCTION(GetVersion);
#undef LLMC_FUNCTION
};

// Tuning asks for kOffers algorithms (cuBLASLt 13.1 has 3 to 8), times each, then the best kFinalists of them kRounds
// times. A time is of runs without a pause for so long, because a card under load has another clock than a rested one.
constexpr int kOffers = 32, kFinalists = 4, kRounds = 5;
constexpr float kGroupMilliseconds = 2.0f;

void check(cublasStatus_t status, const char* call) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw Error(filled("cuda: cuBLASLt returned status {} ({})", static_cast<int>(status), call));
}
#define LT_CHECK(call) check(call, #call)

cudaDataType_t data_type(DType t) { return t == DType::f32 ? CUDA_R_32F : CUDA_R_16BF; }

cublasLtEpilogue_t epilogue_of(Epilogue e) {
    switch (e) {
    case Epilogue::none: return CUBLASLT_EPILOGUE_DEFAULT;
    case Epilogue::bias: return CUBLASLT_EPILOGUE_BIAS;
    case Epilogue::gelu_bias: return CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    case Epilogue::gelu: return CUBLASLT_EPILOGUE_GELU_AUX;
    case Epilogue::dgelu: return CUBLASLT_EPILOGUE_DGELU;
    case Epilogue::bgradb: return CUBLASLT_EPILOGUE_BGRADB;
    }
    return CUBLASLT_EPILOGUE_DEFAULT;
}

// Everything that the choice of an algorithm depends on, and nothing else (as matmul_in_words says it).
struct Key {
    std::int64_t m, n, k, lda, ldb, ldd;
    std::uint32_t align_a, align_b, align_d, align_aux, align_bias;
    std::uint8_t transpose_a, transpose_b, inputs, output, accumulate, epilogue, padding[6];

    bool operator==(const Key& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};
static_assert(sizeof(Key) == 6 * 8 + 5 * 4 + 6 + 6, "padding would make equal keys differ");
struct KeyHash {
    std::size_t operator()(const Key& key) const {  // FNV-1a
        const auto* const bytes = reinterpret_cast<const unsigned char*>(&key);
        std::uint64_t hash = 14695981039346656037ull;
        for (std::size_t i = 0; i < sizeof key; ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
        return static_cast<std::size_t>(hash);
    }
};

Key key_of(const Matmul& p) {
    Key key;
    std::memset(&key, 0, sizeof key);
    key.m = p.m, key.n = p.n, key.k = p.k, key.lda = p.lda, key.ldb = p.ldb, key.ldd = p.ldd;
    key.align_a = alignment_of(p.a), key.align_b = alignment_of(p.b), key.align_d = alignment_of(p.d);
    key.align_aux = alignment_of(p.aux), key.align_bias = alignment_of(p.bias);
    key.transpose_a = p.transpose_a, key.transpose_b = p.transpose_b;
    key.inputs = static_cast<std::uint8_t>(p.inputs), key.output = static_cast<std::uint8_t>(p.output);
    key.accumulate = p.accumulate, key.epilogue = static_cast<std::uint8_t>(p.epilogue);
    return key;
}

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(TunedAlgorithm::words));

// What the documentation demands of epilogues; the heuristic is asked only for the rest.
bool allowed(const Matmul& p) {
    if (p.epilogue == Epilogue::none || p.epilogue == Epilogue::bgradb) return true;
    if (p.output != p.inputs) return false;  // bias and aux would be of another type than D
    if (p.epilogue == Epilogue::bias) return true;
    return p.ldd % 8 == 0 && alignment_of(p.aux) >= 16 && alignment_of(p.d) >= 16;
}

}  // namespace

struct MatmulEngine::State {
    struct Plan {
        cublasLtMatmulDesc_t operation = nullptr;
        cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
        cublasLtMatmulAlgo_t algorithm;
        bool usable = false;
    };

    State(bool tf32, const Tuning* tuning) : tf32(tf32) {
        if (tuning)
            tuned = std::make_unique<TunedAlgorithms>(
                tuning->file, filled("{}, cuBLASLt {}", tuning->device, lib.GetVersion()), tf32);
        CUDA_CHECK(cudaMalloc(&workspace, kWorkspaceBytes));
        const cublasStatus_t status = lib.Create(&handle);
        if (status != CUBLAS_STATUS_SUCCESS) cudaFree(workspace);
        check(status, "cublasLtCreate");
    }
    ~State() {
        for (auto& [key, plan] : plans) destroy(plan);
        cudaFree(workspace);
        lib.Destroy(handle);
    }
    void destroy(Plan& plan) {
        if (plan.operation) lib.MatmulDescDestroy(plan.operation);
        for (cublasLtMatrixLayout_t layout : {plan.a, plan.b, plan.d})
            if (layout) lib.MatrixLayoutDestroy(layout);
        plan = {};
    }

    template <class T>
    void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
        LT_CHECK(lib.MatmulDescSetAttribute(operation, attribute, &value, sizeof value));
    }

    void describe(Plan& plan, const Matmul& p) {
        const cublasComputeType_t compute =
            tf32 && p.inputs == DType::f32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
        LT_CHECK(lib.MatmulDescCreate(&plan.operation, compute, CUDA_R_32F));
        const cublasOperation_t ta = p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                                tb = p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
        set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, ta);
        set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, tb);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p.epilogue));
        if (p.epilogue == Epilogue::bias || p.epilogue == Epilogue::gelu_bias)
            set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(p.inputs));
        if (p.epilogue == Epilogue::bgradb)
            set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, data_type(p.output));
        if (p.aux) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ldd);
        const auto layout = [&](cublasLtMatrixLayout_t* out, DType type, bool transposed, std::int64_t rows,
                                std::int64_t columns, std::int64_t ld) {
            if (transposed) std::swap(rows, columns);
            LT_CHECK(lib.MatrixLayoutCreate(out, data_type(type), static_cast<std::uint64_t>(rows),
                                            static_cast<std::uint64_t>(columns), ld));
        };
        layout(&plan.a, p.inputs, p.transpose_a, p.m, p.k, p.lda);
        layout(&plan.b, p.inputs, p.transpose_b, p.k, p.n, p.ldb);
        layout(&plan.d, p.output, false, p.m, p.n, p.ldd);
    }

    void choose(Plan& plan, const Key& key, const Matmul& p, cudaStream_t stream) {
        set_pointers(plan, p);
        if (tuned && take_kept(plan, p)) return;
        const std::vector<cublasLtMatmulAlgo_t> offers = ask(plan, key, tuned ? kOffers : 1);
        plan.usable = !offers.empty();
        if (!plan.usable) return;
        plan.algorithm = offers[0];
        if (offers.size() > 1) choose_fastest(plan, p, offers, stream);
    }

    // The choice that an earlier process made.
    bool take_kept(Plan& plan, const Matmul& p) {
        const TunedAlgorithm* const kept = tuned->find(p);
        if (!kept) return false;
        std::memcpy(&plan.algorithm, kept->words.data(), sizeof plan.algorithm);
        cublasLtMatmulHeuristicResult_t result = {};
        plan.usable = lib.MatmulAlgoCheck(handle, plan.operation, plan.a, plan.b, plan.d, plan.d,
                                          &plan.algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
                      result.workspaceSize <= kWorkspaceBytes;
        if (!plan.usable) tuned->refuse(*kept);
        return plan.usable;
    }

    // The algorithms that the heuristic holds for the fastest, the best first; none if there is none.
    std::vector<cublasLtMatmulAlgo_t> ask(const Plan& plan, const Key& key, int count) {
        cublasLtMatmulPreference_t preference;
        LT_CHECK(lib.MatmulPreferenceCreate(&preference));
        const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                              decltype(lib.MatmulPreferenceDestroy)>
            owner(preference, lib.MatmulPreferenceDestroy);
        const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
            LT_CHECK(lib.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
        // If k is split, the parts are added in f32, never in a bf16 output.
        constexpr std::uint32_t reductions =
            CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_a);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_b);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_d);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_d);
        std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<std::size_t>(count));
        int found = 0;
        if (lib.MatmulAlgoGetHeuristic(handle, plan.operation, plan.a, plan.b, plan.d, plan.d, preference,
                                       count, results.data(), &found) != CUBLAS_STATUS_SUCCESS)
            found = 0;
        std::vector<cublasLtMatmulAlgo_t> offers;
        for (int i = 0; i < found; ++i)
            if (results[i].state == CUBLAS_STATUS_SUCCESS) offers.push_back(results[i].algo);
        return offers;
    }

    cublasStatus_t multiply(const Plan& plan, const Matmul& p, const cublasLtMatmulAlgo_t& algorithm, void* d,
                            cudaStream_t stream) {
        const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
        return lib.Matmul(handle, plan.operation, &alpha, p.a, plan.a, p.b, plan.b, &beta, d, plan.d, d,
                          plan.d, &algorithm, workspace, kWorkspaceBytes, stream);
    }

    // Memory and events for timing a matmul.
    struct Clock {
        explicit Clock(std::size_t output_bytes) {
            usable = cudaMalloc(&output, output_bytes) == cudaSuccess &&
                     cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess;
            if (!usable) cudaGetLastError();  // the error is dealt with: the next launch must not find it
        }
        ~Clock() {
            if (begin) cudaEventDestroy(begin);
            if (end) cudaEventDestroy(end);
            cudaFree(output);
        }
        Clock(const Clock&) = delete;
        Clock& operator=(const Clock&) = delete;

        void* output = nullptr;  // that nobody reads
        cudaEvent_t begin = nullptr, end = nullptr;
        bool usable = false;
    };

    // Milliseconds of a run, of several without a pause; infinite if it fails.
    float time(const Plan& plan, const Matmul& p, const cublasLtMatmulAlgo_t& algorithm, int runs,
               const Clock& clock, cudaStream_t stream) {
        float milliseconds = 0.0f;
        CUDA_CHECK(cudaEventRecord(clock.begin, stream));
        for (int run = 0; run < runs; ++run)
            if (multiply(plan, p, algorithm, clock.output, stream) != CUBLAS_STATUS_SUCCESS) return INFINITY;
        CUDA_CHECK(cudaEventRecord(clock.end, stream));
        CUDA_CHECK(cudaEventSynchronize(clock.end));
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, clock.begin, clock.end));
        return milliseconds / static_cast<float>(runs);
    }

    // Times the algorithms on the matmul's own inputs. If there is no memory for that, the heuristic's first choice
    // stays. (What an epilogue writes beside D, the matmul proper overwrites.)
    void choose_fastest(Plan& plan, const Matmul& p, const std::vector<cublasLtMatmulAlgo_t>& offers,
                        cudaStream_t stream) {
        CUDA_CHECK(cudaDeviceSynchronize());  // what another stream does meanwhile would be timed too
        const std::size_t bytes = static_cast<std::size_t>(p.ldd * p.n * size_of(p.output));
        const Clock clock(bytes);
        if (!clock.usable) return;
        CUDA_CHECK(cudaMemsetAsync(clock.output, 0, bytes, stream));
        struct Candidate {
            const cublasLtMatmulAlgo_t* algorithm;
            float first;
            std::vector<float> times;
            float median() const { return times[times.size() / 2]; }
        };
        std::vector<Candidate> candidates;
        for (const cublasLtMatmulAlgo_t& offer : offers) {
            if (std::isinf(time(plan, p, offer, 1, clock, stream)))
                continue;  // the first run loads the kernel
            candidates.push_back({&offer, time(plan, p, offer, 2, clock, stream), {}});
        }
        if (candidates.empty()) return;
        std::stable_sort(candidates.begin(), candidates.end(),
                         [](const Candidate& x, const Candidate& y) { return x.first < y.first; });
        candidates.resize(std::min<std::size_t>(candidates.size(), kFinalists));
        for (int round = 0; round < kRounds; ++round)  // in turn, so that what disturbs one disturbs all
            for (Candidate& c : candidates) {
                const int runs = std::max(2, static_cast<int>(kGroupMilliseconds / c.first));
                c.times.push_back(time(plan, p, *c.algorithm, runs, clock, stream));
            }
        for (Candidate& c : candidates) std::sort(c.times.begin(), c.times.end());
        const Candidate& best =
            *std::min_element(candidates.begin(), candidates.end(),
                              [](const Candidate& x, const Candidate& y) { return x.median() < y.median(); });
        plan.algorithm = *best.algorithm;
        TunedAlgorithm choice{{}, best.median()};
        std::memcpy(choice.words.data(), &plan.algorithm, sizeof plan.algorithm);
        tuned->add(p, choice);
    }

    Plan make(const Key& key, const Matmul& p, cudaStream_t stream) {
        Plan plan;
        try {
            describe(plan, p);
            choose(plan, key, p, stream);
        } catch (...) {
            destroy(plan);
            throw;
        }
        return plan;
    }

    // The two pointers that cuBLASLt wants in the description.
    void set_pointers(Plan& plan, const Matmul& p) {
        if (p.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        if (p.aux) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux);
    }

    bool tf32;
    Library lib;
    std::unique_ptr<TunedAlgorithms> tuned;  // null: the heuristic chooses
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    std::unordered_map<Key, Plan, KeyHash> plans;
};

MatmulEngine::MatmulEngine(bool tf32, const Tuning* tuning) : state_(std::make_unique<State>(tf32, tuning)) {}
MatmulEngine::~MatmulEngine() = default;

bool MatmulEngine::run(const Matmul& p, cudaStream_t stream) {
    if (!allowed(p)) return false;
    State& s = *state_;
    const Key key = key_of(p);
    auto found = s.plans.find(key);
    if (found == s.plans.end() && s.tuned && is_recorded(stream))
        throw Error("cuda: the tuning of a matmul cannot be recorded");
    if (found == s.plans.end()) found = s.plans.emplace(key, s.make(key, p, stream)).first;
    State::Plan& plan = found->second;
    if (!plan.usable) return false;
    s.set_pointers(plan, p);
    check(s.multiply(plan, p, plan.algorithm, p.d, stream), "cublasLtMatmul");
    return true;
}

}  // namespace llmc
