// Runs the model that export.py compiled, in a process without Python: see Makefile.
//
//   main model.pt2 sample.pt lstm_ext/native/_ops.so
//
// sample.pt holds x, h, c and the results that Python computed from them: scores, h, c. The program passes the
// sequences to the model in two parts, as they would arrive from a sensor, and carries the state from one to the next.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " model.pt2 sample.pt lstm_ext/native/_ops.so\n";
    return 2;
  }
  // The operators of lstm_ext register themselves when their library is loaded. That has to come before the model.
  if (dlopen(argv[3], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> sample;
  for (const c10::IValue& value : list.toListRef()) sample.push_back(value.toTensor());
  const at::Tensor &x = sample[0], &h = sample[1], &c = sample[2];

  const int64_t cut = x.size(1) / 3;
  const auto first = model.run({x.narrow(1, 0, cut).contiguous(), h, c});
  const auto second = model.run({x.narrow(1, cut, x.size(1) - cut).contiguous(), first[1], first[2]});

  const auto difference = [](const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); };
  const double worst = std::max({difference(at::cat({first[0], second[0]}, 1), sample[3]),
                                 difference(second[1], sample[4]), difference(second[2], sample[5])});
  std::cout << "scores " << sample[3].sizes() << ", largest difference from Python: " << worst << "\n";
  return worst < 1e-5 ? 0 : 1;
}
