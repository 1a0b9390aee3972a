// Choosing a token from a row of logits. The loops over whole rows are in sampling.inc, once for each kind of processor.
//
// A row is read in blocks of BLOCK tokens. Where the largest of each block is known, few blocks hold candidates, and only
// these are looked at one by one. Logits are float32, weights exp((logit - largest) / temperature) float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace tailorbird {

constexpr std::int64_t BLOCK = 64;
// Weights below exp(-FAR) of the largest are 0: all of a vocabulary together they are less than a float64's rounding.
constexpr double FAR_BELOW = 50;
constexpr double PER_LN2 = 0x1.71547652b82fep0;  // 1 / ln(2)
// Where the search for candidates of a nucleus begins, and how many are sorted rather than shared out.
constexpr double NEAR_BELOW = 3;
constexpr std::size_t FEW_CANDIDATES = 64;
constexpr int BUCKETS = 1024;
constexpr std::int32_t MOST_LOGPROBS = 20;
// Temperatures below it choose as it does: neighbouring float32 numbers are further apart.
constexpr double LEAST_TEMPERATURE = 1e-300;

enum Problem : std::int32_t { FOUND = 0, NOT_FINITE = 1, NOTHING_LEFT = 2 };

// kernels/sampling.py describes the fields, and fills them in.
struct SamplingRow {
  const float* logits;
  const std::int32_t* seen;  // tokens, and how often each is in the output
  const std::int32_t* counts;
  const std::int32_t* bias_tokens;
  const double* biases;
  const std::int32_t* forbidden;
  const std::uint32_t* allowed;  // bits, or null
  std::int64_t seen_count, bias_count, forbidden_count;
  double repetition, presence, frequency;
  double temperature, top_p, min_p, typical_p, uniform;
  std::int64_t top_k;
  std::int32_t logprobs;  // how many of the likeliest; negative: none, and not the chosen one's either
  // what comes back
  std::int32_t problem, token, top_count;
  double logprob;
  double top_logprobs[MOST_LOGPROBS];
  std::int32_t top_tokens[MOST_LOGPROBS];

  bool penalizes() const { return seen_count > 0 && (repetition != 1 || presence != 0 || frequency != 0); }
  bool changes() const { return penalizes() || bias_count > 0 || forbidden_count > 0 || allowed != nullptr; }
};

struct Candidate {
  double rank, weight;
  std::int32_t token;
};

inline bool leads(const Candidate& a, const Candidate& b) {
  return a.rank > b.rank || (a.rank == b.rank && a.token < b.token);
}

// Memory of one thread, kept from row to row.
struct SamplingSpace {
  std::vector<float> changed, gathered, maxima;
  std::vector<double> masses, weights;
  std::vector<std::int32_t> tokens;
  std::vector<Candidate> candidates, part;
};

struct SamplingVersion {
  // The largest of a row, and of each of its blocks; not a number where one isn't.
  float (*largest)(const float* logits, std::int64_t count, float* maxima);
  // exp((logit - top) * inverse) of each; and its sums over the blocks.
  void (*weigh)(const float* logits, std::int64_t count, double top, double inverse, double* weights);
  void (*weigh_blocks)(const float* logits, std::int64_t count, const float* maxima, double top, double inverse,
                       double* masses);
};

// A row of logits that is looked at: its largest, and those of its blocks.
struct Seen {
  const float* logits;
  std::int64_t count;
  const float* maxima;
  double top;

  std::int64_t blocks() const { return (count + BLOCK - 1) / BLOCK; }
  std::int64_t end_of(std::int64_t block) const { return std::min(count, (block + 1) * BLOCK); }
};

inline Seen look(const float* logits, std::int64_t count, const SamplingVersion& run, SamplingSpace& space) {
  space.maxima.resize((count + BLOCK - 1) / BLOCK);
  const float top = run.largest(logits, count, space.maxima.data());
  return {logits, count, space.maxima.data(), top};
}

// Logits as penalties, biases, forbidden tokens and the mask leave them; each change is rounded to float32.
inline const float* changed(const SamplingRow& r, std::int64_t count, SamplingSpace& space) {
  const float never = -std::numeric_limits<float>::infinity();
  space.changed.resize(count);
  float* to = space.changed.data();
  std::memcpy(to, r.logits, 4 * count);
  if (r.penalizes()) {
    for (std::int64_t i = 0; i < r.seen_count; ++i) {
      const double logit = to[r.seen[i]];
      const double repeated = logit > 0 ? logit / r.repetition : logit * r.repetition;
      const double often = r.frequency * r.counts[i];
      to[r.seen[i]] = float(repeated - ((r.counts[i] > 0 ? r.presence : 0) + often));
    }
  }
  for (std::int64_t i = 0; i < r.bias_count; ++i) {
    to[r.bias_tokens[i]] = float(double(to[r.bias_tokens[i]]) + r.biases[i]);
  }
  for (std::int64_t i = 0; i < r.forbidden_count; ++i) to[r.forbidden[i]] = never;
  if (r.allowed == nullptr) return to;
  for (std::int64_t first = 0; first < count; first += 32) {
    std::uint32_t without = ~r.allowed[first / 32];
    const std::int64_t end = std::min<std::int64_t>(count, first + 32);
    if (without == ~0u) {
      std::fill(to + first, to + end, never);
      continue;
    }
    if (end < first + 32) without &= (1u << (end - first)) - 1;
    for (; without != 0; without &= without - 1) to[first + __builtin_ctz(without)] = never;
  }
  return to;
}

// Candidates are the tokens whose logit is `bound` at least, by rising id; their rank is their logit.
inline void gather(const Seen& row, double bound, double inverse, const SamplingVersion& run, SamplingSpace& space) {
  bound = std::max(bound, double(std::numeric_limits<float>::lowest()));
  space.gathered.resize(row.count);
  space.tokens.resize(row.count);
  std::int64_t found = 0;
  for (std::int64_t b = 0; b < row.blocks(); ++b) {
    if (row.maxima[b] < bound) continue;
    for (std::int64_t t = b * BLOCK; t < row.end_of(b); ++t) {  // written in any case: nobody guesses which stay
      space.gathered[found] = row.logits[t];
      space.tokens[found] = std::int32_t(t);
      found += row.logits[t] >= bound;
    }
  }
  space.weights.resize(found);
  run.weigh(space.gathered.data(), found, row.top, inverse, space.weights.data());
  space.candidates.resize(found);
  for (std::int64_t i = 0; i < found; ++i) {
    space.candidates[i] = {space.gathered[i], space.weights[i], space.tokens[i]};
  }
}

template <typename Keep>
void keep_if(std::vector<Candidate>& some, const Keep& keep) {
  std::size_t kept = 0;
  for (const Candidate& c : some) {
    const bool stays = keep(c);
    some[kept] = c;
    kept += stays;
  }
  some.resize(kept);
}

// A bound that `wanted` logits reach at least: so many blocks have one that does.
inline double bound_of(const Seen& row, std::int64_t wanted, SamplingSpace& space) {
  if (wanted > row.blocks()) return -std::numeric_limits<double>::infinity();
  space.gathered.assign(row.maxima, row.maxima + row.blocks());
  const auto last = space.gathered.begin() + (wanted - 1);
  std::nth_element(space.gathered.begin(), last, space.gathered.end(), std::greater<float>());
  return *last;
}

// The last of the shortest run of leading candidates that weigh `goal` together, or, counted, are as many; the last of
// all where they don't. `some` are by rising id, and are taken apart: shares of equal width in rank, and of these the one
// where the goal lies, until few are left or all have one rank.
inline Candidate last_leading(std::vector<Candidate>& some, double goal, bool counted) {
  const auto weight_of = [counted](const Candidate& c) { return counted ? 1.0 : c.weight; };
  double sum = 0;
  while (some.size() > FEW_CANDIDATES) {
    double low = some[0].rank, high = low;
    for (const Candidate& c : some) {
      low = std::min(low, c.rank);
      high = std::max(high, c.rank);
    }
    const double scale = BUCKETS / (high - low);
    if (!std::isfinite(scale)) break;
    const auto bucket_of = [=](const Candidate& c) { return std::min(BUCKETS - 1, int((high - c.rank) * scale)); };
    double masses[BUCKETS] = {};
    for (const Candidate& c : some) masses[bucket_of(c)] += weight_of(c);
    int bucket = 0;
    while (bucket < BUCKETS - 1 && sum + masses[bucket] < goal) sum += masses[bucket++];
    keep_if(some, [&](const Candidate& c) { return bucket_of(c) == bucket; });
  }
  if (!std::is_sorted(some.begin(), some.end(), leads)) std::sort(some.begin(), some.end(), leads);
  for (const Candidate& c : some) {
    sum += weight_of(c);
    if (sum >= goal) return c;
  }
  return some.back();
}

// Keep the shortest run of leading candidates that reaches the goal.
inline void keep_leading(double goal, bool counted, SamplingSpace& space) {
  space.part = space.candidates;
  const Candidate last = last_leading(space.part, goal, counted);
  keep_if(space.candidates, [&](const Candidate& c) { return !leads(last, c); });
}

inline double mass_of(const std::vector<Candidate>& some) {
  double sum = 0;
  for (const Candidate& c : some) sum += c.weight;
  return sum;
}

inline double mass_of_blocks(const Seen& row, double inverse, const SamplingVersion& run, SamplingSpace& space) {
  space.masses.resize(row.blocks());
  run.weigh_blocks(row.logits, row.count, row.maxima, row.top, inverse, space.masses.data());
  double sum = 0;
  for (const double mass : space.masses) sum += mass;
  return sum;
}

// Keep the candidates whose surprise is nearest to the mean (https://arxiv.org/abs/2202.00666): how far a token's
// scaled logit lies from the mean of all, since surprise and entropy leave out the same normalizer.
inline void keep_typical(double top, double inverse, double share, SamplingSpace& space) {
  double mass = 0, mean = 0;
  for (const Candidate& c : space.candidates) {
    mass += c.weight;
    if (c.weight > 0) mean += c.weight * ((c.rank - top) * inverse);
  }
  mean /= mass;
  for (Candidate& c : space.candidates) c.rank = -std::fabs((c.rank - top) * inverse - mean);
  keep_leading(share * mass, false, space);
}

// The tokens that may be drawn, with their weights, by rising id.
inline void filter(const SamplingRow& r, const Seen& row, double inverse, const SamplingVersion& run,
                   SamplingSpace& space) {
  const double temperature = 1 / inverse;
  double total;
  if (r.top_k > 0 && r.top_k < row.count) {
    gather(row, bound_of(row, r.top_k, space), inverse, run, space);
    keep_leading(double(r.top_k), true, space);
    total = mass_of(space.candidates);
  } else if (r.top_p < 1) {
    total = mass_of_blocks(row, inverse, run, space);
    for (double below = NEAR_BELOW;; below *= 2) {
      gather(row, row.top - std::min(below, FAR_BELOW) * temperature, inverse, run, space);
      if (below >= FAR_BELOW || mass_of(space.candidates) >= r.top_p * total) break;
    }
  } else {
    const double below = r.min_p > 0 ? std::min(FAR_BELOW, 1e-6 - std::log(r.min_p)) : FAR_BELOW;
    gather(row, row.top - below * temperature, inverse, run, space);
    total = 0;
  }
  if (r.top_p < 1) keep_leading(r.top_p * total, false, space);
  if (r.min_p > 0) keep_if(space.candidates, [&](const Candidate& c) { return c.weight >= r.min_p; });
  if (r.typical_p < 1) keep_typical(row.top, inverse, r.typical_p, space);
}

// The first of some weights whose sum with those before it exceeds the goal; the last above 0 where none does.
template <typename Weight>
std::int64_t first_above(std::int64_t count, double goal, const Weight& weight_of) {
  double sum = 0;
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double weight = weight_of(i);
    if (weight > 0) last = i;
    sum += weight;
    if (sum > goal) return i;
  }
  return last;
}

inline std::int32_t draw(const SamplingRow& r, const Seen& row, const SamplingVersion& run, SamplingSpace& space) {
  const double inverse = 1 / std::max(r.temperature, LEAST_TEMPERATURE);
  if ((r.top_k > 0 && r.top_k < row.count) || r.top_p < 1 || r.min_p > 0 || r.typical_p < 1) {
    filter(r, row, inverse, run, space);
    const std::vector<Candidate>& all = space.candidates;
    return all[first_above(all.size(), r.uniform * mass_of(all), [&](std::int64_t i) { return all[i].weight; })].token;
  }
  const double goal = r.uniform * mass_of_blocks(row, inverse, run, space);
  const std::int64_t block = first_above(row.blocks(), goal, [&](std::int64_t b) { return space.masses[b]; });
  double before = 0;
  for (std::int64_t b = 0; b < block; ++b) before += space.masses[b];
  double weights[BLOCK];
  const std::int64_t first = block * BLOCK, count = row.end_of(block) - first;
  run.weigh(row.logits + first, count, row.top, inverse, weights);
  return std::int32_t(first + first_above(count, goal - before, [&](std::int64_t i) { return weights[i]; }));
}

// The likeliest tokens of the model's own distribution; returns what its logits exceed their log-probabilities by.
inline double likeliest(SamplingRow& r, const Seen& row, const SamplingVersion& run, SamplingSpace& space) {
  const double normalizer = row.top + std::log(mass_of_blocks(row, 1, run, space));
  r.top_count = std::int32_t(std::min<std::int64_t>(r.logprobs, row.count));
  if (r.top_count == 0) return normalizer;
  gather(row, bound_of(row, r.top_count, space), 1, run, space);
  keep_leading(r.top_count, true, space);
  std::sort(space.candidates.begin(), space.candidates.end(), leads);
  r.top_count = std::int32_t(space.candidates.size());  // fewer where others are impossible
  for (std::int32_t i = 0; i < r.top_count; ++i) {
    r.top_tokens[i] = space.candidates[i].token;
    r.top_logprobs[i] = space.candidates[i].rank - normalizer;
  }
  return normalizer;
}

inline void choose(SamplingRow& r, std::int64_t count, const SamplingVersion& run, SamplingSpace& space) {
  r.problem = NOT_FINITE;
  r.token = -1;
  r.top_count = 0;
  Seen row = look(r.logits, count, run, space);
  if (!std::isfinite(row.top)) return;
  const double normalizer = r.logprobs >= 0 ? likeliest(r, row, run, space) : 0;
  if (r.changes()) {
    row = look(changed(r, count, space), count, run, space);
    if (row.top == -std::numeric_limits<double>::infinity()) r.problem = NOTHING_LEFT;
    if (!std::isfinite(row.top)) return;
  }
  if (r.temperature == 0) {
    const std::int64_t block = std::find(row.maxima, row.maxima + row.blocks(), float(row.top)) - row.maxima;
    const float* first = row.logits + block * BLOCK;
    r.token = std::int32_t(std::find(first, row.logits + row.end_of(block), float(row.top)) - row.logits);
  } else {
    r.token = draw(r, row, run, space);
  }
  r.problem = FOUND;
  r.logprob = r.logits[r.token] - normalizer;
}

}  // namespace tailorbird
