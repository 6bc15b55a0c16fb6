import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { NbdAddress } from '../src/index.ts'

const execute = promisify(execFile)

/** Runs a program and gives what it wrote. */
export async function run(program: string, ...args: string[]): Promise<string> {
  const { stdout } = await execute(program, args, { timeout: 60_000, maxBuffer: 1 << 28 })
  return stdout
}

/** A temporary folder, and the servers that were started in it; both end with it. */
export class Lab implements AsyncDisposable {
  readonly folder: string
  readonly #servers: RealServer[] = []
  #port: number | undefined

  private constructor(folder: string) {
    this.folder = folder
  }

  static async create(): Promise<Lab> {
    return new Lab(await mkdtemp(join(tmpdir(), 'varve-nbd-lab-')))
  }

  path(name: string): string {
    return join(this.folder, name)
  }

  /** `qemu-nbd` on a Unix socket of the folder. */
  qemuNbd(...args: string[]): Promise<RealServer> {
    const socketPath = this.path('qemu')
    return this.#start('qemu-nbd', ['--persistent', '-k', socketPath, ...args], { socketPath })
  }

  /** `nbdkit` on a Unix socket of the folder. */
  nbdkit(...args: string[]): Promise<RealServer> {
    const socketPath = this.path('nbdkit')
    return this.#start('nbdkit', ['-f', '-U', socketPath, ...args], { socketPath })
  }

  /** `nbdkit` on a TCP port. */
  async nbdkitOnTcp(...args: string[]): Promise<RealServer> {
    this.#port ??= await freePort() // the same one for a server that is started again
    const port = this.#port
    return this.#start('nbdkit', ['-f', '-i', '127.0.0.1', '-p', String(port), ...args], {
      host: '127.0.0.1',
      port,
    })
  }

  async #start(program: string, args: readonly string[], address: NbdAddress): Promise<RealServer> {
    if ('socketPath' in address) await rm(address.socketPath, { force: true })
    const server = new RealServer(program, args, address)
    this.#servers.push(server)
    await server.listening()
    return server
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#servers.map(server => server.stop('SIGKILL')))
    await rm(this.folder, { recursive: true, force: true })
  }
}

/** A program that serves an export. */
export class RealServer {
  readonly address: NbdAddress
  readonly process: ChildProcess
  readonly #exited: Promise<unknown>
  #output = ''

  constructor(program: string, args: readonly string[], address: NbdAddress) {
    this.address = address
    this.process = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
    this.process.stderr?.on('data', text => {
      this.#output += text
    })
    this.#exited = new Promise(resolve => {
      this.process.once('exit', resolve)
      this.process.once('error', resolve)
    })
  }

  /** Resolves when it takes connections. */
  async listening(): Promise<void> {
    const { address, process } = this
    const target = 'socketPath' in address ? { path: address.socketPath } : address
    const accepts = () =>
      new Promise<boolean>(resolve => {
        const socket = connect(target)
        socket.once('connect', () => {
          socket.destroy()
          resolve(true)
        })
        socket.once('error', () => resolve(false))
      })
    while (!(await accepts())) {
      if (process.exitCode !== null || process.signalCode !== null)
        throw new Error(`${process.spawnfile} ended: ${this.#output}`)
      await new Promise(resolve => setTimeout(resolve, 10))
    }
  }

  signal(signal: NodeJS.Signals): void {
    this.process.kill(signal)
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    this.process.kill(signal)
    await this.#exited
  }
}

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise(resolve => server.close(resolve))
  if (typeof address !== 'object' || !address) throw new Error('no port')
  return address.port
}

/** Numbers that look random and are the same in every run of a seed. */
export function randomNumbers(seed: number): (below: number) => number {
  let state = seed >>> 0
  return below => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
}
