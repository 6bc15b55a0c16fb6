import { readFile } from 'node:fs/promises'

/** How often the watch looks, as a part of its limit. */
const LOOKS = 5
/** A process that moves fewer bytes than this between two looks only keeps its own house. */
const LEAST_BYTES = 4096

/** Options of {@link IdleWatch}. */
export interface IdleWatchOptions {
  /** The process. */
  pid: number
  /** How long it may make no progress, in milliseconds. */
  idleMs: number
  /** Called once, when it has made none for so long. */
  onIdle: () => void
}

/**
 * Watches a process for progress: bytes that it takes or gives, and bytes that it moves by itself, as over a slow
 * network from its own buffers. The latter are the counts of `/proc/<pid>/io` (proc_pid_io(5)), which cover
 * sockets; where they cannot be read, only the former are seen.
 */
export class IdleWatch implements Disposable {
  readonly #options: IdleWatchOptions
  readonly #timer: NodeJS.Timeout
  #idleMs: number
  #last = performance.now()
  /** What the process had moved at the last look, in bytes. */
  #moved = 0
  #holders = 0

  constructor(options: IdleWatchOptions) {
    this.#options = options
    this.#idleMs = options.idleMs
    this.#timer = setInterval(() => this.#look(), Math.max(10, options.idleMs / LOOKS))
  }

  /** The process has made progress. */
  progress(): void {
    this.#last = performance.now()
  }

  /** While held, the process is not to blame: it waits for somebody else. Dispose of what is returned to go on. */
  hold(): Disposable {
    this.#holders++
    return {
      [Symbol.dispose]: () => {
        this.#holders--
        this.progress()
      },
    }
  }

  /** Gives the process this much more time to make no progress in, in milliseconds. */
  extend(ms: number): void {
    this.#idleMs += ms
  }

  #look(): void {
    readMoved(this.#options.pid).then(moved => {
      if (moved - this.#moved >= LEAST_BYTES) this.progress()
      this.#moved = moved
      if (this.#holders > 0 || performance.now() - this.#last < this.#idleMs) return
      clearInterval(this.#timer)
      this.#options.onIdle()
    })
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
    this.#holders = 1 // a look that is under way finds it held
  }
}

/** Bytes that a process has read and written so far, by any system call. 0 where that is not told. */
async function readMoved(pid: number): Promise<number> {
  const counts = await readFile(`/proc/${pid}/io`, 'utf8').catch(() => '') // it has ended, or is not ours to see
  const [, read = 0] = /^rchar: (\d+)$/m.exec(counts) ?? []
  const [, written = 0] = /^wchar: (\d+)$/m.exec(counts) ?? []
  return Number(read) + Number(written)
}
