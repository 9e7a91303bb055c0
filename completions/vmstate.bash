# Bash completion for the commands of vmstate: options from each command's own --help, sockets for GUEST.

_vmstate()
{
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[0]}
    local words
    case $previous in
        --after)
            words='paused running quit' ;;
        -r|--recipient)
            words=$(gpg --batch --list-keys --with-colons 2>/dev/null |
                awk -F: '$1 == "uid" { sub(/.*</, "", $10); sub(/>.*/, "", $10); print $10 }') ;;
        --sign)
            words=$(gpg --batch --list-secret-keys --with-colons 2>/dev/null |
                awk -F: '$1 == "uid" { sub(/.*</, "", $10); sub(/>.*/, "", $10); print $10 }') ;;
        --signer)
            words=$(gpg --batch --list-keys --with-colons 2>/dev/null |
                awk -F: '$1 == "pub" { key = 1 } key && $1 == "fpr" { print $10; key = 0 }') ;;
        --trust)
            words='pgp classic tofu tofu+pgp direct always auto' ;;
        --home)
            COMPREPLY=($(compgen -d -- "$current")); return ;;
        --netns)
            words=$(ls /run/netns 2>/dev/null) ;;
        --on)
            words=$(ls /sys/class/net 2>/dev/null) ;;
        -o|--output|--passphrase-file|--log)
            COMPREPLY=($(compgen -f -- "$current")); return ;;
        *)
            if [[ $current == -* ]]; then
                # What else is said of an option may name those of other commands.
                words=$("$command" --help 2>/dev/null | sed -nE 's/^  (vm-.*|-.*)/ \1/; T; s/(\S)  .*/\1/; p' |
                    grep -oE -- '(^|[ ,])-(-[a-z][a-z-]+|[a-zA-Z0-9])\b' | tr -d ' ,')
            fi ;;
    esac
    if [[ -n $words ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current")); return
    fi
    # GUEST is a socket, FILE a file; after `--` comes a command line of QEMU.
    COMPREPLY=($(compgen -f -- "$current"))
    [[ $command != *vm-announce ]] || COMPREPLY+=($(compgen -W "$(ls /sys/class/net 2>/dev/null)" -- "$current"))
}

complete -o filenames -F _vmstate \
    vm-announce vm-cancel vm-compress vm-cont vm-dump vm-encrypt vm-inspect vm-migrate vm-restore vm-speed vm-status vm-stop vm-verify
