// The arithmetic of native.cpp, in torch's vectors of float32: dot products and a running softmax.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace adapter_kernels {

namespace vec = at::vec;
using Vector = vec::Vectorized<float>;

// keys whose scores are held at a time
constexpr int64_t BLOCK = 64;

const auto ADD = [](const Vector& a, const Vector& b) { return a + b; };
const auto MULTIPLY = [](const Vector& a, const Vector& b) { return a * b; };

inline float dot(const float* a, const float* b, int64_t n) {
  return vec::map2_reduce_all<float>(MULTIPLY, ADD, a, b, n);
}

// out[x][w] = w . x of some rows of C numbers: several streams at once reach the memory's speed.
template <int WEIGHTS, int ROWS>
void dots(const float* w, int64_t w_step, const float* x, int64_t width, float* out,
          int64_t out_step) {
  Vector sums[ROWS][WEIGHTS];
  for (auto& row : sums)
    for (Vector& sum : row) sum = Vector(0.0f);
  int64_t i = 0;
  for (; i + Vector::size() <= width; i += Vector::size()) {
    Vector part[ROWS];
    for (int r = 0; r < ROWS; ++r) part[r] = Vector::loadu(x + r * width + i);
    for (int n = 0; n < WEIGHTS; ++n) {
      const Vector weight = Vector::loadu(w + n * w_step + i);
      for (int r = 0; r < ROWS; ++r) sums[r][n] = vec::fmadd(weight, part[r], sums[r][n]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int n = 0; n < WEIGHTS; ++n) {
      float sum = vec::vec_reduce_all<float>(ADD, sums[r][n]);
      for (int64_t j = i; j < width; ++j) sum += w[n * w_step + j] * x[r * width + j];
      out[r * out_step + n] = sum;
    }
  }
}

// One query's softmax over keys that come in blocks: the largest score, the sum, the weighted sum.
struct Softmax {
  float top = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
  float* out;

  Softmax(float* place, int64_t width) : out(place) { std::fill_n(out, width, 0.0f); }

  // n <= BLOCK keys and values, each `step` numbers after the one before
  void add(const float* q, const float* k, const float* v, int64_t n, int64_t k_step,
           int64_t v_step, int64_t width, float scale) {
    float score[BLOCK];
    for (int64_t j = 0; j < n; ++j) score[j] = scale * dot(q, k + j * k_step, width);
    const auto larger = [](const Vector& a, const Vector& b) { return vec::maximum(a, b); };
    const float high = std::max(vec::reduce_all<float>(larger, score, n), top);
    // while all scores are -infinity their weights are 0
    const float from = high == -std::numeric_limits<float>::infinity() ? 0.0f : high;
    vec::map<float>([=](const Vector& x) { return (x - Vector(from)).exp(); }, score, score, n);
    const float kept = std::exp(top - from);
    sum = sum * kept + vec::reduce_all<float>(ADD, score, n);
    vec::map<float>([=](const Vector& x) { return x * Vector(kept); }, out, out, width);
    for (int64_t j = 0; j < n; ++j) {
      const Vector weight(score[j]);
      const auto more = [=](const Vector& x, const Vector& y) { return vec::fmadd(y, weight, x); };
      vec::map2<float>(more, out, out, v + j * v_step, width);
    }
    top = high;
  }
};

// Calls work(begin, end) on parts of 0 to count, of at least `grain`, in torch's threads; Python's
// other threads run meanwhile.
template <typename Work>
void spread(int64_t count, int64_t grain, const Work& work) {
  const py::gil_scoped_release release;
  at::parallel_for(0, count, std::max<int64_t>(1, grain), work);
}

}  // namespace adapter_kernels
