// The only threading on the CPU. parallel_for hands out task numbers 0..n-1; which thread runs which task is
// not fixed, so a task's result must depend on its number alone: that is why results do not depend on the
// number of threads.
#pragma once

#include <cstdint>
#include <string>

namespace llmc {

// CPUs that this process may use: what affinity and the cgroup's quota allow.
int usable_cpus();

// OMP_NUM_THREADS if set, else usable_cpus().
int default_threads();

// How threads are bound to CPUs, in words, for `llmc info`.
std::string pinning();

// Runs body(context, task, thread) for every task; thread < threads tells scratch buffers apart. Denormals
// are flushed to zero inside, and the caller's floating-point mode is restored after. Bodies must not throw.
void run_tasks(int threads, std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context);

template <class Body>
void parallel_for(int threads, std::int64_t tasks, Body&& body) {
    run_tasks(
        threads, tasks,
        [](void* context, std::int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); },
        &body);
}

}  // namespace llmc
