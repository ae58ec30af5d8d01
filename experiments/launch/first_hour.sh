#!/bin/bash
# What to run first on a rented accelerator, in slices of ten minutes at most.
#
#   experiments/launch/first_hour.sh                  all slices, in turn
#   experiments/launch/first_hour.sh tests profile    only these
#   experiments/launch/first_hour.sh --list           name them
#   SCALE=smoke experiments/launch/first_hour.sh      a rehearsal on a CPU
#
# A slice that is done is skipped, and one that was cut off goes on, so the same
# command continues where it was stopped. The exit code is 1 if a slice failed,
# after all others have run. docs/first_hour.md says what to expect.
#
# The environment may set
#   PYTHON  the Python of this package's environment        (python)
#   TORCH   a Python that has PyTorch, to compare with       (the same)
#   DATA    the folder of prepared TFDS sets, with cifar100  (that of TFDS)
#   OUT     where everything goes                  (runs/first_hour_SCALE)
#   SECONDS_OF_A_SLICE                                       (600)
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

PYTHON=${PYTHON:-python} TORCH=${TORCH:-$PYTHON} DATA=${DATA:-}
SCALE=${SCALE:-paper} LIMIT=${SECONDS_OF_A_SLICE:-600}
OUT=${OUT:-runs/first_hour_$SCALE}
ALL=(tests rounds bench_float32 bench_tensorfloat32 bench_bfloat16 torch_float32
  torch_tensorfloat32 torch_bfloat16 profile resist local_sgd)

refuse() {
  echo "error: $1" >&2
  exit 2
}

say() { echo "$1" | tee -a "$OUT/summary.txt"; }

case $SCALE in
  paper) # All the device can do; JAX chooses it.
    export JAX_PLATFORMS=${JAX_PLATFORMS-}
    network=(--network=paper --workers=4 --batch_size=128 --steps=20)
    rounds=(--local_steps=50) peer=(--compile --runs=1) only=
    ;;
  smoke) # The same commands on CPUs, as small as they go.
    export JAX_PLATFORMS=cpu REHEARSE=1
    network=(--network=digits --workers=2 --batch_size=8 --repeats=1)
    rounds=(--local_steps=2) peer=(--workers=22 --batch_size=2 --runs=1)
    only='masked_psum, float64 highest, one program'
    ;;
  *) refuse "SCALE is '$SCALE'; use paper or smoke." ;;
esac
command -v timeout >/dev/null ||
  refuse 'the command `timeout` is missing: install GNU coreutils.'
[[ $LIMIT =~ ^[1-9][0-9]*$ ]] ||
  refuse "SECONDS_OF_A_SLICE is '$LIMIT'; use a whole number, such as 600."

# Sets what a slice is about, its command, and where its result lies.
describe() {
  local precision=${1#*_} dtype=float32 form=()
  [ "$precision" = bfloat16 ] && dtype=bfloat16
  [ "$precision" = float32 ] && form=(--precision=highest)
  [ "$precision" = tensorfloat32 ] && form=(--precision=tensorfloat32)
  form+=("--dtype=$dtype")
  result=$OUT/$1.json
  case $1 in
    tests)
      about='the tests that need an accelerator'
      command=(-m pytest -q -m accelerator tests/rounds/test_accelerator.py)
      result=$OUT/$1.log
      ;;
    rounds)
      about='rounds in every protocol and precision beside a CPU in float64'
      command=(-m experiments.accelerator "--only=$only" "--timeout=$LIMIT")
      ;;
    bench_*)
      about="the parts of a round in $precision"
      command=(-m experiments.bench "${network[@]}" "${rounds[@]}" "${form[@]}")
      ;;
    torch_*)
      about="a step in $precision beside PyTorch's"
      command=(-m experiments.torch_peer "--torch=$TORCH" "${network[@]:1}")
      command+=("${peer[@]}" "${form[@]}")
      ;;
    profile)
      about='a round as the profiler of JAX sees it'
      command=(-m experiments.bench "${network[@]}" "${rounds[@]}")
      command+=(--dtype=bfloat16 --repeats=1)
      command+=("--profile=$OUT/profile" "--out=$OUT/profile.json")
      result=$OUT/profile
      ;;
    resist | local_sgd)
      about="CIFAR-100 on four workers in bfloat16 by $1"
      command=(-m experiments.table2 "--scale=$SCALE" --dtype=bfloat16)
      command+=("--only=cifar100_$1_s4" "--data_dir=$DATA")
      command+=("--runs=$OUT/runs" "--results=$OUT/results")
      result=$OUT/results/table2/$SCALE
      ;;
    *) refuse "there is no slice '$1'; the slices are ${ALL[*]}." ;;
  esac
  [[ $result = *.json ]] && command+=("--out=$result")
}

# Says why a slice cannot run here; nothing if it can.
missing() {
  local code='import torch'
  [ "$SCALE" = smoke ] || code+='; torch.cuda.current_device()'
  [[ $1 != torch_* ]] || "$TORCH" -c "$code" 2>/dev/null ||
    echo "$TORCH has no PyTorch for this device; name one that has as TORCH=..."
}

child='' stopped=''
stop() {
  stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT HUP

# Runs a command for a slice at most; it gets a tenth of that to save and end.
limited() {
  local grace=$(((LIMIT + 9) / 10))
  timeout "--kill-after=$grace" $((LIMIT - grace + (LIMIT == grace))) "$@" &
  child=$!
  wait "$child"
  local code=$?
  # A signal to this script ends the wait before the command has saved.
  while [ -n "$stopped" ] && kill -0 "$child" 2>/dev/null; do wait "$child"; done
  child=''
  return "$code"
}

# Runs a slice, again where it was cut off; returns 1 if it is not done.
slice() {
  local name=$1 log=$OUT/$1.log began code why spent=0 turn
  if [ -e "$OUT/$name.done" ]; then
    say "$name: done before, in $(<"$OUT/$name.done") s; see $result"
    return 0
  fi
  why=$(missing "$name")
  if [ -n "$why" ]; then
    say "$name: skipped, because $why"
    return 0
  fi
  [ ! -e "$OUT/$name.spent" ] || spent=$(<"$OUT/$name.spent")
  for turn in 1 2 3 4 5 6; do
    echo "$name: $about ..."
    began=$SECONDS
    limited "$PYTHON" "${command[@]}" >>"$log" 2>&1
    code=$?
    spent=$((spent + SECONDS - began))
    echo "$spent" >"$OUT/$name.spent"
    if [ -n "$stopped" ]; then
      say "$name: stopped after $spent s; the same command goes on"
      return 1
    fi
    case $code in
      0)
        mv "$OUT/$name.spent" "$OUT/$name.done"
        say "$name: done in $spent s; see $result"
        return 0
        ;;
      124 | 137) say "$name: cut off after $spent s, slice $turn; it goes on" ;;
      *)
        say "$name: FAILED with exit code $code after $spent s; see $log:"
        tail -n 3 "$log" | cut -c1-300
        return 1
        ;;
    esac
  done
  say "$name: FAILED, not done after $spent s; see $log"
  return 1
}

names=("${@:-${ALL[@]}}")
if [ "${1-}" = --list ]; then names=("${ALL[@]}"); fi
for name in "${names[@]}"; do
  describe "$name"
  [ "${1-}" != --list ] || printf '%-21s%s\n' "$name" "$about"
done
[ "${1-}" != --list ] || exit 0

# One line of what is here, before an hour is paid for.
here=$("$PYTHON" -c "
import jax
found = jax.devices()
print(len(found), found[0].platform, found[0].device_kind, 'JAX', jax.__version__)
") || refuse "$PYTHON cannot import JAX; PYTHON=... names another Python."
[[ $SCALE = smoke || $here != *' cpu '* ]] ||
  refuse "JAX sees no accelerator here ($here); SCALE=smoke rehearses on a CPU."
mkdir -p "$OUT" || refuse "OUT is '$OUT', where no folder can be made."
# What one slice compiled, the next ones find; benches compile. On CPUs, programs with several
# devices may hang when JAX loads them.
if [ "$SCALE" = smoke ]; then
  unset JAX_COMPILATION_CACHE_DIR
else
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled}
fi
say "$(date -u +%FT%TZ) $SCALE scale on $here"
failed=0
for name in "${names[@]}"; do
  describe "$name"
  slice "$name" || failed=1
  [ -z "$stopped" ] || exit 143
done
say "all results: $OUT"
exit "$failed"
