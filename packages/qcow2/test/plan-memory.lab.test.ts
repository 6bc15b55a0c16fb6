import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'

async function plan(disk: string): Promise<{ count: number; peakMiB: number }> {
  const script = fileURLToPath(new URL('./plan-in-memory.ts', import.meta.url))
  const args = ['--import', 'tsx', script, disk]
  const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: 120_000 })
  return JSON.parse(stdout)
}

// A process with all of the SDK has 130 MiB before it plans: this is what is left of 200 MiB.
const MOST_MIB = 70

test('a sparse disk of 16 TiB, and one of 1 TiB with a million extents, are planned within 200 MiB', async () => {
  const empty = await plan('none')
  for (const [disk, extents] of [
    ['sparse', 32_768],
    ['extents', 1_000_000],
  ] as const) {
    const { count, peakMiB } = await plan(disk)
    expect(count).toBe(extents)
    expect(peakMiB - empty.peakMiB, disk).toBeLessThanOrEqual(MOST_MIB)
  }
}, 400_000)
