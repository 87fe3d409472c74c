#!/usr/bin/env bash
# Everything that wants an accelerator, in one call of under nine minutes:
#     benchmarks/gpu.sh DATA_DIR OUT_DIR
# DATA_DIR holds the prepared real CIFAR-10 at 32 pixels (cifar10/X_tr_32.pth ...); OUT_DIR gets the
# JSON files, the log and the pictures. First correctness against float64, then timings, then a
# short real distillation. The table comes last. PYTHON names the interpreter.
set -uo pipefail
if [ $# -ne 2 ] || [ ! -e "$1/cifar10/X_tr_32.pth" ]; then
    echo "usage: benchmarks/gpu.sh DATA_DIR OUT_DIR; DATA_DIR must hold cifar10/X_tr_32.pth" >&2
    exit 2
fi
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
status=0

step() {  # seconds, name, command...: one that fails is said, the rest goes on
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name failed ($code)"
        status=1
    fi
}

small="--data_dir $data --data_name cifar10 --seed 0 --save_dir $work/teacher_ckpt"
distil="--data_dir $data --data_name cifar10 --img_size 32 --seed 0 --num_images 100
    --target_ckpt $work/teacher_ckpt/barlow_twins_resnet18_cifar10.pt --outer_batch_size 256
    --outer_iteration 1500 --online_iteration 300 --num_models 5 --outer_lr 1e-2 --precision bf16
    --eval_every 99999 --test_iteration 500 --save_dir $work/results --exp_name krr_st"
probe="--source_data_name cifar10 --target_data_name cifar10 --data_dir $data --img_size 32
    --test_model base --method krr_st --protocol probe --label_fraction 0.05 --pre_epoch 200
    --num_test 3 --seed 0 --log_dir $work/log"
step 100 correctness "$python" -m pytest -m gpu -n 0 -p no:cacheprovider tests
step 200 timings "$python" -m benchmarks --device cuda --out "$out/gpu.json"
# shellcheck disable=SC2086
{
    step 90 target "$python" -m krr_st.target $small --epochs 3 --batch_size 512
    step 120 distil "$python" train.py $distil
    step 60 probe "$python" test.py $probe --synthetic_path "$work/results/krr_st"
}
cp "$work"/results/krr_st/{results.json,x_syn.png,loss.png} "$work"/log/results.jsonl "$out" 2>/dev/null
echo
"$python" -m benchmarks.summary "$out"
exit $status
