#!/usr/bin/env bash
# Whether everything holds on a CUDA GPU, in at most 8 minutes:
#
#     bash tests/gpu.sh [FOLDER]
#
# FOLDER (default: gpu_out) receives block.txt, the figures, which are also printed at the end, and
# a log of every step. A step that fails is reported, the others still run, and the exit code is 1;
# without CUDA it is 2. DEVICE=cpu tries the same steps in tiny sizes.
set -uo pipefail

device=${DEVICE:-cuda}
if [ "$device" = cuda ] && ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null; then
    echo "gpu.sh: no CUDA for the torch of $(command -v python || echo "python, which is not there")"
    exit 2
fi
mkdir -p "${1:-gpu_out}" || exit 1
out=$(cd "${1:-gpu_out}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
failed=0
limit=475  # seconds for all steps together
: > "$out/block.txt"

say() {
    echo "$*" >> "$out/block.txt"
}

step() {  # step NAME COMMAND…: its output goes to NAME.log
    local name=$1 began=$SECONDS left=$((limit - SECONDS)) code
    shift
    echo "$name: $*"
    timeout --kill-after=5 "$((left > 1 ? left : 1))" "$@" > "$out/$name.log" 2>&1
    code=$?
    if [ "$code" -eq 0 ]; then
        say "$name: ok, $((SECONDS - began)) s"
        return 0
    fi
    failed=1
    [ "$code" -ne 124 ] || code="124, out of time"
    say "$name: FAILED, $((SECONDS - began)) s (exit code $code; see $out/$name.log)"
    echo "$name: FAILED (exit code $code)"
    tail -n 5 "$out/$name.log" | sed 's/^/    /' | tee -a "$out/block.txt"
    return 1
}

show() {  # the lines that a step printed, into the block
    sed 's/^/    /' "$out/$1.log" >> "$out/block.txt"
}

# ---- sizes
job=(--algo mocan --device "$device")
train=(--device "$device" --repeat 2 --json)  # with CUDA it adds GPT-2 124M by itself
sample=(--device "$device" --repeat 3 --json --layers 12 --width 768 --heads 12 --prompt 128 --response 128)
quick=(--quick --algo mocan --device "$device" --dtype float32)
if [ "$device" = cpu ]; then
    tiny=(--layers 1 --width 16 --heads 2 --vocab 300 --prompt 4 --response 6 --repeat 1)
    job+=(--quick)
    train+=("${tiny[@]}" --memory_pairs 2 --memory_response 8)
    sample+=("${tiny[@]}" --world_responses 2)
fi

# ---- what runs here
cat > "$out/versions.py" <<'END'
import platform, torch
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"cuda:{i} {p.name}, {p.total_memory / 1e9:.0f} GB")
END
step versions python "$out/versions.py" && show versions

# ---- the tests that need CUDA
step tests python -m pytest -q -rs -p no:cacheprovider tests -k "cuda or input_kinds" &&
    say "    $(tail -n 1 "$out/tests.log")"

# ---- the default job
step job python train.py "${job[@]}" --out "$out/job" &&
    sed -n '/^ .*reward gain/,$p' "$out/job.log" | sed 's/^/    /' >> "$out/block.txt"

# ---- adapters, in the device's own dtype
step adapters python train.py "${quick[@]:0:5}" --lora 8 --out "$out/adapters" &&
    sed -n '/^ .*reward gain/,$p' "$out/adapters.log" | sed 's/^/    /' >> "$out/block.txt"

# ---- GPT-2 124M, random weights
cat > "$out/figures.py" <<'END'
import json, sys
what, path = sys.argv[1:]
figures = json.load(open(path))
peer = {"train": "trl", "sample": "transformers"}[what]
unit = {"train": "pairs", "sample": "tokens"}[what]
cases = figures[what]
largest = max(case["shape"]["n_layer"] for case in cases)
for case in cases:
    shape = case["shape"]
    if shape["n_layer"] < largest:
        continue
    print(f"{shape['n_layer']} layers, width {shape['n_embd']}, vocabulary {shape['vocab']}, {shape['prompt']} + "
          f"{shape['response']} tokens, {case['dtype']}; torch.mm {max(case['mm_flops'].values()) / 1e12:.1f} TFLOP/s")
    for name in ("ours", peer):
        if what == "train" and name in case:
            x = case[name]
            rate, share = x["pairs_per_second"], x["mm_share"]
            memory = x["peak_bytes"]
            more = f", peak memory {memory / 1e9:.2f} GB" if memory is not None else ""
        elif what == "sample" and name in case["tokens_per_second"]:
            rate, share, more = case["tokens_per_second"][name], case["mm_share"][name], ""
        else:
            print(f"    {name}: skipped, not installed")
            continue
        print(f"    {name}: {rate:.1f} {unit}/s, {share:.1%} of the matrix product{more}")
    if "ratio" in case:
        difference = case.get("loss_difference", case.get("logp_difference"))
        print(f"    ratio {case['ratio']:.2f}; largest difference of {'losses' if what == 'train' else 'ln p'} {difference:.1e}")
END
for what in train sample; do
    declare -n sizes=$what
    step "bench_$what" bash -c 'json=$1; shift; python tests/bench.py "$@" > "$json"' - "$out/$what.json" "$what" "${sizes[@]}" &&
        step "figures_$what" python "$out/figures.py" "$what" "$out/$what.json" && show "figures_$what"
done

# ---- two processes on one card
cat > "$out/one_card.py" <<'END'
"""train.py as one of several processes on one card: with gloo, since NCCL refuses a card twice."""
import functools, os, runpy, sys
import torch.distributed as dist
sys.path.insert(0, os.getcwd())
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group = functools.partial(dist.init_process_group, "gloo")
runpy.run_path("train.py", run_name="__main__")
END
cat > "$out/compare.py" <<'END'
import json, sys
one, two = (json.load(open(f"{folder}/results.json"))["policies"]["mocan"] for folder in sys.argv[1:])
agree = abs(two["lam"][0] / one["lam"][0] - 1) < 0.1
print(f"λ* of one process {one['lam'][0]:.3f}, of two {two['lam'][0]:.3f}")
for what, x, y, (low, high) in (
        ("reward gain", one["reward_gain"], two["reward_gain"], one["reward_gain_ci"]),
        ("safety gain", one["constraint_gain"][0], two["constraint_gain"][0], one["constraint_gain_ci"][0]),
        ("KL", one["kl"], two["kl"], one["kl_ci"])):
    agree &= low - 0.05 < y < high + 0.05
    print(f"{what} of one process {x:.3f} [{low:.3f}, {high:.3f}], of two {y:.3f}")
print("they agree" if agree else "they do NOT agree")
sys.exit(not agree)
END
rm -f "$out"/{one,two}/results.json  # of an earlier try
step one_process python train.py "${quick[@]}" --out "$out/one"
step two_processes python -m torch.distributed.run --standalone --nproc-per-node 2 \
    "$out/one_card.py" "${quick[@]}" --out "$out/two"
step compare python "$out/compare.py" "$out/one" "$out/two" && show compare

say "all steps: $SECONDS s, $([ $failed -eq 0 ] && echo "every step ok" || echo "SOME FAILED")"
echo
cat "$out/block.txt"
exit $failed
