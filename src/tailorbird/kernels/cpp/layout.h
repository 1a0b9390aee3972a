// How a packed weight lies in memory, and how it gets there from the stored form.
//
// A weight is cut into tiles of 16 rows, and a tile into steps of 32 columns. A step holds its codes in parts of 8,
// 4, 2 or 1 bits, so that none crosses a byte: 5 bits are 4 and 1, for example, the lower ones first. Of a part of p
// bits a row has p words of 32 bits in each step, and those of the 16 rows lie side by side: a word is a lane of a
// vector. Word v holds the columns from 32 / p * v on; its byte j has columns j, 4 + j, 8 + j, ... of them, the first in
// the lowest bits. So the same shift and mask bring four neighbouring columns of all rows into place at once, as the
// instructions that multiply bytes in fours want them.
//
// Codes of a codebook are stored as those of 4 bits are, and read as the codes of 8 bits that its table makes of them:
// signed levels plus 128, whose zero point is 128.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tailorbird {

constexpr int LANES = 16, STEP = 32, FOURS = STEP / 4;
//: Activations that share a scale, at most; a group of the weight is cut where it is longer.
constexpr std::int64_t LONGEST_SEGMENT = 128;

struct Weight {
  const std::uint32_t* codes;   // [tiles][steps][bits][LANES]
  const std::uint16_t* scales;  // [tiles][groups][LANES], float16 or bfloat16
  const std::uint8_t* zeros;    // [tiles][groups][LANES], or null: 2^(bits - 1) everywhere
  std::int64_t rows, in_features, columns, groups, group_columns;  // columns: in_features in whole steps
  std::int32_t bits, half;      // bits: of a code as it is read; half: whether scales are float16
  const std::uint8_t* table;    // [16], or null: codes are what they stand for
  const float* tables;          // [rows][LANES], or null; codes are then as they are stored, with 8 bytes behind them
};

// A weight as it is stored: rows of a bit stream each, the first code in the lowest bits.
struct Stored {
  const std::uint8_t* codes;    // [rows][ceil(in_features * bits / 8)]
  const std::uint16_t* scales;  // [rows][groups], float16 or bfloat16
  const std::uint8_t* zeros;    // [rows][ceil(groups * bits / 8)], or null: 2^(bits - 1) everywhere
  std::int64_t rows, in_features, groups, group_columns;
  std::int32_t bits, half;      // half: whether scales are float16
  const float* levels;          // [16], of a codebook, which has no zeros; or null: codes are what they stand for
};

enum class Kind : std::int32_t { float32, bfloat16, float16 };

// The rows of an embedding: values of `kind`, or a weight as it is stored, whose values are rounded to `kind`.
struct Embedding {
  const void* dense;  // [rows][width], or null: packed
  Stored packed;
  std::int64_t rows, width;
  float factor;       // what rows are multiplied by, products rounded to `kind`
  Kind kind;
};

//: Where numbers of bits are template arguments: 4 that a table makes 8 of.
constexpr int CODEBOOK = 16 + 4;
constexpr int stored_bits(int bits) { return bits % 16; }

constexpr int part_count(int bits) { return bits == 3 || bits == 5 || bits == 6 ? 2 : 1; }
constexpr int part_bits(int bits, int part) {
  const int lower = part_count(bits) == 1 ? bits : bits == 3 ? 2 : 4;
  return part == 0 ? lower : bits - lower;
}

// `width` bits of every byte.
constexpr std::uint32_t each_byte(int width) { return 0x01010101u * ((1u << width) - 1); }

inline std::uint32_t four_bytes(const void* from) {
  std::uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

inline std::int64_t tile_count(const Weight& w) { return (w.rows + LANES - 1) / LANES; }

// Values that share a scale: how many columns from `column` on, which lies in the group that ends at `group_end`.
inline std::int64_t segment_end(std::int64_t column, std::int64_t group_end) {
  return std::min(column + LONGEST_SEGMENT, group_end);
}

inline std::int64_t segment_count(const Weight& w) {
  const std::int64_t whole = (std::min(w.group_columns, w.columns) + LONGEST_SEGMENT - 1) / LONGEST_SEGMENT;
  const std::int64_t last = w.columns - (w.groups - 1) * w.group_columns;
  return (w.groups - 1) * whole + (last + LONGEST_SEGMENT - 1) / LONGEST_SEGMENT;
}

// Eight codes of `bits` bits each, a byte for each: the lowest come first.
struct Spread {
  static std::uint64_t eight(std::uint64_t stream, int bits) {
    std::uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= (stream >> i * bits & ((1u << bits) - 1)) << 8 * i;
    return bytes;
  }
};

// Tiles `first` to `last` of the stored codes: rows of a bit stream each, `in_features` codes of `bits` bits.
template <typename How>
inline __attribute__((always_inline)) void lay_out_with(const std::uint8_t* stored, std::int64_t rows,
                                                        std::int64_t in_features, int bits, std::uint32_t* codes,
                                                        std::int64_t first, std::int64_t last) {
  const std::int64_t width = (in_features * bits + 7) / 8, steps = (in_features + STEP - 1) / STEP;
  const int step_bytes = STEP / 8 * bits;
  for (std::int64_t tile = first; tile < last; ++tile) {
    std::uint32_t* words = codes + tile * steps * bits * LANES;
    for (std::int64_t step = 0; step < steps; ++step, words += bits * LANES) {
      const std::int64_t begin = step * step_bytes;
      for (int lane = 0; lane < LANES; ++lane) {
        const std::int64_t row = tile * LANES + lane;
        std::uint8_t stream[STEP + 8] = {};  // zeros in place of rows and columns that aren't there
        if (row < rows) {
          std::memcpy(stream, stored + row * width + begin, std::min<std::int64_t>(step_bytes, width - begin));
        }
        std::uint32_t fours[FOURS];
        for (int eight = 0; eight < STEP / 8; ++eight) {
          std::uint64_t eight_codes;
          std::memcpy(&eight_codes, stream + eight * bits, 8);
          const std::uint64_t bytes = How::eight(eight_codes, bits);
          fours[2 * eight] = std::uint32_t(bytes);
          fours[2 * eight + 1] = std::uint32_t(bytes >> 32);
        }
        for (int part = 0, word = 0, shift = 0; part < part_count(bits); ++part) {
          const int p = part_bits(bits, part), per_word = 8 / p;
          for (int v = 0; v < p; ++v) {
            std::uint32_t together = 0;
            for (int q = 0; q < per_word; ++q) together |= (fours[v * per_word + q] >> shift & each_byte(p)) << q * p;
            words[(word + v) * LANES + lane] = together;
          }
          word += p;
          shift += p;
        }
      }
    }
  }
}

#if defined(__x86_64__)
struct Deposit {
  __attribute__((target("bmi2"))) static std::uint64_t eight(std::uint64_t stream, int bits) {
    return __builtin_ia32_pdep_di(stream, 0x0101010101010101u * ((1u << bits) - 1));
  }
};

__attribute__((target("bmi2"))) inline void lay_out_by_deposit(const std::uint8_t* stored, std::int64_t rows,
                                                               std::int64_t in_features, int bits,
                                                               std::uint32_t* codes, std::int64_t first,
                                                               std::int64_t last) {
  switch (bits) {  // known numbers of bits let the compiler unroll
    case 2: return lay_out_with<Deposit>(stored, rows, in_features, 2, codes, first, last);
    case 3: return lay_out_with<Deposit>(stored, rows, in_features, 3, codes, first, last);
    case 4: return lay_out_with<Deposit>(stored, rows, in_features, 4, codes, first, last);
    case 5: return lay_out_with<Deposit>(stored, rows, in_features, 5, codes, first, last);
    case 6: return lay_out_with<Deposit>(stored, rows, in_features, 6, codes, first, last);
    case 8: return lay_out_with<Deposit>(stored, rows, in_features, 8, codes, first, last);
  }
}
#endif

inline void lay_out(const std::uint8_t* stored, std::int64_t rows, std::int64_t in_features, int bits,
                    std::uint32_t* codes, std::int64_t first, std::int64_t last) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("bmi2")) {
    return lay_out_by_deposit(stored, rows, in_features, bits, codes, first, last);
  }
#endif
  lay_out_with<Spread>(stored, rows, in_features, bits, codes, first, last);
}

}  // namespace tailorbird
