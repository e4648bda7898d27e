// Reads a TorchScript file without running any of it. torch::jit::load runs code of the file while
// it reads: every __setstate__, and the expressions that are default arguments or constants of a
// class. Here each source is parsed and looked at before the compiler sees it, and objects are put
// together from their attributes alone.
#pragma once

#include <memory>
#include <string>

namespace caffe2::serialize {
class ReadAdapterInterface;
}
namespace torch::jit {
struct Module;
}

namespace itwin::worker {

// The module; its compilation unit holds every function and method that it or its attributes can
// call, compiled and not yet run. Throws UserError, beginning with `field`, for what would have
// run; what LibTorch throws for a file that is no TorchScript.
torch::jit::Module ImportTorchScript(std::shared_ptr<caffe2::serialize::ReadAdapterInterface> file,
                                     const std::string& field);

}  // namespace itwin::worker
