import type { Random } from './random.ts'

export const INSTANCE = 'web-1'
export const DISKS = ['vda', 'vdb'] as const
export type DiskName = (typeof DISKS)[number]

/**
 * A domain that boots nothing: its firmware finds no boot sector, and halts.
 *
 * @param disks the `<disk>` elements
 */
export function domainXml(disks: readonly string[], name: string = INSTANCE): string {
  return `<domain type='qemu'>
  <name>${name}</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <on_poweroff>destroy</on_poweroff>
  <devices>${disks.join('')}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
`
}

/** What a guest does to a disk. */
export type ChangeKind = 'write' | 'zero' | 'discard'

const CHANGES: readonly ChangeKind[] = ['write', 'write', 'zero', 'discard']

/** QEMU ignores what is discarded while an overlay is being merged, as a device may: then it keeps what it held. */
export const CHANGES_WHILE_MERGED: readonly ChangeKind[] = ['write', 'write', 'zero']

/** One change of a disk: a command for `qemu-io`, done to the bytes as well. */
export function randomChange(
  content: Buffer,
  random: Random,
  kinds: readonly ChangeKind[] = CHANGES,
): string {
  const units = content.byteLength / 512
  const start = random.below(units)
  const length = Math.min(1 + random.below(random.oneIn(2) ? 16 : 2500), units - start)
  const [offset, bytes] = [start * 512, length * 512]
  const kind = random.pick(kinds)
  const byte = kind === 'write' ? 1 + random.below(255) : 0
  // What is discarded reads as zeros from whole blocks on only.
  const first = kind === 'discard' ? Math.ceil(offset / 65_536) * 65_536 : offset
  const end = kind === 'discard' ? Math.floor((offset + bytes) / 65_536) * 65_536 : offset + bytes
  if (end <= first) return randomChange(content, random, kinds)
  content.fill(byte, first, end)
  if (kind === 'write') return `write -P ${byte} ${first} ${end - first}`
  return `${kind === 'zero' ? 'write -z' : 'discard'} ${first} ${end - first}`
}
