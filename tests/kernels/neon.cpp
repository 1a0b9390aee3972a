// Products, what is added to them, blocks and rows of embeddings of NEON's version against those of the portable one,
// bit for bit: both sum in the same order, and both multiply and add at once. Every width, with zero points and without,
// a codebook and tables, odd shapes, few tokens and many.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <vector>

#include "../../src/tailorbird/kernels/cpp/library.cpp"

using namespace tailorbird;

constexpr int PORTABLE = 0, NEON = 4;
std::mt19937 random_bits;

std::int64_t between(std::int64_t least, std::int64_t most) { return least + random_bits() % (most - least + 1); }

std::vector<float> floats(std::int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = between(-1000, 1000) / 1000.0f;
  return values;
}

// Packed linears with all that they point to.
struct Weights {
  std::deque<std::vector<std::uint32_t>> codes;
  std::deque<std::vector<std::uint16_t>> scales;
  std::deque<std::vector<std::uint8_t>> zeros;
  std::uint8_t book[16];

  Weight add(std::int64_t rows, std::int64_t in_features, int bits, bool symmetric, bool half, bool with_book = false) {
    const std::int64_t steps = (in_features + STEP - 1) / STEP, tiles = (rows + LANES - 1) / LANES;
    const std::int64_t group_steps = between(1, 6), groups = (steps + group_steps - 1) / group_steps;
    std::vector<std::uint8_t> stored(rows * ((in_features * bits + 7) / 8));
    for (auto& byte : stored) byte = random_bits();
    codes.emplace_back(tiles * steps * bits * LANES);
    scales.emplace_back(tiles * groups * LANES);
    zeros.emplace_back(tiles * groups * LANES);
    for (auto& scale : scales.back()) scale = (half ? 0x2c00 : 0x3d00) + between(0, 100);  // about 1 / 16 to 1 / 32
    for (auto& zero : zeros.back()) zero = between(0, (1 << bits) - 1);
    tailorbird_lay_out(stored.data(), rows, in_features, bits, codes.back().data(), between(1, 3));
    for (auto& level : book) level = random_bits();
    return {codes.back().data(), scales.back().data(), symmetric ? nullptr : zeros.back().data(), rows, in_features,
            steps * STEP, groups, group_steps * STEP, with_book ? 8 : bits, half, with_book ? book : nullptr};
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

bool product(int bits, bool symmetric, bool int8, bool book) {
  Weights weights;
  const std::int64_t rows = between(1, 70), in_features = between(1, 300), tokens = between(1, 29);
  const Weight weight = weights.add(rows, in_features, bits, symmetric, between(0, 1), book);
  const std::vector<float> x = floats(tokens * in_features);
  std::vector<float> expected(tokens * rows, NAN), found(tokens * rows, NAN);
  tailorbird_linear(&weight, x.data(), expected.data(), tokens, 0, int8, 1, PORTABLE);
  tailorbird_linear(&weight, x.data(), found.data(), tokens, 0, int8, between(1, 3), NEON);
  return same(expected, found) && expected[0] == expected[0];
}

// Products with a table of values for each row.
bool table_product(int bits) {
  const std::int64_t rows = between(1, 40), in_features = between(1, 200), tokens = between(1, 11);
  const std::int64_t columns = (in_features + STEP - 1) / STEP * STEP;
  std::vector<std::uint8_t> codes(rows * ((in_features * bits + 7) / 8) + 8);
  for (auto& byte : codes) byte = random_bits();
  std::vector<float> tables = floats(rows * LANES);
  for (std::int64_t i = 0; i < rows * LANES; ++i) {
    if (i % LANES >= 1 << bits) tables[i] = tables[i - (1 << bits)];
  }
  const std::vector<float> x = floats(tokens * in_features);
  std::vector<float> expected(tokens * rows, NAN), found(tokens * rows, NAN);
  Weight w{};
  w.codes = reinterpret_cast<const std::uint32_t*>(codes.data());
  w.rows = rows, w.in_features = in_features, w.columns = columns, w.groups = 1, w.group_columns = columns;
  w.bits = bits, w.tables = tables.data();
  tailorbird_table_linear(&w, x.data(), expected.data(), tokens, 1, PORTABLE);
  tailorbird_table_linear(&w, x.data(), found.data(), tokens, between(1, 3), NEON);
  return same(expected, found) && expected[0] == expected[0];
}

// What an adapter makes of random outputs, with matrices of each kind, and then what a sparse part adds.
bool additions() {
  const std::int64_t rows = between(1, 70), in_features = between(1, 300), tokens = between(1, 9);
  const std::int64_t rank = between(1, 40), tiles = (rows + LANES - 1) / LANES;
  const auto kind = static_cast<Matrix>(between(0, 2));
  std::vector<float> down = floats(rank * in_features), up = floats(rank * tiles * LANES);
  if (kind != Matrix::float32) {
    auto fill = [&](std::vector<float>& matrix, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) {
        if (kind == Matrix::int8) {
          reinterpret_cast<std::int8_t*>(matrix.data())[i] = between(-127, 127);
        } else {
          reinterpret_cast<std::uint16_t*>(matrix.data())[i] = 0x3d00 + between(0, 100) + (between(0, 1) << 15);
        }
      }
    };
    fill(down, rank * in_features);
    fill(up, rank * tiles * LANES);
  }
  const std::vector<float> core = floats(rank * rank), ranks = floats(rank);
  const std::vector<float> outputs = floats(rows), bias = floats(rows);
  const LinearAdapter adapter{down.data(), up.data(), between(0, 1) ? core.data() : nullptr,
                              between(0, 1) ? ranks.data() : nullptr, nullptr, between(0, 1) ? outputs.data() : nullptr,
                              between(0, 1) ? bias.data() : nullptr, rank, 0.3f, kind, kind};
  std::vector<std::int64_t> offsets(rows + 1);
  std::vector<std::uint16_t> columns, values;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t count = between(0, 9); count > 0; --count) {
      columns.push_back(between(0, in_features - 1));
      values.push_back(0x3800 + between(0, 0x3ff));
    }
    offsets[row + 1] = columns.size();
  }
  const SparseRows sparse{offsets.data(), columns.data(), values.data(), rows, in_features, 0, between(0, 1) != 0};
  const std::vector<float> x = floats(tokens * in_features), before = floats(tokens * rows);
  auto run = [&](int version) {
    std::vector<float> y = before;
    const int threads = between(1, 3);
    tailorbird_adapt(&adapter, x.data(), in_features, y.data(), rows, tokens, threads, version);
    tailorbird_add_sparse(&sparse, x.data(), y.data(), tokens, threads, version);
    return y;
  };
  const std::vector<float> expected = run(PORTABLE);
  return same(expected, run(NEON)) && !same(expected, before);
}

// Rows of an embedding, packed in groups of 32 columns, rounded to each kind of values.
bool rows_looked_up(int bits, bool symmetric, bool book) {
  const std::int64_t rows = between(1, 40), width = between(1, 300), groups = (width + 31) / 32, count = between(1, 9);
  std::vector<std::uint8_t> codes(rows * ((width * bits + 7) / 8)), zeros(rows * ((groups * bits + 7) / 8));
  std::vector<std::uint16_t> scales(rows * groups);
  std::vector<std::int64_t> ids(count);
  const std::vector<float> levels = floats(16);
  for (auto& byte : codes) byte = random_bits();
  for (auto& byte : zeros) byte = random_bits();
  for (auto& scale : scales) scale = between(0, 0x7bff);  // every finite positive float16
  for (auto& id : ids) id = between(0, rows - 1);
  const Stored packed{codes.data(), scales.data(), symmetric ? nullptr : zeros.data(), rows, width, groups, 32,
                      bits, 1, book ? levels.data() : nullptr};
  for (const Kind kind : {Kind::float32, Kind::bfloat16, Kind::float16}) {
    const Embedding embedding{nullptr, packed, rows, width, between(0, 1) ? 1.0f : 1.7f, kind};
    std::vector<float> expected(count * width, NAN), found(count * width, NAN);
    tailorbird_look_up(&embedding, ids.data(), count, expected.data(), 1, PORTABLE);
    tailorbird_look_up(&embedding, ids.data(), count, found.data(), between(1, 3), NEON);
    if (!same(expected, found) || expected[0] != expected[0]) return false;
  }
  return true;
}

// A block of the Llama kind and a head, over two sequences of unlike lengths.
bool block(int bits, bool symmetric, bool int8, Activation activation) {
  constexpr std::int64_t head_dim = 16, heads = 4, kv_heads = 2, width = 56, inner = 88, vocabulary = 45;
  const std::int64_t lengths[] = {between(1, 40), between(1, 40)}, tokens = lengths[0] + lengths[1];
  Weights weights;
  auto linear = [&](std::int64_t rows, std::int64_t in_features) {
    return Linear{weights.add(rows, in_features, bits, symmetric, false), nullptr, nullptr, 0, int8};
  };
  const std::vector<float> norms = floats(width), angles = floats(64 * head_dim), hidden = floats(tokens * width);
  const Norm norm{norms.data(), nullptr, 1e-5f, NormKind::root_mean_square};
  Block b{};
  b.before_attention = b.before_mlp = norm;
  b.attention_in[0] = linear((heads + 2 * kv_heads) * head_dim, width);
  b.attention_out = linear(width, heads * head_dim);
  b.mlp_in[0] = linear(inner, width);
  b.mlp_in[1] = linear(inner, width);
  b.mlp_out = linear(width, inner);
  b.queries = {0, heads / kv_heads * head_dim, head_dim};
  b.keys = {heads * head_dim, head_dim, head_dim};
  b.values = {(heads + kv_heads) * head_dim, head_dim, head_dim};
  b.heads = heads, b.kv_heads = kv_heads, b.head_dim = b.rotary_dim = head_dim;
  b.attention_linears = 1, b.mlp_linears = 2, b.gated = 1, b.activation = activation, b.scale = 0.25f;
  b.cosine = angles.data(), b.sine = angles.data() + head_dim / 2;
  const Linear head = linear(vocabulary, width);
  std::vector<std::int32_t> positions, sequences;
  for (int sequence = 0; sequence < 2; ++sequence) {
    for (int position = 0; position < lengths[sequence]; ++position) {
      positions.push_back(position);
      sequences.push_back(sequence);
    }
  }
  const std::int32_t pages[] = {2, 0, 1, 3};
  auto run = [&](int version, bool float32) {
    std::vector<float> keys(4 * kv_heads * head_dim * PAGE), values(keys.size()), out = hidden;
    b.key_pages = keys.data(), b.value_pages = values.data();
    const Batch batch{positions.data(), positions.data(), sequences.data(), pages, nullptr, nullptr,
                      tokens, 2, width, nullptr, 0, 0, float32, nullptr};
    const int threads = between(1, 3);
    std::vector<float> logits(tokens * vocabulary);
    tailorbird_run_blocks(&b, 0, 1, &batch, out.data(), threads, version);
    tailorbird_run_head(&norm, &head, out.data(), tokens, width, logits.data(), threads, version);
    out.insert(out.end(), logits.begin(), logits.end());
    return out;
  };
  for (const bool float32 : {false, true}) {
    const std::vector<float> expected = run(PORTABLE, float32);
    if (!same(expected, run(NEON, float32)) || same(expected, hidden)) return false;
  }
  return true;
}

// The weights of random logits, which each version rounds in its own way.
bool weights() {
  const std::int64_t count = between(1, 300);
  std::vector<float> logits(count), maxima(count), expected_maxima(count);
  std::vector<double> found(count), sums(count);
  for (auto& logit : logits) logit = between(-6000, 0) / 100.0f;
  const float top = portable::largest(logits.data(), count, expected_maxima.data());
  if (neon::largest(logits.data(), count, maxima.data()) != top || maxima != expected_maxima) return false;
  neon::weigh(logits.data(), count, top, 0.9, found.data());
  neon::weigh_blocks(logits.data(), count, maxima.data(), top, 0.9, sums.data());
  for (std::int64_t i = 0; i < count; ++i) {
    const double x = (double(logits[i]) - top) * 0.9, exact = x < -FAR_BELOW ? 0 : std::exp(x);
    if (std::fabs(found[i] - exact) > 2e-11 * exact) return false;
    sums[i / BLOCK] -= found[i];
  }
  for (std::int64_t b = 0; b * BLOCK < count; ++b) {
    if (std::fabs(sums[b]) > 1e-13 * BLOCK) return false;
  }
  return true;
}

int main(int, char** arguments) {
  if (tailorbird_best_version() != NEON) return std::puts("this processor has no dot products"), 1;
  random_bits.seed(std::atoi(arguments[1]));
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    if (!weights()) return std::puts("weights of logits differ"), 1;
    if (!additions()) return std::puts("adapters or sparse parts differ"), 1;
    if (!table_product(2 + round % 3)) return std::puts("products with tables differ"), 1;
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      for (const int kind : {0, 1, 2, 3}) {
        const bool symmetric = kind & 1, int8 = kind & 2;
        const auto activation = static_cast<Activation>(round % 4);
        const bool book = bits == 4 && symmetric;
        const char* wrong = !product(bits, symmetric, int8, book && round % 2) ? "product" : nullptr;
        if (!rows_looked_up(bits, symmetric, book && int8)) wrong = "row";
        if (round % 4 == 0 && !block(bits, symmetric, int8, activation)) wrong = "block";
        if (wrong != nullptr) {
          std::printf("a %s of %d bits differs, symmetric %d, int8 %d\n", wrong, bits, symmetric, int8);
          return 1;
        }
      }
    }
  }
  return 0;
}
