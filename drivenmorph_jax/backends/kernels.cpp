// Kernels for CPU, which XLA calls through its foreign function interface. `kernels.py` loads them.
//
// Arrays are float32 and row-major, with the channels last. Work is split into blocks over XLA's own threads. Which
// thread takes a block changes no sum, so results have the same bits on any number of cores.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

// Whether this machine has the instructions that the kernels below are compiled for. It is compiled for any machine.
extern "C" int drivenmorph_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif

namespace {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Index = int64_t;

constexpr Index LANES = 8;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
void store(float* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }
float sum(Vector v) {
  float total = 0;
  for (Index k = 0; k < LANES; k++) total += v[k];
  return total;
}

// f(0), ..., f(count - 1), on all threads of the pool. The calling thread works too and takes what no other has begun.
// So it never waits for a thread that waits itself.
void parallel(ffi::ThreadPool pool, Index count, std::function<void(Index)> f) {
  struct Work {
    std::function<void(Index)> f;
    Index count, done = 0;
    std::atomic<Index> next{0};
    std::mutex mutex;
    std::condition_variable ended;
  };
  auto work = std::make_shared<Work>();
  work->f = std::move(f);
  work->count = count;
  auto run = [work] {
    Index finished = 0;
    for (Index i; (i = work->next++) < work->count; finished++) work->f(i);
    if (!finished) return;
    std::lock_guard<std::mutex> lock(work->mutex);
    if ((work->done += finished) == work->count) work->ended.notify_all();
  };
  for (Index helper = 1; helper < std::min(count, pool.num_threads()); helper++) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->ended.wait(lock, [&] { return work->done == work->count; });
}

// f<C>() for the numbers of channels that the package has most, f<0>() for others.
#define FOR_CHANNELS(channels, f, ...)      \
  switch (channels) {                       \
    case 1: f<1>(__VA_ARGS__); break;       \
    case 2: f<2>(__VA_ARGS__); break;       \
    case 3: f<3>(__VA_ARGS__); break;       \
    case 4: f<4>(__VA_ARGS__); break;       \
    case 8: f<8>(__VA_ARGS__); break;       \
    case 16: f<16>(__VA_ARGS__); break;     \
    default: f<0>(__VA_ARGS__);             \
  }

// Convolution ---------------------------------------------------------------------------------------------------------

constexpr Index PLANES = 4;  // output planes of a block
constexpr Index CHUNK = 192;  // voxels for which all output channels are computed while their inputs are in cache
constexpr Index GROUP = 4;  // output channels that are computed together
constexpr Index SLACK = 48;  // the last vectors of a plane read so far beyond its end

// f<n>() with n = count, for counts of 1 to GROUP.
#define FOR_COUNT(count, f, ...)            \
  switch (count) {                          \
    case 1: f<1>(__VA_ARGS__); break;       \
    case 2: f<2>(__VA_ARGS__); break;       \
    case 3: f<3>(__VA_ARGS__); break;       \
    default: f<4>(__VA_ARGS__);             \
  }

// Volumes (B, D, H, W, C).
struct Volumes {
  Index b, d, h, w, c;
  explicit Volumes(const Array& x) {
    auto n = x.dimensions();
    b = n[0], d = n[1], h = n[2], w = n[3], c = n[4];
  }
  Index blocks_each() const { return (d + PLANES - 1) / PLANES; }
  Index blocks() const { return b * blocks_each(); }
  Index row() const { return w + 2; }
  Index plane() const { return (h + 2) * row() + SLACK; }
  Index channel() const { return (PLANES + 2) * plane(); }
  Index flat() const { return h * row(); }  // voxels of a plane and, between its rows, borders
};

// A block of planes with one more on either side, channels first and with zeros around: (C, PLANES + 2, plane). Within
// the flat plane, a shift of the kernel is an offset, the same for all voxels.
struct Block {
  Index b, first, count;
  Block(const Volumes& s, Index number) : b(number / s.blocks_each()), first(number % s.blocks_each() * PLANES),
                                          count(std::min(PLANES, s.d - first)) {}
};

template <Index C>
void split_channels(const float* from, Index count, Index channels, float* to, Index stride) {
  channels = C ? C : channels;
  for (Index k = 0; k < count; k++)
    for (Index c = 0; c < channels; c++) to[c * stride + k] = from[k * channels + c];
}

template <Index C>
void join_channels(const float* from, Index stride, Index count, Index channels, float* to) {
  channels = C ? C : channels;
  for (Index k = 0; k < count; k++)
    for (Index c = 0; c < channels; c++) to[k * channels + c] = from[c * stride + k];
}

void pad(const float* x, const Volumes& s, const Block& block, std::vector<float>& padded) {
  padded.assign(s.c * s.channel(), 0.0f);
  for (Index d = std::max<Index>(block.first - 1, 0); d < std::min(block.first + block.count + 1, s.d); d++)
    for (Index h = 0; h < s.h; h++)
      FOR_CHANNELS(s.c, split_channels, x + ((block.b * s.d + d) * s.h + h) * s.w * s.c, s.w, s.c,
                   padded.data() + (d + 1 - block.first) * s.plane() + (h + 1) * s.row() + 1, s.channel())
}

// OUT output channels of VECTORS * LANES voxels. kernel is (I, 27, OUT).
template <Index OUT, Index VECTORS>
void convolve(const float* x, const Volumes& s, const float* kernel, float* out) {
  Vector total[OUT][VECTORS] = {};
  for (Index i = 0; i < s.c; i++)
    for (Index a = 0; a < 3; a++)
      for (Index b = 0; b < 3; b++) {
        const float* at = x + i * s.channel() + a * s.plane() + b * s.row();
        for (Index c = 0; c < 3; c++, kernel += OUT) {
          Vector near[VECTORS];
          for (Index v = 0; v < VECTORS; v++) near[v] = load(at + c + v * LANES);
          for (Index o = 0; o < OUT; o++)
            for (Index v = 0; v < VECTORS; v++) total[o][v] += kernel[o] * near[v];
        }
      }
  for (Index o = 0; o < OUT; o++)
    for (Index v = 0; v < VECTORS; v++) store(out + o * CHUNK + v * LANES, total[o][v]);
}

template <Index OUT>
void convolve_chunk(const float* x, const Volumes& s, const float* kernel, Index count, float* out) {
  constexpr Index VECTORS = OUT > 2 ? 3 : 4;
  static_assert(CHUNK % (VECTORS * LANES) == 0);
  for (Index p = 0; p < count; p += VECTORS * LANES) convolve<OUT, VECTORS>(x + p, s, kernel, out + p);
}

// The kernel (3, 3, 3, I, O) in the order in which `convolve` reads it; for the adjoint, that of the mirrored kernel
// from the O to the I channels.
std::vector<float> packed(const float* kernel, Index ins, Index outs, bool adjoint) {
  std::vector<float> all;
  for (Index first = 0; first < outs; first += GROUP)
    for (Index i = 0; i < ins; i++)
      for (Index k = 0; k < 27; k++)
        for (Index o = first; o < std::min(first + GROUP, outs); o++)
          all.push_back(adjoint ? kernel[((26 - k) * outs + o) * ins + i] : kernel[(k * ins + i) * outs + o]);
  return all;
}

// out (B, D, H, W, O) at the planes of a block.
void convolve_block(const float* padded, const Volumes& s, const Block& block, const std::vector<float>& kernel,
                    Index outs, float* out) {
  static thread_local std::vector<float> made;
  made.resize(outs * CHUNK);
  for (Index d = 0; d < block.count; d++)
    for (Index start = 0; start < s.flat(); start += CHUNK) {
      const Index end = std::min(start + CHUNK, s.flat());
      for (Index first = 0; first < outs; first += GROUP)
        FOR_COUNT(outs - first, convolve_chunk, padded + d * s.plane() + start, s, kernel.data() + first * s.c * 27,
                  end - start, made.data() + first * CHUNK)
      for (Index h = start / s.row(); h * s.row() < end; h++) {  // the voxels of every row that this chunk holds
        const Index from = std::max(start, h * s.row()), to = std::min(end, h * s.row() + s.w);
        FOR_CHANNELS(outs, join_channels, made.data() + from - start, CHUNK, to - from, outs,
                     out + ((((block.b * s.d + block.first + d) * s.h + h) * s.w + from - h * s.row()) * outs))
      }
    }
}

ffi::Error Convolution(ffi::ThreadPool pool, Array x, Array kernel, Result out) {
  const Volumes s(x);
  const Index outs = kernel.dimensions()[4];
  const std::vector<float> weights = packed(kernel.typed_data(), s.c, outs, false);
  parallel(pool, s.blocks(), [&](Index number) {
    static thread_local std::vector<float> padded;
    const Block block(s, number);
    pad(x.typed_data(), s, block, padded);
    convolve_block(padded.data(), s, block, weights, outs, out->typed_data());
  });
  return ffi::Error::Success();
}

// Adds the products of OUT output channels with the input channels of s at all shifts to `total` (3, 3, 3, I, O).
template <Index OUT>
void correlate(const float* x, const Volumes& s, const float* g, Index count, Index outs, float* total) {
  for (Index i = 0; i < s.c; i++)
    for (Index a = 0; a < 3; a++)
      for (Index b = 0; b < 3; b++) {
        const float* at = x + i * s.channel() + a * s.plane() + b * s.row();
        Vector products[3][OUT] = {};
        for (Index p = 0; p < count; p += LANES) {
          Vector near[3] = {load(at + p), load(at + p + 1), load(at + p + 2)};
          for (Index o = 0; o < OUT; o++) {
            Vector here = load(g + o * s.channel() + p);
            for (Index c = 0; c < 3; c++) products[c][o] += near[c] * here;
          }
        }
        for (Index c = 0; c < 3; c++)
          for (Index o = 0; o < OUT; o++) total[((9 * a + 3 * b + c) * s.c + i) * outs + o] += sum(products[c][o]);
      }
}

// The cotangents of x and of the kernel, for the cotangent g (B, D, H, W, O) of the convolution.
ffi::Error ConvolutionAdjoint(ffi::ThreadPool pool, Array x, Array kernel, Array g, Result g_x, Result g_kernel) {
  constexpr Index STRETCH = 1024;  // voxels of a plane that fit into cache
  const Volumes s(x), t(g);
  const Index size = 27 * s.c * t.c;
  const std::vector<float> weights = packed(kernel.typed_data(), t.c, s.c, true);
  std::vector<float> parts(s.blocks() * size);  // of the cotangent of the kernel, from each block
  parallel(pool, s.blocks(), [&](Index number) {
    static thread_local std::vector<float> padded_x, padded_g;
    const Block block(s, number);
    pad(x.typed_data(), s, block, padded_x);
    pad(g.typed_data(), t, block, padded_g);
    convolve_block(padded_g.data(), t, block, weights, s.c, g_x->typed_data());
    for (Index d = 0; d < block.count; d++)
      for (Index start = 0; start < s.flat(); start += STRETCH)
        for (Index first = 0; first < t.c; first += GROUP)
          FOR_COUNT(t.c - first, correlate, padded_x.data() + d * s.plane() + start, s,
                    padded_g.data() + first * t.channel() + (d + 1) * t.plane() + t.row() + 1 + start,
                    std::min(STRETCH, s.flat() - start), t.c, parts.data() + number * size + first)
  });
  float* total = g_kernel->typed_data();
  std::fill(total, total + size, 0.0f);
  for (Index number = 0; number < s.blocks(); number++)
    for (Index k = 0; k < size; k++) total[k] += parts[number * size + k];
  return ffi::Error::Success();
}

// Warp ----------------------------------------------------------------------------------------------------------------

// Images (..., D, H, W, C) and fields (..., X, Y, Z, 3) with the same leading axes.
struct Warp {
  Index batch, image[3], field[3], channels;
  Warp(const Array& x, const Array& u) : batch(1) {
    auto n = x.dimensions(), m = u.dimensions();
    for (size_t axis = 0; axis + 4 < n.size(); axis++) batch *= n[axis];
    for (Index axis = 0; axis < 3; axis++) image[axis] = n[n.size() - 4 + axis], field[axis] = m[m.size() - 4 + axis];
    channels = n[n.size() - 1];
  }
  Index voxels() const { return image[0] * image[1] * image[2]; }
  Index samples() const { return field[0] * field[1] * field[2]; }
};

// Along one axis of n voxels: the lower corner of the cell around a sample, and the sample's place in the cell. That of
// a NaN is NaN.
inline Index lower(float x, Index n, float& fraction) {
  float clamped = x < 0 ? 0 : x > n - 1 ? n - 1 : x;
  Index low = clamped > 0 ? std::min(Index(clamped), n - 2) : 0;
  fraction = clamped - float(low);
  return low;
}

// The samples of the row (i, j) of a field.
template <Index C>
void gather_row(const Warp& s, const float* image, const float* u, Index i, Index j, float* out) {
  const Index channels = C ? C : s.channels, y = s.image[2] * channels, x = s.image[1] * y;
  for (Index k = 0; k < s.field[2]; k++, u += 3, out += channels) {
    float f[3];
    Index low[3] = {lower(i + u[0], s.image[0], f[0]), lower(j + u[1], s.image[1], f[1]),
                    lower(k + u[2], s.image[2], f[2])};
    const float* at = image + low[0] * x + low[1] * y + low[2] * channels;
    float w00 = (1 - f[0]) * (1 - f[1]), w01 = (1 - f[0]) * f[1], w10 = f[0] * (1 - f[1]), w11 = f[0] * f[1];
    for (Index c = 0; c < channels; c++) {
      float before = w00 * at[c] + w01 * at[y + c] + w10 * at[x + c] + w11 * at[x + y + c];
      const float* next = at + channels;
      float after = w00 * next[c] + w01 * next[y + c] + w10 * next[x + c] + w11 * next[x + y + c];
      out[c] = (1 - f[2]) * before + f[2] * after;
    }
  }
}

ffi::Error WarpForward(ffi::ThreadPool pool, Array image, Array u, Result out) {
  Warp s(image, u);
  parallel(pool, s.batch * s.field[0], [&](Index plane) {
    Index b = plane / s.field[0], i = plane % s.field[0];
    for (Index j = 0; j < s.field[1]; j++) {
      Index row = (plane * s.field[1] + j) * s.field[2];
      FOR_CHANNELS(s.channels, gather_row, s, image.typed_data() + b * s.voxels() * s.channels,
                   u.typed_data() + 3 * row, i, j, out->typed_data() + row * s.channels)
    }
  });
  return ffi::Error::Success();
}

// The part of the row (i, j) of samples that reaches the planes first <= x < last of the image. A sample belongs to the
// plane of its lower corner, where its cotangent of u is computed.
template <Index C>
void scatter_row(const Warp& s, const float* image, const float* u, const float* g, Index i, Index j, Index first,
                 Index last, float* g_image, float* g_u) {
  const Index channels = C ? C : s.channels, steps[3] = {s.image[1] * s.image[2] * channels, s.image[2] * channels,
                                                         channels};
  for (Index k = 0; k < s.field[2]; k++, u += 3, g += channels, g_u += 3) {
    const float x[3] = {i + u[0], j + u[1], k + u[2]};
    float f[3];
    Index low[3];
    low[0] = lower(x[0], s.image[0], f[0]);
    if (low[0] + 1 < first || low[0] >= last) continue;
    low[1] = lower(x[1], s.image[1], f[1]);
    low[2] = lower(x[2], s.image[2], f[2]);
    const Index place = low[0] * steps[0] + low[1] * steps[1] + low[2] * steps[2];
    if (low[0] >= first) {
      float along[8];
      for (Index corner = 0; corner < 8; corner++) {
        const float* at = image + place + (corner >> 2) * steps[0] + (corner >> 1 & 1) * steps[1]
                          + (corner & 1) * steps[2];
        along[corner] = 0;
        for (Index c = 0; c < channels; c++) along[corner] += at[c] * g[c];
      }
      for (Index axis = 0; axis < 3; axis++) {
        const Index p = axis == 0, q = axis == 2 ? 1 : 2, far = 4 >> axis, step_p = 4 >> p, step_q = 4 >> q;
        float change[4];
        for (Index n = 0; n < 4; n++) {
          const Index corner = (n >> 1) * step_p + (n & 1) * step_q;
          change[n] = along[corner + far] - along[corner];
        }
        const float total = (1 - f[p]) * ((1 - f[q]) * change[0] + f[q] * change[1])
                            + f[p] * ((1 - f[q]) * change[2] + f[q] * change[3]);
        g_u[axis] = x[axis] >= 0 && x[axis] <= s.image[axis] - 1 ? total : 0;
      }
    }
    for (Index side = 0; side < 2; side++) {
      if (low[0] + side < first || low[0] + side >= last) continue;
      for (Index corner = 0; corner < 4; corner++) {
        const float weight = (side ? f[0] : 1 - f[0]) * (corner >> 1 ? f[1] : 1 - f[1])
                             * (corner & 1 ? f[2] : 1 - f[2]);
        float* at = g_image + place + side * steps[0] + (corner >> 1) * steps[1] + (corner & 1) * steps[2];
        for (Index c = 0; c < channels; c++) at[c] += weight * g[c];
      }
    }
  }
}

// Both cotangents of a warp in one pass. Every block adds to some planes of the image alone, in the order of samples.
ffi::Error WarpAdjoint(ffi::ThreadPool pool, Array image, Array u, Array g, Result g_image, Result g_u) {
  Warp s(image, u);
  const Index rows = s.field[0] * s.field[1];
  std::vector<std::pair<Index, Index>> reach(s.batch * rows);  // the first and last plane of a row's lower corners
  parallel(pool, s.batch * s.field[0], [&](Index plane) {
    for (Index j = 0; j < s.field[1]; j++) {
      const float* at = u.typed_data() + 3 * s.field[2] * (plane * s.field[1] + j);
      Index least = s.image[0], most = 0;
      for (Index k = 0; k < s.field[2]; k++) {
        float fraction;
        Index low = lower(plane % s.field[0] + at[3 * k], s.image[0], fraction);
        least = std::min(least, low), most = std::max(most, low);
      }
      reach[plane * s.field[1] + j] = {least, most};
    }
  });
  const Index blocks = std::min(s.image[0], 4 * std::max<Index>(1, pool.num_threads()));
  parallel(pool, s.batch * blocks, [&](Index number) {
    const Index b = number / blocks, block = number % blocks, size = s.voxels() * s.channels;
    const Index first = s.image[0] * block / blocks, last = s.image[0] * (block + 1) / blocks;
    float* to = g_image->typed_data() + b * size;
    std::fill(to + first * (size / s.image[0]), to + last * (size / s.image[0]), 0.0f);
    for (Index row = 0; row < rows; row++) {
      const auto [least, most] = reach[b * rows + row];
      if (most + 1 < first || least >= last) continue;
      const Index sample = (b * rows + row) * s.field[2];
      FOR_CHANNELS(s.channels, scatter_row, s, image.typed_data() + b * size, u.typed_data() + 3 * sample,
                   g.typed_data() + sample * s.channels, row / s.field[1], row % s.field[1], first, last, to,
                   g_u->typed_data() + 3 * sample)
    }
  });
  return ffi::Error::Success();
}

// Damped step ---------------------------------------------------------------------------------------------------------

// Arrays (..., D, H, W, C), and the damping of the step.
struct Step {
  Index batch = 1, d, h, w, c;
  float share, floor;
  Step(const Array& x, float share, float floor) : share(share), floor(floor) {
    auto n = x.dimensions();
    const size_t rank = n.size();
    for (size_t axis = 0; axis + 4 < rank; axis++) batch *= n[axis];
    d = n[rank - 4], h = n[rank - 3], w = n[rank - 2], c = n[rank - 1];
  }
  Index row() const { return w * c; }
  Index plane() const { return h * row(); }
};

// A difference along an axis of n voxels: before `scale`, the voxel itself counts `own` times where a neighbour lacks.
struct Side {
  float own, scale;
  Index before, after;  // steps to the neighbours, 0 at the border
  Side(Index place, Index n) : own(place == 0 ? -1 : place == n - 1 ? 1 : 0), scale(own ? 1 : 0.5f),
                               before(place > 0), after(place < n - 1) {}
};

// What both passes compute at a row of voxels: channels first, (C, W) or (W).
struct Row {
  enum { X, Y, Z, D, WEIGHT, INPUTS };
  Index w;
  std::vector<float> inputs[INPUTS], interleaved;
  std::vector<float> sums[10];  // xx, xy, xz, yy, yz, zz, xd, yd, zd, dd
  std::vector<float> p[3], q[3];

  // Slopes, differences and weights at the row (b, i, j), and their sums over the channels.
  void read(const Step& s, const float* d, const float* slope, const float* weights, Index b, Index i, Index j) {
    w = s.w;
    const Index row = s.row(), at = b * s.d * s.plane() + i * s.plane() + j * row;
    const float* here = slope + at;
    interleaved.resize(3 * row);
    const Index steps[2] = {s.plane(), row};
    const Side sides[2] = {Side(i, s.d), Side(j, s.h)};
    for (Index axis = 0; axis < 2; axis++) {
      const Side side = sides[axis];
      const float* before = here - side.before * steps[axis];
      const float* after = here + side.after * steps[axis];
      float* to = interleaved.data() + axis * row;
      for (Index k = 0; k < row; k++) to[k] = side.scale * (after[k] - before[k]);
    }
    float* along = interleaved.data() + 2 * row;
    for (Index k = 0; k < s.c; k++) along[k] = here[k + s.c] - here[k];
    for (Index k = s.c; k < row - s.c; k++) along[k] = 0.5f * (here[k + s.c] - here[k - s.c]);
    for (Index k = row - s.c; k < row; k++) along[k] = here[k] - here[k - s.c];
    const float* from[INPUTS] = {interleaved.data(), interleaved.data() + row, along, d + at, weights + at};
    for (Index input = 0; input < INPUTS; input++) {
      inputs[input].resize(row);
      FOR_CHANNELS(s.c, split_channels, from[input], w, s.c, inputs[input].data(), w)
    }
    for (auto& sum : sums) sum.assign(w, 0.0f);
    for (Index c = 0; c < s.c; c++) add(inputs[X].data() + c * w, inputs[Y].data() + c * w, inputs[Z].data() + c * w,
                                        inputs[D].data() + c * w, inputs[WEIGHT].data() + c * w);
  }

  void add(const float* x, const float* y, const float* z, const float* d, const float* weight) {
    float *xx = sums[0].data(), *xy = sums[1].data(), *xz = sums[2].data(), *yy = sums[3].data(), *yz = sums[4].data(),
          *zz = sums[5].data(), *xd = sums[6].data(), *yd = sums[7].data(), *zd = sums[8].data(), *dd = sums[9].data();
#pragma GCC ivdep
    for (Index k = 0; k < w; k++) {
      const float wx = weight[k] * x[k], wy = weight[k] * y[k], wz = weight[k] * z[k], wd = weight[k] * d[k];
      xx[k] += wx * x[k], xy[k] += wx * y[k], xz[k] += wx * z[k], yy[k] += wy * y[k], yz[k] += wy * z[k];
      zz[k] += wz * z[k], xd[k] += wd * x[k], yd[k] += wd * y[k], zd[k] += wd * z[k], dd[k] += wd * d[k];
    }
  }

  // The solution p; where g (W, 3) is given also q, that with g on the right-hand side. As `_solve` in forces.py.
  void solve(const Step& s, const float* g) {
    for (auto& x : p) x.resize(w);
    for (auto& x : q) x.resize(w);
    const float *xx = sums[0].data(), *xy = sums[1].data(), *xz = sums[2].data(), *yy = sums[3].data(),
                *yz = sums[4].data(), *zz = sums[5].data(), *dd = sums[9].data();
    const float* right[3] = {sums[6].data(), sums[7].data(), sums[8].data()};
    for (Index pass = 0; pass < (g ? 2 : 1); pass++) {
      float* to[3];
      for (Index axis = 0; axis < 3; axis++) to[axis] = (pass ? q : p)[axis].data();
      if (pass)
        for (Index k = 0; k < w; k++)
          for (Index axis = 0; axis < 3; axis++) to[axis][k] = g[3 * k + axis];
      else
        for (Index axis = 0; axis < 3; axis++) std::copy(right[axis], right[axis] + w, to[axis]);
      float *p0 = to[0], *p1 = to[1], *p2 = to[2];
#pragma GCC ivdep
      for (Index k = 0; k < w; k++) {
        const float damping = s.share * dd[k] + s.floor;
        const float scale = 1 / (xx[k] + yy[k] + zz[k] + 3 * damping), least = scale * damping;
        const float m00 = scale * (xx[k] + damping), m01 = scale * xy[k], m02 = scale * xz[k];
        const float f1 = m01 / m00, f2 = m02 / m00;
        const float m11 = std::max(scale * (yy[k] + damping) - f1 * m01, least), m12 = scale * yz[k] - f1 * m02;
        const float f3 = m12 / m11;
        const float m22 = std::max(scale * (zz[k] + damping) - f2 * m02 - f3 * m12, least);
        const float r0 = scale * p0[k], r1 = scale * p1[k] - f1 * r0, r2 = scale * p2[k] - f2 * r0 - f3 * r1;
        p2[k] = r2 / m22;
        p1[k] = (r1 - m12 * p2[k]) / m11;
        p0[k] = (r0 - m01 * p1[k] - m02 * p2[k]) / m00;
      }
    }
  }
};

ffi::Error DampedStep(ffi::ThreadPool pool, Array d, Array slope, Array weights, float share, float floor, Result out) {
  const Step s(d, share, floor);
  parallel(pool, s.batch * s.d, [&](Index plane) {
    static thread_local Row row;
    for (Index j = 0; j < s.h; j++) {
      row.read(s, d.typed_data(), slope.typed_data(), weights.typed_data(), plane / s.d, plane % s.d, j);
      row.solve(s, nullptr);
      float* to = out->typed_data() + 3 * s.w * (plane * s.h + j);
      for (Index k = 0; k < s.w; k++)
        for (Index axis = 0; axis < 3; axis++) to[3 * k + axis] = row.p[axis][k];
    }
  });
  return ffi::Error::Success();
}

// to += the transpose of a difference, from cotangents at the voxel itself and at its neighbours.
void add_adjoint(float* to, const float* here, const float* before, const float* after, const Side& side, Index place,
                 Index n, Index count) {
  const float own = side.own * side.scale;
  const float left = side.before ? Side(place - 1, n).scale : 0, right = side.after ? Side(place + 1, n).scale : 0;
  for (Index k = 0; k < count; k++) to[k] += own * here[k] + left * before[k] - right * after[k];
}

// The cotangents of d, slope and weights, for the cotangent g (..., D, H, W, 3) of the step. The formulas are those of
// `_damped_step_backward` in forces.py. A block computes what its planes need of the planes next to it once more.
ffi::Error DampedStepAdjoint(ffi::ThreadPool pool, Array d, Array slope, Array weights, Array g, float share,
                             float floor, Result g_d, Result g_slope, Result g_weights) {
  constexpr Index PLANES = 8;
  const Step s(d, share, floor);
  const Index each = (s.d + PLANES - 1) / PLANES, size = s.row();
  parallel(pool, s.batch * each, [&](Index number) {
    static thread_local Row row;
    static thread_local std::vector<float> of_x, of_y, of_z, made[5];  // cotangents of the slopes, voxels first
    const Index b = number / each, first = number % each * PLANES, last = std::min(first + PLANES, s.d);
    of_x.resize((PLANES + 2) * s.plane()), of_y.resize(s.plane()), of_z.resize(size);
    for (auto& x : made) x.resize(size);
    for (Index i = std::max<Index>(first - 1, 0); i < std::min(last + 1, s.d); i++) {
      const Index start = (b * s.d + i) * s.plane();
      const bool inside = i >= first && i < last;
      for (Index j = 0; j < s.h; j++) {
        row.read(s, d.typed_data(), slope.typed_data(), weights.typed_data(), b, i, j);
        row.solve(s, g.typed_data() + 3 * s.w * ((b * s.d + i) * s.h + j));
        const float *p0 = row.p[0].data(), *p1 = row.p[1].data(), *p2 = row.p[2].data();
        const float *q0 = row.q[0].data(), *q1 = row.q[1].data(), *q2 = row.q[2].data();
        for (Index c = 0; c < s.c; c++) {
          const Index at = c * s.w;
          const float *x = row.inputs[Row::X].data() + at, *y = row.inputs[Row::Y].data() + at,
                      *z = row.inputs[Row::Z].data() + at, *diff = row.inputs[Row::D].data() + at,
                      *weight = row.inputs[Row::WEIGHT].data() + at;
          float *gx = made[0].data() + at, *gy = made[1].data() + at, *gz = made[2].data() + at,
                *gd = made[3].data() + at, *gw = made[4].data() + at;
#pragma GCC ivdep
          for (Index k = 0; k < s.w; k++) {
            const float left = diff[k] - (p0[k] * x[k] + p1[k] * y[k] + p2[k] * z[k]);
            const float along = q0[k] * x[k] + q1[k] * y[k] + q2[k] * z[k];
            const float bend = s.share * (p0[k] * q0[k] + p1[k] * q1[k] + p2[k] * q2[k]) * diff[k];
            gx[k] = weight[k] * (left * q0[k] - along * p0[k]);
            gy[k] = weight[k] * (left * q1[k] - along * p1[k]);
            gz[k] = weight[k] * (left * q2[k] - along * p2[k]);
            gd[k] = weight[k] * (along - 2 * bend);
            gw[k] = along * left - bend * diff[k];
          }
        }
        float* to[5] = {of_x.data() + (i - first + 1) * s.plane() + j * size, of_y.data() + j * size, of_z.data(),
                        g_d->typed_data() + start + j * size, g_weights->typed_data() + start + j * size};
        for (Index n = 0; n < (inside ? 5 : 1); n++)
          FOR_CHANNELS(s.c, join_channels, made[n].data(), s.w, s.w, s.c, to[n])
        if (!inside) continue;
        float* out = g_slope->typed_data() + start + j * size;
        std::fill(out, out + size, 0.0f);
        for (Index k = 0; k < s.w; k++) {
          const Side side(k, s.w);
          const float* here = of_z.data() + k * s.c;
          add_adjoint(out + k * s.c, here, here - side.before * s.c, here + side.after * s.c, side, k, s.w, s.c);
        }
      }
      for (Index j = 0; inside && j < s.h; j++) {
        const Side side(j, s.h);
        const float* here = of_y.data() + j * size;
        add_adjoint(g_slope->typed_data() + start + j * size, here, here - side.before * size, here + side.after * size,
                    side, j, s.h, size);
      }
    }
    for (Index i = first; i < last; i++) {
      const Side side(i, s.d);
      const float* here = of_x.data() + (i - first + 1) * s.plane();
      add_adjoint(g_slope->typed_data() + (b * s.d + i) * s.plane(), here, here - side.before * s.plane(),
                  here + side.after * s.plane(), side, i, s.d, s.plane());
    }
  });
  return ffi::Error::Success();
}

// Attention over neighbourhoods ---------------------------------------------------------------------------------------

typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// exp(x) for x <= 0, to 1e-7 of it, after the Cephes library. That of a NaN is NaN.
Vector exponential(Vector x) {
  const Vector least = x - x - 87.0f;
  x = x < least ? least : x;
  const Integers power = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  const Vector n = __builtin_convertvector(power, Vector), f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector y = 1.9875691500e-4f * f + 1.3981999507e-3f;
  y = ((((y * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f + 1.6666665459e-1f) * f + 5.0000001201e-1f) * f * f;
  const Integers exponent = (power + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return (y + f + 1.0f) * scale;
}

// Queries and keys (B, D, H, W, heads, C), values (B, D, H, W, heads, V). A padded plane of keys or values repeats the
// voxels at its edges; within the flat plane, a shift is an offset. Planes of queries have the same rows.
struct Attention {
  Index b, d, h, w, heads, c, v, radius;
  Attention(const Array& q, const Array& values, Index radius) : radius(radius) {
    auto n = q.dimensions();
    b = n[0], d = n[1], h = n[2], w = n[3], heads = n[4], c = n[5], v = values.dimensions()[5];
  }
  Index row() const { return w + 2 * radius; }
  Index plane() const { return (h + 2 * radius) * row() + 4 * LANES; }
  Index channel() const { return (d + 2 * radius) * plane(); }
  Index flat() const { return (h * row() + LANES - 1) / LANES * LANES; }
  Index shifts() const { return (2 * radius + 1) * (2 * radius + 1) * (2 * radius + 1); }
};

// x (B, D, H, W, channels) -> (B channels, D + 2 r, plane).
std::vector<float> padded_at_edges(ffi::ThreadPool pool, const float* x, const Attention& s, Index channels) {
  std::vector<float> out(s.b * channels * s.channel());
  parallel(pool, s.b * channels, [&](Index number) {
    const float* from = x + number / channels * s.d * s.h * s.w * channels + number % channels;
    float* to = out.data() + number * s.channel();
    auto near = [&](Index place, Index n) { return std::clamp<Index>(place - s.radius, 0, n - 1); };
    for (Index i = 0; i < s.d + 2 * s.radius; i++, to += s.plane())
      for (Index j = 0; j < s.h + 2 * s.radius; j++)
        for (Index k = 0; k < s.row(); k++)
          to[j * s.row() + k] = from[((near(i, s.d) * s.h + near(j, s.h)) * s.w + near(k, s.w)) * channels];
  });
  return out;
}

// `count` of the `channels` of a plane (H, W, channels) -> (count, flat), zero between the rows.
void flatten(const float* x, const Attention& s, Index channels, Index count, std::vector<float>& out) {
  out.assign(count * s.flat(), 0.0f);
  for (Index c = 0; c < count; c++)
    for (Index j = 0; j < s.h; j++)
      for (Index k = 0; k < s.w; k++) out[c * s.flat() + j * s.row() + k] = x[(j * s.w + k) * channels + c];
}

void unflatten(const std::vector<float>& x, const Attention& s, Index channels, Index count, float* out) {
  for (Index c = 0; c < count; c++)
    for (Index j = 0; j < s.h; j++)
      for (Index k = 0; k < s.w; k++) out[(j * s.w + k) * channels + c] = x[c * s.flat() + j * s.row() + k];
}

// The products of x (channels, flat) at 8 voxels with its neighbours y, summed over the channels, for all shifts.
template <Index SIDE>
void dots(const float* x, const float* y, const Attention& s, Index channels, Vector* out) {
  for (Index a = 0; a < SIDE; a++)
    for (Index b = 0; b < SIDE; b++, out += SIDE) {
      const float* at = y + a * s.plane() + b * s.row();
      Vector total[SIDE] = {};
      for (Index c = 0; c < channels; c++) {
        const Vector here = load(x + c * s.flat());
        for (Index z = 0; z < SIDE; z++) total[z] += here * load(at + c * s.channel() + z);
      }
      for (Index z = 0; z < SIDE; z++) out[z] = total[z];
    }
}

// The sum over all shifts of the weights times the neighbours y, for every channel: (channels, flat) at 8 voxels.
template <Index SIDE>
void weighted(const Vector* weights, const float* y, const Attention& s, Index channels, float* out) {
  for (Index c = 0; c < channels; c++, y += s.channel(), out += s.flat()) {
    Vector total[SIDE] = {};
    for (Index a = 0; a < SIDE; a++)
      for (Index b = 0; b < SIDE; b++)
        for (Index z = 0; z < SIDE; z++)
          total[z] += weights[(a * SIDE + b) * SIDE + z] * load(y + a * s.plane() + b * s.row() + z);
    for (Index z = 1; z < SIDE; z++) total[0] += total[z];
    store(out, total[0]);
  }
}

// Adds the weights times x (channels, flat) at 8 voxels to each of their neighbours y.
template <Index SIDE>
void spread(const Vector* weights, const float* x, const Attention& s, Index channels, float* y, Index channel) {
  for (Index a = 0; a < SIDE; a++)
    for (Index b = 0; b < SIDE; b++)
      for (Index z = 0; z < SIDE; z++, weights++) {
        float* at = y + a * s.plane() + b * s.row() + z;
        for (Index c = 0; c < channels; c++) {
          float* to = at + c * channel;
          store(to, load(to) + *weights * load(x + c * s.flat()));
        }
      }
}

// Logits -> softmax.
void normalise(Vector* x, Index count) {
  Vector highest = x[0], total = {};
  for (Index k = 1; k < count; k++) highest = larger(highest, x[k]);
  for (Index k = 0; k < count; k++) total += x[k] = exponential(x[k] - highest);
  for (Index k = 0; k < count; k++) x[k] /= total;
}

template <Index SIDE>
void attend_plane(const Attention& s, const float* queries, const float* keys, const float* values, Index number,
                  float* attended, float* offset) {
  static thread_local std::vector<float> q, found, moved;
  const Index b = number / s.d, i = number % s.d, radius = SIDE / 2, voxels = s.h * s.w;
  Vector weights[SIDE * SIDE * SIDE];
  moved.assign(3 * s.flat(), 0.0f);
  found.resize(s.v * s.flat());
  for (Index head = 0; head < s.heads; head++) {
    flatten(queries + (number * voxels * s.heads + head) * s.c, s, s.heads * s.c, s.c, q);
    for (Index p = 0; p < s.flat(); p += LANES) {
      const Index at = i * s.plane() + p;
      dots<SIDE>(q.data() + p, keys + (b * s.heads + head) * s.c * s.channel() + at, s, s.c, weights);
      normalise(weights, s.shifts());
      weighted<SIDE>(weights, values + (b * s.heads + head) * s.v * s.channel() + at, s, s.v, found.data() + p);
      for (Index axis = 0, step = SIDE * SIDE; axis < 3; axis++, step /= SIDE) {
        Vector sum = {};
        for (Index k = 0; k < s.shifts(); k++) sum += weights[k] * float(k / step % SIDE - radius);
        float* to = moved.data() + axis * s.flat() + p;
        store(to, load(to) + sum / float(s.heads));
      }
    }
    unflatten(found, s, s.heads * s.v, s.v, attended + (number * voxels * s.heads + head) * s.v);
  }
  unflatten(moved, s, 3, 3, offset + number * voxels * 3);
}

// f<2 radius + 1>() for a radius of 1 to 3.
#define FOR_RADIUS(radius, f, ...)          \
  switch (radius) {                         \
    case 1: f<3>(__VA_ARGS__); break;       \
    case 2: f<5>(__VA_ARGS__); break;       \
    default: f<7>(__VA_ARGS__);             \
  }

ffi::Error AttentionForward(ffi::ThreadPool pool, Array q, Array k, Array v, int64_t radius, Result attended,
                            Result offset) {
  const Attention s(q, v, radius);
  const std::vector<float> keys = padded_at_edges(pool, k.typed_data(), s, s.heads * s.c),
                           values = padded_at_edges(pool, v.typed_data(), s, s.heads * s.v);
  parallel(pool, s.b * s.d, [&](Index number) {
    FOR_RADIUS(radius, attend_plane, s, q.typed_data(), keys.data(), values.data(), number, attended->typed_data(),
               offset->typed_data())
  });
  return ffi::Error::Success();
}

// One plane of one head. The cotangents of its keys and values are added to g_keys and g_values, which are padded and
// begin at this plane; `channel` is the step from one channel to the next there.
template <Index SIDE>
void attend_plane_adjoint(const Attention& s, const float* queries, const float* keys, const float* values,
                          const float* g, const float* g_offset, Index number, Index head, float* g_queries,
                          float* g_keys, float* g_values, Index channel) {
  static thread_local std::vector<float> q, of, moved, found;
  const Index b = number / s.d, i = number % s.d, radius = SIDE / 2, voxels = s.h * s.w;
  flatten(queries + (number * voxels * s.heads + head) * s.c, s, s.heads * s.c, s.c, q);
  flatten(g + (number * voxels * s.heads + head) * s.v, s, s.heads * s.v, s.v, of);
  flatten(g_offset + number * voxels * 3, s, 3, 3, moved);
  found.resize(s.c * s.flat());
  Vector weights[SIDE * SIDE * SIDE], of_logits[SIDE * SIDE * SIDE];
  for (Index p = 0; p < s.flat(); p += LANES) {
    const float* near_keys = keys + (b * s.heads + head) * s.c * s.channel() + i * s.plane() + p;
    dots<SIDE>(q.data() + p, near_keys, s, s.c, weights);
    normalise(weights, s.shifts());
    dots<SIDE>(of.data() + p, values + (b * s.heads + head) * s.v * s.channel() + i * s.plane() + p, s, s.v, of_logits);
    Vector mean = {};
    for (Index k = 0; k < s.shifts(); k++) {
      for (Index axis = 0, step = SIDE * SIDE; axis < 3; axis++, step /= SIDE)
        of_logits[k] += load(moved.data() + axis * s.flat() + p) * (float(k / step % SIDE - radius) / s.heads);
      mean += weights[k] * of_logits[k];
    }
    for (Index k = 0; k < s.shifts(); k++) of_logits[k] = weights[k] * (of_logits[k] - mean);
    weighted<SIDE>(of_logits, near_keys, s, s.c, found.data() + p);
    spread<SIDE>(of_logits, q.data() + p, s, s.c, g_keys + p, channel);
    spread<SIDE>(weights, of.data() + p, s, s.v, g_values + p, channel);
  }
  unflatten(found, s, s.heads * s.c, s.c, g_queries + (number * voxels * s.heads + head) * s.c);
}

ffi::Error AttentionAdjoint(ffi::ThreadPool pool, Array q, Array k, Array v, Array g, Array g_offset, int64_t radius,
                            Result g_q, Result g_k, Result g_v) {
  constexpr Index PLANES = 4;
  const Attention s(q, v, radius);
  const std::vector<float> keys = padded_at_edges(pool, k.typed_data(), s, s.heads * s.c),
                           values = padded_at_edges(pool, v.typed_data(), s, s.heads * s.v);
  // Every block adds up the cotangents of keys and values by itself, with a margin. They are joined in one order.
  const Index channel = (PLANES + 2 * s.radius) * s.plane();
  const Index each = (s.d + PLANES - 1) / PLANES, blocks = s.b * each * s.heads, size = (s.c + s.v) * channel;
  std::vector<float> made(blocks * size);
  parallel(pool, blocks, [&](Index number) {
    const Index b = number / (each * s.heads), head = number % s.heads, first = number / s.heads % each * PLANES;
    for (Index i = first; i < std::min(first + PLANES, s.d); i++) {
      float* to = made.data() + number * size + (i - first) * s.plane();
      FOR_RADIUS(radius, attend_plane_adjoint, s, q.typed_data(), keys.data(), values.data(), g.typed_data(),
                 g_offset.typed_data(), b * s.d + i, head, g_q->typed_data(), to, to + s.c * channel, channel)
    }
  });
  parallel(pool, s.b * s.heads * (s.c + s.v), [&](Index number) {
    const Index c = number % (s.c + s.v), head = number / (s.c + s.v) % s.heads, b = number / (s.c + s.v) / s.heads;
    const bool key = c < s.c;
    const Index count = key ? s.c : s.v, channels = s.heads * count;
    float* out = (key ? g_k : g_v)->typed_data() + b * s.d * s.h * s.w * channels + head * count + (key ? c : c - s.c);
    for (Index p = 0; p < s.d * s.h * s.w; p++) out[p * channels] = 0;
    auto near = [&](Index place, Index n) { return std::clamp<Index>(place - s.radius, 0, n - 1); };
    for (Index block = 0; block < each; block++) {
      const float* from = made.data() + ((b * each + block) * s.heads + head) * size + c * channel;
      const Index planes = std::min(PLANES, s.d - block * PLANES) + 2 * s.radius;
      for (Index i = 0; i < planes; i++, from += s.plane())
        for (Index j = 0; j < s.h + 2 * s.radius; j++)
          for (Index k = 0; k < s.row(); k++)
            out[((near(block * PLANES + i, s.d) * s.h + near(j, s.h)) * s.w + near(k, s.w)) * channels] +=
                from[j * s.row() + k];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define HANDLER(name, f, arguments, results) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(drivenmorph_##name, f, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() arguments results)
#define TAKES_2 .Arg<Array>().Arg<Array>()
#define TAKES_3 TAKES_2.Arg<Array>()
#define GIVES_1 .Ret<Array>()
#define TAKES_4 TAKES_3.Arg<Array>()
#define TAKES_5 TAKES_4.Arg<Array>()
#define DAMPING .Attr<float>("share").Attr<float>("floor")
#define GIVES_2 GIVES_1.Ret<Array>()
#define GIVES_3 GIVES_2.Ret<Array>()

HANDLER(convolution, Convolution, TAKES_2, GIVES_1);
HANDLER(convolution_adjoint, ConvolutionAdjoint, TAKES_3, GIVES_2);
HANDLER(warp, WarpForward, TAKES_2, GIVES_1);
HANDLER(warp_adjoint, WarpAdjoint, TAKES_3, GIVES_2);
HANDLER(damped_step, DampedStep, TAKES_3 DAMPING, GIVES_1);
HANDLER(damped_step_adjoint, DampedStepAdjoint, TAKES_4 DAMPING, GIVES_3);
HANDLER(attention, AttentionForward, TAKES_3.Attr<int64_t>("radius"), GIVES_2);
HANDLER(attention_adjoint, AttentionAdjoint, TAKES_5.Attr<int64_t>("radius"), GIVES_3);
