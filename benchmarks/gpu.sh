#!/usr/bin/env bash
# Everything that wants an accelerator, in calls of under ten minutes:
#     benchmarks/gpu.sh DATA_DIR OUT_DIR [cuda|cpu] [checks|run|sets]
# DATA_DIR holds the prepared real CIFAR-10 at 32 pixels (cifar10/X_tr_32.pth ...). OUT_DIR gets at most
# eight files: log.txt, JSON that grows while it is measured, pictures. First a target model and, beside it,
# correctness against float64; then a short real distillation, stopped and resumed with graphs, and its probe
# beside that of random images (`run` alone: and that of --recipe best); then the parts of a step and the
# timings, with the device to themselves. The table comes last. `checks` are correctness, parts and timings
# alone, `run` the rest alone. `sets` is for a call of its own: a strong target model; then DC, DM and a study
# of what images are worth, side by side. Results are packed while it runs: a call cut short leaves some.
# PYTHON names the interpreter, TARGET_EPOCHS the epochs of the target model, WORK a folder for sets and
# models, which is kept. kornia and pytest-xdist need not be there.
# With `cpu` the same runs on a CPU at a tiny size and without time limits, to see that it works.
set -uo pipefail
device=${3:-cuda} part=${4:-all}
if [ $# -lt 2 ] || [ ! -e "$1/cifar10/X_tr_32.pth" ] || [[ ! $device/$part =~ ^(cuda|cpu)/(all|checks|run|sets)$ ]]; then
    echo "usage: benchmarks/gpu.sh DATA_DIR OUT_DIR [cuda|cpu] [checks|run|sets]; DATA_DIR must hold cifar10/X_tr_32.pth" >&2
    exit 2
fi
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
python=${PYTHON:-$(command -v python3 || command -v python)}
cd "$(dirname "$0")/.."
work=${WORK:-$(mktemp -d)}
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0
: >"$out/log.txt"

step() {  # seconds, name, command...: one that fails is said, the rest goes on
    local limit=$1 name=$2
    shift 2
    [ "$device" = cpu ] && limit=$((limit * 60))
    echo "== $name: $*" | tee -a "$out/log.txt"
    timeout --kill-after 10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name failed ($code)" | tee -a "$out/log.txt"
        status=1
    fi
    keep
    return "$code"
}

keep() {  # what can be read of the sets so far
    if [ "$part" = sets ]; then
        local packed=$(mktemp -p "$work")
        (cd "$work" && find results study -name '*.json*' -o -name '*.png' -o -name '*.md' -o -name '*.log') 2>/dev/null |
            tar czf "$packed" -C "$work" -T - 2>/dev/null
        mv "$packed" "$out/sets.tar.gz"
    else
        cp "$work"/results/krr_st/{results.json,x_syn.png,loss.png} "$work"/log/results.jsonl "$out" 2>/dev/null
        cp "$work/log_of_best/results.jsonl" "$out/best.jsonl" 2>/dev/null
    fi
}

stop_after_a_save() {  # seconds, file, command...: SIGTERM once the file is there, or the time is over
    local tenths=$(($1 * 10)) file=$2
    shift 2
    "$@" >>"$out/log.txt" 2>&1 &
    local pid=$!
    while [ $((tenths -= 1)) -gt 0 ] && [ ! -e "$file" ] && kill -0 $pid 2>/dev/null; do sleep 0.1; done
    kill -TERM $pid 2>/dev/null
    wait $pid
    echo "== stopped with code $?" | tee -a "$out/log.txt"
}

if [ "$device" = cuda ]; then
    parts=() timings=() arch=resnet18 epochs=${TARGET_EPOCHS:-3} batch=512
    size="--num_images 1000 --outer_batch_size 1024 --outer_iteration 10000 --online_iteration 300
        --num_models 10 --save_every 1000 --print_every 1000 --precision bf16 --pre_iteration 1000"
    matching="--num_eval 5" short="--Iteration 2000 --eval_interval 2000" strong="--epochs 10 --batch_size 512"
    study="--student convnet_64_128_256_bn --pre_iteration 1000 --curve 50 200 1000 --workers 3"
    length_of_best="--outer_iteration 1000 --online_iteration 200 --num_models 3 --precision bf16 --print_every 500"
    images=1000 labels=0.05 network=convnet_128_256_512_bn tests=(-m gpu) pre="--pre_iteration 1000"
else
    parts=(--m 8 --b 8 --dim 16 --size 128 --images 1) timings=(--quick) arch=convnet_8_bn epochs=1 batch=32
    size="--num_images 8 --outer_batch_size 16 --outer_iteration 6 --online_iteration 3
        --num_models 2 --save_every 2 --print_every 2 --pre_epoch 2"
    matching="--num_eval 1 --epoch_eval_train 2 --batch_real 4 --model ConvNetW32" short="--Iteration 2"
    strong="--epochs 1 --batch_size 32"
    study="--student convnet_8_bn --pre_iteration 2 --curve 8 16 --num_images 8 --levers none --fractions 0.5"
    length_of_best="--outer_iteration 3 --views 3 --outer_batch_size 16 --view_batch 8 --num_models 1
        --online_iteration 3 --online_lr 0.01 --pre_iteration 2 --pre_lr 0.001"
    images=8 labels=0.5 network=convnet_8_bn tests=(--collect-only) pre="--pre_epoch 5 --pre_lr 0.001"
fi
on="--data_dir $data --data_name cifar10 --img_size 32 --device $device --seed 0"
target=$work/teacher_ckpt/barlow_twins_${arch}_cifar10.pt
# Filling a table of all views takes longer than this run saves by it.
distil="$on --target_model $arch --target_ckpt $target --train_model $network --target_views online --outer_lr 1e-2
    $size --eval_every 99999 --test_iteration 300 --save_dir $work/results --exp_name krr_st"
best="--recipe best $on --target_model $arch --target_ckpt $target --train_model $network --num_images $images
    $length_of_best --eval_every 99999 --test_iteration 300 --save_dir $work/results --exp_name best"
random="--method random_features --num_images $images --target_model $arch --target_ckpt $target
    --synthetic_data_dir $work/sets"
probe="--source_data_name cifar10 --target_data_name cifar10 --data_dir $data --img_size 32 --device $device
    --test_model $network --protocol probe --label_fraction $labels $pre --num_test 2 --seed 0 --log_dir $work/log"

correctness() {
    step 120 correctness "$python" -m pytest -o addopts= -q -p no:cacheprovider tests/test_gpu.py "${tests[@]}"
}

target() {
    local train="$on --save_dir $work/teacher_ckpt --epochs $epochs --batch_size $batch"
    if "$python" -c "import kornia" 2>/dev/null; then
        step 120 target "$python" -m krr_st.target $train --target_model "$arch" --precision bf16
    else  # a classifier will do for the timings
        step 120 target "$python" -m krr_st.kd_teacher $train --arch "$arch"
        mv "$work/teacher_ckpt/teacher_cifar10.pt" "$target"
    fi
    step 20 random "$python" -m krr_st.baselines $on $random
}

# shellcheck disable=SC2086
run() {
    stop_after_a_save 40 "$work/results/krr_st/state.pt" "$python" train.py $distil
    step 190 distil "$python" train.py $distil
    step 40 probe "$python" test.py $probe --method krr_st --synthetic_path "$work/results/krr_st"
    step 40 probe_of_random "$python" test.py $probe --method random_features --synthetic_data_dir "$work/sets"
    [ "$part" = run ] || return 0
    step 100 best "$python" train.py $best &&
        step 40 probe_of_best "$python" test.py $probe --log_dir "$work/log_of_best" --method krr_st \
            --synthetic_path "$work/results/best"
}

# shellcheck disable=SC2086
sets() {
    local main="methods/DC_DSA_DM/main.py --dataset CIFAR10 --data_path $data --device $device --seed 0 $matching"
    local length=$short
    [ "$device" = cpu ] || length="--eval_interval 1000"
    (while sleep 20 && kill -0 $$ 2>/dev/null; do keep; done) >/dev/null 2>&1 &
    local packing=$! jobs=()
    step 100 strong "$python" -m krr_st.kd_teacher $on --save_dir "$work/teacher_ckpt" --arch "$arch" $strong
    step 400 dc_1 "$python" $main --method DC --ipc 1 $length --save_path "$work/results/dc_1" & jobs+=($!)
    step 400 dm_1 "$python" $main --method DM --ipc 1 $short --save_path "$work/results/dm_1" & jobs+=($!)
    step 400 dm_10 "$python" $main --method DM --ipc 10 $short --save_path "$work/results/dm_10" & jobs+=($!)
    step 400 study "$python" -m krr_st.study --data_dir "$data" --img_size 32 --device "$device" --seeds 1 \
        --network "$arch" --target_ckpt "$work/teacher_ckpt/teacher_cifar10.pt" --levers best \
        --target_scale std --pre_mixup --probe_on both --target_error --shots none --precision bf16 \
        --folder "$work/study" $study
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    kill $packing
    wait $packing
    keep
}

if [ "$part" = checks ]; then
    correctness
elif [ "$part" = sets ]; then
    sets
else
    [ "$part" = run ] || correctness &
    target
    wait $! || status=1
    run
fi
[ "$part" = run ] || [ "$part" = sets ] || {
    step 35 parts "$python" -m benchmarks.parts --device "$device" "${parts[@]}" --out "$out/parts.json"
    step 115 timings "$python" -m benchmarks --device "$device" "${timings[@]}" --out "$out/gpu.json"
}
"$python" -m benchmarks.summary "$out" | tee "$out/summary.md"
exit $status
