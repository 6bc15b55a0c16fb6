import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import type { ProgressEvent, VarveEvent } from '../src/events.ts'
import { Progress } from '../src/progress.ts'

let told: ProgressEvent[]
const onEvent = (event: VarveEvent) => {
  if (event.type === 'progress') told.push(event)
}
const last = () => told.at(-1) ?? expect.fail('nothing was told')

beforeEach(() => {
  told = []
  vi.useFakeTimers({ toFake: ['performance'] })
})
afterEach(() => void vi.useRealTimers())

/** So many bytes are done when so many milliseconds have passed since what was before. */
function after(ms: number, bytes: number, progress: Progress): void {
  vi.advanceTimersByTime(ms)
  progress.update(bytes)
}

test('a disk begins with nothing done, no rate and no time left', () => {
  new Progress({ onEvent }, 'vda', 8000)
  expect(told).toEqual([
    { type: 'progress', disk: 'vda', bytesDone: 0, bytesTotal: 8000, percent: 0, bytesPerSecond: 0 },
  ])
})

test('the rate is in bytes a second, and the time left in seconds at that rate', () => {
  const progress = new Progress({ onEvent }, 'vda', 8000)
  after(2000, 1000, progress)
  expect(last()).toEqual({
    type: 'progress',
    disk: 'vda',
    bytesDone: 1000,
    bytesTotal: 8000,
    percent: 12.5,
    bytesPerSecond: 500,
    secondsLeft: 14,
  })
  after(500, 2000, progress)
  expect(last()).toMatchObject({ percent: 25, bytesPerSecond: 800, secondsLeft: 7.5 })
})

test('the rate is that of the last five seconds', () => {
  const progress = new Progress({ onEvent }, 'vda', 100_000)
  for (let second = 1; second <= 10; second++) after(1000, second * 1000, progress)
  expect(last()).toMatchObject({ bytesPerSecond: 1000, secondsLeft: 90 })
  for (let second = 1; second <= 5; second++) {
    after(1000, 10_000 + second * 4000, progress)
    // The seconds that were slow count as long as they are among the last five.
    expect(last().bytesPerSecond).toBe((second * 4000 + (5 - second) * 1000) / 5)
  }
  expect(last()).toMatchObject({ bytesPerSecond: 4000, secondsLeft: 17.5 })
})

test('after a long silence the rate is that of the silence', () => {
  const progress = new Progress({ onEvent }, 'vda', 10_000)
  after(1000, 1000, progress)
  after(60_000, 4000, progress)
  expect(last()).toMatchObject({ bytesPerSecond: 50, secondsLeft: 120 })
})

test('a step back after a retry is told, and makes no negative rate', () => {
  const progress = new Progress({ onEvent }, 'vda', 10_000)
  after(1000, 4000, progress)
  after(1000, 2000, progress)
  expect(last()).toMatchObject({ bytesDone: 2000, percent: 20, bytesPerSecond: 1000, secondsLeft: 8 })
  after(1000, 0, progress)
  expect(last()).toMatchObject({ bytesDone: 0, bytesPerSecond: 0 })
  expect(last()).not.toHaveProperty('secondsLeft')
  for (let second = 1; second <= 6; second++) after(1000, second * 500, progress)
  expect(last()).toMatchObject({ bytesPerSecond: 500, secondsLeft: 14 })
  after(1000, 100, progress) // less than five seconds ago
  expect(last()).toMatchObject({ bytesDone: 100, bytesPerSecond: 0 })
})

test('it is told four times a second at most, and at the end', () => {
  const progress = new Progress({ onEvent }, 'vda', 1000)
  for (let step = 1; step <= 99; step++) after(10, step * 10, progress)
  expect(told.map(({ bytesDone }) => bytesDone)).toEqual([0, 250, 500, 750])
  vi.advanceTimersByTime(10)
  progress.finish()
  expect(last()).toMatchObject({ bytesDone: 1000, percent: 100, bytesPerSecond: 1000, secondsLeft: 0 })
})

test('a disk without a byte is done at once', () => {
  new Progress({ onEvent }, 'vda', 0).finish()
  for (const event of told) expect(event).toMatchObject({ bytesDone: 0, bytesTotal: 0, percent: 100 })
})
