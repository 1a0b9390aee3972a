// Threads that go through the same steps together.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace tailorbird {

// What threads tell each other of the steps of one call: how far each thread's share of a step is taken, and how much of
// the step is done.
class Steps {
 public:
  // Room for `count` steps of so many threads, nothing of which is done.
  void reset(std::int64_t count, int threads) {
    stride_ = threads + 1;
    if (capacity_ < count * stride_) counts_ = std::make_unique<Count[]>(capacity_ = count * stride_);
    for (std::int64_t i = 0; i < count * stride_; ++i) counts_[i].value.store(0, std::memory_order_relaxed);
  }

  std::atomic<std::int64_t>& done(std::int64_t step) { return counts_[step * stride_].value; }
  std::atomic<std::int64_t>& taken(std::int64_t step, int thread) { return counts_[step * stride_ + 1 + thread].value; }

 private:
  struct alignas(64) Count {  // in a line of the cache of its own
    std::atomic<std::int64_t> value{0};
  };
  std::unique_ptr<Count[]> counts_;
  std::int64_t stride_ = 0, capacity_ = 0;
};

// One of the threads that go through `Steps`.
//
// The pieces of a step depend on nothing but the steps before it. Each thread has its share of them, the same in every
// call, so that its caches may hold what they read; who is through with his own takes what others haven't begun. So a
// thread that the system lets wait, or whose core is slower, holds the others up by the piece in its hands at most. It
// finds the steps done that it missed. No bit of a result depends on who does which piece.
class Team {
 public:
  Team(Steps& steps, int thread, int threads) : thread(thread), threads(threads), steps_(steps) {}

  const int thread, threads;

  // Pieces of work of which `count` are done by all together, so that there is something left to take for those who are
  // early: a multiple of `least`.
  std::int64_t piece_of(std::int64_t count, std::int64_t least = 1) const {
    if (threads == 1) return count;
    return std::max<std::int64_t>(1, (count / (PIECES * threads) + least - 1) / least) * least;
  }

  // Call `work(first, last)` for some of `count` until all are taken. `finish` waits until they are done, too.
  template <typename Work>
  std::int64_t start(std::int64_t count, std::int64_t piece, const Work& work) {
    const std::int64_t step = step_++;
    if (threads == 1) {
      if (count > 0) work(std::int64_t(0), count);
      return step;
    }
    std::int64_t mine = 0;
    for (int turn = 0; turn < threads; ++turn) {
      const int whose = (thread + turn) % threads;
      const std::int64_t begin = count * whose / threads, end = count * (whose + 1) / threads;
      std::atomic<std::int64_t>& taken = steps_.taken(step, whose);
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const std::int64_t first = begin + taken.fetch_add(piece, std::memory_order_relaxed);
        if (first >= end) break;
        const std::int64_t last = std::min(first + piece, end);
        work(first, last);
        mine += last - first;
      }
    }
    if (mine > 0) steps_.done(step).fetch_add(mine, std::memory_order_acq_rel);
    return step;
  }

  void finish(std::int64_t step, std::int64_t count) {
    if (threads == 1) return;
    const std::atomic<std::int64_t>& done = steps_.done(step);
    for (int turns = 0; done.load(std::memory_order_acquire) < count; ++turns) {
      if (turns < SPINS) {
        relax();
      } else {
        sched_yield();  // whom we wait for may want this processor
      }
    }
  }

  template <typename Work>
  void share(std::int64_t count, std::int64_t piece, const Work& work) {
    finish(start(count, piece, work), count);
  }

 private:
  static constexpr std::int64_t PIECES = 8;
  static constexpr int SPINS = 1 << 10;  // some tens of microseconds

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Steps& steps_;
  std::int64_t step_ = 0;
};

}  // namespace tailorbird
