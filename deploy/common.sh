# Shared by the scripts of this folder; sourced, with the repository as working directory.
export LC_ALL=C.UTF-8
# Open MPI refuses root and more ranks than cores unless told; containers and small machines need both.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

script_started=$SECONDS
step() { printf '\n== %s  (%d s)\n' "$*" $((SECONDS - script_started)); }

usage_of() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$1"; }

build_directory() { if [[ "$1" == dev ]]; then echo build; else echo "build-$1"; fi; }

# Headers precompiled and macros of the build folder must not spoil the cache.
prepare_compiler_cache() {
  export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
  export CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-10G}
  # Another clone of the same sources finds the same objects.
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
}

# Runs a noisy command quietly; shows the end of its output when it fails.
run_logged() {
  local what=$1 log
  shift
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    echo "$what failed: $*" >&2
    tail -n 40 "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

# As many jobs as cores, but never more than the memory holds (a LibTorch file takes 1.5 GiB).
build_jobs() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
  ((memory < 1)) && memory=1
  echo $((cores < memory ? cores : memory))
}

# build_targets DIRECTORY TARGET...: ninja with a counter; everything it says when it fails.
build_targets() {
  local directory=$1 log
  shift
  if [[ -t 1 ]]; then
    NINJA_STATUS='   [%f/%t, %e s] ' ninja -C "$directory" -j "$(build_jobs)" "$@"
  else
    log=$(mktemp)
    if ! ninja -C "$directory" -j "$(build_jobs)" "$@" >"$log" 2>&1; then
      echo "the build failed:" >&2
      grep -v '^\[' "$log" | tail -n 60 >&2
      rm -f "$log"
      return 1
    fi
    tail -n 1 "$log"
    rm -f "$log"
  fi
}
