import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { cephProgram } from './ceph-program.ts'

const LOG_END = 2000

/** A request, and who waits for what comes of it. */
interface Waiting {
  readonly resolve: (result: never) => void
  readonly reject: (error: Error) => void
}

/**
 * A client of a lab's cluster that stays: it makes, changes and reads RBD images by Ceph's own libraries, without a new
 * process each time, of which `rbd` and `ceph` take most of the time of what they do. Images are named
 * `<pool>/[<namespace>/]<image>`. It does one thing after the other.
 */
export class CephClient implements AsyncDisposable {
  readonly #folder: string
  readonly #child: ChildProcess
  readonly #waiting: Waiting[] = []
  #stderr = ''
  #reads = 0

  /** @internal */
  constructor(conf: string, folder: string) {
    this.#folder = folder
    // Debian's own Python has Ceph's libraries.
    const args = ['--pdeathsig', 'KILL', '--', '/usr/bin/python3', '-c', cephProgram, conf]
    const child = spawn('setpriv', args, { stdio: 'pipe', detached: true })
    this.#child = child
    child.on('error', error => this.#end(error.message))
    child.stdin.on('error', () => undefined) // its end is told by `close`
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-LOG_END)
    })
    child.on('close', () => this.#end(this.#stderr))
    createInterface(child.stdout).on('line', line => {
      const { result, error } = JSON.parse(line)
      const waiting = this.#waiting.shift()
      if (error === undefined) waiting?.resolve(result as never)
      else waiting?.reject(new Error(error))
    })
  }

  /** Sends a command to the monitor, such as `{ prefix: 'osd stat', format: 'json' }`, and returns what it says. */
  monitor(command: Readonly<Record<string, unknown>>): Promise<string> {
    return this.#ask('monitor', command)
  }

  /** Makes a pool ready for RBD images, as `rbd pool init` does. */
  initPool(pool: string): Promise<void> {
    return this.#ask('init_pool', pool)
  }

  /** Makes an image of `size` bytes. */
  create(image: string, size: number): Promise<void> {
    return this.#ask('create', image, size)
  }

  /** The images in a pool, or namespace, `<pool>[/<namespace>]`, without it, sorted. */
  list(pool: string): Promise<string[]> {
    return this.#ask('list_images', `${pool}/`)
  }

  /** Gives an image another size, in bytes. No error where it has it. */
  resize(image: string, size: number): Promise<void> {
    return this.#ask('resize', image, size)
  }

  /**
   * Changes an image as `qemu-io` does: `write -P <byte> <start> <length>`, `write -z` and `write -z -u` for zeros, and
   * `discard`. Numbers may end with `k` or `M`.
   */
  write(image: string, commands: readonly string[]): Promise<void> {
    return this.#ask('write', image, commands)
  }

  /** What an image holds at a snapshot, such as `vms/disk@one`, or now. */
  async read(image: string): Promise<Buffer> {
    const path = join(this.#folder, `read-${this.#reads++}`)
    const [name, snapshot] = image.split('@')
    await this.#ask('read', name, snapshot ?? null, path)
    const bytes = await readFile(path)
    await rm(path)
    return bytes
  }

  /** The snapshots of an image, the oldest first. */
  snapshots(image: string): Promise<string[]> {
    return this.#ask('snapshots', image)
  }

  /** Makes a snapshot of an image. */
  createSnapshot(image: string, snapshot: string): Promise<void> {
    return this.#ask('create_snapshot', image, snapshot)
  }

  /** Removes these snapshots. */
  removeSnapshots(image: string, ...snapshots: string[]): Promise<void> {
    return this.#ask('remove_snapshots', image, snapshots)
  }

  /** Ends it. */
  async [Symbol.asyncDispose](): Promise<void> {
    const { exitCode, signalCode, pid } = this.#child
    if (pid === undefined || exitCode !== null || signalCode !== null) return
    const closed = once(this.#child, 'close')
    this.#child.kill('SIGKILL')
    await closed
  }

  #ask<T>(operation: string, ...args: unknown[]): Promise<T> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject })
      this.#child.stdin?.write(`${JSON.stringify([operation, args])}\n`)
    })
  }

  #end(why: string): void {
    for (const { reject } of this.#waiting.splice(0)) reject(new Error(`The client of Ceph ended: ${why}`))
  }
}
