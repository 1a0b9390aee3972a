// Random weights of every width through every version of the products, of dequantization and of looking rows up, random
// additions to these, random rows of logits, random codes, and the passes of a tuning step, in blocks of memory of exactly the size
// that they need: built with sanitizers, so that a step beyond any of them, or anything undefined, ends the run.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../src/tailorbird/kernels/cpp/library.cpp"

using namespace tailorbird;

int code_of(const std::uint8_t* stream, std::int64_t index, int bits) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const std::int64_t place = index * bits + bit;
    code |= (stream[place / 8] >> place % 8 & 1) << bit;
  }
  return code;
}

// A random rectangle of a random weight, as float32 or bfloat16.
bool dequantizes(std::mt19937& random, int bits, int version) {
  const std::int64_t rows = 1 + random() % 20, in_features = 1 + random() % 300, size = 32 * (1 + random() % 6);
  const bool symmetric = random() % 2, one_group = random() % 3 == 0, bfloat16 = random() % 2;
  const std::int64_t group_columns = one_group ? in_features : size;
  const std::int64_t groups = (in_features + group_columns - 1) / group_columns;
  const std::int64_t width = (in_features * bits + 7) / 8, zeros_width = (groups * bits + 7) / 8;
  std::vector<std::uint8_t> codes(rows * width), zeros(rows * zeros_width);
  std::vector<std::uint16_t> scales(rows * groups);
  for (auto& byte : codes) byte = random();
  for (auto& byte : zeros) byte = random();
  for (auto& scale : scales) scale = 0x3f00 + random() % 100;
  const std::int64_t row = random() % rows, count = 1 + random() % (rows - row);
  const std::int64_t column = random() % ((in_features + 15) / 16) * 16;
  const std::int64_t columns = 1 + random() % (in_features - column);
  std::vector<std::uint16_t> to(count * columns * (bfloat16 ? 1 : 2));
  const Stored weight{codes.data(), scales.data(), symmetric ? nullptr : zeros.data(), rows, in_features, groups,
                      group_columns, bits, 0, nullptr};
  tailorbird_dequantize(&weight, row, count, column, columns, to.data(), bfloat16, 1 + random() % 3, version);
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t group = (column + c) / group_columns;
      const int code = code_of(codes.data() + (row + r) * width, column + c, bits);
      const int zero = symmetric ? 1 << (bits - 1) : code_of(zeros.data() + (row + r) * zeros_width, group, bits);
      const float exact = (code - zero) * portable::value_of(BFloat16{scales[(row + r) * groups + group]});
      const std::int64_t place = r * columns + c;
      float value;
      if (bfloat16) {
        value = portable::value_of(BFloat16{to[place]});
      } else {
        std::memcpy(&value, to.data() + 2 * place, 4);
      }
      if (!(std::fabs(value - exact) <= (bfloat16 ? std::fabs(exact) / 256 : 0))) {
        std::printf("%d bits, version %d: %g is not %g\n", bits, version, value, exact);
        return false;
      }
    }
  }
  return true;
}

// Random weights through a random prefix code and back, and random bytes that are no codes of anything.
bool codes_exponents(std::mt19937& random) {
  std::vector<int> lengths = {0};
  const std::size_t symbols = 2 + random() % 255;
  while (lengths.size() < symbols) {
    const std::size_t at = random() % lengths.size();
    if (lengths[at] == LONGEST_CODE) continue;
    lengths.push_back(++lengths[at]);
  }
  std::vector<std::uint16_t> table(1 << LONGEST_CODE);
  std::vector<std::uint32_t> codes(256);
  std::uint32_t filled = 0;
  for (int length = 1; length <= LONGEST_CODE; ++length) {
    for (std::size_t symbol = 0; symbol < symbols; ++symbol) {
      if (lengths[symbol] != length) continue;
      codes[symbol] = filled >> (LONGEST_CODE - length) | std::uint32_t(length) << 16;
      for (int i = 0; i < 1 << (LONGEST_CODE - length); ++i) table[filled++] = std::uint16_t(symbol | length << 8);
    }
  }
  const std::int64_t weights = 1 + random() % 3000, block = 1 + random() % 700, blocks = (weights + block - 1) / block;
  std::vector<std::uint16_t> values(weights), to(weights);
  std::vector<std::int64_t> starts(blocks + 1);
  for (std::int64_t i = 0, bits = 0; i < weights; ++i) {
    const std::uint32_t symbol = random() % symbols;
    values[i] = std::uint16_t(symbol << 7 | (random() & 0x807f));
    bits += codes[symbol] >> 16;
    if (i % block == block - 1 || i == weights - 1) starts[i / block + 1] = starts[i / block] + (bits + 7) / 8, bits = 0;
  }
  std::vector<std::uint8_t> stream(starts[blocks]), rest(weights);
  const int threads = 1 + random() % 3;
  tailorbird_encode_entropy(codes.data(), values.data(), starts.data(), weights, block, stream.data(), rest.data(), threads);
  if (tailorbird_decode_entropy(table.data(), stream.data(), starts.data(), rest.data(), weights, block, to.data(),
                                threads) != -1 || to != values) {
    return std::puts("weights didn't come back"), false;
  }
  for (auto& byte : stream) byte = random();
  for (int i = random() % 50; i > 0; --i) table[random() % table.size()] = 0;
  for (std::int64_t i = 1; i < blocks; ++i) starts[i] = starts[i - 1] + random() % (starts[blocks] - starts[i - 1] + 1);
  tailorbird_decode_entropy(table.data(), stream.data(), starts.data(), rest.data(), weights, block, to.data(), threads);
  tailorbird_encode_entropy(codes.data(), values.data(), starts.data(), weights, block, stream.data(), rest.data(), threads);
  return true;
}

// A random row of logits, with every setting by chance: what is chosen is a token that was allowed.
bool chooses(std::mt19937& random, int version) {
  const std::int64_t vocabulary = 1 + random() % (random() % 2 ? 70 : 700);
  std::vector<float> logits(vocabulary);
  for (auto& logit : logits) logit = random() % 9 == 0 ? -INFINITY : int(random() % 4001 - 2000) / 100.0f;
  logits[random() % vocabulary] = 1;
  std::vector<std::uint32_t> bits((vocabulary + 31) / 32);
  for (auto& word : bits) word = random() % 3 ? random() : 0;
  std::vector<std::int32_t> tokens(random() % vocabulary), counts(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = i, counts[i] = random() % 3;
  const std::vector<double> biases(tokens.size(), 0.25);
  const auto share = [&](double none) { return random() % 2 ? none : (1 + random() % 1000) / 1000.0; };
  SamplingRow row = {};
  row.logits = logits.data();
  row.seen = row.bias_tokens = tokens.data(), row.counts = counts.data(), row.biases = biases.data();
  row.seen_count = random() % 2 ? tokens.size() : 0, row.bias_count = random() % 2 ? tokens.size() : 0;
  row.forbidden = tokens.data(), row.forbidden_count = std::min<std::size_t>(random() % 2, tokens.size());
  row.allowed = random() % 2 ? bits.data() : nullptr;
  row.repetition = 1.25, row.presence = 0.5, row.frequency = -0.125;
  const double temperatures[] = {0, 1e-320, 0.01, 1, 100};
  row.temperature = temperatures[random() % 5];
  row.top_p = share(1), row.min_p = share(0), row.typical_p = share(1), row.uniform = random() % 1000 / 1000.0;
  row.top_k = random() % 2 ? random() % 100 : 0;
  row.logprobs = int(random() % (MOST_LOGPROBS + 2)) - 1;
  void* const rows[] = {&row};
  tailorbird_choose(rows, 1, vocabulary, 1 + random() % 3, version);
  const auto may = [&](std::int64_t t) {
    return std::isfinite(logits[t]) && (row.forbidden_count == 0 || t != tokens[0]) &&
           (row.allowed == nullptr || bits[t / 32] >> t % 32 & 1);
  };
  bool any = false;
  for (std::int64_t t = 0; t < vocabulary; ++t) any = any || may(t);
  if (row.problem == (any ? FOUND : NOTHING_LEFT) && (!any || may(row.token))) return true;
  std::printf("version %d: of %d tokens %d, problem %d\n", version, int(vocabulary), row.token, row.problem);
  return false;
}

// Random rows of a random embedding, packed or dense; and none where an id has no row.
bool looks_up(std::mt19937& random, int bits, int version) {
  const std::int64_t rows = 1 + random() % 20, width = 1 + random() % 300, group_columns = 32 * (1 + random() % 6);
  const std::int64_t groups = (width + group_columns - 1) / group_columns, count = 1 + random() % 9;
  const bool book = bits == 4 && random() % 2, symmetric = book || random() % 2, dense = random() % 3 == 0;
  const Kind kind = static_cast<Kind>(random() % 3);
  const std::int64_t row_bytes = (width * bits + 7) / 8, zeros_bytes = (groups * bits + 7) / 8;
  std::vector<std::uint8_t> codes(rows * row_bytes), zeros(rows * zeros_bytes);
  std::vector<std::uint16_t> scales(rows * groups), halves(dense ? rows * width : 0);
  std::vector<float> singles(dense ? rows * width : 0), levels(book ? 16 : 0), to(count * width, NAN);
  for (auto& byte : codes) byte = random();
  for (auto& byte : zeros) byte = random();
  for (auto& scale : scales) scale = 0x3c00 + random() % 100;  // float16 from 1 on
  for (auto& level : levels) level = int(random() % 255) - 127;
  for (auto& value : halves) value = (kind == Kind::bfloat16 ? 0x3f80 : 0x3c00) + random() % 100;
  for (auto& value : singles) value = random() % 100 / 8.0f;
  const Stored packed{codes.data(), scales.data(), symmetric ? nullptr : zeros.data(), rows, width, groups,
                      group_columns, bits, 1, book ? levels.data() : nullptr};
  const void* values = kind == Kind::float32 ? static_cast<const void*>(singles.data()) : halves.data();
  const float factor = random() % 2 ? 1 : 3;
  const Embedding embedding{dense ? values : nullptr, packed, rows, width, factor, kind};
  std::vector<std::int64_t> ids(count);
  for (auto& id : ids) id = random() % rows;
  const std::int64_t wrong = random() % count, given = ids[wrong];
  for (const std::int64_t id : {rows, std::int64_t(-1), std::int64_t(1) << 62, -(std::int64_t(1) << 62)}) {
    ids[wrong] = id;
    const std::int64_t missed =
        tailorbird_look_up(&embedding, ids.data(), count, to.data(), 1 + random() % 3, version);
    if (missed != wrong || !std::isnan(to[0])) return std::puts("an id without a row was looked up"), false;
  }
  ids[wrong] = given;
  if (tailorbird_look_up(&embedding, ids.data(), count, to.data(), 1 + random() % 3, version) != -1) return false;
  for (std::int64_t token = 0; token < count; ++token) {
    for (std::int64_t c = 0; c < width; ++c) {
      const std::int64_t row = ids[token], group = c / group_columns, place = row * width + c;
      const int code = code_of(codes.data() + row * row_bytes, c, bits);
      const int zero = symmetric ? 1 << (bits - 1) : code_of(zeros.data() + row * zeros_bytes, group, bits);
      float exact = (book ? levels[code] : code - zero) * portable::value_of(Half{scales[row * groups + group]});
      if (dense && kind == Kind::float32) exact = singles[place];
      if (dense && kind == Kind::bfloat16) exact = portable::value_of(BFloat16{halves[place]});
      if (dense && kind == Kind::float16) exact = portable::value_of(Half{halves[place]});
      exact *= factor;
      const float unit = kind == Kind::float32 ? 0 : kind == Kind::bfloat16 ? 1 / 128.0f : 1 / 1024.0f;
      if (!(std::fabs(to[token * width + c] - exact) <= unit * std::fabs(exact))) {
        std::printf("a row of %d bits, version %d: %g is not %g\n", bits, version, to[token * width + c], exact);
        return false;
      }
    }
  }
  return true;
}

// Random rows through the passes of a tuning step, forward and backward: every result is finite, and softmax's sums are 1.
bool trains(std::mt19937& random, int version) {
  const std::int64_t rows = random() % 9, width = 1 + random() % 70;
  const bool bfloat16 = random() % 2, layer = random() % 2;
  const int threads = 1 + random() % 3;
  const auto floats = [&](std::int64_t count) {
    std::vector<float> made(count);
    for (auto& value : made) value = random() % 2001 / 1000.0f - 1;
    return made;
  };
  // Activations of either kind, as halves of words; what isn't written yet isn't a number in either.
  const auto values = [&](std::int64_t count, bool written) {
    std::vector<std::uint16_t> made(bfloat16 ? count : 2 * count, 0x7fc0);
    if (!written) return made;
    if (bfloat16) {
      for (auto& value : made) value = 0x3f00 + random() % 100;
    } else {
      const std::vector<float> wide = floats(count);
      if (count > 0) std::memcpy(made.data(), wide.data(), 4 * count);
    }
    return made;
  };
  const auto finite = [&](const std::vector<std::uint16_t>& made) {
    for (std::size_t i = bfloat16 ? 0 : 1; i < made.size(); i += bfloat16 ? 1 : 2) {
      if ((made[i] & 0x7f80) == 0x7f80) return false;
    }
    return true;
  };
  const std::int64_t count = rows * width;
  const auto x = values(count, true), other = values(count, true), gradient = values(count, true);
  auto y = values(count, false), to = values(count, false), more = values(count, false);
  const std::vector<float> weight = floats(width), bias = floats(width);
  std::vector<float> means(rows), factors(rows), weight_gradient(width, NAN), bias_gradient(width, NAN);
  NormPass norm{x.data(), nullptr, y.data(), weight.data(), bias.data(), layer ? means.data() : nullptr, factors.data(),
                nullptr, nullptr, rows, width, width, width, 1e-5f, bfloat16};
  tailorbird_norm(&norm, threads, version);
  norm.gradient = gradient.data();
  norm.to = to.data();
  norm.weight_gradient = weight_gradient.data();
  norm.bias_gradient = bias_gradient.data();
  tailorbird_norm(&norm, threads, version);
  bool good = finite(y) && finite(to);
  for (std::int64_t i = 0; i < width; ++i) good &= std::isfinite(weight_gradient[i]) && std::isfinite(bias_gradient[i]);
  const Curve curve = random() % 2 ? Curve::silu : Curve::gelu_tanh;
  GatePass gate{x.data(), other.data(), nullptr, y.data(), nullptr, rows, width, width, width, width, curve, bfloat16};
  tailorbird_gate(&gate, threads, version);
  gate.gradient = gradient.data();
  gate.to = to.data();
  gate.up_gradient = more.data();
  tailorbird_gate(&gate, threads, version);
  good = good && finite(y) && finite(to) && finite(more);
  auto logits = x;
  std::vector<std::int64_t> targets(rows);
  for (auto& target : targets) target = random() % width;
  std::vector<float> losses(rows, NAN);
  const LossPass loss{logits.data(), targets.data(), losses.data(), rows, width, 0.5f, random() % 2 ? 3.0f : 0, bfloat16, 1};
  tailorbird_cross_entropy(&loss, threads, version);
  for (const float one : losses) good &= std::isfinite(one);
  good = good && finite(logits);
  if (!bfloat16 || rows > width) return good;
  const std::vector<std::uint16_t> low(count, 0);
  auto scores = x, again = x, of_scores = gradient;
  std::vector<float> normalizers(rows);
  AttentionPass attention{scores.data(), low.data(), nullptr, normalizers.data(), 1, rows, width, width - rows,
                          std::int64_t(1 + random() % width), 0.5f};
  tailorbird_softmax(&attention, threads, version);
  attention.scores = again.data();
  attention.gradient = of_scores.data();
  tailorbird_softmax(&attention, threads, version);
  for (std::int64_t row = 0; row < rows; ++row) {
    float sum = 0;
    for (std::int64_t i = 0; i < width; ++i) sum += portable::value_of(BFloat16{again[row * width + i]});
    good &= std::fabs(sum - 1) < 0.01f;
  }
  return good && finite(of_scores);
}

// Products with a table of values for each row, and nothing behind the codes but the bytes that must be there.
bool looks_up_tables(std::mt19937& random, int bits, int version) {
  const std::int64_t rows = 1 + random() % 40, in_features = 1 + random() % 200, tokens = 1 + random() % 11;
  const std::int64_t width = (in_features * bits + 7) / 8, columns = (in_features + STEP - 1) / STEP * STEP;
  std::vector<std::uint8_t> codes(rows * width + 8);
  std::vector<float> tables(rows * LANES), x(tokens * in_features), y(tokens * rows, NAN);
  for (auto& byte : codes) byte = random();
  for (auto& value : x) value = int(random() % 9) - 4;
  for (std::int64_t i = 0; i < rows * LANES; ++i) tables[i] = i % LANES < 1 << bits ? int(random() % 9) - 4 : tables[i - (1 << bits)];
  Weight w{};
  w.codes = reinterpret_cast<const std::uint32_t*>(codes.data());
  w.rows = rows, w.in_features = in_features, w.columns = columns, w.groups = 1, w.group_columns = columns;
  w.bits = bits, w.tables = tables.data();
  tailorbird_table_linear(&w, x.data(), y.data(), tokens, 1 + random() % 3, version);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (std::int64_t row = 0; row < rows; ++row) {
      double exact = 0;
      for (std::int64_t column = 0; column < in_features; ++column) {
        int code = 0;
        for (int bit = 0; bit < bits; ++bit) {
          const std::int64_t place = column * bits + bit;
          code |= (codes[row * width + place / 8] >> place % 8 & 1) << bit;
        }
        exact += tables[row * LANES + code] * x[token * in_features + column];
      }
      if (y[token * rows + row] != exact) {
        std::printf("tables of %d bits, version %d: %g is not %g\n", bits, version, y[token * rows + row], exact);
        return false;
      }
    }
  }
  return true;
}

int main(int, char** arguments) {
  std::mt19937 random(std::atoi(arguments[1]));
  const int widths[] = {2, 3, 4, 5, 6, 8};
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    const bool book = random() % 7 == 0;
    const int bits = book ? 4 : widths[random() % 6];
    int version = random() % 6;
    if (!tailorbird_runs_version(version)) version = 0;
    if (!dequantizes(random, bits, version) || !looks_up(random, bits, version)) return 1;
    if (!chooses(random, version) || !codes_exponents(random)) return 1;
    if (!trains(random, version)) {
      std::printf("a pass of a tuning step, version %d\n", version);
      return 1;
    }
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
    std::uint8_t table[16];
    for (auto& level : table) level = random();
    const bool symmetric = book || random() % 2, int8 = random() % 2;
    tailorbird_lay_out(stored.data(), rows, in_features, bits, codes.data(), 1 + random() % 3);
    const Weight weight{codes.data(), scales.data(), symmetric ? nullptr : zeros.data(), rows, in_features, columns,
                        groups, group_steps * STEP, book ? 8 : bits, 0, book ? table : nullptr};
    tailorbird_linear(&weight, x.data(), y.data(), tokens, 0, int8, 1 + random() % 3, version);
    std::vector<double> expected(tokens * rows);
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
          if (book) code = table[code];
          const double weighed = (double(code) - (symmetric ? 1 << (weight.bits - 1) : zeros[at])) * scale;
          exact += weighed * x[token * in_features + column];
          size += std::fabs(weighed);
        }
        // Activations lie within 1; rounded to bytes each moves by half a 127th at most.
        expected[token * rows + row] = y[token * rows + row];
        if (!(std::fabs(y[token * rows + row] - exact) <= (int8 ? 0.5 / 127 + 1e-4 : 1e-4) * size + 1e-30)) {
          std::printf("%d bits, codebook %d, version %d, int8 %d: %g is not %g\n", bits, book, version, int8,
                      y[token * rows + row], exact);
          return 1;
        }
      }
    }
    if (!looks_up_tables(random, 2 + random() % 3, version)) return 1;
    // y = outputs * (y + scale * up down x) + bias, then a sparse matrix is added; all numbers are small and exact.
    const std::int64_t rank = 1 + random() % 40;
    const bool low_rank = random() % 4, factors = random() % 2, bias = random() % 2;
    const auto numbers = [&](std::int64_t count) {
      std::vector<float> made(count);
      for (auto& value : made) value = int(random() % 5) - 2;
      return made;
    };
    const std::vector<float> down = numbers(rank * in_features), up = numbers(rank * tiles * LANES), outputs = numbers(rows);
    const std::vector<float> own = numbers(rows), inputs = numbers(tokens * in_features);
    // A core that is the identity, and ranks that are 1, change nothing.
    std::vector<float> core(rank * rank), ones(rank, 1.0f);
    for (std::int64_t r = 0; r < rank; ++r) core[r * rank + r] = 1;
    const LinearAdapter adapter{low_rank ? down.data() : nullptr, low_rank ? up.data() : nullptr,
                                low_rank && random() % 2 ? core.data() : nullptr,
                                low_rank && random() % 2 ? ones.data() : nullptr, nullptr,
                                factors ? outputs.data() : nullptr, bias ? own.data() : nullptr,
                                low_rank ? rank : 0, 0.5f, Matrix::float32, Matrix::float32};
    std::vector<std::int64_t> offsets(rows + 1);
    std::vector<std::uint16_t> narrow, values;
    std::vector<std::int32_t> wide;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int count = random() % 9; count > 0; --count) {
        wide.push_back(random() % in_features);
        narrow.push_back(wide.back());
        values.push_back(0x3c00);  // 1 as float16, 1 / 128 as bfloat16
      }
      offsets[row + 1] = wide.size();
    }
    const bool is_wide = random() % 2, half = random() % 2;
    const void* places = is_wide ? static_cast<const void*>(wide.data()) : narrow.data();
    const SparseRows sparse{offsets.data(), places, values.data(), rows, in_features, is_wide, half};
    const int threads = 1 + random() % 3;
    tailorbird_adapt(&adapter, inputs.data(), in_features, y.data(), rows, tokens, threads, version);
    tailorbird_add_sparse(&sparse, inputs.data(), y.data(), tokens, threads, version);
    for (std::int64_t token = 0; token < tokens; ++token) {
      const float* x_of = inputs.data() + token * in_features;
      std::vector<double> low(rank);
      for (std::int64_t r = 0; low_rank && r < rank; ++r) {
        for (std::int64_t i = 0; i < in_features; ++i) low[r] += down[r * in_features + i] * x_of[i];
      }
      for (std::int64_t row = 0; row < rows; ++row) {
        double exact = expected[token * rows + row];
        for (std::int64_t r = 0; low_rank && r < rank; ++r) exact += 0.5 * up[(row / LANES * rank + r) * LANES + row % LANES] * low[r];
        exact = (factors ? outputs[row] : 1) * exact + (bias ? own[row] : 0);
        for (std::int64_t k = offsets[row]; k < offsets[row + 1]; ++k) exact += x_of[wide[k]] * (half ? 1 : 1 / 128.0);
        if (!(std::fabs(y[token * rows + row] - exact) <= 1e-5 * (std::fabs(exact) + 100))) {
          std::printf("additions, version %d: %g is not %g\n", version, y[token * rows + row], exact);
          return 1;
        }
      }
    }
  }
  return 0;
}
