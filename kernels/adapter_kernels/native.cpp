// Decoding's operations on a CPU in float32: each in one call from Python.
//
// At these sizes a call of torch costs more than what it computes, and so do checks in Python.
// Every function checks its arguments itself and returns None for whatever it does not take: other
// dtypes and layouts, gradients, tensors that are traced, and what is wrong. The caller then goes
// the general way, which computes the first and names the last. Equations and arguments are those
// of the public functions.
//
// Every output number is computed by one thread in an order that depends on its own row alone.

#include <ATen/record_function.h>
#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "native_arguments.h"
#include "native_arithmetic.h"

namespace adapter_kernels {
namespace {

constexpr int64_t MAX_TOKENS = 16;
constexpr int64_t MAX_WIDTH = 256;
// rows for which reading the weights is most of a linear map
constexpr int64_t FEW_ROWS = 8;
// numbers that are worth a thread
constexpr int64_t GRAIN = 16384;

py::object rms_norm(const Tensor& x, const Tensor& weight, double eps, const Optional& residual) {
  const bool taken = unwatched() && takes_rows(x) && x.is_contiguous() && takes_rows(weight) &&
      weight.dim() == 1 && weight.size(0) == x.size(-1) && eps >= 0 && std::isfinite(eps) &&
      (!residual ||
       (takes(*residual) && residual->is_contiguous() && residual->sizes() == x.sizes()));
  if (!taken) return py::none();
  RECORD_FUNCTION("adapter_kernels::rms_norm", {});
  const int64_t width = x.size(-1), rows = x.numel() / width;
  Tensor out = at::empty(x.sizes(), x.options());
  Tensor h = residual ? at::empty(x.sizes(), x.options()) : x;
  const float* in = x.const_data_ptr<float>();
  const float* more = residual ? residual->const_data_ptr<float>() : nullptr;
  const float* w = weight.const_data_ptr<float>();
  float* sums = residual ? h.mutable_data_ptr<float>() : nullptr;
  float* result = out.mutable_data_ptr<float>();
  spread(rows, GRAIN / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* a = in + row * width;
      float* o = result + row * width;
      if (more != nullptr) {
        const float* b = more + row * width;
        float* s = sums + row * width;
        vec::map2<float>(ADD, s, a, b, width);
        a = s;
      }
      const float mean = dot(a, a, width) / static_cast<float>(width);
      const float rstd = 1.0f / std::sqrt(mean + static_cast<float>(eps));
      const auto scaled = [=](const Vector& n, const Vector& by) { return n * Vector(rstd) * by; };
      vec::map2<float>(scaled, o, a, w, width);
    }
  });
  return residual ? py::object(py::make_tuple(out, h)) : py::cast(out);
}

py::object linear(const Tensor& x, const Tensor& weight) {
  const bool taken = unwatched() && takes_rows(x) && x.is_contiguous() && takes_rows(weight) &&
      weight.dim() == 2 && weight.size(1) == x.size(-1) && x.numel() <= FEW_ROWS * x.size(-1);
  if (!taken) return py::none();
  RECORD_FUNCTION("adapter_kernels::linear", {});
  // as many sums as there are registers for
  constexpr int STREAMS = Vector::size() >= 16 ? 8 : 4;
  const int64_t width = x.size(-1), rows = x.numel() / width, outputs = weight.size(0);
  const int64_t step = weight.stride(0);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor out = at::empty(sizes, x.options());
  const float* in = x.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* result = out.mutable_data_ptr<float>();
  const int64_t blocks = (outputs + STREAMS - 1) / STREAMS;
  spread(blocks, GRAIN / (STREAMS * width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * STREAMS; n < std::min(end * STREAMS, outputs); n += STREAMS) {
      const float* some = w + n * step;
      int64_t row = 0;
      for (; n + STREAMS <= outputs && row + 2 <= rows; row += 2)
        dots<STREAMS, 2>(some, step, in + row * width, width, result + row * outputs + n, outputs);
      for (; row < rows; ++row) {
        const float* one = in + row * width;
        float* o = result + row * outputs + n;
        if (n + STREAMS <= outputs) dots<STREAMS, 1>(some, step, one, width, o, outputs);
        for (int64_t i = 0; n + STREAMS > outputs && i < outputs - n; ++i)
          dots<1, 1>(some + i * step, step, one, width, o + i, outputs);
      }
    }
  });
  return py::cast(out);
}

py::object swiglu(const Tensor& gate, const Tensor& up) {
  const bool taken = unwatched() && takes_rows(gate) && gate.is_contiguous() && takes(up) &&
      up.is_contiguous() && up.sizes() == gate.sizes();
  if (!taken) return py::none();
  RECORD_FUNCTION("adapter_kernels::swiglu", {});
  Tensor out = at::empty(gate.sizes(), gate.options());
  const float* a = gate.const_data_ptr<float>();
  const float* b = up.const_data_ptr<float>();
  float* o = out.mutable_data_ptr<float>();
  spread(gate.numel(), GRAIN, [&](int64_t begin, int64_t end) {
    const auto silu = [](const Vector& z, const Vector& y) {
      return z / (Vector(1.0f) + z.neg().exp()) * y;
    };
    vec::map2<float>(silu, o + begin, a + begin, b + begin, end - begin);
  });
  return py::cast(out);
}

// (B, T, heads, D) of float32 whose rows can be read one number after another.
bool takes_heads(const Tensor& x, int64_t batch, int64_t tokens, int64_t width) {
  return x.dim() == 4 && takes_rows(x) && x.size(0) == batch && x.size(1) == tokens &&
      x.size(3) == width;
}

bool takes_angles(const Tensor& x, int64_t batch, int64_t tokens, int64_t width) {
  return (x.dim() == 2 || (x.dim() == 3 && x.size(0) == batch)) && takes_rows(x) &&
      x.size(-1) * 2 == width && x.size(-2) == tokens;
}

// int32 numbers (rows, columns) of which each row lies together.
bool takes_table(const Tensor& x, int64_t rows) {
  return x.dim() == 2 && takes(x, at::kInt) && x.size(0) == rows &&
      (x.stride(1) == 1 || x.size(1) <= 1);
}

void rotate(const float* in, const float* cos, const float* sin, float* out, int64_t width) {
  for (int64_t i = 0; i < width / 2; ++i) {
    const float a = in[2 * i], b = in[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

py::object write_cache(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                       const Tensor& v_cache, const Tensor& positions, const Optional& page_table,
                       const Optional& cos, const Optional& sin, const Optional& q) {
  if (!unwatched() || k.dim() != 4 || positions.dim() != 2) return py::none();
  const int64_t batch = k.size(0), tokens = k.size(1), groups = k.size(2), width = k.size(3);
  const bool rotated = cos.has_value() && sin.has_value();
  const bool taken = takes_heads(k, batch, tokens, width) &&
      takes_heads(v, batch, tokens, width) && v.size(2) == groups && takes_cache(k_cache) &&
      takes_cache(v_cache) && k_cache.sizes() == v_cache.sizes() && k_cache.size(2) == groups &&
      k_cache.size(3) == width && positions.sizes() == k.sizes().slice(0, 2) &&
      (takes(positions, at::kInt) || takes(positions, at::kLong)) &&
      (page_table ? takes_table(*page_table, batch) : k_cache.size(0) == batch) &&
      cos.has_value() == sin.has_value() &&
      (!rotated ||
       (width % 2 == 0 && takes_angles(*cos, batch, tokens, width) &&
        takes_angles(*sin, batch, tokens, width))) &&
      (!q || (rotated && takes_heads(*q, batch, tokens, width)));
  // what is read must not be what is written
  const auto untouched = [&](const Tensor& x) { return apart(x, k_cache) && apart(x, v_cache); };
  if (!taken || !apart(k_cache, v_cache) || !untouched(k) || !untouched(v) ||
      (q && !untouched(*q)) || (rotated && !(untouched(*cos) && untouched(*sin))))
    return py::none();
  RECORD_FUNCTION("adapter_kernels::write_cache", {});
  const int64_t page = k_cache.size(1), pages = page_table ? page_table->size(1) : 1;
  // where each token goes: a row of the caches and a slot in it, or -1
  std::vector<int64_t> rows(batch * tokens), slots(batch * tokens);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t offset = b * positions.stride(0) + t * positions.stride(1);
      const int64_t position = positions.scalar_type() == at::kInt
          ? positions.const_data_ptr<int32_t>()[offset]
          : positions.const_data_ptr<int64_t>()[offset];
      if (position < -1 || position >= pages * page) return py::none();
      int64_t row = b;
      if (page_table && position >= 0) {
        const int32_t* own = page_table->const_data_ptr<int32_t>() + b * page_table->stride(0);
        row = own[position / page];
        if (row < 0 || row >= k_cache.size(0)) return py::none();
      }
      rows[b * tokens + t] = row;
      slots[b * tokens + t] = position < 0 ? -1 : position % page;
    }
  }
  Tensor turned = q ? at::empty(q->sizes(), k.options()) : at::empty({0}, k.options());
  float* const keys = k_cache.mutable_data_ptr<float>();
  float* const values = v_cache.mutable_data_ptr<float>();
  const auto angles = [&](const Tensor& x, int64_t b, int64_t t) {
    return x.const_data_ptr<float>() + (x.dim() == 3 ? b * x.stride(0) : 0) + t * x.stride(-2);
  };
  const auto row_of = [](const Tensor& x, int64_t b, int64_t t, int64_t head) {
    return b * x.stride(0) + t * x.stride(1) + head * x.stride(2);
  };
  spread(batch * tokens, GRAIN / (groups * width), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / tokens, t = n % tokens;
      const float* c = rotated ? angles(*cos, b, t) : nullptr;
      const float* s = rotated ? angles(*sin, b, t) : nullptr;
      for (int64_t g = 0; g < groups && slots[n] >= 0; ++g) {
        const float* in = k.const_data_ptr<float>() + row_of(k, b, t, g);
        float* out = keys + row_of(k_cache, rows[n], slots[n], g);
        if (rotated) rotate(in, c, s, out, width);
        else std::memcpy(out, in, width * sizeof(float));
        std::memcpy(values + row_of(v_cache, rows[n], slots[n], g),
                    v.const_data_ptr<float>() + row_of(v, b, t, g), width * sizeof(float));
      }
      for (int64_t head = 0; q && head < q->size(2); ++head)
        rotate(q->const_data_ptr<float>() + row_of(*q, b, t, head), c, s,
               turned.mutable_data_ptr<float>() + (n * q->size(2) + head) * width, width);
    }
  });
  written(k_cache);
  written(v_cache);
  return py::cast(turned);
}

// A sequence's row of the prompts, -1 for none, and how many keys it has.
struct PromptRow {
  int64_t row, count;
};

// A layer's prompts in one of their three forms: for all, per sample, a bank.
struct Prompts {
  const Optional &k, &v, &gate, &index, &lengths;

  bool taken(int64_t batch, int64_t groups, int64_t heads, int64_t width) const {
    if (!k || !v || !gate) return !k && !v && !gate && !index && !lengths;
    const int64_t dim = k->dim();
    if (dim != 4 && (dim != 3 || index)) return false;
    const int64_t count = index ? k->size(0) : batch;
    return takes_rows(*k) && takes_rows(*v) &&
        k->sizes() == v->sizes() && k->size(-1) == width && k->size(-2) == groups &&
        (dim == 3 || k->size(0) == count) && takes_rows(*gate) && gate->size(-1) == heads &&
        (gate->dim() == 1 ? !index : gate->dim() == 2 && dim == 4 && gate->size(0) == count) &&
        (!index || (index->dim() == 1 && index->size(0) == batch && takes(*index, at::kInt))) &&
        (!lengths ||
         (index && lengths->dim() == 1 && lengths->size(0) == count && takes(*lengths, at::kInt)));
  }

  // The row of k of sequence b, -1 for none.
  int64_t row(int64_t b) const {
    return index ? index->const_data_ptr<int32_t>()[b * index->stride(0)]
                 : (k->dim() == 4 ? b : 0);
  }

  int64_t length(int64_t row) const {
    return lengths ? lengths->const_data_ptr<int32_t>()[row * lengths->stride(0)] : k->size(-3);
  }

  // Whether the indices of a bank name its rows; then `found` holds each sequence's own.
  bool find(int64_t batch, std::vector<PromptRow>& found) const {
    found.assign(batch, {-1, 0});
    if (!k) return true;
    for (int64_t a = 0; lengths && a < k->size(0); ++a)
      if (length(a) < 0 || length(a) > k->size(1)) return false;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t a = row(b);
      if (a < -1 || (index && a >= k->size(0))) return false;
      if (a >= 0) found[b] = {a, length(a)};
    }
    return true;
  }

  // Adds gate * softmax(scale q k) v of one row and one head to out.
  void add(const float* q, float* out, PromptRow found, int64_t head, int64_t group,
           int64_t width, float scale) const {
    const auto [a, count] = found;
    if (count == 0) return;
    const auto start = [&](const Tensor& x) {
      return x.const_data_ptr<float>() + (x.dim() == 4 ? a * x.stride(0) : 0) +
          group * x.stride(-2);
    };
    float sum[MAX_WIDTH];
    Softmax softmax(sum, width);
    const int64_t k_step = k->stride(-3), v_step = v->stride(-3);
    for (int64_t j = 0; j < count; j += BLOCK)
      softmax.add(q, start(*k) + j * k_step, start(*v) + j * v_step, std::min(BLOCK, count - j),
                  k_step, v_step, width, scale);
    const float strength =
        gate->const_data_ptr<float>()[(gate->dim() == 2 ? a * gate->stride(0) : 0) +
                                      head * gate->stride(-1)];
    const Vector by(1.0f / softmax.sum), gated(strength);
    const auto more = [=](const Vector& own, const Vector& x) {
      return own + gated * (x * by);
    };
    vec::map2<float>(more, out, out, sum, width);
  }
};

py::object decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const Optional& prompt_k, const Optional& prompt_v, const Optional& gate,
                  const Optional& adapter_index, const Optional& prompt_lengths,
                  const Tensor& cache_lengths, const Optional& page_table,
                  std::optional<double> scale) {
  if (!unwatched() || q.dim() != 4 || k_cache.dim() != 4) return py::none();
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), width = q.size(3);
  const int64_t groups = k_cache.size(2), page = k_cache.size(1);
  const Prompts prompts{prompt_k, prompt_v, gate, adapter_index, prompt_lengths};
  const bool taken = takes_rows(q) && tokens <= MAX_TOKENS && width % 8 == 0 &&
      width <= MAX_WIDTH && takes_rows(k_cache) && takes_rows(v_cache) &&
      k_cache.sizes() == v_cache.sizes() && k_cache.size(3) == width && heads % groups == 0 &&
      cache_lengths.dim() == 1 && cache_lengths.size(0) == batch &&
      takes(cache_lengths, at::kInt) &&
      (page_table ? takes_table(*page_table, batch) : k_cache.size(0) == batch) &&
      prompts.taken(batch, groups, heads, width) &&
      (!scale || (std::fabs(*scale) >= 1e-30 && std::fabs(*scale) <= 1e30));
  // numbers that are looked at once, because other threads may change them
  std::vector<PromptRow> own_prompts;
  if (!taken || !prompts.find(batch, own_prompts)) return py::none();
  const int64_t capacity = page_table ? page * page_table->size(1) : page;
  std::vector<int64_t> lengths(batch);
  std::vector<std::vector<int64_t>> pages(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length =
        cache_lengths.const_data_ptr<int32_t>()[b * cache_lengths.stride(0)];
    if (length < 0 || length > capacity || (length > 0 && length < tokens)) return py::none();
    for (int64_t i = 0; page_table && i * page < length; ++i) {
      const int32_t one =
          page_table->const_data_ptr<int32_t>()[b * page_table->stride(0) + i];
      if (one < 0 || one >= k_cache.size(0)) return py::none();
      pages[b].push_back(one);
    }
    lengths[b] = length;
  }
  RECORD_FUNCTION("adapter_kernels::zero_init_attention_decode", {});
  const float by = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(double(width)));
  const int64_t per_group = heads / groups, rows = per_group * tokens;
  Tensor out = at::empty(q.sizes(), q.options());
  const float* const queries = q.const_data_ptr<float>();
  const float* const keys = k_cache.const_data_ptr<float>();
  const float* const values = v_cache.const_data_ptr<float>();
  float* const result = out.mutable_data_ptr<float>();
  const int64_t keys_read = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const int64_t work = 2 * rows * width * (keys_read / batch + 1);
  // a key head of a sequence is one thread's: its rows are the queries that share its keys
  spread(batch * groups, GRAIN / work, [&](int64_t begin, int64_t end) {
    std::vector<Softmax> softmax;
    softmax.reserve(rows);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / groups, g = n % groups, length = lengths[b];
      const auto query = [&](int64_t r) {
        return queries + b * q.stride(0) + (r % tokens) * q.stride(1) +
            (g * per_group + r / tokens) * q.stride(2);
      };
      softmax.clear();
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = g * per_group + r / tokens;
        softmax.emplace_back(result + ((b * tokens + r % tokens) * heads + head) * width, width);
      }
      // a block of keys is read once for all rows and lies within a page
      for (int64_t start = 0; start < length;) {
        const int64_t in_page = start % page;
        const int64_t end_of_block = std::min({start + BLOCK, start + page - in_page, length});
        const int64_t row = page_table ? pages[b][start / page] : b;
        const float* k = keys + row * k_cache.stride(0) + in_page * k_cache.stride(1) +
            g * k_cache.stride(2);
        const float* v = values + row * v_cache.stride(0) + in_page * v_cache.stride(1) +
            g * v_cache.stride(2);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t seen = length - tokens + r % tokens + 1;
          const int64_t count = std::min(end_of_block, seen) - start;
          if (count > 0)
            softmax[r].add(query(r), k, v, count, k_cache.stride(1), v_cache.stride(1), width, by);
        }
        start = end_of_block;
      }
      for (int64_t r = 0; r < rows && length > 0; ++r) {
        float* const own = softmax[r].out;
        const Vector by_sum(1.0f / softmax[r].sum);
        vec::map<float>([=](const Vector& x) { return x * by_sum; }, own, own, width);
        prompts.add(query(r), own, own_prompts[b], g * per_group + r / tokens, g, width, by);
      }
    }
  });
  return py::cast(out);
}

// What has other types than these functions is not taken either.
template <typename Function>
void define(py::module_& module, const char* name, Function function) {
  module.def(name, function);
  module.def(name, [](const py::args&) { return py::none(); });
}

}  // namespace
}  // namespace adapter_kernels

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace adapter_kernels;
  define(module, "rms_norm", &rms_norm);
  define(module, "linear", &linear);
  define(module, "swiglu", &swiglu);
  define(module, "write_cache", &write_cache);
  define(module, "decode", &decode);
}
