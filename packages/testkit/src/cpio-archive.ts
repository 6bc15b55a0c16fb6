/** One entry of a cpio archive. */
export interface CpioEntry {
  /** Path inside the archive, without a leading slash. */
  readonly path: string
  /** File type and permission bits as in `st_mode`, such as 0o100755 for a program. */
  readonly mode: number
  /** The content of a file, or the target of a symbolic link. */
  readonly data?: Uint8Array
  /** Major and minor number of a device node. */
  readonly device?: readonly [major: number, minor: number]
}

const trailer: CpioEntry = { path: 'TRAILER!!!', mode: 0 }

/**
 * A cpio archive in the "newc" format, which the Linux kernel unpacks as its initramfs
 * (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel).
 */
export function cpioArchive(entries: readonly CpioEntry[]): Buffer {
  const parts: Uint8Array[] = []
  for (const [index, entry] of [...entries, trailer].entries()) {
    const name = Buffer.from(`${entry.path}\0`)
    const data = entry.data ?? new Uint8Array()
    const [major, minor] = entry.device ?? [0, 0]
    // inode, mode, uid, gid, nlink, mtime, size, dev major/minor, rdev major/minor, name length, checksum
    const fields = [index + 1, entry.mode, 0, 0, 1, 0, data.length, 0, 0, major, minor, name.length, 0]
    const header = `070701${fields.map(field => field.toString(16).padStart(8, '0')).join('')}`
    parts.push(Buffer.from(header), name, padding(header.length + name.length), data, padding(data.length))
  }
  return Buffer.concat(parts)
}

function padding(length: number): Uint8Array {
  return new Uint8Array(-length & 3)
}
