import { execFileSync } from 'node:child_process'
import { mkdtemp, rmdir } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** A small file system of its own; needs root. Whoever mounts it unmounts it. */
export interface Tmpfs {
  /** Where it is mounted. */
  readonly path: string
  /** Mounts it again with other options, such as `ro`. */
  remount(options: string): void
  /** Unmounts it, which leaves an empty folder. */
  unmount(): void
  /** Unmounts it where it is still mounted, and removes the folder. */
  dispose(): Promise<void>
}

/** Mounts a tmpfs with options such as `size=8m`. */
export async function mountTmpfs(options: string): Promise<Tmpfs> {
  const path = await mkdtemp(join(tmpdir(), 'varve-tmpfs-'))
  execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'tmpfs', path])
  let mounted = true
  const unmount = () => {
    if (mounted) execFileSync('umount', [path])
    mounted = false
  }
  return {
    path,
    remount: options => execFileSync('mount', ['-o', `remount,${options}`, path]),
    unmount,
    async dispose() {
      unmount()
      await rmdir(path)
    },
  }
}
