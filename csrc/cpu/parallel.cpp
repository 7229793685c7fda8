// parallel_for by OpenMP; on macOS by Grand Central Dispatch, because a bundled libomp crashes beside
// PyTorch's. Both run one worker per thread, which takes tasks from a counter: dynamic balance without an
// OpenMP feature that MSVC lacks.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace llmc {

namespace {

// Arithmetic on denormals takes a hundred times as long; nothing in training is worth that. The mode belongs
// to the thread, so it is set where our loops run and put back: the host process keeps its own.
class FlushDenormals {
#if defined(__x86_64__) || defined(_M_X64)
    unsigned saved_ = _mm_getcsr();

  public:
    FlushDenormals() { _mm_setcsr(saved_ | 0x8040u); }
    ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    std::uint64_t saved_;

  public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(saved_ | (std::uint64_t{1} << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
  public:
    FlushDenormals() {}
#endif
};

struct Tasks {
    std::atomic<std::int64_t> next{0};
    std::int64_t count;
    void (*body)(void*, std::int64_t, int);
    void* context;

    void work(int thread) {
        const FlushDenormals mode;
        for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            body(context, task, thread);
    }
};

#if defined(__linux__)
int allowed_cpus() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
}

// The quota of a container, in CPUs; 0 if there is none.
int cgroup_cpus() {
    std::ifstream v2("/sys/fs/cgroup/cpu.max");
    std::string quota;
    double period = 0;
    if (v2 >> quota >> period && quota != "max")
        return std::max(1, static_cast<int>(std::atof(quota.c_str()) / period + 0.5));
    double q = 0, p = 0;
    std::ifstream q1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), p1("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (q1 >> q && p1 >> p && q > 0 && p > 0) return std::max(1, static_cast<int>(q / p + 0.5));
    return 0;
}

#endif

#if defined(__linux__) && defined(_OPENMP) && !defined(__SANITIZE_THREAD__)
// If two threads run on one CPU, everything takes twice as long, and the scheduler does let that happen. So if the
// process may use exactly as many CPUs as it has threads, each worker is bound to a CPU of its own, other than the one
// that the calling thread is on. The calling thread is not bound: it is the user's, and threads that it starts later
// would inherit the binding. If there are more CPUs, nothing is bound, because a second process of this program would
// choose the same ones.
class Pinning {
    std::atomic<int> threads_{0};

  public:
    bool wanted(int threads) const {
        return threads > 1 && !std::getenv("OMP_PROC_BIND") && !std::getenv("GOMP_CPU_AFFINITY") &&
               threads_.load(std::memory_order_relaxed) < threads;
    }
    void done(int threads) { threads_.store(threads, std::memory_order_relaxed); }
    static void bind(int thread, const cpu_set_t& allowed, int caller_cpu) {
        int seen = 0;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed) || cpu == caller_cpu) continue;
            if (++seen == thread) {
                cpu_set_t one;
                CPU_ZERO(&one);
                CPU_SET(cpu, &one);
                sched_setaffinity(0, sizeof one, &one);
                return;
            }
        }
    }
};
Pinning& workers() {
    static Pinning p;
    return p;
}
#endif

}  // namespace

int usable_cpus() {
    int cpus = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    if (const int n = allowed_cpus()) cpus = n;
    if (const int n = cgroup_cpus()) cpus = std::min(cpus, n);
#endif
    return std::max(cpus, 1);
}

int default_threads() {
    int cpus = usable_cpus();
    if (const char* set = std::getenv("OMP_NUM_THREADS")) {
        const int n = std::atoi(set);
        if (n > 0) cpus = n;
    }
#if !defined(_OPENMP) && !defined(__APPLE__)
    cpus = 1;
#endif
    return std::clamp(cpus, 1, 1024);
}

std::string pinning(int threads) {
    (void)threads;
#if defined(__APPLE__)
    return "left to Grand Central Dispatch";
#elif !defined(_OPENMP)
    return "one thread: built without OpenMP";
#elif defined(__linux__)
    if (const char* bind = std::getenv("OMP_PROC_BIND")) return std::string("by OMP_PROC_BIND=") + bind;
    if (std::getenv("GOMP_CPU_AFFINITY")) return "by GOMP_CPU_AFFINITY";
    if (threads == allowed_cpus()) return "each worker on a CPU of its own";
    return "left to the system";
#else
    return "left to the system";
#endif
}

void run_tasks(int threads, std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context) {
    if (tasks <= 0) return;
    Tasks t{{}, tasks, body, context};
    threads = static_cast<int>(std::min<std::int64_t>(threads, tasks));
    if (threads <= 1) return t.work(0);
#if defined(__APPLE__)
    dispatch_apply_f(static_cast<std::size_t>(threads), DISPATCH_APPLY_AUTO, &t,
                     [](void* tasks_, std::size_t thread) {
                         static_cast<Tasks*>(tasks_)->work(static_cast<int>(thread));
                     });
#elif defined(__SANITIZE_THREAD__)
    // ThreadSanitizer does not see OpenMP's barriers; it sees threads begin and end.
    std::vector<std::thread> workers;
    for (int thread = 1; thread < threads; ++thread) workers.emplace_back([&t, thread] { t.work(thread); });
    t.work(0);
    for (std::thread& worker : workers) worker.join();
#elif defined(_OPENMP)
#if defined(__linux__)
    if (workers().wanted(threads)) {
        cpu_set_t allowed;
        const bool enough =
            sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_COUNT(&allowed) == threads;
        const int caller = sched_getcpu();
        if (enough) {
#pragma omp parallel num_threads(threads)
            if (omp_get_thread_num() > 0) Pinning::bind(omp_get_thread_num(), allowed, caller);
        }
        workers().done(threads);
    }
#endif
#pragma omp parallel num_threads(threads)
    t.work(omp_get_thread_num());
#else
    t.work(0);
#endif
}

}  // namespace llmc
