import type { Content } from './proving-ground.ts'

/** Rejects where a disk is lost, or is not what it must be, with the first byte that differs. */
export function expectContent(what: string, found: Content, wanted: Content): void {
  const lost = Object.keys(wanted).filter(disk => !(disk in found))
  if (lost.length > 0) throw new Error(`${what}: ${lost.join(' and ')} is not there`)
  for (const [disk, bytes] of Object.entries(found)) {
    const right = wanted[disk]
    if (!right) throw new Error(`${what}: nobody knows ${disk}`)
    if (bytes.equals(right)) continue
    const at = bytes.findIndex((byte, index) => byte !== right[index])
    throw new Error(
      `${what}: ${disk} differs first at ${at}: ${bytes[at]} and not ${right[at]} (${bytes.length} bytes)`,
    )
  }
}
