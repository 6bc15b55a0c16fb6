import { constants, write as writeCallback } from 'node:fs'
import { type FileHandle, open, rm, stat, statfs } from 'node:fs/promises'
import { dirname } from 'node:path'
import { VarveError } from './errors.ts'
import { targetError } from './restore-target.ts'

const STAT_BLOCK = 512 // of stat's `blocks`, whatever the file system's block size

/** Options of a target that is a new file. */
export interface FileTargetOptions {
  /** Where the file goes. Its folder exists. */
  readonly path: string
  /** Replaces a file that is there, from the first byte on: it is lost also when the restore fails. Default: false. */
  readonly overwrite?: boolean
}

/** A new sparse file that is written at positions, many at once. */
export class TargetFile {
  readonly path: string
  readonly #handle: FileHandle

  private constructor(path: string, handle: FileHandle) {
    this.path = path
    this.#handle = handle
  }

  /**
   * Creates the file, `size` bytes of nothing, readable by its owner alone. `dataBytes` is what will be
   * written: `TARGET_FULL` when the file system has less, before anything is touched. `TARGET_EXISTS` when
   * there is a file at the path, `TARGET_FAILED` when something else is.
   */
  static async create(options: FileTargetOptions, size: number, dataBytes: number): Promise<TargetFile> {
    const { path, overwrite = false } = options
    try {
      await checkPlace(path, dataBytes)
      const { O_CREAT, O_EXCL, O_TRUNC, O_WRONLY } = constants
      const handle = await open(path, O_WRONLY | O_CREAT | (overwrite ? O_TRUNC : O_EXCL), 0o600)
      const file = new TargetFile(path, handle)
      try {
        await handle.truncate(size)
      } catch (error) {
        await file.abort()
        throw error
      }
      return file
    } catch (error) {
      throw targetError(error, path)
    }
  }

  /** Writes all of `data` at `position`. */
  write(position: number, data: Uint8Array): Promise<void> {
    return new Promise((resolve, reject) => {
      const from = (done: number): void => {
        writeCallback(this.#handle.fd, data, done, data.length - done, position + done, (error, written) => {
          if (error) reject(targetError(error, this.path))
          else if (done + written < data.length) from(done + written)
          else resolve()
        })
      }
      from(0)
    })
  }

  /** Makes the file and its name durable. */
  async finish(): Promise<void> {
    try {
      await this.#handle.sync()
      await this.#handle.close()
      const folder = await open(dirname(this.path), constants.O_RDONLY)
      try {
        await folder.sync()
      } finally {
        await folder.close()
      }
    } catch (error) {
      throw targetError(error, this.path)
    }
  }

  /** Removes the file. */
  async abort(): Promise<void> {
    await this.#handle.close()
    await rm(this.path, { force: true })
  }
}

/** Before anything is touched: what is at the path is nothing or a file, and there is room for a new one. */
async function checkPlace(path: string, dataBytes: number): Promise<void> {
  const old = await stat(path).catch(() => undefined) // whatever else is wrong with the path, open tells
  if (old && !old.isFile()) {
    throw new VarveError(
      'TARGET_FAILED',
      `${path} is no regular file. Give the path of a file, or restore in place.`,
      { context: { path } },
    )
  }
  const { bavail, bsize } = await statfs(dirname(path))
  const freeBytes = bavail * bsize + (old ? old.blocks * STAT_BLOCK : 0)
  if (freeBytes >= dataBytes) return
  throw new VarveError(
    'TARGET_FULL',
    `${path} needs ${dataBytes} bytes and its file system has ${freeBytes} left. Free some and restore again.`,
    { context: { path, dataBytes, freeBytes } },
  )
}
