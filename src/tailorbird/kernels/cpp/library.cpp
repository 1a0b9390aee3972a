// Products with packed integer weights, and what goes with them, as plain C functions; what they do for one kind of
// processor is in products.inc and its neighbours, how a weight lies in memory in layout.h.
//
// Activations are taken as they are, in float32 arithmetic, or first rounded to bytes, one scale for each segment of at
// most 128 inputs that share a group of the weight. A result has the same bits whatever the number of tokens or threads.

#include <omp.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "block.h"
#include "entropy.h"
#include "forking.h"
#include "sampling.h"
#include "team.h"
#include "training.h"
#include "walsh.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace tailorbird {

// So many tokens are worth unpacking codes for; bytes of unpacked codes that stay in the second cache.
constexpr int MANY_TOKENS = 12;
// For so many at most, codes are fetched ahead of their turn.
constexpr int NEAR_TOKENS = 96;
// Tokens whose bytes lie side by side then, and that go through two tiles together. Zen 5 takes 9.5 cycles for each of
// their 16 sums over 64 columns, 8 of them dot products: it begins the next segment while it scales the last one. Of
// the 24 sums of 12 tokens each took 11, since too few instructions fit its window; the 8 of 4 tokens wait for each
// other.
constexpr int TOGETHER = 8;
// Rows so long go through fewer tokens two tiles at a time; of shorter ones two streams are slower than one.
constexpr std::int64_t PAIRED_COLUMNS = 2048;
constexpr std::int64_t PANEL_BYTES = 256 << 10;
// Tiles that are taken together, at least: many tokens go through two at a time.
constexpr std::int64_t PIECE_TILES = 2;

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// Bytes from one token's activations to the next: a line more than there are, so that those of neighbouring tokens
// don't compete for the same places of the cache.
inline std::int64_t byte_stride(std::int64_t columns) { return columns + 64; }

// Where results go.
struct Outputs {
  void* values;  // [tokens][stride]
  std::int64_t rows, stride;
  bool bfloat16;      // or float32
  const float* bias;  // or null
};

// Memory that begins where a line of the cache does: a vector that crosses lines costs twice.
template <typename T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <typename U>
  Lines(const Lines<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* at, std::size_t) { ::operator delete(at, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
template <typename T>
using Values = std::vector<T, Lines<T>>;

template <typename T>
T* room(Values<T>& in, std::int64_t count) {
  if (std::int64_t(in.size()) < count) in.resize(count);
  return in.data();
}

// Activations as bytes, with a scale and minus the sum of the bytes for each segment.
//
// Fewer than MANY_TOKENS: bytes with a sign [tokens][byte_stride(columns)], scales and sums [tokens][segments]. More:
// plus 128, in blocks of TOGETHER tokens that lie side by side, so that products read one stream:
// [blocks][columns / 4][TOGETHER][4], scales and sums [blocks][segments][TOGETHER].
struct Quantized {
  std::uint8_t* bytes;
  float* scales;
  std::int32_t* sums;
  std::int64_t tokens, segments;

  Quantized of(const Weight& w) const { return {bytes, scales, sums, tokens, segment_count(w)}; }
};

inline std::int64_t whole_blocks(std::int64_t tokens) {
  return (tokens + TOGETHER - 1) / TOGETHER * TOGETHER;
}

// Where one token's bytes and segments lie.
struct Places {
  std::uint8_t* bytes;
  float* scales;
  std::int32_t* sums;
  std::int64_t four_stride, step;  // from four columns to the next, in bytes; from one segment to the next
  std::uint32_t flip;              // the bits in which the bytes of four columns differ from those with a sign
};

inline Places places_of(std::int64_t columns, const Quantized& q, std::int64_t token) {
  if (q.tokens < MANY_TOKENS) {
    const std::int64_t at = token * q.segments;
    return {q.bytes + token * byte_stride(columns), q.scales + at, q.sums + at, 4, 1, 0};
  }
  const std::int64_t within = token % TOGETHER, at = (token - within) * q.segments + within;
  return {q.bytes + (token - within) * columns + 4 * within, q.scales + at, q.sums + at, 4 * TOGETHER, TOGETHER,
          0x80808080u};
}

// Memory for activations as bytes, kept from call to call.
struct ByteSpace {
  Values<std::uint8_t> bytes;
  Values<float> scales;
  Values<std::int32_t> sums;

  void reach(const Weight& w, std::int64_t tokens) {
    room(bytes, whole_blocks(tokens) * byte_stride(w.columns));
    room(scales, whole_blocks(tokens) * segment_count(w));
    room(sums, whole_blocks(tokens) * segment_count(w));
  }

  Quantized of(std::int64_t tokens) { return {bytes.data(), scales.data(), sums.data(), tokens, 0}; }
};

// What one thread keeps for the blocks that it runs, from call to call.
struct BlockSpace {
  Values<float> wide, turned, kept, projected, inner, added, low, parts;
  ByteSpace rounded[3];
  std::vector<std::int64_t> runs;
  Steps steps;
};

// Room for linears that read the same activations: `count` of them.
void room_for(const Linear* linears, int count, std::int64_t tokens, BlockSpace& space, std::int64_t& columns,
              std::int64_t& rows) {
  std::int64_t together = 0;
  for (int i = 0; i < count; ++i) {
    const Weight& w = linears[i].weight;
    columns = std::max(columns, w.columns);
    together += w.rows;
    if (linears[i].int8 && linears[i].dense == nullptr) space.rounded[i].reach(w, tokens);
  }
  rows = std::max(rows, together);
}

// What each step takes, told by one thread.
struct Laps {
  double* seconds;  // null: nobody wants to know
  std::chrono::steady_clock::time_point last;

  void end(Step step) {
    if (seconds == nullptr) return;
    const auto now = std::chrono::steady_clock::now();
    seconds[step] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace tailorbird

#define VERSION portable
#define TARGET
#define UNROLL(n)
#include "products.inc"
#include "walsh.inc"
#include "block.inc"
#include "dequantize.inc"
#include "sampling.inc"
#include "training.inc"
#undef VERSION
#undef TARGET
#undef UNROLL

#if defined(__x86_64__)
#define UNROLL(n) _Pragma("GCC unroll 16")
#define VERSION avx2
#define TARGET __attribute__((target("avx2,fma")))
#define DOT_AVX2
#include "products.inc"
#include "walsh.inc"
#include "block.inc"
#include "dequantize.inc"
#include "sampling.inc"
#include "training.inc"
#undef VERSION
#undef TARGET
#undef DOT_AVX2

#define VERSION avxvnni
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define DOT_AVXVNNI
#include "products.inc"
#include "walsh.inc"
#include "block.inc"
#include "dequantize.inc"
#include "sampling.inc"
#include "training.inc"
#undef VERSION
#undef TARGET
#undef DOT_AVXVNNI

#define VERSION avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,prefer-vector-width=512")))
#define DOT_AVX512
#include "products.inc"
#include "walsh.inc"
#include "block.inc"
#include "dequantize.inc"
#include "sampling.inc"
#include "training.inc"
#undef VERSION
#undef TARGET

// Blocks alone; all else is that of AVX-512.
#define VERSION avx512bf16
#define TARGET                                                                         \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma," \
                        "prefer-vector-width=512")))
#define DOTS_BF16
namespace tailorbird::avx512bf16 {
using namespace avx512;
}
#include "block.inc"
#undef VERSION
#undef TARGET
#undef DOTS_BF16
#undef DOT_AVX512
#elif defined(__aarch64__)
#define UNROLL(n) _Pragma("GCC unroll 16")
#define VERSION neon
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define DOT_NEON
#include "products.inc"
#include "walsh.inc"
#include "block.inc"
#include "dequantize.inc"
#include "sampling.inc"
#include "training.inc"
#undef VERSION
#undef TARGET
#undef DOT_NEON
#endif

namespace tailorbird {

template <typename T>
struct Version {
  void (*quantize)(const Weight&, const T*, const Quantized&, std::int64_t);
  void (*widen)(const Weight&, const T*, float*);
  void (*int8_products)(const Weight&, const Quantized&, const Outputs&, std::int64_t, std::int64_t);
  void (*float_products)(const Weight&, const float*, std::int64_t, const Outputs&, std::int64_t, std::int64_t,
                         std::int64_t);
};

template <typename T>
Version<T> version_of(int version) {
#if defined(__x86_64__)
  if (version == 1) return {avx2::quantize<T>, avx2::widen<T>, avx2::int8_products_of, avx2::float_products_of};
  if (version == 2 || version == 5) {
    return {avx512::quantize<T>, avx512::widen<T>, avx512::int8_products_of, avx512::float_products_of};
  }
  if (version == 3) {
    return {avxvnni::quantize<T>, avxvnni::widen<T>, avxvnni::int8_products_of, avxvnni::float_products_of};
  }
#elif defined(__aarch64__)
  if (version == 4) return {neon::quantize<T>, neon::widen<T>, neon::int8_products_of, neon::float_products_of};
#endif
  return {portable::quantize<T>, portable::widen<T>, portable::int8_products_of, portable::float_products_of};
}

struct BlockVersion {
  decltype(&portable::run_blocks) run_blocks;
  decltype(&portable::run_head) run_head;
  decltype(&portable::run_attention) run_attention;
  decltype(&portable::adapt) adapt;
  decltype(&portable::add_sparse) add_sparse;
  decltype(&portable::table_products) table_products;
};

decltype(&portable::dequantize) dequantize_of(int version) {
#if defined(__x86_64__)
  if (version == 1) return avx2::dequantize;
  if (version == 2 || version == 5) return avx512::dequantize;
  if (version == 3) return avxvnni::dequantize;
#elif defined(__aarch64__)
  if (version == 4) return neon::dequantize;
#endif
  return portable::dequantize;
}

decltype(&portable::look_up) look_up_of(int version) {
#if defined(__x86_64__)
  if (version == 1) return avx2::look_up;
  if (version == 2 || version == 5) return avx512::look_up;
  if (version == 3) return avxvnni::look_up;
#elif defined(__aarch64__)
  if (version == 4) return neon::look_up;
#endif
  return portable::look_up;
}

BlockVersion block_version_of(int version) {
#define FUNCTIONS(v) {v::run_blocks, v::run_head, v::run_attention, v::adapt, v::add_sparse, v::table_products}
#if defined(__x86_64__)
  if (version == 1) return FUNCTIONS(avx2);
  if (version == 2) return FUNCTIONS(avx512);
  if (version == 5) return FUNCTIONS(avx512bf16);
  if (version == 3) return FUNCTIONS(avxvnni);
#elif defined(__aarch64__)
  if (version == 4) return FUNCTIONS(neon);
#endif
  return FUNCTIONS(portable);
#undef FUNCTIONS
}

SamplingVersion sampling_version_of(int version) {
#if defined(__x86_64__)
  if (version == 1) return {avx2::largest, avx2::weigh, avx2::weigh_blocks};
  if (version == 2 || version == 5) return {avx512::largest, avx512::weigh, avx512::weigh_blocks};
  if (version == 3) return {avxvnni::largest, avxvnni::weigh, avxvnni::weigh_blocks};
#elif defined(__aarch64__)
  if (version == 4) return {neon::largest, neon::weigh, neon::weigh_blocks};
#endif
  return {portable::largest, portable::weigh, portable::weigh_blocks};
}

struct TrainingVersion {
  void (*norm)(const NormPass&, std::int64_t, std::int64_t);
  void (*norm_weight)(const NormPass&, std::int64_t, std::int64_t);
  void (*gate)(const GatePass&, std::int64_t, std::int64_t);
  void (*loss)(const LossPass&, std::int64_t, std::int64_t);
  void (*attention)(const AttentionPass&, std::int64_t, std::int64_t);
  void (*walsh)(const WalshPass&, std::int64_t, std::int64_t);
};

TrainingVersion training_version_of(int version) {
#define PASSES(v) {v::pass_norm, v::pass_norm_weight, v::pass_gate, v::pass_loss, v::pass_attention, v::pass_walsh}
#if defined(__x86_64__)
  if (version == 1) return PASSES(avx2);
  if (version == 2 || version == 5) return PASSES(avx512);
  if (version == 3) return PASSES(avxvnni);
#elif defined(__aarch64__)
  if (version == 4) return PASSES(neon);
#endif
  return PASSES(portable);
#undef PASSES
}

// Call `work` with parts of `count` pieces, each a multiple of `least` but the last of a thread's share.
template <typename Work>
void share_out(std::int64_t count, int threads, const Work& work, std::int64_t least = 1) {
  thread_local Steps own;
  own.reset(1, threads);
  Steps& steps = own;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Team team(steps, omp_get_thread_num(), omp_get_num_threads());
    team.start(count, team.piece_of(count, least), work);  // the end of the region waits
  }
}

template <typename T>
void multiply(const Weight& w, const T* x, const Outputs& y, std::int64_t tokens, bool int8, int threads, int version) {
  thread_local ByteSpace rounded;
  thread_local Values<float> floats;
  const Version<T> run = version_of<T>(version);
  const std::int64_t tiles = tile_count(w);
  if (int8) rounded.reach(w, tokens);
  const Quantized q = rounded.of(tokens).of(w);
  float* wide = int8 ? nullptr : room(floats, tokens * w.columns);
  auto prepare = [&](std::int64_t t) {
    if (int8) {
      run.quantize(w, x + t * w.in_features, q, t);
    } else {
      run.widen(w, x + t * w.in_features, wide + t * w.columns);
    }
  };
  const auto prepare_some = [&](auto first, auto last) {
    for (std::int64_t t = first; t < last; ++t) prepare(t);
  };
  share_out(tokens, tokens < 4 * threads ? 1 : threads, prepare_some, TOGETHER);
  const auto multiply_some = [&](auto first, auto last) {
    if (int8) {
      run.int8_products(w, q, y, first, last);
    } else {
      run.float_products(w, wide, w.columns, y, tokens, first, last);
    }
  };
  share_out(tiles, threads, multiply_some, PIECE_TILES);
}

}  // namespace tailorbird

extern "C" {

// Whether this processor runs a version: 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 AVX2 with AVX-VNNI, 4 NEON with dot
// products, 5 AVX-512 with VNNI and products of bfloat16.
int tailorbird_runs_version(int version) {
  if (version == 0) return 1;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (version == 1) return avx2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (version == 2) return avx512;
  if (version == 5) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (version == 3) return avx2 && __builtin_cpu_supports("avxvnni");
#elif defined(__ARM_FEATURE_DOTPROD)  // what was built runs nowhere else
  if (version == 4) return 1;
#elif defined(__aarch64__) && defined(__linux__)
  if (version == 4) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return 0;
}

// The fastest of those.
int tailorbird_best_version() {
  for (const int version : {4, 5, 2, 3, 1}) {
    if (tailorbird_runs_version(version)) return version;
  }
  return 0;
}

// Stored codes [rows][ceil(in_features * bits / 8)] into the layout of layout.h.
void tailorbird_lay_out(const void* stored, std::int64_t rows, std::int64_t in_features, int bits, void* codes,
                        int threads) {
  const std::int64_t tiles = (rows + tailorbird::LANES - 1) / tailorbird::LANES;
  tailorbird::share_out(tiles, threads, [&](auto first, auto last) {
    tailorbird::lay_out(static_cast<const std::uint8_t*>(stored), rows, in_features, bits,
                        static_cast<std::uint32_t*>(codes), first, last);
  });
}

// A rectangle of a stored weight as numbers, into to[rows][columns]; it begins at a column that 16 divides. Groups hold a
// multiple of 16 columns, or there is one per row. A value has the same bits in every version.
void tailorbird_dequantize(const void* weight, std::int64_t row, std::int64_t rows, std::int64_t column,
                           std::int64_t columns, void* to, int bfloat16, int threads, int version) {
  using namespace tailorbird;
  const Stored& w = *static_cast<const Stored*>(weight);
  const auto run = dequantize_of(version);
  share_out(rows, threads, [&](auto first, auto last) {
    run(w, row + first, row + last, column, column + columns,
        static_cast<char*>(to) + first * columns * (bfloat16 ? 2 : 4), bfloat16);
  });
}

// The rows of `count` ids as float32, into to[count][width]; the same bits in every version. Returns the number of the first
// id that has no row, and then does nothing, or -1.
std::int64_t tailorbird_look_up(const void* embedding, const std::int64_t* ids, std::int64_t count, float* to,
                                int threads, int version) {
  using namespace tailorbird;
  const Embedding& e = *static_cast<const Embedding*>(embedding);
  for (std::int64_t token = 0; token < count; ++token) {
    if (ids[token] < 0 || ids[token] >= e.rows) return token;
  }
  const auto run = look_up_of(version);
  share_out(count, threads, [&](auto first, auto last) { run(e, ids + first, last - first, to + first * e.width); });
  return -1;
}

// y[tokens][rows] = x[tokens][in_features] times the weight; both float32, or both bfloat16.
void tailorbird_linear(const void* weight, const void* x, void* y, std::int64_t tokens, int bfloat16, int int8,
                       int threads, int version) {
  const tailorbird::Weight& w = *static_cast<const tailorbird::Weight*>(weight);
  const tailorbird::Outputs out{y, w.rows, w.rows, bfloat16 != 0, nullptr};
  if (bfloat16) {
    tailorbird::multiply(w, static_cast<const tailorbird::BFloat16*>(x), out, tokens, int8, threads, version);
  } else {
    tailorbird::multiply(w, static_cast<const float*>(x), out, tokens, int8, threads, version);
  }
}

// Blocks `first` to `last` over hidden[tokens][width], float32, in place.
void tailorbird_run_blocks(const void* blocks, std::int64_t first, std::int64_t last, const void* batch,
                           float* hidden, int threads, int version) {
  using namespace tailorbird;
  const auto run = block_version_of(version).run_blocks;
  run(static_cast<const Block*>(blocks), first, last, *static_cast<const Batch*>(batch), hidden, threads);
}

// logits[tokens][head.weight.rows] of hidden[tokens][width], which left the last block.
void tailorbird_run_head(const void* norm, const void* head, const float* hidden, std::int64_t tokens,
                         std::int64_t width, float* logits, int threads, int version) {
  using namespace tailorbird;
  const auto run = block_version_of(version).run_head;
  run(*static_cast<const Norm*>(norm), *static_cast<const Linear*>(head), hidden, tokens, width, logits, threads);
}

// outputs[tokens][heads * head_dim] of a block's attention alone; projected[tokens][stride] has queries, keys, values.
void tailorbird_run_attention(const void* block, const void* batch, float* projected, std::int64_t stride,
                              float* outputs, int threads, int version) {
  using namespace tailorbird;
  const auto run = block_version_of(version).run_attention;
  run(*static_cast<const Block*>(block), *static_cast<const Batch*>(batch), projected, stride, outputs, threads);
}

// y[tokens][rows] becomes what an adapter makes of it; all activations are float32.
void tailorbird_adapt(const void* adapter, const float* x, std::int64_t in_features, float* y, std::int64_t rows,
                      std::int64_t tokens, int threads, int version) {
  using namespace tailorbird;
  thread_local Values<float> space;
  thread_local Steps own_steps;
  const LinearAdapter& a = *static_cast<const LinearAdapter*>(adapter);
  const auto run = block_version_of(version).adapt;
  float* low = room(space, tokens * a.rank);
  own_steps.reset(2, threads);
  Steps& steps = own_steps;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Team team(steps, omp_get_thread_num(), omp_get_num_threads());
    run(a, x, in_features, low, y, rows, tokens, team);
  }
}

// y[tokens][rows] += the sparse matrix times x[tokens][in_features]; all activations are float32.
void tailorbird_add_sparse(const void* sparse, const float* x, float* y, std::int64_t tokens, int threads,
                           int version) {
  using namespace tailorbird;
  const SparseRows& s = *static_cast<const SparseRows*>(sparse);
  const auto run = block_version_of(version).add_sparse;
  share_out(s.rows, threads, [&](auto first, auto last) { run(s, x, y, tokens, first, last); });
}

// y[tokens][rows] = x[tokens][in_features] times a weight of tables; all activations are float32.
void tailorbird_table_linear(const void* weight, const float* x, float* y, std::int64_t tokens, int threads,
                             int version) {
  using namespace tailorbird;
  const Weight& w = *static_cast<const Weight*>(weight);
  const Outputs out{y, w.rows, w.rows, false, nullptr};
  const auto run = block_version_of(version).table_products;
  share_out(tile_count(w), threads, [&](auto first, auto last) { run(w, x, w.in_features, out, tokens, first, last); });
}

// A token for each of the rows[count], which all have logits of so many tokens; what is found lies in the rows.
void tailorbird_choose(void* const* rows, std::int64_t count, std::int64_t tokens, int threads, int version) {
  using namespace tailorbird;
  const SamplingVersion run = sampling_version_of(version);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (std::int64_t i = 0; i < count; ++i) {
    thread_local SamplingSpace space;
    choose(*static_cast<SamplingRow*>(rows[i]), tokens, run, space);
  }
}

// The passes of training.h. A row's results have the same bits whatever the rows beside it and the number of threads.
void tailorbird_norm(const void* pass, int threads, int version) {
  using namespace tailorbird;
  const NormPass& p = *static_cast<const NormPass*>(pass);
  const TrainingVersion run = training_version_of(version);
  if (p.to != nullptr) share_out(p.rows, threads, [&](auto first, auto last) { run.norm(p, first, last); });
  if (p.weight_gradient == nullptr) return;
  share_out((p.width + LANES - 1) / LANES, threads, [&](auto first, auto last) {
    run.norm_weight(p, first * LANES, std::min(last * LANES, p.width));
  });
}

void tailorbird_gate(const void* pass, int threads, int version) {
  using namespace tailorbird;
  const GatePass& p = *static_cast<const GatePass*>(pass);
  const auto run = training_version_of(version).gate;
  share_out(p.rows, threads, [&](auto first, auto last) { run(p, first, last); });
}

void tailorbird_softmax(const void* pass, int threads, int version) {
  using namespace tailorbird;
  const AttentionPass& p = *static_cast<const AttentionPass*>(pass);
  const auto run = training_version_of(version).attention;
  share_out(p.matrices * p.queries, threads, [&](auto first, auto last) { run(p, first, last); });
}

// The pass of walsh.h, likewise.
void tailorbird_walsh(const void* pass, int threads, int version) {
  using namespace tailorbird;
  const WalshPass& p = *static_cast<const WalshPass*>(pass);
  const auto run = training_version_of(version).walsh;
  share_out(p.rows * p.blocks, threads, [&](auto first, auto last) { run(p, first, last); });
}

void tailorbird_cross_entropy(const void* pass, int threads, int version) {
  using namespace tailorbird;
  const LossPass& p = *static_cast<const LossPass*>(pass);
  const auto run = training_version_of(version).loss;
  share_out(p.rows, threads, [&](auto first, auto last) { run(p, first, last); });
}

// Weights of blocks of so many, the last one may be shorter; block i has the bytes starts[i] to starts[i + 1] of the stream.
// Returns the number of the first block that is damaged, or -1.
std::int64_t tailorbird_decode_entropy(const std::uint16_t* table, const std::uint8_t* stream,
                                       const std::int64_t* starts, const std::uint8_t* rest, std::int64_t weights,
                                       std::int64_t block_weights, std::uint16_t* to, int threads) {
  const std::int64_t blocks = (weights + block_weights - 1) / block_weights;
  std::int64_t damaged = blocks;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : damaged) if (threads > 1)
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t first = i * block_weights, count = std::min(block_weights, weights - first);
    if (!tailorbird::decode_block(table, stream + starts[i], starts[i + 1] - starts[i], rest + first, count, to + first)) {
      damaged = std::min(damaged, i);
    }
  }
  return damaged == blocks ? -1 : damaged;
}

// The inverse; `starts` are those that the lengths of the codes give.
void tailorbird_encode_entropy(const std::uint32_t* codes, const std::uint16_t* values, const std::int64_t* starts,
                               std::int64_t weights, std::int64_t block_weights, std::uint8_t* stream,
                               std::uint8_t* rest, int threads) {
  const std::int64_t blocks = (weights + block_weights - 1) / block_weights;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t first = i * block_weights, count = std::min(block_weights, weights - first);
    tailorbird::encode_block(codes, values + first, count, stream + starts[i], starts[i + 1] - starts[i], rest + first);
  }
}

}  // extern "C"
