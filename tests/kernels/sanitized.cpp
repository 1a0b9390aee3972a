// Random weights of every width through every version of the products, in blocks of memory of exactly the size
// that they need: built with sanitizers, so that a step beyond any of them, or anything undefined, ends the run.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../src/tailorbird/kernels/cpp/library.cpp"

using namespace tailorbird;

int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  const int widths[] = {2, 3, 4, 5, 6, 8};
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    const int bits = widths[random() % 6];
    int version = random() % 5;
    if (!tailorbird_runs_version(version)) version = 0;
    const std::int64_t rows = 1 + random() % 70, in_features = 1 + random() % 300, tokens = 1 + random() % 29;
    const std::int64_t steps = (in_features + STEP - 1) / STEP, columns = steps * STEP;
    const std::int64_t group_steps = 1 + random() % 6, groups = (steps + group_steps - 1) / group_steps;
    const std::int64_t tiles = (rows + LANES - 1) / LANES, width = (in_features * bits + 7) / 8;
    std::vector<std::uint8_t> stored(rows * width), zeros(tiles * groups * LANES);
    std::vector<std::uint32_t> codes(tiles * steps * bits * LANES);
    std::vector<std::uint16_t> scales(tiles * groups * LANES);
    std::vector<float> x(tokens * in_features), y(tokens * rows, NAN);
    for (auto& byte : stored) byte = random();
    for (auto& scale : scales) scale = 0x3f00 + random() % 100;  // bfloat16 from 0.5 on
    for (auto& zero : zeros) zero = random() % (1 << bits);
    for (auto& value : x) value = random() % 2001 / 1000.0f - 1;
    const bool symmetric = random() % 2, int8 = random() % 2;
    tailorbird_lay_out(stored.data(), rows, in_features, bits, codes.data(), 1 + random() % 3);
    const Weight weight{codes.data(), scales.data(), symmetric ? nullptr : zeros.data(), rows, in_features, columns,
                        groups, group_steps * STEP, bits, 0};
    tailorbird_linear(&weight, x.data(), y.data(), tokens, 0, int8, 1 + random() % 3, version);
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t row = 0; row < rows; ++row) {
        double exact = 0, size = 0;
        for (std::int64_t column = 0; column < in_features; ++column) {
          const std::int64_t at = (row / LANES * groups + column / (group_steps * STEP)) * LANES + row % LANES;
          int code = 0;
          for (int bit = 0; bit < bits; ++bit) {
            const std::int64_t place = column * bits + bit;
            code |= (stored[row * width + place / 8] >> place % 8 & 1) << bit;
          }
          const std::uint32_t scale_bits = std::uint32_t(scales[at]) << 16;
          float scale;
          std::memcpy(&scale, &scale_bits, 4);
          const double weighed = (double(code) - (symmetric ? 1 << (bits - 1) : zeros[at])) * scale;
          exact += weighed * x[token * in_features + column];
          size += std::fabs(weighed);
        }
        // Activations lie within 1; rounded to bytes each moves by half a 127th at most.
        if (!(std::fabs(y[token * rows + row] - exact) <= (int8 ? 0.5 / 127 + 1e-4 : 1e-4) * size + 1e-30)) {
          std::printf("%d bits, version %d, int8 %d: %g is not %g\n", bits, version, int8, y[token * rows + row],
                      exact);
          return 1;
        }
      }
    }
  }
  return 0;
}
