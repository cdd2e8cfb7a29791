#!/usr/bin/env bash
# The training benchmark on one or two GPUs, the most telling runs first, each within eight minutes; or, on two, whether
# what makes a run fast there leaves the model as it is: the tests of GPUs, and `verify` over every fast path.
#
#     bash benchmarks/gpu_session.sh one|two|check [DIRECTORY] [SETTINGS OF STRETTO]
#     bash benchmarks/gpu_session.sh two out "--bucket-mb 256"
#
# Every run saves its JSON after each turn, so a session that is cut leaves what was measured. A run that fails or
# takes too long is said to, and the next one begins. PYTHON names the interpreter, PEERS adds to the peers.
set -u
cd "$(dirname "$0")/.."
devices=${1:?one, two or check}
out=${2:-benchmarks/results/gpu}
words=${3:-}
python=${PYTHON:-python3}
peers=stretto,torch${PEERS:+,$PEERS}
mkdir -p "$out"

run() {
    local name=$1
    shift
    echo "== $(date +%T) $name: $*"
    timeout --kill-after=10 480 "$python" -m benchmarks.train "$@" --stretto "$words" --out "$out/$name.json"
    echo "== $(date +%T) $name ended with $?"
}

# Large enough that messages go through copy engines, small enough for minutes.
sizes="--hidden 256 --heads 4 --kv-heads 2 --ffn 768 --layers 2 --vocab 1000 --seq-len 1024 --micro-batch 2"
sizes="$sizes --global-batch 4 --device cuda --nproc 2 --tp 1 --pp 1 --no-sequence-parallel"

verify() {
    local log
    log="$out/verify$(tr -d ' ' <<<"$*").txt"
    # shellcheck disable=SC2086  # words
    timeout --kill-after=10 300 "$python" -m stretto verify $sizes $words "$@" >"$log" 2>&1 ||
        echo "$*" >>"$out/failed.txt"
    echo "$*: $(grep -E 'EQUAL|DIFFERENT|rror' "$log" | tail -n 1)"
}

case $devices in
check)
    # Of the packages for development it takes pytest, pytest-timeout and hypothesis.
    : >"$out/failed.txt"
    { "$python" -m pytest -q -m gpu --continue-on-collection-errors || echo tests >>"$out/failed.txt"; } \
        >"$out/tests.txt" 2>&1 &
    for dtype in fp32 bf16; do
        verify --dtype $dtype --dp 2 &
        verify --dtype $dtype --pp 2 &
        verify --dtype $dtype --tp 2 &
        verify --dtype $dtype --tp 2 --sequence-parallel &
        verify --dtype $dtype --tp 2 --sequence-parallel --recompute selective &
        wait # the tests, too, before bf16
    done
    verify --dtype bf16 --tp 2 --sequence-parallel --fp8 tensorwise &
    verify --dtype bf16 --tp 2 --sequence-parallel --fp8 rowwise &
    verify --dtype bf16 --tp 2 --sequence-parallel --attention flash4 &
    wait
    tail -n 40 "$out/tests.txt"
    ! grep --with-filename . "$out/failed.txt"
    exit
    ;;
one)
    run D1 --shape D1 --peers "$peers"
    run D2 --shape D2 --peers "$peers" --traces "$out"
    # D1 again with its traces: also tells how far two runs of the same lie apart.
    run D1-again --shape D1 --peers "$peers" --traces "$out" --ceiling-seconds 0.3
    # A step takes almost four seconds.
    run D3 --shape D3 --peers "$peers" --warmup 5 --ceiling-seconds 0.3
    ;;
two)
    # The ceiling is that of one device alone, the same for all; the bubble is added to it for pp.
    run D4-dp --shape D4 --parallel dp --peers "$peers,torch-zero1" --ceiling-seconds 0.3
    run D4-tp --shape D4 --parallel tp --peers "$peers,torch-async-tp" --ceiling-seconds 0.3
    run D4-pp --shape D4 --parallel pp --peers "$peers" --ceiling-seconds 0.3
    run D4-fsdp --shape D4 --parallel dp --peers stretto,torch-fsdp --ceiling-seconds 0.3
    ;;
*)
    echo "one, two or check, not $devices" >&2
    exit 2
    ;;
esac
"$python" -m benchmarks.train.report "$out"/*.json
