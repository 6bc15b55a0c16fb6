import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { pollUntil } from './lab-poll.ts'
import { pauseProcess } from './lab-process.ts'

const LOG_END = 2000

/** A server in the foreground, its output in a file; the kernel kills it when the process that started it ends. */
export class LabDaemon {
  readonly #program: string
  readonly #log: string
  readonly #child: ChildProcess

  constructor(program: string, args: readonly string[], log: string) {
    this.#program = program
    this.#log = log
    const output = openSync(log, 'a')
    // Detached: Ctrl-C in a terminal is for the test, which then stops the lab.
    this.#child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', program, ...args], {
      stdio: ['ignore', output, output],
      detached: true,
    })
    closeSync(output)
    this.#child.on('error', () => undefined) // seen in ready(), which has the log
    this.#child.unref()
  }

  /** Waits until `look` finds the server ready. */
  async ready(look: () => Promise<boolean>, timeoutMs: number): Promise<void> {
    await pollUntil(
      async () => {
        if (this.#ended) throw new Error(await this.#failure('ended at its start'))
        return (await look()) || undefined
      },
      timeoutMs,
      () => this.#failure(`is not ready after ${timeoutMs / 1000} s`),
    )
  }

  /** Ends it at once, as a power cut does, and waits for its end. */
  async kill(): Promise<void> {
    if (this.#ended) return
    const exit = once(this.#child, 'exit', { signal: AbortSignal.timeout(30_000) })
    this.#child.ref()
    this.#child.kill('SIGKILL')
    await exit
  }

  /** Has it hang, connections and all, until {@link LabDaemon.resume}. */
  async pause(): Promise<void> {
    const { pid } = this.#child
    if (this.#ended || pid === undefined) throw new Error(await this.#failure('has ended'))
    await pauseProcess(pid)
  }

  /** Has it go on. */
  resume(): void {
    this.#child.kill('SIGCONT')
  }

  get #ended(): boolean {
    const { pid, exitCode, signalCode } = this.#child
    return pid === undefined || exitCode !== null || signalCode !== null
  }

  async #failure(what: string): Promise<string> {
    const log = await readFile(this.#log, 'utf8').catch(() => '')
    return `${this.#program} ${what}. ${log.slice(-LOG_END)}`
  }
}

/** Ports of the loopback address that nobody listened on a moment ago. */
export async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'))
  try {
    return await Promise.all(
      servers.map(async server => {
        await once(server, 'listening')
        return (server.address() as AddressInfo).port
      }),
    )
  } finally {
    for (const server of servers) server.close()
  }
}
