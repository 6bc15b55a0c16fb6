import { readFileSync } from 'node:fs'
import {
  type ClientRequest,
  Agent as HttpAgent,
  type IncomingMessage,
  request as requestHttp,
} from 'node:http'
import { Agent as HttpsAgent, request as requestHttps } from 'node:https'
import { Readable } from 'node:stream'
import { rootCertificates } from 'node:tls'
import { abortError, errorMessage, VarveError } from '@varve/core'
import { chunkSent } from './upload-stream.ts'

/** More than any sensible number of parts at once. */
const MAX_SOCKETS = 256
/** How long a server that does not know `Expect: 100-continue` is waited for; as curl does. */
const CONTINUE_TIMEOUT_MS = 1000
/** The bytes of one write, so that the progress of a large chunk is seen. */
const WRITE_SIZE = 256 * 1024

/** Options of {@link HttpHandler}. */
export interface HttpHandlerOptions {
  /** How long the server may make no progress, in milliseconds. */
  timeoutMs: number
  /** PEM text or an absolute path. */
  ca?: string | undefined
}

/** A request as the SDK gives it to its handler. */
export interface SdkRequest {
  method: string
  protocol: string
  hostname: string
  port?: number
  path: string
  query?: Record<string, string | string[] | null>
  headers: Record<string, string>
  body?: unknown
}

/** An answer as the SDK takes it. */
export interface SdkResponse {
  statusCode: number
  headers: Record<string, string>
  body: IncomingMessage
}

/**
 * Sends the SDK's requests by `node:http` and `node:https`. The SDK's own handler counts a source that stalls,
 * or a reader that is slow, as a server that is silent, and cannot tell when a chunk has been sent.
 */
export class HttpHandler {
  readonly #options: HttpHandlerOptions
  readonly #http = new HttpAgent({ keepAlive: true, maxSockets: MAX_SOCKETS })
  #https: HttpsAgent | undefined

  constructor(options: HttpHandlerOptions) {
    this.#options = options
  }

  /** Resolves when the head of the answer is there. A body that is a stream is destroyed when it fails. */
  async handle(
    request: SdkRequest,
    { abortSignal }: { abortSignal?: AbortSignal } = {},
  ): Promise<{ response: SdkResponse }> {
    if (abortSignal?.aborted) {
      if (request.body instanceof Readable) request.body.destroy() // nobody listens yet to hear of an error
      throw abortError(abortSignal)
    }
    const { promise, resolve, reject } = Promise.withResolvers<{ response: SdkResponse }>()
    const sent = this.#start(request)
    const exchange = new Exchange(sent, request, this.#options.timeoutMs)
    const giveUp = () => abortSignal && exchange.fail(abortError(abortSignal))
    abortSignal?.addEventListener('abort', giveUp, { once: true })
    sent.on('error', error => {
      exchange.end(error)
      reject(error)
    })
    sent.on('close', () => {
      exchange.end()
      abortSignal?.removeEventListener('abort', giveUp)
      reject(Object.assign(new Error('the connection was closed without an answer'), { code: 'ECONNRESET' }))
    })
    sent.on('response', response => {
      if (!exchange.answered(response)) return
      resolve({
        response: { statusCode: response.statusCode ?? 0, headers: headersOf(response), body: response },
      })
    })
    exchange.begin()
    return promise
  }

  /** Ends the connections. */
  destroy(): void {
    this.#http.destroy()
    this.#https?.destroy()
  }

  #start({ method, protocol, hostname, port, path, query, headers }: SdkRequest): ClientRequest {
    const search = queryString(query)
    const options = {
      method,
      host: hostname.replace(/^\[|\]$/g, ''), // an IPv6 address
      port,
      path: search === '' ? path : `${path}?${search}`,
      headers,
    }
    if (protocol === 'http:') return requestHttp({ ...options, agent: this.#http })
    this.#https ??= new HttpsAgent({ keepAlive: true, maxSockets: MAX_SOCKETS, ...trust(this.#options.ca) })
    return requestHttps({ ...options, agent: this.#https })
  }
}

/** One request and its answer: sends the body and sees that the server goes on. */
class Exchange {
  readonly #sent: ClientRequest
  readonly #body: unknown
  readonly #expects: boolean
  readonly #timeoutMs: number
  #watch: NodeJS.Timeout | undefined
  #continueTimer: NodeJS.Timeout | undefined
  #response: IncomingMessage | undefined
  /** The bytes of the body, where the head of the request tells them. */
  readonly #length: number | undefined
  #written = 0
  #unsent = 0
  #sending = false
  #bodyEnded = false
  #progress = 0
  #begunAt = 0
  #sentAt = 0

  constructor(sent: ClientRequest, request: SdkRequest, timeoutMs: number) {
    this.#sent = sent
    this.#body = request.body
    this.#expects = headerOf(request, 'expect') !== undefined
    const length = headerOf(request, 'content-length')
    this.#length = length === undefined ? undefined : Number(length)
    this.#timeoutMs = timeoutMs
  }

  begin(): void {
    this.#startWatch()
    if (this.#body instanceof Readable) this.#body.on('error', error => this.fail(error))
    if (this.#expects) {
      this.#sent.once('continue', () => this.#send())
      this.#sent.once('socket', () => {
        this.#continueTimer = setTimeout(() => this.#send(), CONTINUE_TIMEOUT_MS)
      })
    } else this.#send()
  }

  /** Takes the head of the answer; false where it cannot be true, which fails the request. */
  answered(response: IncomingMessage): boolean {
    clearTimeout(this.#continueTimer)
    const { statusCode = 0 } = response
    const isSuccess = statusCode >= 200 && statusCode < 300
    if (isSuccess && !this.#bodyEnded && this.#written !== this.#length) {
      this.fail(new Error(`the storage answered ${statusCode} before it was sent all of the body`))
      return false
    }
    this.#response = response
    if (this.#bodyEnded) return true
    // Refused before all was sent: the rest is not, and nothing else can use the connection.
    this.#sending = true
    this.#bodyEnded = true
    if (this.#body instanceof Readable) this.#body.destroy()
    response.once('end', () => this.#sent.destroy())
    return true
  }

  fail(error: Error): void {
    this.#response?.destroy(error)
    this.#sent.destroy(error)
  }

  end(error?: Error): void {
    clearInterval(this.#watch)
    clearTimeout(this.#continueTimer)
    if (this.#body instanceof Readable) this.#body.destroy(error)
  }

  #send(): void {
    clearTimeout(this.#continueTimer)
    if (this.#sending) return
    this.#sending = true
    this.#begunAt = this.#sentAt = performance.now()
    const body = this.#body
    if (!(body instanceof Readable)) {
      this.#bodyEnded = true
      this.#sent.end(body ?? undefined)
      return
    }
    body.on('data', chunk => {
      if (!this.#write(chunk)) body.pause()
    })
    body.on('end', () => {
      this.#bodyEnded = true
      this.#sent.end()
    })
    this.#sent.on('drain', () => body.resume())
  }

  #write(chunk: Buffer): boolean {
    if (this.#sent.destroyed || this.#bodyEnded) return false
    let more = true
    for (let start = 0; start < chunk.byteLength; start += WRITE_SIZE) {
      const piece = chunk.subarray(start, start + WRITE_SIZE)
      const last = start + WRITE_SIZE >= chunk.byteLength
      this.#written += piece.byteLength
      this.#unsent += piece.byteLength
      more = this.#sent.write(piece, error => {
        if (error) return
        this.#unsent -= piece.byteLength
        this.#progress += piece.byteLength
        this.#sentAt = performance.now()
        if (last) chunkSent(chunk)
      })
    }
    return more
  }

  /** A timer that looks now and then costs nothing for each chunk. */
  #startWatch(): void {
    let seen = -1
    let since = performance.now()
    this.#watch = setInterval(
      () => {
        const progress = this.#progress + (this.#sent.socket?.bytesRead ?? 0)
        if (progress !== seen || this.#waitsForOthers()) {
          seen = progress
          since = performance.now()
        } else if (performance.now() - since >= this.#longestSilence()) {
          const message = `the server made no progress for ${this.#longestSilence() / 1000} s`
          this.fail(Object.assign(new Error(message), { code: 'ETIMEDOUT' }))
        }
      },
      Math.max(1, this.#timeoutMs / 8),
    )
  }

  /** How long nothing may be seen to happen, in milliseconds. */
  #longestSilence(): number {
    if (this.#response || !this.#bodyEnded || this.#unsent > 0) return this.#timeoutMs
    // what the system still holds of the body takes no longer than all of it took to get there
    return this.#timeoutMs + Math.min(this.#sentAt - this.#begunAt, 10 * this.#timeoutMs)
  }

  /** Whether it is not the server that is waited for. */
  #waitsForOthers(): boolean {
    if (this.#response) return this.#response.complete || this.#response.readableLength > 0 // the reader is slow
    if (!this.#sent.socket) return true // all connections are in use
    return this.#sending && !this.#bodyEnded && this.#unsent === 0 // the source is slow
  }
}

function headerOf({ headers }: SdkRequest, wanted: string): string | undefined {
  return Object.entries(headers).find(([name]) => name.toLowerCase() === wanted)?.[1]
}

function headersOf(response: IncomingMessage): Record<string, string> {
  const headers: Record<string, string> = {}
  for (const [name, value] of Object.entries(response.headers)) {
    if (value !== undefined) headers[name] = Array.isArray(value) ? value.join(', ') : value
  }
  return headers
}

/** As the SDK's signer writes it: by RFC 3986, names in order. */
function queryString(query: SdkRequest['query'] = {}): string {
  const parts: string[] = []
  for (const name of Object.keys(query).sort()) {
    const value = query[name]
    const key = encode(name)
    if (Array.isArray(value)) for (const item of value) parts.push(`${key}=${encode(item)}`)
    else parts.push(value ? `${key}=${encode(value)}` : value === '' ? `${key}=` : key)
  }
  return parts.join('&')
}

function encode(text: string): string {
  return encodeURIComponent(text).replace(
    /[!'()*]/g,
    sign => `%${sign.charCodeAt(0).toString(16).toUpperCase()}`,
  )
}

function trust(ca: string | undefined): { ca?: string[] } {
  if (ca === undefined) return {}
  try {
    return { ca: [...rootCertificates, ca.startsWith('/') ? readFileSync(ca, 'utf8') : ca] }
  } catch (error) {
    throw new VarveError(
      'INVALID_CONFIG',
      `The certificate authority ${ca} of an S3 storage cannot be read: ${errorMessage(error)}.`,
      { context: { field: 'ca', path: ca }, cause: error },
    )
  }
}
