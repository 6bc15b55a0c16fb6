import { execFileSync } from 'node:child_process'
import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** A folder that is mounted on another one; needs root. */
export interface Unmountable {
  readonly path: string
  /** Mounts it where it is not mounted. */
  mount(): void
  /** Leaves an empty folder. `lazily`: also where it is in use, as when a server goes away. */
  unmount(lazily?: 'lazily'): void
  /** Unmounts and removes it. */
  dispose(): Promise<void>
}

/** Mounts a new folder. A lab that is started later has it mounted in its own name space for good. */
export async function mountNew(): Promise<Unmountable> {
  const parent = await mkdtemp(join(tmpdir(), 'varve-mount-'))
  const [stored, path] = [join(parent, 'stored'), join(parent, 'mounted')]
  for (const folder of [stored, path]) await mkdir(folder)
  let mounted = false
  const folder: Unmountable = {
    path,
    mount() {
      if (!mounted) execFileSync('mount', ['--bind', stored, path])
      mounted = true
    },
    unmount(lazily) {
      execFileSync('umount', [...(lazily ? ['--lazy'] : []), path])
      mounted = false
    },
    async dispose() {
      if (mounted) folder.unmount()
      await rm(parent, { recursive: true })
    },
  }
  folder.mount()
  return folder
}
