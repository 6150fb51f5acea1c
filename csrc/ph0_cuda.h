// 0-dimensional persistence on a CUDA device. Knows no Python and no torch.
//
// Weights, order, padding and what is not finite: as ph0_cpu.h says; the answers are the same bits.
// Every pointer is to memory of the current device. Calls put kernels on the stream and return:
// nothing is allocated, copied to the host or waited for, so they may be captured in a graph. A
// launch that fails throws std::runtime_error with the kernel's name.
#pragma once

#include <cstdint>

#include "ph0_core.h"

namespace ph0::cuda {

using Stream = void*;  // a cudaStream_t

// What the device allows. Answers of the CUDA runtime, asked once a device.
struct Device {
  int processors = 0;         // streaming multiprocessors
  int64_t shared_memory = 0;  // bytes a block may ask for
};
Device device_limits(int device);

enum class Number { kFloat, kDouble, kHalf, kBfloat16 };

// Values [B, n]; row_stride 1 and value_stride B is sample-major. Strides in values, of any sign.
struct Lines {
  const void* values;
  int64_t row_stride, value_stride;
  int64_t B, n;
  const int64_t* lengths;  // [B], or null: all n
};

// Bytes of workspace lines_r_f and lines_deaths want for these lines. Less workspace than that is
// an error.
int64_t lines_workspace(const Lines& in, Number number, bool deaths, const Device& device);

// r_f [B] (float for the 16-bit numbers): the largest gap, without sorting. One read of the values
// from memory for up to 10,240 floats a line and for 16-bit numbers, two otherwise.
void lines_r_f(const Lines& in, Number number, void* out, void* workspace, const Device& device,
               Stream stream);

// Largest n of lines_deaths.
int64_t sorted_values(Number number, const Device& device);

// All gaps ascending [B, n - 1], of kFloat or kDouble.
void lines_deaths(const Lines& in, Number number, void* deaths, void* workspace,
                  const Device& device, Stream stream);

// Clouds [B, n, d], or matrices [B, n, n] (d = 0), contiguous.
struct Trees {
  const void* data;
  int64_t B, n, d;
  const int64_t* lengths;  // [B], or null
  bool squared;            // the death of an edge is its weight: sqeuclidean
  void* deaths;            // [B, n - 1]
  int64_t* edges;          // [B, n - 1, 2], or null
};

// Prim, one block a cloud. Largest n: prim_points. workspace: prim_workspace bytes.
int64_t prim_points();
int64_t prim_workspace(const Trees& in, Number number, const Device& device);
void prim(const Trees& in, Number number, void* workspace, const Device& device, Stream stream);

// Boruvka with a lock-free union-find, many blocks a cloud. In two calls with a sort of `codes`
// between them:
//   boruvka_codes   codes [B, n] int64, by which near points stand together; not for matrices;
//   boruvka         order [B, n] int64, the points in the order of their codes (null for matrices).
//   Leaves the edges
//                   unsorted: weights [B, n] words and pairs [B, n] int64 (smaller end * 2^32 +
//                   larger end); all ones where there is none;
//   boruvka_write   ranks [B, n] int64, the slots of weights and pairs in the order (weight, pair).
// The same workspace of boruvka_workspace bytes is handed to all three.
int64_t boruvka_workspace(const Trees& in, Number number);
void boruvka_codes(const Trees& in, Number number, int64_t* codes, void* workspace, Stream stream);
void boruvka(const Trees& in, Number number, const int64_t* order, void* weights, int64_t* pairs,
             void* workspace, Stream stream);
void boruvka_write(const Trees& in, Number number, const int64_t* ranks, const void* weights,
                   const int64_t* pairs, void* workspace, Stream stream);

}  // namespace ph0::cuda
