// Threads that go through random steps, some of them late: every piece is done once, after all of the step before, and
// whoever is late finds done what he missed.
#include "../../src/tailorbird/kernels/cpp/team.h"

#include <chrono>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

using tailorbird::Steps;
using tailorbird::Team;

struct Step {
  std::int64_t count, piece;
  bool waits;  // or is finished with the step after it
};

// Values that each piece of each step raises by one, without any lock: sanitizers see who comes too early.
struct Work {
  std::vector<Step> steps;
  std::vector<std::vector<int>> values;

  explicit Work(std::mt19937& random) {
    for (int i = 0; i < 40; ++i) {
      steps.push_back({std::int64_t(random() % 50), 1 + std::int64_t(random() % 9), i == 39 || random() % 4 != 0});
      values.emplace_back(steps.back().count);
    }
  }

  // What one thread does; returns whether it never met a piece whose step was entered too early.
  bool go(Team team, unsigned late) {
    std::mt19937 random(late);
    bool right = true;
    std::vector<std::pair<std::int64_t, std::int64_t>> open;
    for (std::size_t i = 0; i < steps.size(); ++i) {
      if (late != 0 && random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
      const std::size_t begun = i - open.size();  // all before it are done
      const auto number = team.start(steps[i].count, steps[i].piece, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t at = first; at < last; ++at) ++values[i][at];
        for (std::size_t before = 0; before < begun; ++before) {
          for (int value : values[before]) right &= value == 1;
        }
      });
      open.emplace_back(number, steps[i].count);
      if (!steps[i].waits) continue;
      for (const auto& [step, count] : open) team.finish(step, count);
      open.clear();
    }
    return right;
  }

  bool done() const {
    bool once = true;
    for (const auto& step : values) {
      for (int value : step) once &= value == 1;
    }
    return once;
  }
};

// All threads at once, some late now and then.
bool together(std::mt19937& random, Steps& steps, int threads) {
  Work work(random);
  steps.reset(std::int64_t(work.steps.size()), threads);
  std::vector<char> right(threads);
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    const unsigned late = random() % 2 == 0 ? 0 : random();
    running.emplace_back([&, thread, late] { right[thread] = work.go(Team(steps, thread, threads), late); });
  }
  for (auto& thread : running) thread.join();
  bool all = work.done();
  for (char one : right) all &= one != 0;
  return all;
}

// One thread after the other: each could go through all steps alone, and the first one did.
bool one_by_one(std::mt19937& random, Steps& steps, int threads) {
  Work work(random);
  steps.reset(std::int64_t(work.steps.size()), threads);
  bool right = true;
  for (int thread = threads - 1; thread >= 0; --thread) {
    right &= work.go(Team(steps, thread, threads), 0);
    right &= work.done();
  }
  return right;
}

int main() {
  std::mt19937 random(0);
  Steps steps;  // kept from call to call, as blocks keep it
  for (int round = 0; round < 60; ++round) {
    const int threads = 1 + round % 5;
    if (!together(random, steps, threads) || !one_by_one(random, steps, threads)) {
      std::printf("round %d of %d threads went wrong\n", round, threads);
      return 1;
    }
  }
  std::printf("done\n");
  return 0;
}
