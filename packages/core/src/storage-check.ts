import { randomBytes } from 'node:crypto'
import { buffer } from 'node:stream/consumers'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import {
  bytesBody,
  type CallOptions,
  type StorageCheck,
  type StorageDriver,
  type StorageHealth,
} from './storage.ts'

const PROBE_PREFIX = '.varve-check-'
const DAY_MS = 24 * 3_600_000
/** For the removal of a probe after a check that failed or was given up. */
const REMOVAL_TIMEOUT_MS = 10_000

/** Options of {@link checkStorage}. */
export interface CheckStorageOptions extends CallOptions {
  /** Tries to reach the storage and tells what it knows of it: the health's fields of the same names. */
  connect: () => Promise<Pick<StorageHealth, 'freeBytes' | 'notice'>>
}

/**
 * {@link StorageDriver.check} for any driver: connects, then writes, reads back, lists and deletes a probe by
 * the driver's own methods. The probe does not stay, whichever of them fails; one that a killed process left
 * more than a day ago is removed as well.
 *
 * @throws ABORTED
 */
export async function checkStorage(
  driver: StorageDriver,
  { connect, ...call }: CheckStorageOptions,
): Promise<StorageHealth> {
  const { signal } = call
  const began = performance.now()
  const key = PROBE_PREFIX + randomBytes(8).toString('hex')
  const probe = randomBytes(1024)
  const checks: StorageCheck[] = []
  let known: Pick<StorageHealth, 'freeBytes' | 'notice'> = {}

  const steps: [StorageCheck['name'], () => Promise<unknown>][] = [
    [
      'connect',
      async () => {
        known = await connect()
      },
    ],
    ['write', () => driver.put(key, bytesBody(probe), call)],
    [
      'read',
      async () => {
        // a range, as what is short need not wait for long ones, and of a byte more than there may be
        const range = { start: 0, end: probe.length + 1 }
        const stored = await buffer(await driver.get(key, { ...call, range }))
        if (!probe.equals(stored)) throw damaged('other bytes came back')
      },
    ],
    ['list', () => listProbes(driver, key, call)],
    ['delete', () => driver.delete(key, call)],
  ]
  for (const [name, step] of steps) {
    try {
      await step()
      checks.push({ name, ok: true })
    } catch (error) {
      checks.push({
        name,
        ok: false,
        message: errorMessage(error),
        ...(isVarveError(error) && { code: error.code }),
      })
      if (name !== 'connect' && name !== 'write') await removeProbe(driver, key, call)
      if (signal?.aborted) throw abortError(signal)
      break
    }
  }
  const ok = checks.every(check => check.ok)
  return { ok, checks, ...known, durationMs: performance.now() - began }
}

async function listProbes(driver: StorageDriver, key: string, call: CallOptions): Promise<void> {
  let found = false
  for await (const object of driver.list(PROBE_PREFIX, call)) {
    if (object.key === key) found = true
    else if (object.modifiedAt && Date.now() - object.modifiedAt.getTime() > DAY_MS) {
      await driver.delete(object.key, call)
    }
  }
  if (!found) throw damaged('an object that was just written is not listed')
}

async function removeProbe(driver: StorageDriver, key: string, call: CallOptions): Promise<void> {
  try {
    await driver.delete(key, { ...call, signal: AbortSignal.timeout(REMOVAL_TIMEOUT_MS) })
  } catch {
    // the step that failed is what is told; a probe that stays is 1 KiB, and a later check removes it
  }
}

function damaged(what: string): VarveError {
  return new VarveError(
    'STORAGE_FAILED',
    `The storage does not keep what is written to it: ${what}. Have its server and disks checked, and back up to another one until this check succeeds.`,
  )
}
