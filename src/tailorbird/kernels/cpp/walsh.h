// Input transforms: blocks of inputs times their signs and Hadamard's matrix, over the root of its order, or back.
#pragma once

#include <cstdint>

namespace tailorbird {

struct WalshPass {
  const float* x;            // [rows][blocks][block]
  const std::int8_t* signs;  // [blocks][block], 1 or -1
  float* to;                 // as x; may be x
  std::int64_t rows, blocks, block;  // block: a power of two
  float factor;              // 1 over the root of block
  std::int32_t back;         // signs come last
};

}  // namespace tailorbird
