// obce._cpu: addresses and sizes come in as integers, so no numpy or torch header is needed.
// Contracts: ph0_cpu.h. obce/backends.py is the only caller and checks everything first.
#include <pybind11/pybind11.h>

#include "ph0_cpu.h"

namespace {

template <class P>
P* at(std::uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

template <class T>
void lines_r_f(std::uintptr_t values, int64_t row_stride, int64_t value_stride, int64_t B,
               int64_t n, std::uintptr_t lengths, std::uintptr_t out, int threads) {
  ph0::lines_r_f<T>(
      {at<const T>(values), row_stride, value_stride, B, n, at<const int64_t>(lengths)}, at<T>(out),
      threads);
}

template <class T>
void lines_deaths(std::uintptr_t values, int64_t row_stride, int64_t value_stride, int64_t B,
                  int64_t n, std::uintptr_t lengths, std::uintptr_t deaths, int threads) {
  ph0::lines_deaths<T>(
      {at<const T>(values), row_stride, value_stride, B, n, at<const int64_t>(lengths)},
      at<T>(deaths), threads);
}

template <class T>
void clouds_h0(std::uintptr_t points, int64_t B, int64_t n, int64_t d, std::uintptr_t lengths,
               int metric, double p, std::uintptr_t deaths, std::uintptr_t edges, int algorithm,
               int threads) {
  ph0::clouds_h0<T>({at<const T>(points), B, n, d, at<const int64_t>(lengths),
                     static_cast<ph0::Metric>(metric), p},
                    {at<T>(deaths), at<int64_t>(edges)}, static_cast<ph0::Algorithm>(algorithm),
                    threads);
}

template <class T>
void matrices_h0(std::uintptr_t entries, int64_t B, int64_t n, std::uintptr_t lengths,
                 bool condensed, std::uintptr_t deaths, std::uintptr_t edges, int threads) {
  ph0::matrices_h0<T>({at<const T>(entries), B, n, at<const int64_t>(lengths), condensed},
                      {at<T>(deaths), at<int64_t>(edges)}, threads);
}

template <class T>
void graph_h0(std::uintptr_t ends_a, std::uintptr_t ends_b, std::uintptr_t weights, int64_t m,
              int64_t n, std::uintptr_t deaths, std::uintptr_t edges) {
  ph0::graph_h0<T>(
      {at<const int32_t>(ends_a), at<const int32_t>(ends_b), at<const T>(weights), m, n},
      {at<T>(deaths), at<int64_t>(edges)});
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("simd_level", &ph0::simd_level);
  m.def("lines_r_f_float32", &lines_r_f<float>, Free());
  m.def("lines_r_f_float64", &lines_r_f<double>, Free());
  m.def("lines_deaths_float32", &lines_deaths<float>, Free());
  m.def("lines_deaths_float64", &lines_deaths<double>, Free());
  m.def("clouds_h0_float32", &clouds_h0<float>, Free());
  m.def("clouds_h0_float64", &clouds_h0<double>, Free());
  m.def("matrices_h0_float32", &matrices_h0<float>, Free());
  m.def("matrices_h0_float64", &matrices_h0<double>, Free());
  m.def("graph_h0_float32", &graph_h0<float>, Free());
  m.def("graph_h0_float64", &graph_h0<double>, Free());
}
