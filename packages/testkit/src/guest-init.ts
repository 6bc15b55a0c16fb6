/** The virtio-serial port over which the host sends commands to the guest. */
export const commandPortName = 'varve.command'

/** The virtio-serial port of QEMU's guest agent; the name is the one that libvirt looks for. */
export const agentPortName = 'org.qemu.guest_agent.0'

/** A word of the kernel's command line: the guest is to start the agent. */
export const agentFlag = 'varve.agent'

/**
 * The first program of the lab's guest: a busybox shell script that loads the modules, starts the guest agent
 * where its port is there, powers off at the press of the ACPI button, and serves commands from the host.
 *
 * The protocol is made of lines over the virtio-serial port {@link commandPortName}. The host sends
 * `run ID COMMAND` or `kill ID`, the guest answers each `run` with `done ID EXITCODE o:STDOUT e:STDERR`;
 * COMMAND, STDOUT and STDERR in base64. Commands run side by side, each in a process group of its own.
 */
export const guestInit: string = `#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
while read -r module; do insmod "$module"; done < /lib/guest-modules

mkdir -p /dev/virtio-ports /mnt
mkfifo /run/done
exec 4<>/run/done

port() {
  for folder in /sys/class/virtio-ports/*; do
    read -r name < "$folder/name" && [ "$name" = "$1" ] && echo "\${folder##*/}" && return
  done 2> /dev/null
  return 1
}

# The ports appear after the module is loaded, by messages that the host sends.
wait_for_port() {
  for attempt in $(seq 1000); do
    port "$1" && return
    usleep 10000
  done
  return 1
}

start_agent() {
  device=$(wait_for_port ${agentPortName}) || return
  ln -sf "/dev/$device" /dev/virtio-ports/${agentPortName}
  exec /usr/sbin/qemu-ga -m virtio-serial -p /dev/virtio-ports/${agentPortName} -t /run
}

run() {
  base64 -d > "/run/$1.sh" <<BASE64
$2
BASE64
  setsid sh "/run/$1.sh" > "/run/$1.out" 2> "/run/$1.err" < /dev/null 3>&- 4>&- &
  echo $! > "/run/$1.pid"
  wait $!
  echo "$1 $?" >&4
}

reply() {
  while read -r id code; do
    printf 'done %s %s o:%s e:%s\\n' "$id" "$code" "$(base64 "/run/$id.out" | tr -d '\\n')" "$(base64 "/run/$id.err" | tr -d '\\n')" >&3
    rm -f "/run/$id".*
  done <&4
}

grep -q ${agentFlag} /proc/cmdline && start_agent &
# Opened here: a button pressed once the guest takes commands is never missed.
for event in /dev/input/event*; do
  exec 5< "$event"
  (head -c 24 <&5 > /dev/null && exec /sbin/shutdown) &
done
exec 5<&-

exec 3<>"/dev/$(wait_for_port ${commandPortName})"
reply &
while :; do
  if read -r verb id command <&3; then
    case "$verb" in
      run) run "$id" "$command" & ;;
      kill) kill -KILL -- "-$(cat "/run/$id.pid")" ;;
    esac
  else
    usleep 50000 # nobody is connected on the host's side
  fi
done
`

/**
 * `shutdown` of the guest, also called by the agent on a `guest-shutdown`: flush, unmount, power off.
 * Its arguments are ignored.
 */
export const guestShutdown = `#!/bin/sh
sync
umount -a -t ext4,ext2 2>/dev/null
sync
exec poweroff -f
`

/**
 * Writes marked blocks to a device, some in a second, until \`/run/NAME.stop\` is there:
 * \`writer NAME DEVICE FIRST_BLOCK BLOCKS\`. A write is logged when the device has flushed it.
 */
export const guestWriter = `#!/bin/sh
number=0
while [ ! -e "/run/$1.stop" ]; do
  number=$((number + 1))
  block=$(($3 + (RANDOM * 32768 + RANDOM) % $4))
  yes "writer $1 write $number block $block" | head -c 65536 |
    dd of="$2" bs=65536 count=1 seek=$block iflag=fullblock conv=notrunc,fsync 2>/run/$1.error ||
    { cat "/run/$1.error" >&2; exit 1; }
  echo "$number $block" >> "/run/$1.log"
  usleep 150000 # leaves the host's processor to others
done
`
