import type { Socket } from 'node:net'
import { abortError, errorMessage, isVarveError, VarveError } from '@varve/core'
import type { SFTPWrapper } from 'ssh2'
import { STATUS, statusOf } from './sftp-error.ts'

/** What a server that tells no limits takes in one request (draft-ietf-secsh-filexfer-02, section 3). */
const UNTOLD_PACKET = 32 * 1024
/** What a write has besides its data: numbers, and a handle of up to 256 bytes. */
const WRITE_HEADER = 4 + 1 + 4 + (4 + 256) + 8 + 4
/** For an ssh2 that does not tell what it sends at most in one request. */
const SMALL_PACKET = 16 * 1024
/** What ssh2 takes from a server in one answer is 256 KiB with its header; OpenSSH's own limit is the same. */
const LARGEST_PACKET = 255 * 1024
/** How long the flush of a file may take, while the server's other half answers keepalives. */
const FLUSH_TIMEOUT_MS = 15 * 60_000
/** How often a server is looked at before it counts as silent. A process that is held up itself looks only once. */
const LOOKS = 4
/** More than the answers to the keepalives between two looks: what a slow network still carries. */
const CARRIED_BYTES = 1024
/** How long a connection gets to say goodbye. */
const GOODBYE_MS = 2000

/** Gets the outcome of a request. */
export type Answer<T> = (error: unknown, value: T) => void

/** Begins a request; ssh2 gives its outcome to the callback. */
export type Start<T> = (sftp: SFTPWrapper, done: (error?: Error | null, value?: T) => void) => void

/** Options of {@link SftpConnection.call}. */
export interface RequestOptions {
  /** Rejects with `ABORTED` at once; the request itself goes on. */
  signal?: AbortSignal | undefined
  /** Whether the server may be silent for long, since it writes to its disk. Default: false. */
  flush?: boolean
}

/** What a connection is made of. */
export interface SftpConnectionParts {
  readonly socket: Socket
  readonly sftp: SFTPWrapper
  /** The fingerprint of the server's host key. */
  readonly fingerprint: string
  /** Such as `sftp://host:22`, for messages. */
  readonly address: string
  readonly timeoutMs: number
  /** Says goodbye to the server. */
  readonly end: () => void
}

/**
 * One SFTP session. All requests may be under way at once; they are answered in any order. Once the session is broken, or
 * the server has sent no answer, nor a part of one, for `timeoutMs`, all requests fail with
 * `STORAGE_UNREACHABLE`, also later ones. Time without a request under way does not count.
 */
export class SftpConnection {
  readonly fingerprint: string
  /** The most bytes that one read or write asks for. */
  readonly packetSize: number
  readonly #parts: SftpConnectionParts
  readonly #waiting = new Set<(failure: VarveError) => void>()
  #flushes: number[] = []
  /** Bytes that had come at the last look. */
  #received = 0
  /** Looks since the server was last known to be there. */
  #looks = 0
  #idle: NodeJS.Timeout | undefined
  #failure: VarveError | undefined

  constructor(parts: SftpConnectionParts) {
    this.#parts = parts
    this.fingerprint = parts.fingerprint
    this.packetSize = packetSizeOf(parts.sftp)
    parts.sftp.on('error', (error: Error) => this.#break(error.message))
    parts.sftp.on('close', () => this.#break('the server ended the session'))
    parts.socket.on('close', () => this.#break('the connection was closed'))
    if (parts.socket.destroyed) this.#break('the connection was closed')
  }

  /** Why the session is broken, or undefined while it is not. */
  get failure(): VarveError | undefined {
    return this.#failure
  }

  /** What the lower layers report; the first report is what callers get to see. */
  readonly onError = (error: Error): void => this.#break(error.message)

  /** Sends a request; `answer` is called once, later. */
  send<T>(start: Start<T>, answer: Answer<T>, flush = false): void {
    if (this.#failure) {
      const failure = this.#failure
      queueMicrotask(() => answer(failure, undefined as T))
      return
    }
    const fail = (failure: VarveError) => settle(failure)
    const settle = (error: unknown, value?: T) => {
      if (!this.#waiting.delete(fail)) return
      if (flush) this.#flushes.shift()
      this.#heard()
      answer(error, value as T)
    }
    this.#waiting.add(fail)
    if (flush) this.#flushes.push(performance.now())
    if (this.#idle === undefined) {
      this.#received = this.#parts.socket.bytesRead
      this.#idle = setTimeout(() => this.#look(), this.#parts.timeoutMs / LOOKS)
    }
    try {
      start(this.#parts.sftp, (error, value) => {
        if (error && statusOf(error) === undefined && !isVarveError(error)) this.#break(error.message)
        else settle(error ?? undefined, value)
      })
    } catch (error) {
      // ssh2 throws where a server lacks an extension
      const refusal = Object.assign(new Error(errorMessage(error)), { code: STATUS.OP_UNSUPPORTED })
      queueMicrotask(() => settle(refusal))
    }
  }

  /** Sends a request and waits for its answer. A refusal of the server rejects with ssh2's error, which has its status code. */
  call<T>(start: Start<T>, { signal, flush = false }: RequestOptions = {}): Promise<T> {
    return new Promise((resolve, reject) => {
      if (signal?.aborted) return reject(abortError(signal))
      const onAbort = () => signal && reject(abortError(signal))
      signal?.addEventListener('abort', onAbort, { once: true })
      const answer: Answer<T> = (error, value) => {
        signal?.removeEventListener('abort', onAbort)
        if (error === undefined) resolve(value)
        else reject(error)
      }
      this.send(start, answer, flush)
    })
  }

  /** Ends the session; requests under way fail. */
  async end(): Promise<void> {
    const { socket, end } = this.#parts
    this.#fail(new VarveError('ABORTED', `The storage ${this.#parts.address} was closed while it was used.`))
    if (socket.destroyed) return
    await new Promise<void>(resolve => {
      const timer = setTimeout(() => socket.destroy(), GOODBYE_MS)
      socket.once('close', () => {
        clearTimeout(timer)
        resolve()
      })
      end()
    })
  }

  /** The server has all its time again for what is still under way. */
  #heard(): void {
    this.#received = this.#parts.socket.bytesRead
    this.#looks = 0
    if (this.#waiting.size > 0) this.#idle?.refresh()
    else {
      clearTimeout(this.#idle)
      this.#idle = undefined
    }
  }

  #look(): void {
    const { socket, timeoutMs } = this.#parts
    const [flush] = this.#flushes
    const isFlushing = flush !== undefined && performance.now() - flush < FLUSH_TIMEOUT_MS
    const bytes = socket.bytesRead - this.#received
    this.#received = socket.bytesRead
    this.#looks = bytes > (isFlushing ? 0 : CARRIED_BYTES) ? 0 : this.#looks + 1
    if (this.#looks === LOOKS) this.#break(`the server has not answered for ${timeoutMs / 1000} s`)
    else this.#idle?.refresh()
  }

  #break(why: string): void {
    const { address, socket } = this.#parts
    this.#fail(
      new VarveError(
        'STORAGE_UNREACHABLE',
        `The connection to ${address} broke: ${why}. Check the server and the network.`,
        {
          context: { address },
          retryable: true,
        },
      ),
    )
    socket.resetAndDestroy() // not to be closed in peace: what the system still holds would reach the server later
  }

  #fail(failure: VarveError): void {
    this.#failure ??= failure
    for (const fail of [...this.#waiting]) fail(this.#failure)
  }
}

/**
 * ssh2 asks for the limits (`limits@openssh.com`) by itself and says so by `maxOpenHandles`. What it puts into one
 * request at most, which without limits is less than servers take, it keeps in fields that its types do not name;
 * of a larger request it sends the rest when the first part is answered.
 */
function packetSizeOf(sftp: SFTPWrapper): number {
  const isTold = Reflect.get(sftp, 'maxOpenHandles') !== undefined
  const field = (name: string) => Number(Reflect.get(sftp, name))
  const sizes = [field('_maxReadLen'), field('_maxWriteLen'), field('_maxOutPktLen') - WRITE_HEADER]
  if (sizes.some(Number.isNaN)) return SMALL_PACKET
  return Math.max(1, Math.min(isTold ? LARGEST_PACKET : UNTOLD_PACKET, ...sizes))
}
