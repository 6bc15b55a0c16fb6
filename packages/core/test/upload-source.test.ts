import { Readable } from 'node:stream'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { VarveError } from '../src/errors.ts'
import { bytesBody, type UploadBody } from '../src/storage.ts'
import { type ReadUploadOptions, readUpload } from '../src/upload-source.ts'

async function collect(body: UploadBody, options: Partial<ReadUploadOptions> = {}): Promise<Uint8Array[]> {
  const chunks: Uint8Array[] = []
  for await (const chunk of readUpload(body, { key: 'k', ...options })) chunks.push(chunk)
  return chunks
}

function bodyOf(stream: Readable, size?: number): UploadBody {
  return { replayable: false, open: () => stream, ...(size === undefined ? {} : { size }) }
}

function failed(message: string) {
  return { code: 'UPLOAD_FAILED', message: expect.stringContaining(message) }
}

describe('readUpload', () => {
  test('every chunk is the very one that the source gave, also when several wait', async () => {
    const chunks = Array.from({ length: 50 }, (_, index) => Buffer.alloc(10, index))
    const stream = new Readable({ highWaterMark: 1000, read: () => undefined })
    for (const chunk of [...chunks, null]) stream.push(chunk)
    const got = await collect(bodyOf(stream, 500))
    expect(got).toHaveLength(50)
    got.forEach((chunk, index) => {
      expect(chunk).toBe(chunks[index])
    })
  })

  test('the bytes are the same however they are cut, and empty chunks are left out', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.uint8Array({ maxLength: 40 })),
        fc.boolean(),
        async (parts, objectMode) => {
          const whole = Buffer.concat(parts)
          const stream = Readable.from(parts, { objectMode, highWaterMark: 1 })
          const got = await collect(bodyOf(stream, whole.byteLength))
          expect(Buffer.concat(got).equals(whole)).toBe(true)
          expect(got.every(chunk => chunk.byteLength > 0)).toBe(true)
        },
      ),
    )
  })

  test('a range of a body has the size of the range', async () => {
    const body = bytesBody(Buffer.from('0123456789'))
    const got = await collect(body, { range: { start: 3, end: 7 } })
    expect(String(Buffer.concat(got))).toBe('3456')
  })

  test.each([
    ['too short', 4, 'ended after 3 of 4 bytes'],
    ['too long', 2, 'more than the 2 bytes'],
  ])('a source that is %s is a failed upload', async (_, size, message) => {
    const stream = Readable.from([Buffer.from('abc')])
    await expect(collect(bodyOf(stream, size))).rejects.toMatchObject(failed(message))
    expect(stream.destroyed).toBe(true)
  })

  test('an error of the source is the cause; a VarveError is thrown as it is', async () => {
    const error = new Error('boom')
    const failing = () =>
      new Readable({
        read() {
          this.destroy(error)
        },
      })
    await expect(collect(bodyOf(failing()))).rejects.toMatchObject({
      ...failed('boom. See that what is uploaded is there'),
      cause: error,
    })
    const typed = new VarveError('NBD_FAILED', 'gone')
    const failingTyped = new Readable({
      read() {
        this.destroy(typed)
      },
    })
    await expect(collect(bodyOf(failingTyped))).rejects.toBe(typed)
  })

  test('a source that had failed or was destroyed before is a failed upload', async () => {
    const broken = new Readable({ read: () => undefined })
    broken.on('error', () => undefined).destroy(new Error('boom'))
    await expect(collect(bodyOf(broken))).rejects.toMatchObject(failed('boom'))
    const destroyed = new Readable({ read: () => undefined }).destroy()
    await expect(collect(bodyOf(destroyed))).rejects.toMatchObject(failed(''))
  })

  test('text and objects are no bytes', async () => {
    const text = Readable.from(['text'])
    await expect(collect(bodyOf(text))).rejects.toMatchObject(failed('string in place of bytes'))
  })

  test('an abort ends a source that gives nothing and never closes', async () => {
    const controller = new AbortController()
    const reason = new Error('enough')
    async function* stuck() {
      yield Buffer.from('x')
      controller.abort(reason)
      await new Promise(() => undefined)
    }
    const stream = Readable.from(stuck())
    const upload = collect(bodyOf(stream), { signal: controller.signal })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED', cause: reason })
    expect(stream.destroyed).toBe(true)
  })

  test('an upload that was given up before does not open its source', async () => {
    const open = () => expect.unreachable('opened')
    const upload = collect({ replayable: true, open }, { signal: AbortSignal.abort() })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
  })

  test('a source that fails while it is destroyed ends no process', async () => {
    const closed = Promise.withResolvers<void>()
    const stream = new Readable({
      read() {
        this.push(Buffer.from('x'))
      },
      destroy(_error, done) {
        done(new Error('late'))
        closed.resolve()
      },
    })
    for await (const _ of readUpload(bodyOf(stream), { key: 'k' })) break
    expect(stream.destroyed).toBe(true)
    await closed.promise
  })

  test('the source is asked for no more than is taken, but for what its own buffer holds', async () => {
    let given = 0
    const stream = new Readable({
      highWaterMark: 1,
      read() {
        given++
        this.push(Buffer.from('x'))
      },
    })
    const chunks = readUpload(bodyOf(stream), { key: 'k' })
    await chunks.next()
    await new Promise(resolve => setImmediate(resolve))
    expect(given).toBeLessThanOrEqual(3)
    await chunks.return(undefined)
  })
})
