#!/bin/bash
# Stands in for `ftrain` where a test is about the batch script: it writes down its arguments in the run directory and
# ends as the script's name asks for. docs/clusters.md has the exit codes that it imitates.

if [[ $1 == secret ]]; then
    umask 077
    echo "secret of process $$" >> "$2"
    exit 0
fi

arguments=("$@")
while (($# > 0)); do
    case $1 in
    --run-dir) run_dir=$2 && shift 2 ;;
    --node-rank) node=$2 && shift 2 ;;
    *.py) script=$1 && break ;;
    *) shift ;;
    esac
done

start=0
while ! mkdir "$run_dir/node$node.start$start" 2> /dev/null; do ((start += 1)); done
record=$run_dir/node$node.start$start
printf '%s\0' "${arguments[@]}" > "$record/arguments"

leave() {
    touch "$record/saved"
    exit 75
}

case $script in
begin.py) # told to leave while it still has no handler for it; to the end when started again
    if ((start == 0)); then
        touch "$record/ready"
        while :; do sleep 0.05; done
    fi
    ;;
stay.py) # until told to leave; to the end when started again
    if ((start == 0)); then
        trap leave TERM
        touch "$record/ready"
        while :; do sleep 0.05; done
    fi
    ;;
killed.py) # the second node's launcher is SIGKILLed once
    if ((start == 0 && node == 1)); then kill -KILL $$; fi
    ;;
fail.py) exit 1 ;;
esac
touch "$record/ended"
