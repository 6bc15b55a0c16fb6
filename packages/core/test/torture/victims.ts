import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { type Bundle, bundle } from '../bundle.ts'
import type { Job, Message, Result } from './job.ts'
import { killDescendants } from './processes.ts'

/** How a victim ended. */
export type End =
  | { readonly killed: true; readonly point: string }
  | ({
      readonly killed: false
      readonly points: readonly string[]
      readonly failure?: { readonly code: string; readonly message: string }
    } & Result)

/** What happens while a victim works. */
export interface Meanwhile {
  /** Awaited while it streams: the guest writes. */
  readonly streaming?: () => Promise<void>
  /** Kills it from outside after this many milliseconds of its work. */
  readonly killAfterMs?: number
}

/** Their program. */
export const bundleVictim = (): Promise<Bundle> => bundle(new URL('./victim.ts', import.meta.url))

/** Processes that are told what to do and killed in the middle of it. One is always started in advance. */
export class Victims implements AsyncDisposable {
  readonly #program: Bundle
  readonly #temporary: string
  readonly #ownsProgram: boolean
  #next: ChildProcess | undefined

  private constructor(program: Bundle, temporary: string, ownsProgram: boolean) {
    this.#program = program
    this.#temporary = temporary
    this.#ownsProgram = ownsProgram
  }

  /**
   * @param temporary the folder of their temporary files
   * @param program what they share with others, and does not go with them. Default: one of their own
   */
  static async prepare(temporary: string, program?: Bundle): Promise<Victims> {
    return new Victims(program ?? (await bundleVictim()), temporary, program === undefined)
  }

  /** Has one do its job. */
  async run(job: Job, meanwhile: Meanwhile = {}): Promise<End> {
    const victim = this.#next ?? this.#start()
    this.#next = undefined
    const ended = once(victim, 'exit')
    let last: Message | undefined
    let writes = Promise.resolve()
    let timer: NodeJS.Timeout | undefined
    victim.on('message', (message: Message) => {
      last = message
      if (message.say !== 'streaming') return
      writes = (meanwhile.streaming?.() ?? Promise.resolve()).then(() => {
        if (victim.connected) victim.send('go', () => undefined) // it may have been killed
      })
    })
    victim.send(job)
    if (meanwhile.killAfterMs !== undefined && victim.pid !== undefined) {
      const { pid } = victim
      timer = setTimeout(() => {
        if (job.kill?.scope === 'group') killDescendants(pid)
        victim.kill('SIGKILL')
      }, meanwhile.killAfterMs)
    }
    this.#next = this.#start()
    const [, signal] = await ended
    clearTimeout(timer)
    await writes // also those of a guest whose victim died meanwhile
    if (signal === 'SIGKILL') {
      // From outside it writes no diary, where that of one before may still be.
      if (meanwhile.killAfterMs !== undefined) return { killed: true, point: `${meanwhile.killAfterMs} ms` }
      const point = job.kill && (await readFile(job.kill.diary, 'utf8').catch(() => undefined))
      return { killed: true, point: point ?? 'nobody knows which' }
    }
    if (last?.say === 'done') return { killed: false, ...last }
    if (last?.say === 'failed') return { killed: false, points: last.points, failure: last }
    throw new Error(`the victim ended by ${signal} without a word`)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#next) {
      const ended = once(this.#next, 'exit')
      this.#next.kill('SIGKILL')
      await ended
    }
    if (this.#ownsProgram) await this.#program[Symbol.asyncDispose]()
  }

  #start(): ChildProcess {
    return fork(this.#program.path, { env: { ...process.env, TMPDIR: this.#temporary }, execArgv: [] })
  }
}
