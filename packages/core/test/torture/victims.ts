import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'tsup'
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

const root = fileURLToPath(new URL('../../../..', import.meta.url))

/** Processes that are told what to do and killed in the middle of it. One is always started in advance. */
export class Victims implements AsyncDisposable {
  readonly #program: string
  readonly #folder: string
  readonly #temporary: string
  #next: ChildProcess | undefined

  private constructor(folder: string, temporary: string) {
    this.#folder = folder
    this.#program = join(folder, 'victim.js')
    this.#temporary = temporary
  }

  /**
   * Bundles their program: it then starts in a third of the time.
   *
   * @param temporary the folder of their temporary files
   */
  static async prepare(temporary: string): Promise<Victims> {
    // Below the packages that the bundle imports.
    const cache = join(root, 'node_modules/.cache')
    await mkdir(cache, { recursive: true })
    const folder = await mkdtemp(join(cache, 'varve-victim-'))
    await build({
      entry: [fileURLToPath(new URL('./victim.ts', import.meta.url))],
      outDir: folder,
      format: 'esm',
      target: 'node22',
      platform: 'node',
      config: false,
      silent: true,
      external: ['@napi-rs/blake-hash'], // native
      noExternal: [/^(?!@napi-rs)/],
      outExtension: () => ({ js: '.js' }),
      banner: {
        js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);",
      },
    })
    return new Victims(folder, temporary)
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
    await rm(this.#folder, { recursive: true })
  }

  #start(): ChildProcess {
    return fork(this.#program, { env: { ...process.env, TMPDIR: this.#temporary }, execArgv: [] })
  }
}
