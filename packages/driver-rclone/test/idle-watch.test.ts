import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { expect, onTestFinished, test } from 'vitest'
import { IdleWatch } from '../src/idle-watch.ts'

const IDLE_MS = 500

/** Whether a process is called idle that reads and writes so many bytes, again and again, for twice that long. */
async function isCalledIdle(bytes: number): Promise<boolean> {
  const child = spawn('cat', { stdio: ['pipe', 'ignore', 'inherit'] })
  onTestFinished(async () => {
    child.stdin.end()
    await once(child, 'exit')
  })
  let idle = false
  using _watch = new IdleWatch({
    pid: child.pid ?? 0,
    idleMs: IDLE_MS,
    onIdle: () => {
      idle = true
    },
  })
  for (let time = 0; time < 2 * IDLE_MS && !idle; time += IDLE_MS / 10) {
    child.stdin.write(Buffer.alloc(bytes))
    await delay(IDLE_MS / 10)
  }
  return idle
}

test('a process that moves data is not idle', async () => {
  expect(await isCalledIdle(50_000)).toBe(false)
})

test('a process that moves little again and again is idle, however much that comes to', async () => {
  expect(await isCalledIdle(500)).toBe(true)
})
