import { setImmediate as immediate } from 'node:timers/promises'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { waitUntilOff } from '../src/guest-state.ts'
import { LibvirtDomains } from '../src/libvirt-domains.ts'
import { Virsh } from '../src/virsh.ts'

beforeEach(() => void vi.useFakeTimers({ toFake: ['Date'] }))
afterEach(() => void vi.useRealTimers())

const HOUR_MS = 3_600_000

/** A guest that is off at a look at it, while the clock is set at each. */
class Guest extends LibvirtDomains {
  readonly #offAt: number
  readonly #step: number
  #looks = 0

  constructor(offAt: number, step: number) {
    super(new Virsh('test:///default'))
    this.#offAt = offAt
    this.#step = step
  }

  override async state(): Promise<string> {
    vi.setSystemTime(Date.now() + this.#step)
    await immediate()
    return ++this.#looks < this.#offAt ? 'running' : 'shut off'
  }

  override nextState(): Promise<string> {
    return this.state()
  }
}

test('a guest that shuts down is not switched off as the clock is set forward', async () => {
  expect(await waitUntilOff(new Guest(3, HOUR_MS), 'web-1', 60_000, {})).toBe(true)
})

test('one that does not react is waited for no longer as the clock is set back', async () => {
  expect(await waitUntilOff(new Guest(Number.POSITIVE_INFINITY, -HOUR_MS), 'web-1', 300, {})).toBe(false)
})
