// What a step of tuning does beside products: norms, gates and the loss, forward and backward. Tensors
// belong to the caller; activations are bfloat16 or float32, what is summed over a row is float32.
#pragma once

#include <cstdint>

namespace tailorbird {

// A norm over rows of `width` values, or its gradients where `gradient` is there.
struct NormPass {
  const void *x, *gradient;                // [rows][width]; the gradient is that of the result
  void* to;                                // [rows][width], close together: the result, or the gradient of x
  const float *weight, *bias;              // [width]; a model's offset is in the weight; the bias may be null
  float *means, *factors;                  // [rows], written forward, read backward; means null: root mean square
  float *weight_gradient, *bias_gradient;  // [width], or null: nobody wants them
  std::int64_t rows, width, x_stride, gradient_stride;
  float epsilon;
  std::int32_t bfloat16;
};

// value = gate * sigmoid(curve(gate)) * up, or its gradients where `gradient` is there.
enum class Curve : std::int32_t { silu, gelu_tanh };
struct GatePass {
  const void *gate, *up, *gradient;  // [rows][width]
  void *to, *up_gradient;            // [rows][width], close together: the value, or gate's gradient and up's
  std::int64_t rows, width, gate_stride, up_stride, gradient_stride;
  Curve curve;
  std::int32_t bfloat16;
};

// Channel i of a head turns with channel half + i by the angle of its token; those from 2 * half on stay.
// The loss of each row of logits, which are replaced by its gradient where that is wanted.
struct LossPass {
  void* logits;                 // [rows][vocabulary], close together
  const std::int64_t* targets;  // [rows], tokens of the vocabulary
  float* losses;                // [rows], in nats
  std::int64_t rows, vocabulary;
  float multiplier, softcap;    // what logits are multiplied by, then capped at; 0 is no cap
  std::int32_t bfloat16, gradient;
};

// Some neighbouring queries of causal attention against the keys up to the last of them: scores become probabilities. With
// a gradient, which is that of the probabilities, that becomes the gradient of the scores.
struct AttentionPass {
  void* scores;        // [matrices][queries][keys], bfloat16, before they are scaled
  const void* low;     // what rounding took off them, bfloat16
  void* gradient;      // [matrices][queries][keys], bfloat16, or null
  float* normalizers;  // [matrices][queries], the logarithm of the sum of a row's exponentials: written, or read for gradients
  std::int64_t matrices, queries, keys;
  std::int64_t first;  // the key with which the first query stands; the next one stands with the next key
  std::int64_t window; // how many keys a query sees, up to its own
  float scale;
};

}  // namespace tailorbird
