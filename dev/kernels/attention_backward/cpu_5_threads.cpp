// Threads: each head is a task
//
// Version 4 with one line more. All sums are within a head, so no two threads add to one place, and the result has the same bits
// for any number of threads.
#define FOR_HEADS _Pragma("omp parallel for schedule(dynamic)")
#include "cpu_4_vectors.cpp"
