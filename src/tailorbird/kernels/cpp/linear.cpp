// Products with packed integer weights in float32 arithmetic, as plain C functions.
//
// A weight is laid out in tiles of 16 rows. A step is 32 columns of a tile: for each bit of the coding 16
// words of 32 bits side by side, one of each row, which hold the codes of neighbouring columns, the first in
// the lowest bits. A code of 3, 5, 6 or 8 bits is stored in two parts, so that none crosses a word.
//
// Every result is summed in one order, whatever the number of tokens or threads: within a group even and odd
// columns apart, then the groups one after the other.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int LANES = 16;
constexpr int STEP = 32;

struct Weight {
  const std::uint32_t* codes;  // [tiles][steps][bits][LANES]
  const float* scales;         // [tiles][groups][LANES]
  const float* zeros;          // [tiles][groups][LANES]
  std::int64_t rows, columns, groups, group_columns;  // columns: a multiple of STEP
};

constexpr int parts(int bits) { return bits == 2 || bits == 4 ? 1 : 2; }
constexpr int part_bits(int bits, int part) {
  const int lower = bits <= 3 ? 2 : 4;
  return part == 0 ? lower : bits - lower;
}
constexpr int part_words(int bits, int part) { return part == 0 ? 0 : part_bits(bits, 0); }

}  // namespace

#define VERSION portable
#define TARGET
#include "linear.inc"
#undef VERSION
#undef TARGET

#if defined(__x86_64__)
#define VERSION avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "linear.inc"
#undef VERSION
#undef TARGET

#define VERSION avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")))
#include "linear.inc"
#undef VERSION
#undef TARGET
#endif

extern "C" {

// The best version that this processor runs: 0 portable, 1 AVX2, 2 AVX-512.
int tailorbird_best_version() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// y[tokens][rows] = x[tokens][columns] times the weight, by `threads` threads.
void tailorbird_linear(const void* codes, const void* scales, const void* zeros, const void* x, void* y,
                       std::int64_t rows, std::int64_t columns, std::int64_t groups,
                       std::int64_t group_columns, std::int64_t tokens, int bits, int threads, int version) {
  const Weight weight{static_cast<const std::uint32_t*>(codes),
                      static_cast<const float*>(scales),
                      static_cast<const float*>(zeros),
                      rows,
                      columns,
                      groups,
                      group_columns};
  const float* in = static_cast<const float*>(x);
  float* out = static_cast<float*>(y);
  const std::int64_t tiles = (rows + LANES - 1) / LANES;
  auto multiply = portable::multiply;
#if defined(__x86_64__)
  if (version == 1) multiply = avx2::multiply;
  if (version == 2) multiply = avx512::multiply;
#endif
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    multiply(weight, bits, in, out, tokens, tiles * part / threads, tiles * (part + 1) / threads);
  }
}

}  // extern "C"
