# The machine in the emulated machine, that testbed/inner.sh has put there. Sourced in that machine.

# run_inner DEVICE: runs it with a vhost-vdpa device, until it ends. Leaves its console in /out/console.txt.
run_inner() {
    inner_device=$1
    set --
    while read -r word; do set -- "$@" "$word"; done </guest/arguments
    begun=$(date +%s)
    qemu-system-x86_64 "$@" -object memory-backend-memfd,id=ram,share=on,size=256M -machine memory-backend=ram \
        -device "vhost-vdpa-device-pci,vhostdev=$inner_device" </dev/null >/out/console.txt 2>&1 || true
    echo "$(($(date +%s) - begun)) s"
    tr -d '\r' </out/console.txt | grep -v '^round' | tail -n 20
}
