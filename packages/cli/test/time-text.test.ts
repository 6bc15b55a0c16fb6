import { expect, test } from 'vitest'
import { formatAge, formatClock, formatDuration, formatTime } from '../src/time-text.ts'

test.each([
  [0, '0.0 s'],
  [0.42, '0.4 s'],
  [9.94, '9.9 s'],
  [9.96, '10 s'],
  [59.4, '59 s'],
  [59.6, '1 min'],
  [200, '3 min 20 s'],
  [3599.9, '1 h'],
  [7500, '2 h 5 min'],
  [86_400, '1 d'],
  [273_600, '3 d 4 h'],
])('%d seconds are printed as %s', (seconds, text) => {
  expect(formatDuration(seconds)).toBe(text)
})

test.each([
  [59, 'now'],
  [-5, 'now'], // clocks of two machines differ
  [60, '1 min'],
  [3599, '59 min'],
  [3600, '1 h'],
  [47.9 * 3600, '47 h'],
  [48 * 3600, '2 d'],
  [400 * 86_400, '400 d'],
])('what was %d seconds ago has the age %s', (seconds, text) => {
  const now = new Date('2026-11-23T12:00:00Z')
  expect(formatAge(new Date(now.getTime() - seconds * 1000), now)).toBe(text)
})

test('a moment is printed in the time zone of the machine', () => {
  const moment = new Date(2026, 0, 2, 3, 4, 5) // in the zone of the machine
  expect(formatTime(moment)).toBe('2026-01-02 03:04:05')
  expect(formatClock(moment)).toBe('03:04:05')
})
