import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { VarveError } from '../src/errors.ts'
import { MemoryTarget } from './memory-target.ts'
import { flipBit, LAYERS, restore, stored } from './restored-in-memory.ts'

// Much work for a machine that has other work to do.
vi.setConfig({ testTimeout: 30_000 })

describe('a restore that is given up', () => {
  test('ends with the reason of the signal, and aborts the target when nothing is in flight', {
    timeout: FUZZ_TIMEOUT_MS,
  }, async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(90), async after => {
        const backups = await stored(LAYERS, { chunkSize: 10_000 })
        const controller = new AbortController()
        const reason = new Error('the operator left')
        let calls = 0
        const tick = async (): Promise<void> => {
          if (calls++ === after) controller.abort(reason)
          await new Promise(setImmediate)
        }
        const options = backups.storage
        const get = options.get.bind(options)
        options.get = async (key, getOptions) => {
          await tick()
          return get(key, getOptions)
        }
        const { error, target } = await restore(backups, { signal: controller.signal, onWrite: tick })
        if (target?.state === 'finished') return // it was done before it could be given up
        expect(controller.signal.aborted).toBe(true)
        expect(error).toMatchObject({ code: 'ABORTED', cause: reason })
        expect(target?.state ?? 'aborted').toBe('aborted')
      }),
      fuzz(12),
    )
  })

  test('by the target ends with the error of the first write that failed', async () => {
    const { error, target } = await restore(await stored(), {
      async onWrite(offset, options) {
        if (offset > 300_000) throw new VarveError('TARGET_FULL', 'full')
        await new Promise<void>(resolve =>
          options?.signal?.addEventListener('abort', () => setImmediate(resolve), { once: true }),
        )
      },
    })
    expect(error).toMatchObject({ code: 'TARGET_FULL' })
    expect(target?.state).toBe('aborted')
  })

  test('by the listener of progress ends with its error', async () => {
    const view = new Error('the view is broken')
    const { error, target } = await restore(await stored(), {
      onProgress(done) {
        if (done > 0) throw view
      },
    })
    expect(error).toBe(view)
    expect(target?.state).toBe('aborted')
  })

  test('by an abort while the target is made is told as one', async () => {
    const controller = new AbortController()
    const { error } = await restore(await stored(), {
      signal: controller.signal,
      async createTarget() {
        controller.abort()
        throw new Error('the request was given up')
      },
    })
    expect(error).toMatchObject({ code: 'ABORTED' })
  })

  test('tells of a target that could not be removed, with what made it fail', async () => {
    const backups = await stored()
    flipBit(backups.storage, backups.images[0] ?? '', 800_000)
    const { error } = await restore(backups, {
      async createTarget(merged) {
        const target = new MemoryTarget(merged)
        target.abort = () => Promise.reject(new Error('read-only file system'))
        return target
      },
    })
    expect(error).toMatchObject({
      code: 'DIGEST_MISMATCH',
      message: expect.stringMatching(/another digest.*read-only file system/s),
    })
  })
})
