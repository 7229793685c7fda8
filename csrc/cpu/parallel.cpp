// parallel_for by teams of threads. OpenMP makes the threads and places them, so OMP_PROC_BIND and its like hold; how they
// wait is ours (doc/design.md says why). On macOS Grand Central Dispatch runs the loops, because a bundled libomp crashes
// beside PyTorch's. Either way tasks are taken from a counter: dynamic balance without an OpenMP feature that MSVC lacks.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/check.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
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

#if defined(__APPLE__)
// A forked child may not use Grand Central Dispatch if its parent has.
bool lost_by_fork = false;
#else
inline void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    asm volatile("isb");
#endif
}

// How long a thread spins before it sleeps, by what its last waits showed: a short one makes the limit a little longer, a long one
// halves it. So where loops follow one another closely threads spin; if others want the CPUs, so that a partner is late or this
// thread loses its CPU while it spins, they soon sleep at once. Waits that slept count too, or the limit could never rise from 0.
class Patience {
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::nanoseconds kMost{100'000}, kMore{1'000};
    static constexpr std::chrono::nanoseconds kShort = 2 * kMost;  // it takes time to wake
    std::chrono::nanoseconds limit_ = kMost;

  public:
    template <class Ready, class Sleep>
    void wait(Ready ready, Sleep sleep_until_ready) {
        if (ready()) return;
        const Clock::time_point start = Clock::now();
        bool is_ready = false;
        do {
            for (int i = 0; i < 16 && !is_ready; ++i) {
                pause_briefly();
                is_ready = ready();
            }
        } while (!is_ready && Clock::now() - start <= limit_);
        if (!is_ready) sleep_until_ready();
        limit_ = Clock::now() - start <= kShort ? std::min(limit_ + kMore, kMost) : limit_ / 2;
    }
};

// A calling thread and its workers, which run loop after loop. Nobody waits for a worker that comes late: the caller begins at
// once, and when no task is left it closes the loop and waits only for the workers that have entered it. All that must change
// together is in one atomic number, so a worker enters the loop that is open or none, and never touches one that was closed.
// A team is never destroyed: its threads sleep until the process ends.
class Team {
    // state_: how many workers are in the loop, three flags, and the loop's number. That may wrap: a worker that slept through all
    // of them would miss one more.
    static constexpr std::uint32_t kWorkers = 0x7ff, kOpen = 0x800, kCallerSleeps = 0x1000;
    static constexpr std::uint32_t kWorkersSleep = 0x2000, kLoop = 0x4000;
    alignas(64) std::atomic<std::uint32_t> state_{0};
    alignas(64) std::atomic<std::uint32_t> all_left_{0};  // what the caller sleeps on
    std::atomic<int> wanted_{0};                          // threads that the loop can use
    Tasks* tasks_ = nullptr;
    Patience patience_;

    // Enters the loop that is open, if there is a place in it and its number is not `last`, which becomes its number. `state` is
    // the state in which that was so or not.
    bool enter(int thread, std::uint32_t& state, std::uint32_t& last) {
        state = state_.load(std::memory_order_acquire);
        while ((state & kOpen) && state / kLoop != last && thread < wanted_.load(std::memory_order_relaxed))
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
                last = state / kLoop;
                return true;
            }
        return false;
    }

    void leave() {
        const std::uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
        if ((before & kCallerSleeps) && (before & kWorkers) == 1) {
            all_left_.store(1, std::memory_order_release);
            all_left_.notify_one();
        }
    }

    [[noreturn]] void work(int thread) {
        Patience patience;
        for (std::uint32_t state = 0, last = 0;;) {
            patience.wait([&] { return enter(thread, state, last); },
                          [&] {
                              // Whoever opens a loop after the flag was set wakes this thread, or has changed the number before
                              // it slept.
                              while (!enter(thread, state, last))
                                  if (state_.compare_exchange_weak(state, state | kWorkersSleep,
                                                                   std::memory_order_relaxed))
                                      state_.wait(state | kWorkersSleep, std::memory_order_relaxed);
                          });
            tasks_->work(thread);
            leave();
        }
    }

  public:
    const int threads;

    explicit Team(int threads_) : threads(threads_) {}

    // If a thread cannot be made, those before it stay, and so must the team.
    void start() {
        // ThreadSanitizer does not see how OpenMP starts its threads.
#if defined(_OPENMP) && !defined(__SANITIZE_THREAD__)
        std::thread([this] {
            const int members = threads;  // cl.exe does not know members of a class here
#pragma omp parallel num_threads(members)
            {
                // The first one's place is the caller's.
                while (omp_get_thread_num() == 0) std::this_thread::sleep_for(std::chrono::hours(24));
                work(omp_get_thread_num());
            }
        }).detach();
#else
        for (int thread = 1; thread < threads; ++thread)
            std::thread([this, thread] { work(thread); }).detach();
#endif
    }

    void run(Tasks& tasks, int wanted) {
        tasks_ = &tasks;
        wanted_.store(wanted, std::memory_order_relaxed);
        const std::uint32_t loop = state_.load(std::memory_order_relaxed) / kLoop + 1;
        if (state_.exchange(loop * kLoop | kOpen, std::memory_order_acq_rel) & kWorkersSleep)
            state_.notify_all();
        tasks.work(0);
        if ((state_.fetch_and(~kOpen, std::memory_order_acquire) & kWorkers) == 0) return;
        patience_.wait([&] { return (state_.load(std::memory_order_acquire) & kWorkers) == 0; },
                       [&] {
                           all_left_.store(0, std::memory_order_relaxed);
                           if (state_.fetch_or(kCallerSleeps, std::memory_order_acq_rel) & kWorkers)
                               all_left_.wait(0, std::memory_order_acquire);
                       });
    }
};

// The teams that no thread is using, the last one used at the end. A forked child has none of their threads, so it forgets them.
class IdleTeams {
    std::mutex mutex_;
    std::vector<Team*> teams_;

  public:
    IdleTeams();
    Team* take(int threads) {
        {
            const std::lock_guard lock(mutex_);
            for (std::size_t i = teams_.size(); i-- > 0;)
                if (teams_[i]->threads == threads) {
                    Team* const team = teams_[i];
                    teams_.erase(teams_.begin() + static_cast<std::ptrdiff_t>(i));
                    return team;
                }
        }
        Team* const team = new Team(threads);
        try {
            team->start();
        } catch (const std::system_error& error) {
            throw Error(filled("cannot start {} threads: {}", threads, error.what()));
        }
        return team;
    }
    void give_back(Team* team) {
        const std::lock_guard lock(mutex_);
        teams_.push_back(team);
    }
};
IdleTeams& idle_teams = *new IdleTeams;  // for as long as there are threads

IdleTeams::IdleTeams() {
#if !defined(_WIN32)
    pthread_atfork([] { idle_teams.mutex_.lock(); }, [] { idle_teams.mutex_.unlock(); },
                   [] {
                       idle_teams.teams_.clear();
                       idle_teams.mutex_.unlock();
                   });
#endif
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
    return std::clamp(cpus, 1, 1024);
}

std::string pinning() {
#if defined(__APPLE__)
    return "left to Grand Central Dispatch";
#elif defined(__linux__) && defined(_OPENMP)
    if (const char* bind = std::getenv("OMP_PROC_BIND")) return std::string("by OMP_PROC_BIND=") + bind;
    if (std::getenv("GOMP_CPU_AFFINITY")) return "by GOMP_CPU_AFFINITY";
#endif
    return "left to the system";
}

void run_tasks(int threads, std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context) {
    if (tasks <= 0) return;
    Tasks t{{}, tasks, body, context};
    const int wanted = static_cast<int>(std::min<std::int64_t>(threads, tasks));
    if (wanted <= 1) return t.work(0);
#if defined(__APPLE__)
    [[maybe_unused]] static const int registered =
        pthread_atfork(nullptr, nullptr, [] { lost_by_fork = true; });
    if (lost_by_fork)
        throw Error("this process was forked from one that had computed with several threads, which macOS "
                    "does not allow: "
                    "start processes by 'spawn', or compute with one thread");
    dispatch_apply_f(static_cast<std::size_t>(wanted), DISPATCH_APPLY_AUTO, &t,
                     [](void* tasks_, std::size_t thread) {
                         static_cast<Tasks*>(tasks_)->work(static_cast<int>(thread));
                     });
#else
    Team* const team = idle_teams.take(threads);
    team->run(t, wanted);
    idle_teams.give_back(team);
#endif
}
}  // namespace llmc
