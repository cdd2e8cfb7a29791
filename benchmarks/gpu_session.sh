#!/usr/bin/env bash
# The training benchmark on one or two GPUs, the most telling runs first, each within eight minutes.
#
#     bash benchmarks/gpu_session.sh one|two [DIRECTORY] [SETTINGS OF STRETTO]
#     bash benchmarks/gpu_session.sh two out "--bucket-mb 256"
#
# Every run saves its JSON after each turn, so a session that is cut leaves what was measured. A run that fails or
# takes too long is said to, and the next one begins. PYTHON names the interpreter, PEERS adds to the peers.
set -u
cd "$(dirname "$0")/.."
devices=${1:?one or two}
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

case $devices in
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
    run D4-tp --shape D4 --parallel tp --peers "$peers" --ceiling-seconds 0.3
    run D4-pp --shape D4 --parallel pp --peers "$peers" --ceiling-seconds 0.3
    run D4-fsdp --shape D4 --parallel dp --peers stretto,torch-fsdp --ceiling-seconds 0.3
    ;;
*)
    echo "one or two, not $devices" >&2
    exit 2
    ;;
esac
"$python" -m benchmarks.train.report "$out"/*.json
