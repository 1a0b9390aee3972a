// What a decoder block consists of, and the tokens that run through it; all tensors belong to the caller.
#pragma once

#include <cstdint>

#include "layout.h"

namespace tailorbird {

// Keys of a page lie side by side for every channel, values for every key: [kv_heads][head_dim][PAGE] and
// [kv_heads][PAGE][head_dim], bfloat16 or float32.
constexpr int PAGE = 32;

enum class NormKind : std::int32_t { none, root_mean_square, layer };
enum class Activation : std::int32_t { silu, gelu_tanh, gelu, relu };

struct Norm {
  const float* weight;  // what the normed values are multiplied by; an offset of the model's is in it
  const float* bias;    // or null
  float epsilon;
  NormKind kind;
};

struct LinearAdapter;

// Blocks of inputs times their signs and Hadamard's matrix over the root of its order, before the products of a linear.
struct Turn {
  const std::int8_t* signs;     // [blocks][block], 1 or -1
  std::int64_t blocks, block;  // block: a power of two
  float factor;                // 1 over the root of block
};

// A matrix that is zero but for some values of 16 bits.
struct SparseRows {
  const std::int64_t* offsets;  // [rows + 1], where a row's values begin
  const void *columns, *values;
  std::int64_t rows, in_features;
  std::int32_t wide, half;      // columns are int32, not uint16; values are float16, not bfloat16
};

// y = x times the weight, plus the bias, plus the sparse and the low-rank part. Packed, or dense: [rows][in_features].
struct Linear {
  Weight weight;
  const void* dense;  // null: packed
  const float* bias;  // or null
  std::int32_t dense_float32, int8;  // dense values are float32, not bfloat16; inputs may be rounded to bytes
  const LinearAdapter* low_rank;     // `down` and `up` alone, of all tokens; or null
  const Turn* turn;                  // of the weight's inputs, not of the low-rank part's; or null. Linears that read the
                                     // same inputs have equal ones, or none
  const SparseRows* sparse;          // or null
  const std::int32_t* apart;         // [apart_count] inputs that only the sparse part multiplies: zeros where inputs are
  std::int64_t apart_count;          // rounded to bytes. The same address for all that read the same bytes
};

// Where a head's query, key and value lie in what the projections give for a token: `group_stride` apart those of
// heads with different keys, `stride` apart those that share them.
struct Heads {
  std::int64_t first, group_stride, stride;
};

struct Block {
  Norm before_attention, after_attention, before_mlp, after_mlp;  // those after a sublayer stand before the sum
  Norm query, key;                                                // over the channels of a head, or of all heads
  Linear attention_in[3], attention_out;                          // q, k, v, or fewer where they are fused
  Linear mlp_in[2], mlp_out;                                      // gate and up, or fewer
  Heads queries, keys, values;
  std::int32_t heads, kv_heads, head_dim, rotary_dim, attention_linears, mlp_linears;
  std::int32_t gated, parallel, parallel_norm, whole_norms, window;  // whole: of query and key; window: 0 is none
  Activation activation;
  float scale, softcap;                // softcap: 0 is none
  const float *cosine, *sine;          // [positions][rotary_dim], or null
  void *key_pages, *value_pages;       // of this block
};

// Steps of a block, by what they do; rounding inputs to bytes counts to what comes before it.
enum Step { norms, attention_in, rotary, attention, attention_out, mlp_in, activation, mlp_out };

// What an adapter makes of one linear W: outputs * (W (inputs * x) + scale * up (core (ranks * down (inputs * x)))) +
// bias. All null: nothing.
enum class Matrix : std::int32_t { bfloat16, float32, int8 };
struct LinearAdapter {
  const void *down, *up;           // [rank][in_features] and [tiles of outputs][rank][LANES], both or neither
  const float* core;               // [rank][rank], columns first, or null
  const float* ranks;              // what down x is multiplied by before all else, [rank], or null
  const float *inputs, *outputs;   // factors [in_features] and [out_features], or null
  const float* bias;               // in place of the linear's, or null
  std::int64_t rank;
  float scale;
  Matrix down_kind, up_kind;
};

// The linears of a block in their order: three for attention_in, attention_out, two for mlp_in, mlp_out. `inputs` may be
// there only where a linear is the only one that reads them.
constexpr int ATTENTION_IN = 0, ATTENTION_OUT = 3, MLP_IN = 4, MLP_OUT = 6, LINEARS = 7;
struct BlockAdapter {
  LinearAdapter linears[LINEARS];
};

// Tokens of a batch that share an adapter.
struct Segment {
  std::int64_t begin, end;
  const BlockAdapter* blocks;  // of all blocks of the model
};

// Tokens of some sequences, one after the other.
struct Batch {
  const std::int32_t* positions;  // [tokens], where in its sequence a token stands, for rotary angles
  const std::int32_t* slots;      // [tokens], where its key lies in the pages; tokens of a tree differ here only
  const std::int32_t* sequences;  // [tokens], whose it is; neighbours of one sequence stand together
  const std::int32_t* pages;      // [sequences][most_pages]
  const std::uint64_t* ancestors; // [tokens] or null: of the slots from tree_start on those with a set bit are seen by a
                                  // token whose slot isn't its position; others see all up to theirs
  const std::int32_t* tree_start; // [tokens], beside `ancestors`
  std::int64_t tokens, most_pages, width;
  const Segment* segments;        // [segment_count], by their first token; none share a token
  std::int64_t segment_count, most_rank;
  std::int32_t cache_float32;
  double* seconds;  // by `Step`, where what they take is added; or null
};

}  // namespace tailorbird
