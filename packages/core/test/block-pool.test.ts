import { expect, test } from 'vitest'
import { BlockPool } from '../src/block-pool.ts'

const { signal } = new AbortController()

/** A pool of eight slots. */
function smallPool(): BlockPool {
  return new BlockPool(8 * 1024, 1024)
}

/** Whether a promise has settled once all that is due has run. */
async function settled(promise: Promise<unknown>): Promise<boolean> {
  let done = false
  const mark = (): void => {
    done = true
  }
  promise.then(mark, mark)
  await new Promise(setImmediate)
  return done
}

test('a pool makes as many slots as fit in its memory, and then waits for one to come back', async () => {
  const pool = new BlockPool(10 * 1024 + 5, 1024)
  const slots = await Promise.all(Array.from({ length: 10 }, () => pool.acquire(signal)))
  expect(new Set(slots).size).toBe(10)
  const next = pool.acquire(signal)
  const after = pool.acquire(signal)
  expect(await settled(next)).toBe(false)
  const [first, second] = slots
  if (!first || !second) throw new Error('no slots')
  pool.release(second)
  pool.release(first)
  expect(await next).toBe(second) // first come, first served
  expect(await after).toBe(first)
})

test('a slot uses its memory again', async () => {
  const [slot] = [await smallPool().acquire(signal)]
  const first = slot.allocate(1000, 1024)
  const { buffer } = first
  expect(slot.allocate(24, 1024)).toMatchObject({ buffer, length: 24 })
})

test('whoever waits for a slot can give up, and takes none then', async () => {
  const pool = smallPool()
  const slots = await Promise.all(Array.from({ length: 8 }, () => pool.acquire(signal)))
  const controller = new AbortController()
  const given = pool.acquire(controller.signal)
  const waiting = pool.acquire(signal)
  controller.abort(new Error('enough'))
  await expect(given).rejects.toMatchObject({ code: 'ABORTED' })
  await expect(pool.acquire(controller.signal)).rejects.toMatchObject({ code: 'ABORTED' })
  for (const slot of slots.slice(0, 1)) pool.release(slot)
  expect(await waiting).toBe(slots[0])
})

test('cached blocks leave four slots for others: the one kept longest is evicted', async () => {
  const pool = smallPool()
  const evicted: number[] = []
  for (let block = 0; block < 6; block++) pool.keep(await pool.acquire(signal), () => evicted.push(block))
  expect(evicted).toStrictEqual([0, 1])
  const free = await Promise.all(Array.from({ length: 4 }, () => pool.acquire(signal)))
  expect(await settled(pool.acquire(signal))).toBe(false)
  expect(new Set(free).size).toBe(4)
})

test('a pool is idle when no slot is in use, whether free or kept', async () => {
  const pool = smallPool()
  await pool.idle()
  const [one, two] = [await pool.acquire(signal), await pool.acquire(signal)]
  const idle = pool.idle()
  pool.release(one)
  expect(await settled(idle)).toBe(false)
  pool.keep(two, () => undefined)
  expect(await settled(idle)).toBe(true)
  pool.take(two)
  expect(await settled(pool.idle())).toBe(false)
})
