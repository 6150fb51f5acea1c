// obce._cuda: addresses, sizes and the stream come in as integers, so no torch or numpy header is
// needed. Contract: ph0_cuda.h. obce/cuda.py is the only caller and checks everything first.
// Imports where there is no GPU and no driver.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ph0_cuda.h"
#include "ph0_cuda_error.h"

// True in the build of the tests, whose grid is emulated on the host: it takes tensors that lie
// there.
#ifndef PH0_EMULATED
#define PH0_EMULATED false
#endif

namespace ph0::cuda {

Device device_limits(int device) {
  Device limits;
  int shared = 0;
  succeed(cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  succeed(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
  limits.shared_memory = shared;
  return limits;
}

}  // namespace ph0::cuda

namespace {

namespace py = pybind11;
namespace cuda = ph0::cuda;

template <class P>
P* at(std::uintptr_t address) {
  return reinterpret_cast<P*>(address);
}

// Makes a device the current one of this thread, and the former one again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cuda::succeed(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device) cuda::succeed(cudaSetDevice(device), "cudaSetDevice");
    changed_ = former_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(former_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

// "" when there is a device to run on, else why not.
std::string why_not() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (error != cudaSuccess && driver == 0) return "there is no NVIDIA driver";
  if (error != cudaSuccess)
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  return devices == 0 ? "the CUDA runtime sees no device" : "";
}

cuda::Number number_of(const std::string& name) {
  if (name == "float32") return cuda::Number::kFloat;
  if (name == "float64") return cuda::Number::kDouble;
  if (name == "float16") return cuda::Number::kHalf;
  if (name == "bfloat16") return cuda::Number::kBfloat16;
  throw std::invalid_argument("no kernel takes " + name + ".");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Kernels of obce on a CUDA device; addresses and streams are integers.";
  m.attr("emulated") = PH0_EMULATED;
  m.def("why_not", &why_not);
  m.def("device_limits", [](int device) {
    const cuda::Device limits = cuda::device_limits(device);
    return py::make_tuple(limits.processors, limits.shared_memory);
  });
  m.def("prim_points", &cuda::prim_points);
  m.def("sorted_values", [](const std::string& number, int device) {
    return cuda::sorted_values(number_of(number), cuda::device_limits(device));
  });

  py::class_<cuda::Lines>(m, "Lines", py::module_local())
      .def(py::init([](std::uintptr_t values, int64_t row_stride, int64_t value_stride, int64_t B,
                       int64_t n, std::uintptr_t lengths) {
        return cuda::Lines{at<const void>(values),    row_stride, value_stride, B, n,
                           at<const int64_t>(lengths)};
      }));
  m.def("lines_workspace",
        [](const cuda::Lines& in, const std::string& number, bool deaths, int device) {
          return cuda::lines_workspace(in, number_of(number), deaths, cuda::device_limits(device));
        });
  m.def("lines_r_f", [](const cuda::Lines& in, const std::string& number, std::uintptr_t out,
                        std::uintptr_t workspace, int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::lines_r_f(in, number_of(number), at<void>(out), at<void>(workspace),
                    cuda::device_limits(device), at<void>(stream));
  });
  m.def("lines_deaths", [](const cuda::Lines& in, const std::string& number, std::uintptr_t deaths,
                           std::uintptr_t workspace, int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::lines_deaths(in, number_of(number), at<void>(deaths), at<void>(workspace),
                       cuda::device_limits(device), at<void>(stream));
  });

  py::class_<cuda::Trees>(m, "Trees", py::module_local())
      .def(py::init([](std::uintptr_t data, int64_t B, int64_t n, int64_t d, std::uintptr_t lengths,
                       bool squared, std::uintptr_t deaths, std::uintptr_t edges) {
        return cuda::Trees{
            at<const void>(data), B, n, d, at<const int64_t>(lengths), squared, at<void>(deaths),
            at<int64_t>(edges)};
      }));
  m.def("prim_workspace", [](const cuda::Trees& in, const std::string& number, int device) {
    return cuda::prim_workspace(in, number_of(number), cuda::device_limits(device));
  });
  m.def("prim", [](const cuda::Trees& in, const std::string& number, std::uintptr_t workspace,
                   int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::prim(in, number_of(number), at<void>(workspace), cuda::device_limits(device),
               at<void>(stream));
  });
  m.def("boruvka_workspace", [](const cuda::Trees& in, const std::string& number) {
    return cuda::boruvka_workspace(in, number_of(number));
  });
  m.def("boruvka_codes", [](const cuda::Trees& in, const std::string& number, std::uintptr_t codes,
                            std::uintptr_t workspace, int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::boruvka_codes(in, number_of(number), at<int64_t>(codes), at<void>(workspace),
                        at<void>(stream));
  });
  m.def("boruvka", [](const cuda::Trees& in, const std::string& number, std::uintptr_t order,
                      std::uintptr_t weights, std::uintptr_t pairs, std::uintptr_t workspace,
                      int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::boruvka(in, number_of(number), at<const int64_t>(order), at<void>(weights),
                  at<int64_t>(pairs), at<void>(workspace), at<void>(stream));
  });
  m.def("boruvka_write", [](const cuda::Trees& in, const std::string& number, std::uintptr_t ranks,
                            std::uintptr_t weights, std::uintptr_t pairs, std::uintptr_t workspace,
                            int device, std::uintptr_t stream) {
    const OnDevice on(device);
    cuda::boruvka_write(in, number_of(number), at<const int64_t>(ranks), at<const void>(weights),
                        at<const int64_t>(pairs), at<void>(workspace), at<void>(stream));
  });
}
