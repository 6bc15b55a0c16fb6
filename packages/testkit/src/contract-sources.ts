import { Readable } from 'node:stream'
import { bytesBody, toUploadBody, VarveError } from '@varve/core'
import { describe, expect, test } from 'vitest'
import {
  anotherError,
  begin,
  type Contract,
  errorOf,
  expectNothing,
  expectStored,
  place,
} from './contract-target.ts'
import { patternBytes } from './pattern.ts'
import { PatternBody } from './pattern-body.ts'
import { bodyOf, type Trouble, troubledSource } from './troubled-source.ts'

const never = new Promise<never>(() => undefined)

/** Sources that fail, lie about their size, stall, or are given up: nothing of them may stay. */
export function describeSources(contract: Contract): void {
  describe('sources', () => {
    const goodBytes = contract.streamSize / 2
    const boom = new Error('the source broke')
    const brief = contract.brief
    const troubles: [string, Trouble, number[]][] = [
      ['fails', { kind: 'fail', error: boom }, brief ? [0, goodBytes] : [0, 1, goodBytes]],
      ['is cut off', { kind: 'vanish' }, brief ? [goodBytes] : [0, 1, goodBytes]],
    ]
    describe.each(troubles)('a source that %s', (_, trouble, after) => {
      test.each(after)('after %d bytes is a failed upload and leaves nothing', async bytes => {
        const target = await begin(contract.create)
        const source = troubledSource(trouble, { bytes })
        await expect(target.driver.put('a/b', source)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
        await expectNothing(target)
      })

      test('after all of the promised bytes is a failed upload too', async () => {
        const target = await begin(contract.create)
        const body = bodyOf(goodBytes, () => troubledSource(trouble, { bytes: goodBytes }))
        await expect(target.driver.put('a/b', body)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
        await expectNothing(target)
      })

      if (brief && trouble.kind !== 'fail') return // to a driver both are an error of the source
      test('leaves the former object as it was', async () => {
        const target = await begin(contract.create)
        const former = patternBytes(9, 0, 5000)
        await place(target, 'a/b', former)
        const source = troubledSource(trouble, { bytes: goodBytes })
        await expect(target.driver.put('a/b', source)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
        await expectStored(target, 'a/b', former)
      })
    })

    const lies: [string, number][] = [
      ['shorter by one byte', goodBytes + 1],
      ['longer by one byte', goodBytes - 1],
      ['not empty, as it should be,', 0],
    ]
    if (!brief) lies.push(['much shorter', 100 * goodBytes], ['longer by a lot', 10])
    test.each(lies)('a source that is %s than its size is a failed upload', async (_, size) => {
      const target = await begin(contract.create)
      const body = bodyOf(size, () => troubledSource({ kind: 'end' }, { bytes: goodBytes }))
      await expect(target.driver.put('a/b', body)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
      await expectNothing(target)
    })

    test('a source that never ends fails when it runs over its size', async () => {
      const target = await begin(contract.create)
      const endless = bodyOf(
        goodBytes,
        () =>
          new Readable({
            read: function () {
              this.push(Buffer.alloc(65_536))
            },
          }),
      )
      await expect(target.driver.put('a/b', endless)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
      await expectNothing(target)
    })

    test('an upload that is given up before it begins reads nothing and leaves nothing', async () => {
      const target = await begin(contract.create)
      const source = troubledSource({ kind: 'end' }, { bytes: goodBytes })
      const upload = target.driver.put('a/b', source, { signal: AbortSignal.abort(anotherError) })
      await expect(upload).rejects.toMatchObject({ ...errorOf('ABORTED'), cause: anotherError })
      expect(source.readableDidRead).toBe(false)
      expect(source.destroyed).toBe(true)
      await expectNothing(target)
    })

    test.each([0, goodBytes])(
      'an upload whose source stalls after %d bytes can be given up and leaves nothing',
      async bytes => {
        const target = await begin(contract.create)
        const controller = new AbortController()
        const source = troubledSource(
          { kind: 'wait', resumed: never, size: 2 * goodBytes },
          { bytes, onTaken: () => controller.abort(anotherError) },
        )
        const upload = target.driver.put('a/b', source, { signal: controller.signal })
        await expect(upload).rejects.toMatchObject(errorOf('ABORTED'))
        expect(source.destroyed).toBe(true)
        await expectNothing(target)
      },
    )

    test('a large upload can be given up while it runs, and the former object stays', async () => {
      const target = await begin(contract.create)
      await place(target, 'large', Buffer.from('former'))
      const controller = new AbortController()
      const body = new PatternBody({ size: contract.largeSize })
      const upload = target.driver.put('large', body, {
        signal: controller.signal,
        onProgress: bytes => bytes > contract.largeSize / 3 && controller.abort(anotherError),
      })
      await expect(upload).rejects.toMatchObject(errorOf('ABORTED'))
      expect(body.faults).toEqual([])
      await expectStored(target, 'large', Buffer.from('former'))
    })

    test.each([
      ['at first', 1, boom],
      ['when all is written', goodBytes, new VarveError('STORAGE_UNREACHABLE', 'boom', { retryable: true })],
    ])('an upload whose onProgress throws %s fails with that and leaves nothing', async (_, least, error) => {
      const target = await begin(contract.create)
      const body = new PatternBody({ size: goodBytes, seed: 3 })
      let thrown = false
      const onProgress = (bytes: number) => {
        if (thrown || bytes < least) return
        thrown = true
        throw error
      }
      await expect(target.driver.put('a/b', body, { onProgress })).rejects.toBe(error)
      expect(body.faults).toEqual([])
      await expectNothing(target)
    })

    test('a signal that fires after the upload changes nothing', async () => {
      const target = await begin(contract.create)
      const controller = new AbortController()
      await target.driver.put('done', bytesBody(Buffer.from('x')), { signal: controller.signal })
      controller.abort()
      await expectStored(target, 'done', Buffer.from('x'))
    })

    test('after a failed upload the same key takes the next one', async () => {
      const target = await begin(contract.create)
      const source = troubledSource({ kind: 'fail', error: boom }, { bytes: goodBytes })
      await expect(target.driver.put('again', source)).rejects.toMatchObject(errorOf('UPLOAD_FAILED'))
      await target.driver.put('again', toUploadBody(Readable.from([Buffer.from('whole')])))
      await expectStored(target, 'again', Buffer.from('whole'))
    })
  })
}
