import { Readable } from 'node:stream'
import {
  abortError,
  type CommandEvent,
  emit,
  type RbdDiff,
  type RbdDiffStream,
  type RunOptions,
  VarveError,
} from '@varve/core'
import { execa } from 'execa'
import { DiffParser } from './diff-parser.ts'
import { rbdError } from './rbd-error.ts'

const OUTPUT_LIMIT = 16_384

/**
 * How long it may print nothing while it is waited for, in milliseconds. Without an object map it goes through an image
 * that has not changed and prints nothing; the cluster has its own limit for each step of that.
 */
const IDLE_MS = 60 * 60_000

/** Options of {@link exportDiff}. */
export interface DiffExportOptions extends RunOptions {
  args: readonly string[]
  env: Readonly<Record<string, string>>
  /** `<pool>/[<namespace>/]<image>` */
  image: string
  /** The names that the stream must have. */
  snapshot: string
  from: string | undefined
}

/** Runs `rbd export-diff`. The stream fails with the errors of {@link rbdError} and of {@link DiffParser}. */
export function exportDiff(options: DiffExportOptions): RbdDiffStream {
  const output = new DiffOutput(options)
  return {
    stream: output,
    get position() {
      return output.position
    },
    diff() {
      if (output.diff) return output.diff
      throw new VarveError('INVALID_ARGUMENT', 'The stream of the export has not been read to its end.')
    },
  }
}

/**
 * What an `rbd export-diff` prints, parsed as it passes by. It ends when rbd has ended well and the stream is whole,
 * and fails otherwise: never a short end. Destroying it ends rbd.
 */
class DiffOutput extends Readable {
  /** What the stream holds, once it has ended. */
  diff: RbdDiff | undefined
  readonly #options: DiffExportOptions
  readonly #parser = new DiffParser()
  readonly #kill: () => void
  readonly #stdout: Readable
  readonly #exited: Promise<void>
  #idle: NodeJS.Timeout | undefined

  constructor(options: DiffExportOptions) {
    super({ highWaterMark: 1024 * 1024 })
    this.#options = options
    this.on('error', () => undefined) // one without a listener ends the process, and it may come before anybody reads
    const child = execa('rbd', options.args, {
      stdin: 'ignore',
      env: { LC_ALL: 'C', ...options.env },
      buffer: false,
      reject: false,
      detached: true, // a Ctrl-C in the terminal is for Varve, which then ends rbd in order
      encoding: 'buffer',
      forceKillAfterDelay: 5_000,
    })
    this.#kill = () => child.kill('SIGTERM')
    let stderr = ''
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      stderr = (stderr + text).slice(-OUTPUT_LIMIT)
    })
    this.#stdout = child.stdout
    this.#stdout.on('data', (chunk: Buffer) => this.#take(chunk))
    this.#stdout.on('error', () => undefined) // its exit tells why
    const drained = new Promise<void>(resolve => this.#stdout.once('close', resolve))
    this.#watch()

    const { signal } = options
    const giveUp = () => signal && this.destroy(abortError(signal))
    signal?.addEventListener('abort', giveUp, { once: true })
    this.#exited = child.then(async result => {
      signal?.removeEventListener('abort', giveUp)
      this.#tell({ exitCode: result.exitCode, stderr, durationMs: Math.round(result.durationMs) })
      if (result.code === 'ENOENT') return void this.destroy(missing())
      if (result.exitCode !== 0 || saysError(stderr)) return void this.destroy(this.#failure(result, stderr))
      await drained // what it printed last may still wait for who reads this
      this.#finish()
    })
    if (signal?.aborted) giveUp()
  }

  /** How far into the image the records are that have passed, in bytes. */
  get position(): number {
    return this.#parser.position
  }

  override _read(): void {
    if (!this.#stdout.isPaused()) return
    this.#watch()
    this.#stdout.resume()
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    clearTimeout(this.#idle)
    this.#kill()
    this.#stdout.destroy()
    this.#exited.finally(() => done(error))
  }

  #take(chunk: Buffer): void {
    try {
      this.#parser.push(chunk)
    } catch (error) {
      this.destroy(error as Error)
      return
    }
    if (this.push(chunk)) {
      this.#watch()
      return
    }
    clearTimeout(this.#idle) // whoever reads this is slow, not the cluster
    this.#stdout.pause()
  }

  #finish(): void {
    if (this.destroyed) return
    clearTimeout(this.#idle)
    try {
      const diff = this.#parser.finish()
      this.#checkNames(diff)
      this.diff = diff
      this.push(null)
    } catch (error) {
      this.destroy(error as Error)
    }
  }

  #checkNames({ fromSnapshot, toSnapshot }: RbdDiff): void {
    const { from, snapshot: to } = this.#options
    if (fromSnapshot === from && toSnapshot === to) return
    throw new VarveError(
      'RBD_STREAM_INVALID',
      `rbd export-diff gave the changes from ${fromSnapshot ?? 'nothing'} to ${toSnapshot}, where those from ${from ?? 'nothing'} to ${to} were asked for. Look at which program \`rbd\` is, then back up again.`,
      { context: { fromSnapshot, toSnapshot } },
    )
  }

  #watch(): void {
    clearTimeout(this.#idle)
    this.#idle = setTimeout(() => {
      this.destroy(
        new VarveError(
          'CEPH_UNREACHABLE',
          `rbd export-diff has printed nothing for ${IDLE_MS / 60_000} minutes and was stopped. Check that the Ceph cluster is well (\`ceph status\`) and try again.`,
          { context: { image: this.#options.image }, retryable: true },
        ),
      )
    }, IDLE_MS)
  }

  #failure({ exitCode, signal }: { exitCode?: number; signal?: string }, stderr: string): VarveError {
    const { image, snapshot, from } = this.#options
    const snapshots = from === undefined ? snapshot : `${from} or ${snapshot}` // rbd does not say which it misses
    const label = 'rbd export-diff'
    return rbdError({ label, image, snapshot: snapshots, exitCode, endedBy: signal, stderr: stderr.trim() })
  }

  #tell(ended: Pick<CommandEvent, 'exitCode' | 'stderr' | 'durationMs'>): void {
    emit(this.#options, { type: 'command', command: 'rbd', args: this.#options.args, stdout: '', ...ended })
  }
}

/** Whether rbd itself tells of an error, whatever its exit code: its lines have no time, unlike those of the libraries. */
function saysError(stderr: string): boolean {
  return stderr.split('\n').some(line => !/^\d{4}-\d\d-\d\dT/.test(line) && /error|failed/i.test(line))
}

function missing(): VarveError {
  return new VarveError(
    'COMMAND_MISSING',
    'The program rbd is not installed. Install it (Debian package ceph-common) and try again.',
    { context: { command: 'rbd' } },
  )
}
