import { describe, expect, it } from 'vitest'
import { VarveError } from '../src/errors.ts'
import { fanOut } from '../src/fan-out.ts'

const never = new AbortController().signal

/** Work whose every item ends when the test says so. */
function heldWork() {
  const started: number[] = []
  const signals: AbortSignal[] = []
  const ends = new Map<number, PromiseWithResolvers<string>>()
  const work = async (item: number, signal: AbortSignal): Promise<string> => {
    started.push(item)
    signals.push(signal)
    const end = Promise.withResolvers<string>()
    ends.set(item, end)
    return end.promise
  }
  return { started, signals, work, end: (item: number) => ends.get(item) ?? expect.fail() }
}

/** Lets everything happen that needs no event from outside. */
const settled = () => new Promise(resolve => setImmediate(resolve))

describe('fanning out', () => {
  it('resolves in the order of the items, in whatever order they end', async () => {
    const { work, end } = heldWork()
    const all = fanOut([1, 2, 3], { concurrency: 3, signal: never }, work)
    await settled()
    for (const item of [3, 1, 2]) end(item).resolve(`did ${item}`)
    await expect(all).resolves.toEqual(['did 1', 'did 2', 'did 3'])
  })

  it('of nothing is nothing', async () => {
    await expect(fanOut([], { concurrency: 2, signal: never }, heldWork().work)).resolves.toEqual([])
  })

  it('does no more at once than it may', async () => {
    const { work, end, started } = heldWork()
    const all = fanOut([1, 2, 3], { concurrency: 2, signal: never }, work)
    await settled()
    expect(started).toEqual([1, 2])
    end(2).resolve('')
    await settled()
    expect(started).toEqual([1, 2, 3])
    end(1).resolve('')
    end(3).resolve('')
    await all
  })

  it('gives the others up at the first failure, and throws it when all have ended', async () => {
    const { work, end, started, signals } = heldWork()
    let thrown: unknown
    const all = fanOut([1, 2, 3], { concurrency: 2, signal: never }, work).catch(error => {
      thrown = error
    })
    await settled()
    const failure = new VarveError('STORAGE_FAILED', 'first')
    end(2).reject(failure)
    await settled()
    expect(signals.map(({ aborted }) => aborted)).toEqual([true, true])
    expect(started).toEqual([1, 2])
    expect(thrown).toBeUndefined()
    end(1).reject(new VarveError('ABORTED', 'second'))
    await all
    expect(thrown).toBe(failure)
  })

  it('is ABORTED when it is given up, whatever the work says', async () => {
    const { work, end, started } = heldWork()
    const controller = new AbortController()
    const all = fanOut([1, 2], { concurrency: 1, signal: controller.signal }, work)
    await settled()
    controller.abort(new Error('enough'))
    end(1).resolve('done')
    await expect(all).rejects.toMatchObject({ code: 'ABORTED', message: 'Given up: enough' })
    expect(started).toEqual([1])
  })
})
