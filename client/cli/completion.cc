#include "client/cli/completion.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/spec/nearest_name.h"

namespace itwin::cli {
namespace {

// Fast or nothing: a prompt does not wait for a network.
constexpr char kListJobs[] = "itwin jobs --quiet --limit 100 --timeout 1s 2>/dev/null";

std::string Names(const std::vector<VerbWords>& verbs, bool VerbWords::* which) {
  std::vector<std::string> out;
  for (const VerbWords& verb : verbs) {
    if (verb.*which) out.push_back(verb.name);
  }
  return absl::StrJoin(out, "|");
}

// "  site) compgen add doctor ...": one line per verb with second words.
std::string Parts(const std::vector<VerbWords>& verbs, absl::string_view indent, absl::string_view before, absl::string_view after) {
  std::string out;
  for (const VerbWords& verb : verbs) {
    if (!verb.parts.empty()) absl::StrAppend(&out, indent, verb.name, ") ", before, absl::StrJoin(verb.parts, " "), after, "\n");
  }
  return out;
}

std::string Bash(const std::vector<VerbWords>& verbs, const std::vector<std::string>& global) {
  std::vector<std::string> names;
  for (const VerbWords& verb : verbs) names.push_back(verb.name);
  std::string cases;
  for (const VerbWords& verb : verbs) {
    absl::StrAppend(&cases, "    ", verb.name, ") options=\"", absl::StrJoin(verb.options, " "), "\" ;;\n");
  }
  return absl::StrCat(
      "# bash completion for itwin; use it with: eval \"$(itwin completion bash)\"\n"
      "_itwin() {\n"
      "  local word=${COMP_WORDS[COMP_CWORD]} verb= options= i\n"
      "  for ((i = 1; i < COMP_CWORD; ++i)); do\n"
      "    case ${COMP_WORDS[i]} in\n"
      "      ", absl::StrJoin(names, "|"), ") verb=${COMP_WORDS[i]}; break ;;\n"
      "    esac\n"
      "  done\n"
      "  if [[ ${COMP_WORDS[COMP_CWORD-1]} == --output ]]; then\n"
      "    COMPREPLY=($(compgen -W 'table json' -- \"$word\")); return\n"
      "  fi\n"
      "  case $verb in\n", cases,
      "  esac\n"
      "  if [[ $word == -* ]]; then\n"
      "    COMPREPLY=($(compgen -W \"$options ", absl::StrJoin(global, " "), "\" -- \"$word\")); return\n"
      "  fi\n"
      "  case $verb in\n"
      "    '') COMPREPLY=($(compgen -W '", absl::StrJoin(names, " "), "' -- \"$word\")) ;;\n"
      "    ", Names(verbs, &VerbWords::takes_job), ") COMPREPLY=($(compgen -W \"$(", kListJobs, ")\" -- \"$word\")) ;;\n"
      "    ", Names(verbs, &VerbWords::takes_file), ") COMPREPLY=($(compgen -f -- \"$word\")) ;;\n"
      "    completion) COMPREPLY=($(compgen -W 'bash zsh fish' -- \"$word\")) ;;\n",
      // After the second word: a file, or a site.
      Parts(verbs, "    ", "if [[ ${COMP_WORDS[COMP_CWORD-1]} == add ]]; then COMPREPLY=($(compgen -f -- \"$word\")); else COMPREPLY=($(compgen -W '", "' -- \"$word\")); fi ;;"),
      "  esac\n"
      "}\n"
      "complete -o filenames -F _itwin itwin\n");
}

std::string Quoted(absl::string_view text) { return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'"); }

std::string Zsh(const std::vector<VerbWords>& verbs, const std::vector<std::string>& global) {
  std::string described, cases;
  for (const VerbWords& verb : verbs) {
    absl::StrAppend(&described, "    ", Quoted(absl::StrCat(verb.name, ":", verb.description)), "\n");
    absl::StrAppend(&cases, "    ", verb.name, ") options=(", absl::StrJoin(verb.options, " "), ") ;;\n");
  }
  return absl::StrCat(
      "#compdef itwin\n"
      "# zsh completion for itwin; use it with: eval \"$(itwin completion zsh)\"\n"
      "_itwin() {\n"
      "  local -a verbs options\n"
      "  local verb= i\n"
      "  verbs=(\n", described,
      "  )\n"
      "  for ((i = 2; i < CURRENT; ++i)); do\n"
      "    if [[ -n ${(M)verbs:#${words[i]}:*} ]]; then verb=${words[i]}; break; fi\n"
      "  done\n"
      "  if [[ ${words[CURRENT-1]} == --output ]]; then compadd table json; return; fi\n"
      "  case $verb in\n", cases,
      "  esac\n"
      "  if [[ ${words[CURRENT]} == -* ]]; then compadd -- $options ", absl::StrJoin(global, " "), "; return; fi\n"
      "  case $verb in\n"
      "    '') _describe 'command' verbs ;;\n"
      "    ", Names(verbs, &VerbWords::takes_job), ") compadd -- $(", kListJobs, ") ;;\n"
      "    ", Names(verbs, &VerbWords::takes_file), ") _files ;;\n"
      "    completion) compadd bash zsh fish ;;\n",
      Parts(verbs, "    ", "if [[ ${words[CURRENT-1]} == add ]]; then _files; else compadd ", "; fi ;;"),
      "  esac\n"
      "}\n"
      "(( $+functions[compdef] )) && compdef _itwin itwin\n");
}

std::string Fish(const std::vector<VerbWords>& verbs, const std::vector<std::string>& global) {
  std::string out = "# fish completion for itwin; use it with: itwin completion fish | source\ncomplete -c itwin -f\n";
  for (const VerbWords& verb : verbs) {
    absl::StrAppend(&out, "complete -c itwin -n __fish_use_subcommand -a ", verb.name, " -d ", Quoted(verb.description), "\n");
    const std::string seen = Quoted(absl::StrCat("__fish_seen_subcommand_from ", verb.name));
    for (const std::string& option : verb.options) {
      if (absl::StartsWith(option, "--")) absl::StrAppend(&out, "complete -c itwin -n ", seen, " -l ", option.substr(2), "\n");
    }
    if (verb.takes_job) absl::StrAppend(&out, "complete -c itwin -n ", seen, " -a '(", kListJobs, ")'\n");
    if (!verb.parts.empty()) {
      absl::StrAppend(&out, "complete -c itwin -n ", seen, " -a '", absl::StrJoin(verb.parts, " "), "'\n",
                      "complete -c itwin -n '__fish_seen_subcommand_from add' -F\n");
    }
    if (verb.takes_file) absl::StrAppend(&out, "complete -c itwin -n ", seen, " -F\n");
  }
  for (const std::string& option : global) {
    if (absl::StartsWith(option, "--")) absl::StrAppend(&out, "complete -c itwin -l ", option.substr(2), "\n");
  }
  absl::StrAppend(&out, "complete -c itwin -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'\n");
  return out;
}

}  // namespace

absl::StatusOr<std::string> CompletionScript(absl::string_view shell, const std::vector<VerbWords>& verbs,
                                             const std::vector<std::string>& global_options) {
  if (shell == "bash") return Bash(verbs, global_options);
  if (shell == "zsh") return Zsh(verbs, global_options);
  if (shell == "fish") return Fish(verbs, global_options);
  return absl::InvalidArgumentError(
      absl::StrCat("shell '", shell, "' is unknown; ", UnknownNameHint(shell, {"bash", "zsh", "fish"})));
}

}  // namespace itwin::cli
