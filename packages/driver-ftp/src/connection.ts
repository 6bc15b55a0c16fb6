import type { Socket } from 'node:net'
import { abortError, unlessAborted, VarveError } from '@varve/core'
import { Client, type FTPResponse } from 'basic-ftp'
import {
  ftpError,
  isRefusal,
  isReply,
  protocolError,
  replyText,
  timeoutError,
  tlsError,
} from './ftp-error.ts'
import type { FtpSettings } from './ftp-options.ts'

/** So that a router on the way does not forget the control connection while a transfer runs for hours. */
const KEEP_ALIVE_MS = 30_000

/** A control connection, logged in and with its folder known. It carries out one command at a time. */
export class FtpConnection {
  readonly client: Client
  readonly settings: FtpSettings
  /** The absolute path of the folder that holds the backups, without a `/` at its end. */
  root = ''
  /** What the server's `FEAT` names, such as `MDTM` and `REST`. */
  features: ReadonlyMap<string, string> = new Map()
  /** Whether `EPSV` is worth a try. */
  extendedPassive = true
  /** Whether `STAT` may give the listing of a folder. */
  listsByStat = true
  /** Whether `LIST` takes `-a`. */
  listsAll = true

  /** What the control connection is carried by, below TLS. */
  #carrier: Socket | undefined
  /** Replies that are waited for. */
  #awaited = 0

  private constructor(settings: FtpSettings) {
    this.settings = settings
    this.client = new Client(0) // timeouts are kept here, where they have their own errors
  }

  /**
   * Connects and logs in.
   *
   * @throws STORAGE_UNREACHABLE, STORAGE_ACCESS_DENIED, STORAGE_NOT_FOUND, ABORTED
   */
  static async open(settings: FtpSettings, signal: AbortSignal | undefined): Promise<FtpConnection> {
    if (signal?.aborted) throw abortError(signal)
    const connection = new FtpConnection(settings)
    try {
      await unlessAborted(connection.#open(), signal)
      return connection
    } catch (error) {
      connection.close()
      throw error
    }
  }

  /** Whether it can be given another command. */
  get usable(): boolean {
    return !this.client.closed
  }

  /** Where data connections go, whatever address the server names: the host that was connected to. */
  get remoteAddress(): string {
    const { remoteAddress } = this.client.ftp.socket
    if (remoteAddress === undefined) throw new Error('the control connection is closed')
    return remoteAddress
  }

  /** The server's path of names below the root. */
  pathOf(names: readonly string[]): string {
    return [this.root, ...names].join('/')
  }

  /** Sends a command and returns its reply; fails with basic-ftp's `FTPError` when that is a refusal. */
  async command(text: string): Promise<FTPResponse> {
    const [verb = ''] = text.split(' ', 1)
    return this.answered(this.client.send(text), `no reply to ${verb}`)
  }

  /** Waits for the server. One that is silent for too long is no longer spoken to. */
  async answered<T>(work: Promise<T>, what: string, timeoutMs: number = this.settings.timeoutMs): Promise<T> {
    const { promise: tooLate, reject } = Promise.withResolvers<never>()
    const timer = setTimeout(() => {
      reject(timeoutError(what, timeoutMs, this.settings))
      this.close()
    }, timeoutMs)
    this.#awaited++
    try {
      return await Promise.race([work, tooLate])
    } finally {
      this.#awaited--
      clearTimeout(timer)
    }
  }

  /** Ends it, whatever it is doing. A command that has no reply and has not left this machine is not sent any more. */
  close(): void {
    if (this.#awaited > 0 && this.usable) this.#carrier?.resetAndDestroy()
    this.client.close()
  }

  async #open(): Promise<void> {
    const { tls } = this.settings
    await this.#unreachable(() => this.#connect())
    this.client.ftp.socket.setKeepAlive(true, KEEP_ALIVE_MS)
    if (tls === 'explicit') await this.#startTls()
    await this.#logIn()
    await this.#prepare()
    await this.#enterRoot()
  }

  /** A server that cannot be talked to at all is unreachable, also when it is just silent. */
  async #unreachable(work: () => Promise<unknown>): Promise<void> {
    try {
      await work()
    } catch (error) {
      const failure = ftpError(error, 'Connecting', this.settings)
      if (failure.code !== 'TIMEOUT') throw failure
      const { message, context, cause, retryable } = failure
      throw new VarveError('STORAGE_UNREACHABLE', message, { context, cause, retryable })
    }
  }

  async #connect(): Promise<void> {
    const { host, port, tls, tlsOptions } = this.settings
    const connecting =
      tls === 'implicit'
        ? this.client.connectImplicitTLS(host, port, { ...tlsOptions })
        : this.client.connect(host, port)
    await this.answered(connecting, 'no connection and greeting')
    if (tls !== 'implicit') this.#carrier = this.client.ftp.socket // else Node keeps it to itself
  }

  async #startTls(): Promise<void> {
    await this.#unreachable(async () => {
      try {
        await this.answered(this.client.useTLS({ ...this.settings.tlsOptions }), 'no TLS handshake')
      } catch (error) {
        throw isReply(error) && !isReply(error, 421) ? tlsError(error, this.settings) : error
      }
    })
  }

  async #logIn(): Promise<void> {
    const { username, password } = this.settings
    // not every server takes it before the login; a name or password beyond ASCII may need it there
    await this.answered(this.client.sendIgnoringError('OPTS UTF8 ON'), 'no reply to OPTS')
    try {
      await this.answered(this.client.login(username, password), 'no reply to the login')
    } catch (error) {
      throw ftpError(error, `The login as ${username}`, this.settings)
    }
  }

  async #prepare(): Promise<void> {
    const { client, settings } = this
    try {
      this.features = await this.answered(client.features(), 'no reply to FEAT')
      await this.command('TYPE I')
      await this.answered(client.sendIgnoringError('OPTS UTF8 ON'), 'no reply to OPTS')
    } catch (error) {
      throw ftpError(error, 'Preparing the connection', settings)
    }
    if (settings.tls === 'none') return
    try {
      await this.command('PBSZ 0')
      await this.command('PROT P') // RFC 4217, 9: the data connections are to be encrypted as well
    } catch (error) {
      throw isReply(error) && !isReply(error, 421)
        ? tlsError(error, settings)
        : ftpError(error, 'Preparing the connection', settings)
    }
  }

  async #enterRoot(): Promise<void> {
    const { pathPrefix, create, location } = this.settings
    try {
      if (pathPrefix !== '') {
        if (create) await this.#makeRoot()
        await this.command(`CWD ${pathPrefix}`)
      }
      this.root = this.#pathFrom(await this.command('PWD'))
    } catch (error) {
      if (!isRefusal(error)) throw ftpError(error, 'Entering the folder', this.settings)
      throw new VarveError(
        'STORAGE_NOT_FOUND',
        `The folder of ${location} cannot be entered: ${replyText(error, this.settings)}. Make it, or correct pathPrefix; it may also be that the user has no right to enter it.`,
        { context: { location, pathPrefix }, cause: error },
      )
    }
  }

  async #makeRoot(): Promise<void> {
    const names = this.settings.pathPrefix.split('/')
    let path = ''
    for (const [index, name] of names.entries()) {
      path = index === 0 ? name : `${path}/${name}`
      if (name === '' || name === '.') continue
      try {
        await this.command(`MKD ${path}`)
      } catch (error) {
        if (!isRefusal(error)) throw error // refused: it is there, or CWD will say what is wrong
      }
    }
  }

  /** The path in a reply to `PWD`, whose quotes are doubled (RFC 959, appendix II). */
  #pathFrom(reply: FTPResponse): string {
    const quoted = /"((?:[^"]|"")*)"/.exec(reply.message)?.[1]
    if (quoted === undefined) throw protocolError('names no folder in its reply to PWD', reply, this.settings)
    return quoted.replaceAll('""', '"').replace(/\/$/, '')
  }
}
