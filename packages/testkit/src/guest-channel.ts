import { connect, type Socket } from 'node:net'

/** What a command in the guest came to. */
export interface GuestResult {
  /** What the command printed. */
  readonly stdout: string
  /** What it said of its errors. */
  readonly stderr: string
  /** Its exit code. */
  readonly exitCode: number
}

/** A command in the guest ended with another exit code than 0. */
export class GuestCommandError extends Error {
  /** The command that failed. */
  readonly command: string
  /** What came of it. */
  readonly result: GuestResult

  constructor(command: string, result: GuestResult) {
    super(`In the guest, "${command}" ended with ${result.exitCode}: ${result.stderr || result.stdout}`)
    this.name = 'GuestCommandError'
    this.command = command
    this.result = result
  }
}

interface PendingCommand {
  resolve(result: GuestResult): void
  reject(error: Error): void
}

let commandCount = 0

/**
 * The host's side of the command protocol of {@link guestInit}, over the Unix socket of the guest's port.
 * It connects when it is first used, and again after the guest was powered off. A command sent before the
 * guest is up waits in the socket.
 */
export class GuestChannel {
  readonly #socketPath: string
  readonly #pending = new Map<string, PendingCommand>()
  #socket: Socket | undefined

  constructor(socketPath: string) {
    this.#socketPath = socketPath
  }

  /** Runs a shell command; rejects after `timeoutMs` (the command is killed) and when the guest goes away. */
  run(command: string, timeoutMs: number): { id: string; result: Promise<GuestResult> } {
    commandCount += 1
    const id = `${process.pid}-${commandCount}`
    const socket = this.#connected()
    const result = new Promise<GuestResult>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.kill(id)
        settle(() => reject(new Error(`In the guest, "${command}" did not end within ${timeoutMs} ms.`)))
      }, timeoutMs)
      const settle = (then: () => void): void => {
        clearTimeout(timer)
        this.#pending.delete(id)
        then()
      }
      this.#pending.set(id, {
        resolve: value => settle(() => resolve(value)),
        reject: error => settle(() => reject(error)),
      })
    })
    socket.write(`run ${id} ${Buffer.from(command).toString('base64')}\n`)
    return { id, result }
  }

  /** Kills a running command and what it started. */
  kill(id: string): void {
    if (this.#pending.has(id)) this.#socket?.write(`kill ${id}\n`)
  }

  /** Gives up all commands and lets go of the port. */
  close(): void {
    this.#socket?.destroy()
    this.#disconnected(new Error('The connection to the guest was closed.'))
  }

  #connected(): Socket {
    if (this.#socket) return this.#socket
    const socket = connect(this.#socketPath)
    // Idle connections keep no process alive; the timer of a running command does.
    socket.unref()
    const lost = (error: Error): void => {
      socket.destroy()
      if (this.#socket === socket) this.#disconnected(error)
    }
    socket.on('error', cause => lost(new Error(`The guest cannot be reached: ${cause.message}`, { cause })))
    socket.on('close', () => lost(new Error('The guest went away.')))
    let rest = ''
    socket.setEncoding('latin1').on('data', (chunk: string) => {
      const lines = (rest + chunk).split('\n')
      rest = lines.pop() ?? ''
      for (const line of lines) this.#receive(line)
    })
    this.#socket = socket
    return socket
  }

  #disconnected(error: Error): void {
    this.#socket = undefined
    for (const pending of [...this.#pending.values()]) pending.reject(error)
  }

  #receive(line: string): void {
    const [verb, id, code, stdout, stderr] = line.split(' ')
    // A reply cut short, or one to an earlier connection, belongs to nobody.
    if (verb !== 'done' || id === undefined || stderr === undefined) return
    this.#pending.get(id)?.resolve({ exitCode: Number(code), stdout: decode(stdout), stderr: decode(stderr) })
  }
}

/** The text of `o:BASE64` without its last line feed. */
function decode(field = ''): string {
  return Buffer.from(field.slice(2), 'base64').toString().replace(/\n$/, '')
}
