import type { Readable, Writable } from 'node:stream'
import { abortError, type CallOptions, tell, VarveError } from '@varve/core'
import { execa } from 'execa'
import { IdleWatch } from './idle-watch.ts'

/** How much of what rclone prints is kept for events and errors, in characters, from the end. */
const OUTPUT_LIMIT = 16_384
/** How long rclone may take to clean up after itself, as to abort a multipart upload, before it is killed. */
const KILL_AFTER_MS = 4_000

/** How an rclone has ended. */
export interface RcloneExit {
  /** The arguments that tell what it was about. */
  readonly args: readonly string[]
  /** Undefined when it was ended by a signal or could not be started. */
  readonly exitCode: number | undefined
  /** The end of what it printed on its standard error, without secrets. */
  readonly stderr: string
  /** The same as it was printed, with secrets: to tell what it means, and for nothing that is shown or kept. */
  readonly unredacted: string
  /** Why it could not be started: a system error's code. */
  readonly startError?: string
}

/** Options of {@link RcloneProcess.start}. */
export interface RcloneProcessOptions {
  /** The program. */
  command: string
  /** Its whole environment. */
  env: Readonly<Record<string, string>>
  /** Takes the secrets out of a text. */
  redact: (text: string) => string
  /** How long it may make no progress, in milliseconds. */
  idleMs: number
  /** Whether something is written to its standard input. */
  input: boolean
  /** Are told when it has ended. */
  listeners: readonly CallOptions['onCommand'][]
  /** Ends it. */
  signal: AbortSignal | undefined
}

/**
 * One rclone. It is ended by SIGTERM, upon which rclone removes what it can of an upload, and after a while by
 * SIGKILL; never by the end of its input, which is success to it. Its output must be read to its end, or destroyed.
 */
export class RcloneProcess {
  /** Where its input goes. */
  readonly stdin: Writable | null
  /** What it prints. */
  readonly stdout: Readable
  /** How it ended. Never rejects. */
  readonly exited: Promise<RcloneExit>
  /** Sees that it makes progress. */
  readonly watch: IdleWatch
  /** Fires when it has failed, or is stopped. It does not when it ends well. */
  readonly failed: AbortSignal
  readonly #failed = new AbortController()
  readonly #kill: (signal: NodeJS.Signals) => void
  #stopped: VarveError | undefined

  /** @throws ABORTED */
  static start(args: readonly string[], options: RcloneProcessOptions): RcloneProcess {
    if (options.signal?.aborted) throw abortError(options.signal)
    return new RcloneProcess(args, options)
  }

  private constructor(args: readonly string[], options: RcloneProcessOptions) {
    const { command, env, redact, idleMs, input, listeners, signal } = options
    const child = execa(command, args, {
      stdin: input ? 'pipe' : 'ignore',
      env,
      extendEnv: false,
      cwd: '/', // the configuration's paths do not depend on where this process was started
      buffer: false,
      reject: false,
      detached: true, // a Ctrl-C in the terminal is for Varve, which then ends rclone in order
      encoding: 'buffer',
      forceKillAfterDelay: KILL_AFTER_MS,
    })
    let printed = ''
    let isCut = false
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      printed += text
      if (printed.length <= OUTPUT_LIMIT) return
      isCut = true
      printed = printed.slice(-OUTPUT_LIMIT)
    })
    this.stdin = child.stdin
    this.stdin?.on('error', () => undefined) // it has ended: its exit tells why
    this.stdout = child.stdout
    this.failed = this.#failed.signal
    this.#kill = name => child.kill(name)
    this.watch = new IdleWatch({
      pid: child.pid ?? 0,
      idleMs,
      onIdle: () =>
        this.stop(
          new VarveError(
            'TIMEOUT',
            `rclone ${args[0]} made no progress for ${idleMs / 1000} s and was stopped. Is the storage up, and the network?`,
            { context: { command, args, idleMs }, retryable: true },
          ),
        ),
    })
    const giveUp = () => signal && this.stop(abortError(signal))
    signal?.addEventListener('abort', giveUp, { once: true })
    this.exited = child.then(result => {
      signal?.removeEventListener('abort', giveUp)
      this.watch[Symbol.dispose]()
      if (result.exitCode !== 0) this.#failed.abort()
      const unredacted = (isCut ? afterFirstLine(printed) : printed).trim()
      const exit = {
        args,
        exitCode: result.exitCode,
        stderr: redact(unredacted),
        unredacted,
        ...(result.code !== undefined && { startError: result.code }),
      }
      const { exitCode, stderr } = exit
      const durationMs = Math.round(result.durationMs)
      // what it prints on its standard output is data
      const event = { type: 'command', command, args, exitCode, stdout: '', stderr, durationMs } as const
      for (const listener of listeners) tell(listener, event)
      return exit
    })
  }

  /** Why it was stopped, if it was. */
  get stopped(): VarveError | undefined {
    return this.#stopped
  }

  /** Ends it, if it has not ended; await `exited` after it. */
  stop(why: VarveError): void {
    if (this.#stopped) return
    this.#stopped = why
    this.#failed.abort(why)
    this.#kill('SIGTERM')
    this.stdout.destroy()
  }
}

/** Without the first line, which may begin in the middle of a secret that would not be found. */
function afterFirstLine(text: string): string {
  const end = text.indexOf('\n')
  return end < 0 ? '' : text.slice(end + 1)
}
