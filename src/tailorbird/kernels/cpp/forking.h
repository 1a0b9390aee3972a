// What lets a process fork after parallel work.
//
// GNU's OpenMP keeps workers for each thread that has run something in parallel. fork() copies the calling thread with
// all that it knows of its workers, but not the workers; in the new process it would wait for them for ever
// (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=60035). They are therefore let go before, and either process gets new
// ones when it needs them. PyTorch shares these workers, so that its parallel work goes on in the new process, too.
#pragma once

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

namespace tailorbird {

// LLVM's OpenMP, which can stand in for GNU's, minds forks itself; it would let go of the workers of all threads.
inline bool workers_outlive_forks() { return dlsym(RTLD_DEFAULT, "__kmpc_fork_call") != nullptr; }

inline void let_workers_go() { omp_pause_resource_all(omp_pause_soft); }

static const bool forks_are_minded =
    workers_outlive_forks() || pthread_atfork(let_workers_go, nullptr, nullptr) == 0;

}  // namespace tailorbird
