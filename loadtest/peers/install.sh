#!/bin/bash
# Installs the peers, each into an environment of its own, and converts models for them; what is there already is kept.
#
#     loadtest/peers/install.sh llamacpp|openvino                      into $PEERS (loadtest/peers/work)
#     loadtest/peers/install.sh convert DIR...                         for those of the two that are installed
#
# llamacpp needs cmake and a C++ compiler and takes a quarter of an hour; openvino takes about 4 GB.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=${PEERS:-$here/work}
LLAMA_CPP_PYTHON=0.3.36 # the package whose source archive has llama.cpp in it: as a registry serves it, with a version
GENAI=2026.4
TORCH=2.13.0

llamacpp() {
    cd "$work"
    local source=llama_cpp_python-$LLAMA_CPP_PYTHON
    [ -d llama.cpp-tools ] || python3 -m venv llama.cpp-tools
    llama.cpp-tools/bin/pip install -qq ninja gguf
    if [ ! -d "$source" ]; then
        llama.cpp-tools/bin/pip download -qq --no-deps --no-binary :all: "llama-cpp-python==$LLAMA_CPP_PYTHON"
        tar xf "$source.tar.gz"
    fi
    # GCC 12 takes the stores before its ldtilecfg for dead ones: where the CPU has AMX, 8-bit products would crash.
    cmake -S "$source/vendor/llama.cpp" -B llama.cpp -G Ninja -DCMAKE_MAKE_PROGRAM="$work/llama.cpp-tools/bin/ninja" \
        -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse" -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    llama.cpp-tools/bin/ninja -C llama.cpp llama-server llama-bench llama-quantize
    echo "llama.cpp is in $work/llama.cpp/bin (LLAMA_BIN)"
}

openvino() {
    cd "$work"
    [ -d openvino ] || python3 -m venv openvino
    # torch, which the export traces with, comes first and is pinned: any build will do, and the CPU's is the smallest.
    openvino/bin/pip install -qq "torch==$TORCH"
    openvino/bin/pip install -qq "torch==$TORCH" "openvino-genai==$GENAI.*" nncf "optimum-intel[openvino]"
    # It came along for pictures, and fails to import beside a torch of another build.
    openvino/bin/pip uninstall -qq -y torchvision
    echo "OpenVINO is in $work/openvino (OPENVINO_PYTHON=$work/openvino/bin/python)"
}

convert() {
    local model
    for model in "$@"; do
        model=$(cd "$model" && pwd)
        if [ -d "$work/llama.cpp-tools" ] && [ ! -f "$model/gguf/bf16.gguf" ]; then
            (cd "$here/../.." && "$work/llama.cpp-tools/bin/python" -m loadtest.peers.convert_gguf "$model")
        fi
        for format in fp16 int8; do
            if [ -d "$work/openvino" ] && [ ! -d "$model/openvino/$format" ]; then
                "$work/openvino/bin/optimum-cli" export openvino -m "$model" --task text-generation-with-past \
                    --weight-format "$format" "$model/openvino/$format"
            fi
        done
    done
}

case "${1:-}" in
    llamacpp | openvino) mkdir -p "$work" && "$1" ;;
    convert) shift && convert "$@" ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
