import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { buffer } from 'node:stream/consumers'
import { crc32 } from 'node:zlib'
import type { S3DriverOptions } from '@varve/driver-s3'

/** The calls that {@link FakeS3} knows. */
export type Call =
  | 'put'
  | 'get'
  | 'head'
  | 'list'
  | 'create'
  | 'part'
  | 'complete'
  | 'abort'
  | 'delete'
  | 'uploads'
  | 'parts'

/** What becomes of one call: it is answered before or after it has been carried out. */
export interface Fault {
  readonly when: 'before' | 'after'
  /** An answer with an error of S3 in it, a connection that is cut, or the right answer when a promise resolves. */
  readonly answer: { status: number; code: string; message?: string } | 'cut' | (() => Promise<void>)
}

/** An upload in parts that is neither completed nor aborted. */
export interface FakeUpload {
  readonly key: string
  readonly tag: string | undefined
  readonly begunAt: Date
  readonly parts: Map<number, Buffer>
}

/** Just so much of S3 that it can be made to fail in ways that a real server cannot. */
export class FakeS3 implements AsyncDisposable {
  readonly objects = new Map<string, { bytes: Buffer; tag: string | undefined }>()
  readonly uploads = new Map<string, FakeUpload>()
  /** The calls that came, in order. */
  readonly calls: Call[] = []
  /** The heads of the requests that came. */
  readonly requests: IncomingMessage[] = []
  /** The bodies of `put`, `part` and `complete`, as they came. */
  readonly bodies: Buffer[] = []
  /** What becomes of the next calls of a kind, one after the other. */
  readonly faults = new Map<Call, Fault[]>()
  /** Whether listings encode names, as they are asked to. */
  encodesNames = true
  /** The ETag of an object with these bytes. */
  etagOf: (bytes: Buffer) => string | undefined = etag
  /** Whether `if-match` is looked at. */
  heedsIfMatch = true
  /** Whether a body with a checksum behind it is taken apart, and not stored as it came. */
  knowsTrailers = true
  /** Calls that are answered well, once each, before their body is read. */
  readonly hasty = new Set<Call>()
  /** How many bytes of a range a `get` sends at most. */
  mostOfRange = Number.POSITIVE_INFINITY
  /** Whether listings say that they go on, but not where. */
  endless = false
  /** How many bytes a `get` sends before its connection is cut, once. */
  cutDownloadAfter: number | undefined
  #begun = 0
  readonly #server = createServer((request, response) => {
    this.#serve(request, response).catch(error => response.destroy(error))
  })

  static async start(): Promise<FakeS3> {
    const fake = new FakeS3()
    fake.#server.listen(0, '127.0.0.1')
    await once(fake.#server, 'listening')
    return fake
  }

  get options(): S3DriverOptions {
    const { port } = this.#server.address() as AddressInfo
    return { endpoint: `http://127.0.0.1:${port}`, bucket: 'b', accessKey: 'AK', secretKey: 'the-secret' }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.closeAllConnections()
    this.#server.close()
    await once(this.#server, 'close')
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? '', 'http://s3')
    const call = callOf(request.method ?? '', url)
    this.calls.push(call)
    this.requests.push(request)
    if (this.hasty.delete(call)) return void response.setHeader('etag', '"early"').end()
    const body = await buffer(request)
    if (call === 'put' || call === 'part' || call === 'complete') this.bodies.push(body)
    const fault = this.faults.get(call)?.shift()
    if (fault?.when === 'before') await this.#spoil(response, fault)
    if (response.writableEnded || response.destroyed) return
    const answer = this.#take(call, url, request, body)
    if (fault?.when === 'after') await this.#spoil(response, fault)
    if (!response.writableEnded && !response.destroyed) answer(response)
  }

  async #spoil(response: ServerResponse, { answer }: Fault): Promise<void> {
    if (answer === 'cut') response.destroy()
    else if (typeof answer === 'function') await answer()
    else this.#fail(response, answer.status, answer.code, answer.message)
  }

  /** Carries a call out whose body is as it was sent. */
  #take(call: Call, url: URL, request: IncomingMessage, body: Buffer): (response: ServerResponse) => void {
    if (!this.knowsTrailers || request.headers['content-encoding'] !== 'aws-chunked') {
      return this.#carryOut(call, url, request, body)
    }
    const sent = decoded(body)
    const refusal =
      sent.fault ?? (sent.bytes.length === decodedLength(request) ? undefined : 'IncompleteBody')
    if (refusal !== undefined) {
      return response => this.#fail(response, refusal === 'InvalidChunkSizeError' ? 403 : 400, refusal)
    }
    const answer = this.#carryOut(call, url, request, sent.bytes)
    return response => answer(response.setHeader('x-amz-checksum-crc32', sent.checksum))
  }

  #carryOut(
    call: Call,
    url: URL,
    request: IncomingMessage,
    body: Buffer,
  ): (response: ServerResponse) => void {
    const key = decodeURIComponent(url.pathname.slice('/b/'.length))
    const id = url.searchParams.get('uploadId') ?? ''
    const upload = this.uploads.get(id)
    const tag = request.headers['x-amz-meta-varve-upload']?.toString()
    const object = this.objects.get(key)
    switch (call) {
      case 'put':
        this.objects.set(key, { bytes: body, tag })
        return response => response.setHeader('etag', etag(body)).end()
      case 'create': {
        const made = `upload-${++this.#begun}`
        this.uploads.set(made, { key, tag, begunAt: new Date(), parts: new Map() })
        const xml = `<InitiateMultipartUploadResult><UploadId>${made}</UploadId></InitiateMultipartUploadResult>`
        return response => response.end(xml)
      }
      case 'part':
        upload?.parts.set(Number(url.searchParams.get('partNumber')), body)
        return response => response.setHeader('etag', etag(body)).end()
      case 'complete': {
        if (!upload) return response => this.#fail(response, 404, 'NoSuchUpload')
        const numbers = [...upload.parts.keys()].sort((a, b) => a - b)
        const bytes = Buffer.concat(numbers.map(number => upload.parts.get(number) ?? Buffer.alloc(0)))
        this.objects.set(key, { bytes, tag: upload.tag })
        this.uploads.delete(id)
        return response =>
          response.end('<CompleteMultipartUploadResult><ETag>"x-2"</ETag></CompleteMultipartUploadResult>')
      }
      case 'abort':
        return response => {
          if (this.uploads.delete(id)) response.writeHead(204).end()
          else this.#fail(response, 404, 'NoSuchUpload')
        }
      case 'delete':
        this.objects.delete(key)
        return response => response.writeHead(204).end()
      case 'uploads':
        return response => response.end(this.#listing('ListMultipartUploadsResult', this.#uploadItems()))
      case 'parts':
        return response =>
          response.end(this.#listing('ListPartsResult', partItems(upload?.parts ?? new Map())))
      case 'list':
        return response => response.end(this.#listing('ListBucketResult', this.#objectItems()))
      default: {
        if (!object) return response => this.#fail(response, 404, 'NoSuchKey')
        if (
          this.heedsIfMatch &&
          request.headers['if-match'] &&
          request.headers['if-match'] !== this.etagOf(object.bytes)
        ) {
          return response => this.#fail(response, 412, 'PreconditionFailed')
        }
        return response => this.#send(request, response, object)
      }
    }
  }

  #send(
    request: IncomingMessage,
    response: ServerResponse,
    { bytes, tag }: { bytes: Buffer; tag: string | undefined },
  ): void {
    const [, first, last] = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? '') ?? []
    const start = Number(first ?? 0)
    const wanted = last === undefined ? bytes.length : Math.min(Number(last) + 1, start + this.mostOfRange)
    const part = bytes.subarray(start, wanted)
    if (first !== undefined) {
      response.statusCode = 206
      response.setHeader('content-range', `bytes ${start}-${start + part.length - 1}/${bytes.length}`)
    }
    const tagged = this.etagOf(bytes)
    if (tagged !== undefined) response.setHeader('etag', tagged)
    response.setHeader('content-length', part.length)
    if (tag !== undefined) response.setHeader('x-amz-meta-varve-upload', tag)
    const cut = this.cutDownloadAfter
    this.cutDownloadAfter = undefined
    if (request.method === 'HEAD') response.end()
    else if (cut === undefined) response.end(part)
    else response.write(part.subarray(0, cut), () => response.destroy())
  }

  #listing(name: string, items: string[]): string {
    const encoding = this.encodesNames ? '<EncodingType>url</EncodingType>' : ''
    const truncated = this.endless ? '<IsTruncated>true</IsTruncated>' : ''
    return `<${name}>${encoding}${truncated}${items.join('')}</${name}>`
  }

  #objectItems(): string[] {
    return [...this.objects].map(
      ([key, { bytes }]) =>
        `<Contents><Key>${this.#written(key)}</Key><Size>${bytes.length}</Size></Contents>`,
    )
  }

  #uploadItems(): string[] {
    return [...this.uploads].map(
      ([id, { key, begunAt }]) =>
        `<Upload><Key>${this.#written(key)}</Key><UploadId>${id}</UploadId><Initiated>${begunAt.toISOString()}</Initiated></Upload>`,
    )
  }

  #written(key: string): string {
    return this.encodesNames ? encodeURIComponent(key).replaceAll('%20', '+') : key
  }

  #fail(response: ServerResponse, status: number, code: string, message = 'as told'): void {
    response.statusCode = status
    response.end(`<?xml version="1.0"?><Error><Code>${code}</Code><Message>${message}</Message></Error>`)
  }
}

const LEAST_CHUNK = 8192

/** What is in a body of chunks with a CRC32 behind them, and why S3 would refuse it. */
function decoded(body: Buffer): { bytes: Buffer; checksum: string; fault?: string } {
  const chunks: Buffer[] = []
  let at = 0
  for (;;) {
    const head = body.indexOf('\r\n', at)
    const size = Number.parseInt(body.toString('latin1', at, head), 16)
    at = head + 2
    if (!(size > 0)) break
    chunks.push(body.subarray(at, at + size))
    at += size + 2
  }
  const bytes = Buffer.concat(chunks)
  const [, checksum = ''] = /^x-amz-checksum-crc32:(\S+)\r\n/.exec(body.toString('latin1', at)) ?? []
  const sum = Buffer.alloc(4)
  sum.writeUInt32BE(crc32(bytes))
  if (checksum !== sum.toString('base64')) return { bytes, checksum, fault: 'BadDigest' }
  if (chunks.slice(0, -1).some(chunk => chunk.length < LEAST_CHUNK)) {
    return { bytes, checksum, fault: 'InvalidChunkSizeError' }
  }
  return { bytes, checksum }
}

function decodedLength(request: IncomingMessage): number {
  return Number(request.headers['x-amz-decoded-content-length'])
}

function etag(bytes: Buffer): string {
  return `"${createHash('md5').update(bytes).digest('hex')}"`
}

function partItems(parts: ReadonlyMap<number, Buffer>): string[] {
  const time = new Date().toISOString()
  return [...parts.keys()].map(
    number => `<Part><PartNumber>${number}</PartNumber><LastModified>${time}</LastModified></Part>`,
  )
}

function callOf(method: string, { searchParams, pathname }: URL): Call {
  if (method === 'POST') return searchParams.has('uploads') ? 'create' : 'complete'
  if (method === 'PUT') return searchParams.has('partNumber') ? 'part' : 'put'
  if (method === 'DELETE') return searchParams.has('uploadId') ? 'abort' : 'delete'
  if (method === 'HEAD') return 'head'
  if (searchParams.has('uploads')) return 'uploads'
  if (searchParams.has('uploadId')) return 'parts'
  return pathname.length > '/b/'.length ? 'get' : 'list'
}
