// Random weights of every width through every version of the products, in blocks of memory of exactly the size
// that they need: built with sanitizers, so that a step beyond any of them, or anything undefined, ends the run.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../src/tailorbird/kernels/cpp/linear.cpp"

int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  const int widths[] = {2, 3, 4, 5, 6, 8};
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    const int bits = widths[random() % 6], version = random() % (tailorbird_best_version() + 1);
    const std::int64_t rows = 1 + random() % 70, steps = 1 + random() % 9, tokens = 1 + random() % 13;
    const std::int64_t group_steps = 1 + random() % 4, groups = (steps + group_steps - 1) / group_steps;
    const std::int64_t columns = steps * STEP, tiles = (rows + LANES - 1) / LANES;
    std::vector<std::uint32_t> codes(tiles * steps * bits * LANES);
    std::vector<float> scales(tiles * groups * LANES), zeros(scales.size());
    std::vector<float> x(tokens * columns), y(tokens * rows, NAN);
    for (auto& word : codes) word = random();
    for (auto& scale : scales) scale = 0.5f + random() % 100 / 100.0f;
    for (auto& zero : zeros) zero = random() % (1 << bits);
    for (auto& value : x) value = random() % 2001 / 1000.0f - 1;
    tailorbird_linear(codes.data(), scales.data(), zeros.data(), x.data(), y.data(), rows, columns, groups,
                      group_steps * STEP, tokens, bits, 1 + random() % 3, version);
    const int lower = bits <= 3 ? 2 : bits <= 4 ? bits : 4;
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t row = 0; row < rows; ++row) {
        double exact = 0, size = 0;
        for (std::int64_t column = 0; column < columns; ++column) {
          const std::int64_t tile = row / LANES, lane = row % LANES, group = column / (group_steps * STEP);
          const std::uint32_t* step = &codes[(tile * steps + column / STEP) * bits * LANES];
          auto part = [&](int first, int width) {
            const int place = column % STEP * width;
            return step[(first + place / 32) * LANES + lane] >> place % 32 & ((1u << width) - 1);
          };
          std::uint32_t code = part(0, lower);
          if (bits > lower) code |= part(lower, bits - lower) << lower;
          const std::int64_t at = (tile * groups + group) * LANES + lane;
          const double term = (double(code) - zeros[at]) * scales[at] * x[token * columns + column];
          exact += term;
          size += std::fabs(term);
        }
        if (!(std::fabs(y[token * rows + row] - exact) <= 1e-4 * size + 1e-30)) {
          std::printf("%d bits, version %d: %g is not %g\n", bits, version, y[token * rows + row], exact);
          return 1;
        }
      }
    }
  }
  return 0;
}
