# Completion of vdpactl for bash: its grammar, and the names of devices and management devices, which the daemon is asked for.

_vdpactl_names() {
    # "name: ..." at the beginning of a line; nothing without a daemon.
    vdpactl "$@" 2>/dev/null | sed -n 's/^\([^ ]*\): .*/\1/p'
}

_vdpactl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    # The object and its command, without options.
    local words=() each
    for each in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $each == -* ]] || words+=("$each")
    done
    local object=${words[0]-} command=${words[1]-} choices=
    case $object in
        '') choices='mgmtdev dev update daemon config cdi top monitor doctor demo bench help' ;;
        mgmtdev)
            case $command in
                '') choices='show help' ;;
                show) choices=$(_vdpactl_names mgmtdev show) ;;
            esac
            ;;
        dev)
            case $command in
                '') choices='show add set del config vstats help' ;;
                show | del) choices=$(_vdpactl_names dev show) ;;
                config | vstats)
                    case ${words[2]-} in
                        '') choices=show ;;
                        *) choices=$(_vdpactl_names dev show) ;;
                    esac
                    ;;
                set)
                    case $before in
                        name) choices=$(_vdpactl_names dev show) ;;
                        link) choices='up down' ;;
                        size) choices=auto ;;
                        iops | bps) choices=none ;;
                        *) choices='name mac link size iops bps burst' ;;
                    esac
                    ;;
                add)
                    case $before in
                        mgmtdev) choices=$(_vdpactl_names mgmtdev show) ;;
                        path | device_file)
                            mapfile -t COMPREPLY < <(compgen -f -- "$word")
                            return
                            ;;
                        readonly | shared | direct | pin | packed | in_order) choices='on off' ;;
                        format) choices=raw ;;
                        worker) choices='shared own' ;;
                        front) choices=vduse ;;
                        bind) choices='virtio vhost none' ;;
                        *) choices='name mgmtdev path format readonly shared direct pin packed in_order queues queue_size
                            serial iops bps burst memlock max_iotlb_entries cpus worker device_file handover front bind mac mtu
                            max_vqp device_features persistent' ;;
                    esac
                    ;;
            esac
            ;;
        update)
            case $command in
                '') choices='show help' ;;
                show) choices=$(_vdpactl_names dev show) ;;
            esac
            ;;
        daemon) [[ $command ]] || choices='show upgrade help' ;;
        config) [[ $command ]] || choices='check diff save reload help' ;;
        cdi)
            case $before in
                -o | --output | --container-dir)
                    mapfile -t COMPREPLY < <(compgen -f -- "$word")
                    return
                    ;;
            esac
            [[ $command ]] || choices='generate help'
            ;;
        bench) [[ $command ]] || choices='io update' ;;
    esac
    if [[ $word == -* ]]; then
        choices='--json --pretty --statistics --no-nice-names --socket --version --help'
        [[ $object == dev ]] && choices+=' --force'
        [[ $object == daemon ]] && choices+=' --binary --dry-run'
        [[ $object == cdi ]] && choices+=' --output --container-dir'
        [[ $object == top || $object == monitor ]] && choices+=' --delay --count'
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}

complete -F _vdpactl vdpactl
