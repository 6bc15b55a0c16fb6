import { chmod, writeFile } from 'node:fs/promises'

/**
 * A QEMU whose raw images have the node of their file, device or network image alone, as libvirt gives them from 10.1 on
 * where QEMU is 9.0 or newer: without a node of the `raw` driver on top. It takes the command line of an older libvirt, and
 * lets the lower node have the name of the upper one, by which libvirt knows the disk.
 */
const program = String.raw`#!/bin/bash
raw='^\{"node-name":"libvirt-([0-9]+)-format",.*"driver":"raw","file":"libvirt-[0-9]+-storage"\}$'
bare=()
for arg in "$@"; do [[ $arg =~ $raw ]] && bare+=("\${BASH_REMATCH[1]}"); done
args=()
for arg in "$@"; do
  if [[ $arg =~ $raw ]]; then
    unset 'args[-1]' # its -blockdev
    continue
  fi
  for n in "\${bare[@]}"; do arg=\${arg/"\"node-name\":\"libvirt-$n-storage\""/"\"node-name\":\"libvirt-$n-format\""}; done
  args+=("$arg")
done
exec qemu-system-x86_64 "\${args[@]}"
`.replaceAll('\\$', '$')

/** Writes the program to a file. */
export async function writeBareRawQemu(path: string): Promise<void> {
  await writeFile(path, program)
  await chmod(path, 0o755)
}
