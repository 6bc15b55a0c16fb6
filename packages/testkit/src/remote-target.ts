import { buffer } from 'node:stream/consumers'
import { inspect } from 'node:util'
import { bytesBody, type CallOptions, type ErrorCode, isVarveError, type StorageDriver } from '@varve/core'
import { expect, onTestFinished, type TestContext } from 'vitest'
import { expectStored, expectTidy, listed, type RemoteOptions, type RemoteTarget } from './contract-target.ts'
import { pollUntil } from './lab-poll.ts'
import { shownOf, shows } from './secret-forms.ts'

/** {@link RemoteOptions} with their defaults. */
export type Remote = Required<RemoteOptions>

/** What a call may fail with over a bad network. None says that anything is missing, denied or wrong. */
const NETWORK_CODES: readonly ErrorCode[] = [
  'STORAGE_UNREACHABLE',
  'STORAGE_FAILED',
  'TIMEOUT',
  'UPLOAD_FAILED',
]

/** How long a server may take to notice that a connection is gone, and to drop what it had of an upload. */
const SETTLE_MS = 30_000

/**
 * A target for the test that runs, with a network that is well again when the test ends.
 *
 * @param test must be given by a test that runs beside others
 */
export async function beginRemote(
  remote: Remote,
  test: Pick<TestContext, 'onTestFinished'> = { onTestFinished },
): Promise<RemoteTarget> {
  const target = await remote.create()
  test.onTestFinished(() => end(target), 3 * SETTLE_MS)
  return target
}

/** The same as after a test with a network that is well, but the server has a moment. */
async function end(target: RemoteTarget): Promise<void> {
  target.proxy.heal()
  try {
    await settle(() => expectTidy(target))
  } finally {
    await target.dispose()
  }
}

/** Calls `expectation` until it holds, while the server gets used to connections that are gone. */
export async function settle(expectation: () => Promise<void>): Promise<void> {
  let failure: unknown
  const holds = async () => {
    try {
      await expectation()
      return true
    } catch (error) {
      failure = error
      return undefined
    }
  }
  await pollUntil(holds, SETTLE_MS, () => Promise.reject(failure))
}

/** Ends a stall whose calls have all given up: what they had on the way does not arrive late. */
export function endStall({ proxy }: RemoteTarget): void {
  proxy.cutAll()
  proxy.heal()
}

/** Removes what could not be removed while the server was away. */
export async function cleanUpAll(driver: StorageDriver): Promise<void> {
  await driver.cleanUp?.({ olderThan: new Date(Date.now() + 3_600_000) })
}

/** What came of a call. */
export type Outcome<T> = { readonly value: T } | { readonly error: unknown }

/** Waits for a call, whatever comes of it. */
export async function outcomeOf<T>(call: Promise<T>): Promise<Outcome<T>> {
  return call.then(
    value => ({ value }),
    error => ({ error }),
  )
}

/** Every kind of call that a driver takes, all begun at once. */
export function everyCall(
  driver: StorageDriver,
  call: CallOptions = {},
): [string, Promise<Outcome<unknown>>][] {
  const calls: [string, () => Promise<unknown>][] = [
    ['put', () => driver.put('calls/put', bytesBody(Buffer.from('new')), call)],
    ['get', () => driver.get('calls/get', call).then(buffer)],
    ['stat', () => driver.stat('calls/stat', call)],
    ['list', () => listed(driver, 'calls/', call)],
    ['delete', () => driver.delete('calls/delete', call)],
  ]
  return calls.map(([name, begin]) => [name, outcomeOf(begin())])
}

/** Expects every call to fail with one of these codes and without secrets; a check fails as well, and does not throw. */
export async function expectAllRefused(
  driver: StorageDriver,
  codes: readonly ErrorCode[],
  { secrets }: Remote,
): Promise<void> {
  const calls = everyCall(driver).map(async ([name, call]) => {
    const outcome = await call
    if ('value' in outcome) expect.unreachable(`${name} gave ${inspect(outcome.value)}`)
    expectVarveError(outcome.error, codes, secrets, name)
  })
  const [health] = await Promise.all([driver.check(), ...calls])
  expect(health.ok).toBe(false)
  const failed = health.checks.at(-1)
  expect(failed, failed?.message).toMatchObject({ ok: false, code: expect.toBeOneOf([...codes]) })
  expectNoSecrets(health, secrets, 'the outcome of check')
}

/** Expects an error that is of the network, and not of what was asked for. */
export function expectNetworkError(error: unknown, { secrets }: Remote): void {
  expectVarveError(error, NETWORK_CODES, secrets, 'a call')
}

/** Expects an upload that went over a bad network, and was told to have ended so, to be whole or not to be. */
export async function expectWholeOrNothing(
  target: RemoteTarget,
  key: string,
  upload: { bytes: Buffer; former?: Buffer; outcome: Outcome<unknown>; remote: Remote },
): Promise<void> {
  const { bytes, former, outcome, remote } = upload
  if ('value' in outcome) return expectStored(target, key, bytes)
  expectNetworkError(outcome.error, remote)
  await settle(async () => {
    if (former) await expectStored(target, key, former)
    else expect(await target.driver.stat(key)).toBeUndefined()
  })
}

function expectVarveError(
  error: unknown,
  codes: readonly ErrorCode[],
  secrets: readonly string[],
  call: string,
): void {
  expectNoSecrets(error, secrets, `the error of ${call}`)
  if (!isVarveError(error)) expect.unreachable(`${call} failed with something else: ${inspect(error)}`)
  expect(codes, `${call} failed with ${error.code}: ${error.message}`).toContain(error.code)
}

/** Expects none of the secrets in anything that would be seen of a value in a log, also not encoded. */
export function expectNoSecrets(value: unknown, secrets: readonly string[], what: string): void {
  const text = shownOf(value)
  // the text itself stays out of the message
  for (const secret of secrets) expect(shows(text, secret), `${what} shows a secret`).toBe(false)
}
