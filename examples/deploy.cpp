// Classify a picture with what `shiftadd3d export --formats so` wrote, in C++: ./deploy DIR/so photo.ppm
//
// Headers and library come with apache-tvm-ffi; on the machine that it runs on, libtvm_ffi.so of the folder is enough:
//   g++ -std=c++17 deploy.cpp $(tvm-ffi-config --cxxflags --ldflags --libs) -ldl -o deploy
// The picture is a binary PPM of the classifier's size, such as ImageMagick makes:
//   convert photo.jpg -auto-orient -resize 248x248^ -gravity center -extent 224x224 photo.ppm
#include <dlfcn.h>
#include <sys/syscall.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>

namespace ffi = tvm::ffi;

struct Memory {
  void AllocData(DLTensor* tensor) { tensor->data = std::malloc(ffi::GetDataSize(*tensor)); }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

std::string contents(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  auto about = ffi::json::Parse(contents(folder + "/executable.json")).cast<ffi::json::Object>();
  std::istringstream cpu(contents("/proc/cpuinfo"));
  std::vector<std::string> found{std::istream_iterator<std::string>(cpu), {}};
  for (const auto& needed : about["cpu"].cast<ffi::Array<ffi::String>>())
    if (std::find(found.begin(), found.end(), std::string(needed)) == found.end())
      return std::fprintf(stderr, "this CPU lacks %s\n", needed.c_str()), 1;
    else if (std::string(needed) == "amx_tile")  // Linux hands out AMX's registers on request only
      syscall(SYS_arch_prctl, 0x1023, 18);

  auto classifier = about["classifier"].cast<ffi::json::Object>();
  auto seen = classifier["input"].cast<ffi::json::Object>();
  auto mean = seen["mean"].cast<ffi::Array<double>>(), deviation = seen["std"].cast<ffi::Array<double>>();
  const int64_t size = seen["size"].cast<int64_t>(), pixels = size * size;
  const std::string picture = contents(arguments[2]);
  const auto* colors = reinterpret_cast<const unsigned char*>(picture.data() + picture.size() - 3 * pixels);
  auto images = ffi::Tensor::FromNDAlloc(Memory(), {1, 3, size, size}, {kDLFloat, 32, 1}, {kDLCPU, 0});
  for (int64_t i = 0; i < 3 * pixels; ++i)
    static_cast<float*>(images.data_ptr())[i % 3 * pixels + i / 3] = (colors[i] / 255.0 - mean[i % 3]) / deviation[i % 3];

  // The runtime, the weights, and the programs: the second one is for activations that the first cannot express.
  if (!dlopen((folder + "/libtvm_runtime.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) return std::puts(dlerror()), 1;
  ffi::Function::GetGlobalRequired("vm.builtin.tensor_cache.load")(folder, 1, 0);
  auto weights = ffi::Function::GetGlobalRequired("vm.builtin.param_array_from_cache")("param", -1);
  auto control = ffi::Tensor::FromNDAlloc(Memory(), {2}, {kDLInt, 32, 1}, {kDLCPU, 0});
  auto* flag = static_cast<int32_t*>(control.data_ptr());
  for (const auto& name : about["programs"].cast<ffi::Array<ffi::String>>()) {
    auto library = ffi::Module::LoadFromFile(folder + "/" + std::string(name));
    auto machine = library->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    machine->GetFunction("vm_initialization").value()(1, 0, 2);  // a CPU, with a pool of memory
    flag[0] = 0, flag[1] = std::thread::hardware_concurrency();
    auto logits = machine->GetFunction("main").value()(images, control, weights).cast<ffi::Tensor>();
    if (flag[0]) continue;
    auto* first = static_cast<float*>(logits.data_ptr());
    const auto best = std::max_element(first, first + logits.shape()[1]) - first;
    std::printf("%s %.4f\n", classifier["classes"].cast<ffi::Array<ffi::String>>()[best].c_str(), first[best]);
    break;
  }
}
