import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type Server } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { isVarveError, VarveError } from './errors.ts'
import type { DiskPlace } from './host.ts'

/** How often a lock is tried that is waited for, in milliseconds. */
const RETRY_INTERVAL_MS = 20
/** How long such a lock is waited for, in milliseconds: longer than a few small files are written on any machine. */
const WAIT_MS = 30_000

/** What a run holds beside its disks as long as its process lives, since others may hold those after it died. No path is called so. */
export function runLock(id: string): string {
  return `run ${id}`
}

/**
 * Holds disks against every other run on this machine, whatever its state folder. The lock is a Unix socket
 * in Linux's abstract name space: taking it is atomic and the kernel gives it back when the process ends,
 * however it ends, so a lock is never stale. It reaches as far as the network name space does.
 */
export class DiskLock implements AsyncDisposable {
  readonly #servers = new Map<string, Server>()

  /**
   * Takes the lock of every path, or of none.
   *
   * @param paths files or block devices, with symbolic links resolved
   * @throws DISK_BUSY
   */
  static async acquire(paths: readonly string[]): Promise<DiskLock> {
    const lock = new DiskLock()
    try {
      await lock.add(paths)
    } catch (error) {
      await lock.release()
      throw error
    }
    return lock
  }

  /**
   * Takes the lock of what nobody holds for longer than a moment, and no path is called, once it is free.
   *
   * @throws DISK_BUSY where it is not for half a minute, as by a process that was stopped
   */
  static async waitFor(name: string): Promise<DiskLock> {
    const deadline = performance.now() + WAIT_MS
    for (;;) {
      try {
        return await DiskLock.acquire([name])
      } catch (error) {
        if (!isVarveError(error, 'DISK_BUSY') || performance.now() >= deadline) throw error
        await sleep(RETRY_INTERVAL_MS)
      }
    }
  }

  /**
   * Takes the locks of more paths.
   *
   * @throws DISK_BUSY; those that were taken are given back with the others
   */
  async add(paths: readonly string[]): Promise<void> {
    for (const path of [...new Set(paths)].sort()) await this.#add(path)
  }

  async #add(path: string): Promise<void> {
    const name = createHash('sha256').update(path).digest('hex').slice(0, 40)
    const server = createServer(socket => socket.destroy())
    server.unref() // a lock does not keep a process alive
    try {
      server.listen({ path: `\0varve-disk-${name}` })
      await once(server, 'listening')
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === 'EADDRINUSE')) throw error
      throw new VarveError(
        'DISK_BUSY',
        `The disk ${path} is held by another backup or restore. Wait for it to end, or stop it, and try again.`,
        { context: { path }, cause: error, retryable: true },
      )
    }
    this.#servers.set(path, server)
  }

  /**
   * Refuses disks that moved between the look for their locks and the one under them.
   *
   * @throws DISK_BUSY
   */
  assertHolds(disks: readonly DiskPlace[]): void {
    const moved = disks.find(({ path }) => !this.#servers.has(path))
    if (!moved) return
    throw new VarveError(
      'DISK_BUSY',
      `The disk ${moved.name} is on ${moved.path} since a moment ago: something else changes the disks of the instance. Nothing was changed; try again once that is done.`,
      { context: { disk: moved.name, path: moved.path }, retryable: true },
    )
  }

  /** Gives the locks back. May be called more than once. */
  async release(): Promise<void> {
    for (const [path, server] of this.#servers) {
      this.#servers.delete(path)
      server.close()
      await once(server, 'close')
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.release()
  }
}
