# A machine in the emulated machine. Sourced by testbed/cuse and testbed/vduse.
#
# Expects kernel and options (arrays of arguments of testbed/vm), work (a directory of this run), cache (testbed/packages.sh) and die.

# shellcheck shell=bash disable=SC2154,SC2034
# put_guest MODULES SCRIPT [ARG...]: puts the files of a machine that runs SCRIPT in the machine's /guest, and the arguments of its QEMU,
# which has its own files at other paths here.
put_guest() {
    local modules=$1 word image=
    shift
    testbed/vm ${kernel[@]+"${kernel[@]}"} -M 256 -c 1 -m "$modules" -n "$work/guest" "$@"
    mapfile -t command <"$work/guest/command"
    for word in "${command[@]:4}"; do
        case $word in
            */kernel-*/vmlinu*) image=$word word=/guest/image ;;
            "$work/guest"/*) word=/guest/${word##*/} ;;
            file,*) word=file,id=out,path=/guest/out.tar ;;
            "$cache"/*) word=/qemu ;;
        esac
        printf '%s\n' "$word"
    done >"$work/arguments"
    options+=(-M 2048 -f @/usr/share/qemu:/qemu -f @/usr/share/seabios:/qemu
        -f @/usr/bin/qemu-system-x86_64 -f testbed/guest-inner.sh:/guest/inner.sh -f "$image:/guest/image" -f "$work/guest/initrd:/guest/initrd" -f "$work/arguments:/guest/arguments")
}
