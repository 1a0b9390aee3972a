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

// y = x times the weight, plus the bias. Packed, or dense: [rows][in_features].
struct Linear {
  Weight weight;
  const void* dense;  // null: packed
  const float* bias;  // or null
  std::int32_t dense_float32, int8;  // dense values are float32, not bfloat16; inputs may be rounded to bytes
};

// Where a head's query, key and value lie in what the projections give for a token.
struct Heads {
  std::int64_t first, stride;
};

struct Block {
  Norm before_attention, after_attention, before_mlp, after_mlp;  // those after a sublayer stand before the sum
  Norm query, key;                                                // over the channels of a head
  Linear attention_in[3], attention_out;                          // q, k, v, or fewer where they are fused
  Linear mlp_in[2], mlp_out;                                      // gate and up, or fewer
  Heads queries, keys, values;
  std::int32_t heads, kv_heads, head_dim, rotary_dim, attention_linears, mlp_linears;
  std::int32_t gated, parallel, parallel_norm, window;  // window: 0 is none
  Activation activation;
  float scale, softcap;                // softcap: 0 is none
  const float *cosine, *sine;          // [positions][rotary_dim], or null
  void *key_pages, *value_pages;       // of this block
};

// Steps of a block, by what they do; rounding inputs to bytes counts to what comes before it.
enum Step { norms, attention_in, rotary, attention, attention_out, mlp_in, activation, mlp_out };

// Tokens of some sequences, one after the other.
struct Batch {
  const std::int32_t* positions;  // [tokens], where in its sequence a token stands, for rotary angles
  const std::int32_t* slots;      // [tokens], where its key lies in the pages; tokens of a tree differ here only
  const std::int32_t* sequences;  // [tokens], whose it is; neighbours of one sequence stand together
  const std::int32_t* pages;      // [sequences][most_pages]
  const std::uint64_t* ancestors; // [tokens] or null: of the slots from tree_start on those with a set bit are seen
  const std::int32_t* tree_start; // [tokens], beside `ancestors`
  std::int64_t tokens, most_pages, width;
  std::int32_t cache_float32;
  double* seconds;  // by `Step`, where what they take is added; or null
};

}  // namespace tailorbird
