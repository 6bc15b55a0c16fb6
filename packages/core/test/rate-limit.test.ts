import { expect, test } from 'vitest'
import { type Clock, RateLimit } from '../src/rate-limit.ts'
import { TestClock } from './test-clock.ts'

/** Takes `bytes` in pieces of 100, and tells when that was done. */
async function drain(limit: RateLimit, clock: Clock, bytes: number): Promise<number> {
  for (let taken = 0; taken < bytes; taken += 100) await limit.take(100)
  return clock.now()
}

test('all that share a limit get its bytes a second together, no more and no fewer', async () => {
  const clock = new TestClock()
  const limit = new RateLimit(1000, clock)
  const streams = Promise.all([drain(limit, clock, 3000), drain(limit, clock, 2000)])
  await clock.run()
  expect(Math.max(...(await streams))).toBe(4900) // the last piece goes before it is paid for
})

test('what was not used is not saved up', async () => {
  const clock = new TestClock()
  const limit = new RateLimit(1000, clock)
  const idle = clock.sleep(60_000)
  await clock.run()
  await idle
  const stream = drain(limit, clock, 2000)
  await clock.run()
  expect(await stream).toBe(61_900)
})

test('a wait is given up with the run', async () => {
  const limit = new RateLimit(1)
  await limit.take(100)
  const controller = new AbortController()
  const wait = limit.take(1, controller.signal)
  controller.abort()
  await expect(wait).rejects.toMatchObject({ name: 'AbortError' })
})
