import { PatternBody, patternBytes } from '@varve/testkit'
import { expect, test } from 'vitest'
import { FakeServer, type Twist } from './fake-server.ts'

test('what a broken connection asked for does no harm when it is carried out later', async () => {
  const { server, driver } = await FakeServer.begin()
  const size = 2_000_000 // 62 writes
  const late = Promise.withResolvers<void>()
  const changes: number[] = []
  const change: Twist = async () => {
    const { connections } = server
    const number = (changes[connections] ?? 0) + 1
    changes[connections] = number
    if (connections === 1 && number >= 24) server.cut()
    if (connections === 2) {
      server.cut()
      await late.promise
    }
    if (connections === 3 && number === 24) late.resolve()
    return undefined
  }
  server.twists.WRITE = change
  server.twists.FSETSTAT = change
  await driver.put('a', new PatternBody({ size, seed: 1 }))
  await late.promise
  expect(server.connections).toBe(3)
  expect(changes[2]).toBeGreaterThan(0)
  expect(server.files.get('/a')?.equals(patternBytes(1, 0, size))).toBe(true)
})
