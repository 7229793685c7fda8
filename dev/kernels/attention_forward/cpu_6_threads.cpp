// Threads: each head is a task
//
// Version 5 with one line more. Heads share nothing but the cache, so there is no lock and no sum that depends on who comes
// first: the result has the same bits for any number of threads.
#define FOR_HEADS _Pragma("omp parallel for schedule(dynamic)")
#include "cpu_5_vectors.cpp"
