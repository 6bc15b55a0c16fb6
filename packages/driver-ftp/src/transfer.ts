import type { Socket } from 'node:net'
import { TLSSocket } from 'node:tls'
import type { FTPResponse } from 'basic-ftp'
import type { FtpConnection } from './connection.ts'
import { isReply } from './ftp-error.ts'
import { openDataConnection } from './passive.ts'

/** How long the reply to a transfer that was broken off is waited for, in milliseconds. */
const GRACE_MS = 5_000

/** Options of {@link Transfer.begin}. */
export interface TransferOptions {
  /** Where in the file it begins, in bytes. Default: 0. */
  offset?: number
  /** Called right before the command is sent: until there is a reply, the server may carry it out at any time. */
  onSend?: () => void
}

/** A command that moves data, with its data connection. Who begins one ends it, by `finish` or by `abandon`. */
export class Transfer {
  /** The data connection, connected and encrypted where it should be. */
  readonly socket: Socket
  /** The server's last word on the transfer, or why there is none. */
  readonly reply: Promise<FTPResponse>
  readonly #connection: FtpConnection

  private constructor(connection: FtpConnection, socket: Socket, reply: Promise<FTPResponse>) {
    this.#connection = connection
    this.socket = socket
    this.reply = reply
  }

  /** Begins a transfer, and waits until the server has agreed to it. */
  static async begin(
    connection: FtpConnection,
    command: string,
    { offset = 0, onSend }: TransferOptions = {},
  ): Promise<Transfer> {
    const socket = await openDataConnection(connection)
    socket.on('error', () => undefined) // the 'close' that follows is what is looked at
    const encrypted = handshake(socket)
    encrypted.catch(() => undefined) // looked at once the server has agreed
    let transfer: Transfer | undefined
    try {
      if (offset > 0) await connection.command(`REST ${offset}`)
      const { promise: agreed, resolve } = Promise.withResolvers<void>()
      onSend?.()
      const reply: Promise<FTPResponse> = connection.client.ftp.handle(command, (response, task) => {
        if (response instanceof Error) task.reject(response)
        else if (response.code < 200) resolve()
        else if (response.code < 300) task.resolve(response)
        else task.reject(new Error(`the server wants more after ${response.code}`))
      })
      reply.catch(() => undefined) // looked at later
      transfer = new Transfer(connection, socket, reply)
      const [verb = ''] = command.split(' ', 1)
      await connection.answered(Promise.race([agreed, reply]), `no reply to ${verb}`)
      await connection.answered(Promise.race([encrypted, refused(reply)]), 'no TLS on the data connection')
      return transfer
    } catch (error) {
      if (transfer) await transfer.abandon()
      else socket.destroy()
      throw error
    }
  }

  /** Waits for the server's last word, which says that it has all. */
  async finish(timeoutMs?: number): Promise<FTPResponse> {
    const reply = await this.#connection.answered(this.reply, 'no end of a transfer', timeoutMs)
    this.socket.destroy()
    return reply
  }

  /**
   * Breaks it off, and waits until the server has noticed: the connection can be used again after that, or is
   * closed. Returns what the server says went wrong, where it is the server that broke it off.
   */
  async abandon(): Promise<unknown> {
    this.socket.destroy()
    const timeoutMs = Math.min(GRACE_MS, this.#connection.settings.timeoutMs)
    try {
      await this.#connection.answered(this.reply, 'no end of a transfer', timeoutMs)
    } catch (error) {
      if (isReply(error)) return error
      this.#connection.close()
    }
    return undefined
  }
}

/**
 * Waits for the end of the TLS handshake that has just begun, where there is one. What is ended before it is cut off,
 * and a socket that takes up a session names a cipher from its beginning.
 */
async function handshake(socket: Socket): Promise<void> {
  if (!(socket instanceof TLSSocket)) return
  await new Promise<void>((resolve, reject) => {
    socket.once('secureConnect', resolve)
    socket.once('error', reject)
    socket.once('close', () => reject(new Error('the data connection was closed during the TLS handshake')))
  })
}

/** Fails when the transfer does, and never resolves otherwise. */
async function refused(reply: Promise<unknown>): Promise<never> {
  await reply
  return new Promise<never>(() => undefined)
}
