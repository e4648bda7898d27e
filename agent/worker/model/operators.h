// Which operators a model that was handed over may use: those on the allow-list that this LibTorch
// has, and those that a library of the site registers. A model is a program; this keeps it to
// computing with tensors.
#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace torch::jit {
struct Module;
}

namespace itwin::worker {

// Raised when the list changes.
inline constexpr int kAllowListVersion = 2;

// Loads a shared object that registers operators; they are allowed from then on. Only whoever runs
// the worker can name one, never a job. Throws UserError when it cannot be loaded.
void LoadOperatorLibrary(const std::filesystem::path& path);

// Whether the allow-list (or a library) has the operator, as "aten::add" or "aten::add.Tensor".
bool IsAllowed(const std::string& name);
// Whether this LibTorch has it; "aten::add" is there when any overload is.
bool IsAvailable(const std::string& name);

// Throws UserError, beginning with `field`, that names every operator that is not allowed and every
// one that is not there.
void CheckOperators(const std::set<std::string>& names, const std::string& field);

// Every operator, with its overload, of every function and method that was compiled with the module:
// its own, its submodules', those of classes and free functions, called or not.
std::set<std::string> OperatorsOf(const torch::jit::Module& module);

// {"libtorch": …, "allow_list": …, "libraries": […], "operators": […]}: what is both allowed and
// there, sorted.
nlohmann::json DescribeOperators();

}  // namespace itwin::worker
