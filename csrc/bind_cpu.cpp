// obce._cpu: addresses and sizes come in as integers, so no numpy or torch header is needed.
// Contracts: ph0_cpu.h and ph0_cpu_sketch.h. obce/backends.py and obce/sketch.py are the only
// callers and check everything first. Calls come with the GIL; it is given up while the engine
// runs, and taken again to hear Ctrl-C and to call `progress`, None or a function of the share
// done.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "ph0_cpu.h"
#include "ph0_cpu_floats.h"
#include "ph0_cpu_sketch.h"

namespace {

// Of level, base, low and high.
using Addresses = std::array<std::uintptr_t, 4>;

template <class P>
P* at(std::uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

template <class Call>
void heard(const pybind11::object& progress, const Call& call) {
  ph0::Watch watch([&](double share) {
    const pybind11::gil_scoped_acquire hold;
    if (PyErr_CheckSignals() != 0) return false;
    if (progress.is_none()) return true;
    PyObject* const answer = PyObject_CallFunction(progress.ptr(), "d", share);
    Py_XDECREF(answer);
    return answer != nullptr;
  });
  try {
    const pybind11::gil_scoped_release release;
    const ph0::PlainFloats plain;
    call(watch);
  } catch (const ph0::Stopped&) {
    throw pybind11::error_already_set();
  }
}

template <class T>
void lines_r_f(std::uintptr_t values, int64_t row_stride, int64_t value_stride, int64_t B,
               int64_t n, std::uintptr_t lengths, std::uintptr_t out, int threads,
               const pybind11::object& progress) {
  heard(progress, [&](ph0::Watch& watch) {
    ph0::lines_r_f<T>(
        {at<const T>(values), row_stride, value_stride, B, n, at<const int64_t>(lengths)},
        at<T>(out), threads, watch);
  });
}

template <class T>
void lines_deaths(std::uintptr_t values, int64_t row_stride, int64_t value_stride, int64_t B,
                  int64_t n, std::uintptr_t lengths, std::uintptr_t deaths, int threads,
                  const pybind11::object& progress) {
  heard(progress, [&](ph0::Watch& watch) {
    ph0::lines_deaths<T>(
        {at<const T>(values), row_stride, value_stride, B, n, at<const int64_t>(lengths)},
        at<T>(deaths), threads, watch);
  });
}

template <class T>
void clouds_h0(std::uintptr_t points, int64_t B, int64_t n, int64_t d, std::uintptr_t lengths,
               int metric, double p, std::uintptr_t deaths, std::uintptr_t edges, int algorithm,
               int threads, const pybind11::object& progress) {
  heard(progress, [&](ph0::Watch& watch) {
    ph0::clouds_h0<T>({at<const T>(points), B, n, d, at<const int64_t>(lengths),
                       static_cast<ph0::Metric>(metric), p},
                      {at<T>(deaths), at<int64_t>(edges)}, static_cast<ph0::Algorithm>(algorithm),
                      threads, watch);
  });
}

template <class T>
int64_t matrices_h0(std::uintptr_t entries, int64_t B, int64_t n, std::uintptr_t lengths,
                    bool condensed, bool check, std::uintptr_t deaths, std::uintptr_t edges,
                    int threads, const pybind11::object& progress) {
  int64_t flawed = -1;
  heard(progress, [&](ph0::Watch& watch) {
    flawed = ph0::matrices_h0<T>(
        {at<const T>(entries), B, n, at<const int64_t>(lengths), condensed, check},
        {at<T>(deaths), at<int64_t>(edges)}, threads, watch);
  });
  return flawed;
}

template <class T>
void graph_h0(std::uintptr_t ends_a, std::uintptr_t ends_b, std::uintptr_t weights, int64_t m,
              int64_t n, std::uintptr_t deaths, std::uintptr_t edges,
              const pybind11::object& progress) {
  heard(progress, [&](ph0::Watch& watch) {
    ph0::graph_h0<T>(
        {at<const int32_t>(ends_a), at<const int32_t>(ends_b), at<const T>(weights), m, n},
        {at<T>(deaths), at<int64_t>(edges)}, watch);
  });
}

void forest_merges(std::uintptr_t edges, int64_t m, int64_t n, std::uintptr_t merges) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::forest_merges(at<const int64_t>(edges), m, n, at<int64_t>(merges), watch);
  });
}

ph0::GapCells gap_cells(const Addresses& at_, int64_t rows, int64_t cells) {
  return {at<int32_t>(at_[0]),
          at<int64_t>(at_[1]),
          at<int64_t>(at_[2]),
          at<int64_t>(at_[3]),
          rows,
          cells};
}

void cells_update(std::uintptr_t values, int64_t row_stride, int64_t m, std::uintptr_t texts,
                  const Addresses& cells, int64_t rows, int64_t n_cells, int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::cells_update(at<const float>(values), row_stride, m, at<const uint32_t>(texts),
                      gap_cells(cells, rows, n_cells), threads, watch);
  });
}

void cells_merge(const Addresses& into, const Addresses& from, int64_t rows, int64_t n_cells,
                 int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::cells_merge(gap_cells(into, rows, n_cells), gap_cells(from, rows, n_cells), threads,
                     watch);
  });
}

void cells_regrid(const Addresses& cells, int64_t rows, int64_t n_cells, std::uintptr_t level,
                  std::uintptr_t base, int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::cells_regrid(gap_cells(cells, rows, n_cells), at<const int32_t>(level),
                      at<const int64_t>(base), threads, watch);
  });
}

void cells_gaps(const Addresses& cells, int64_t rows, int64_t n_cells, std::uintptr_t gap,
                std::uintptr_t bound, std::uintptr_t texts, std::uintptr_t extremes, int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::cells_gaps(gap_cells(cells, rows, n_cells),
                    {at<float>(gap), at<float>(bound), at<int64_t>(texts), at<float>(extremes)},
                    threads, watch);
  });
}

void sums_update(std::uintptr_t values, int64_t row_stride, int64_t m, int64_t rows,
                 std::uintptr_t positive, std::uintptr_t negative, std::uintptr_t squares,
                 int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::sums_update(at<const float>(values), row_stride, m, rows,
                     {at<int64_t>(positive), at<int64_t>(negative), at<int64_t>(squares)}, threads,
                     watch);
  });
}

void sums_add(std::uintptr_t values, int64_t m, int64_t rows, std::uintptr_t sums, int digits,
              int first, int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::sums_add(at<const double>(values), m, rows, at<int64_t>(sums), digits, first, threads,
                  watch);
  });
}

void sums_means(std::uintptr_t sums, std::uintptr_t count, int64_t rows, std::uintptr_t out,
                int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::sums_means(at<const int64_t>(sums), at<const int64_t>(count), rows, at<double>(out),
                    threads, watch);
  });
}

void sums_deviations(std::uintptr_t sums, std::uintptr_t squares, std::uintptr_t count,
                     int64_t rows, std::uintptr_t out, int threads) {
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    ph0::sums_deviations(at<const int64_t>(sums), at<const int64_t>(squares),
                         at<const int64_t>(count), rows, at<double>(out), threads, watch);
  });
}

int64_t token_sums(std::uintptr_t tokens, int64_t text_stride, int64_t token_stride,
                   std::uintptr_t lengths, int64_t B, int64_t width, std::uintptr_t sums,
                   std::uintptr_t squares, std::uintptr_t least, std::uintptr_t greatest,
                   int threads, std::uintptr_t team) {
  int64_t count = 0;
  heard(pybind11::none(), [&](ph0::Watch& watch) {
    count = ph0::token_sums(at<const float>(tokens), text_stride, token_stride,
                            at<const int64_t>(lengths), B, width, at<double>(sums),
                            at<double>(squares), at<float>(least), at<float>(greatest), threads,
                            reinterpret_cast<ph0::Team>(team), watch);
  });
  return count;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("simd_level", &ph0::simd_level);
  m.def("simd_levels", &ph0::simd_levels);
  m.def("forest_merges", &forest_merges);
  m.def("lines_r_f_float32", &lines_r_f<float>);
  m.def("lines_r_f_float64", &lines_r_f<double>);
  m.def("lines_deaths_float32", &lines_deaths<float>);
  m.def("lines_deaths_float64", &lines_deaths<double>);
  m.def("clouds_h0_float32", &clouds_h0<float>);
  m.def("clouds_h0_float64", &clouds_h0<double>);
  m.def("matrices_h0_float32", &matrices_h0<float>);
  m.def("matrices_h0_float64", &matrices_h0<double>);
  m.def("graph_h0_float32", &graph_h0<float>);
  m.def("graph_h0_float64", &graph_h0<double>);
  m.def("cells_update", &cells_update);
  m.def("cells_merge", &cells_merge);
  m.def("cells_regrid", &cells_regrid);
  m.def("cells_gaps", &cells_gaps);
  m.def("sums_update", &sums_update);
  m.def("sums_add", &sums_add);
  m.def("sums_means", &sums_means);
  m.def("sums_deviations", &sums_deviations);
  m.def("token_sums", &token_sums);
}
