import { VarveError } from '@varve/core'
import { type FaultRule, FaultyDriver } from '@varve/testkit'
import { describe, expect, test } from 'vitest'
import { MemoryDriver } from '../../../examples/custom-driver/memory-driver.ts'
import { checkStorage } from '../src/storage-check.ts'

const denied = new VarveError('STORAGE_ACCESS_DENIED', 'Not allowed.')
const connect = async () => ({ freeBytes: 7 })

describe('checkStorage', () => {
  test('a storage that is well passes every step and keeps no probe', async () => {
    const memory = new MemoryDriver()
    const storage = new FaultyDriver(memory, [])
    const health = await checkStorage(storage, { connect })
    expect(health).toMatchObject({ ok: true, freeBytes: 7 })
    expect(health.checks.map(check => check.name)).toEqual(['connect', 'write', 'read', 'list', 'delete'])
    expect(storage.calls.map(call => call.operation)).toEqual(['put', 'get', 'list', 'delete'])
    expect(memory.objects.size).toBe(0)
  })

  test('a storage that cannot be reached is told as such, and nothing else is tried', async () => {
    const storage = new FaultyDriver(new MemoryDriver(), [])
    const health = await checkStorage(storage, {
      connect: async () => {
        throw new VarveError('STORAGE_UNREACHABLE', 'No route.')
      },
    })
    expect(health).toMatchObject({
      ok: false,
      checks: [{ name: 'connect', ok: false, message: 'No route.', code: 'STORAGE_UNREACHABLE' }],
    })
    expect(storage.calls).toEqual([])
  })

  test.each<[string, FaultRule, string[], string]>([
    ['write', { on: 'put', fault: { kind: 'fail-before', error: denied } }, ['connect'], 'Not allowed.'],
    [
      'read',
      { on: 'get', fault: { kind: 'fail-before', error: denied } },
      ['connect', 'write'],
      'Not allowed.',
    ],
    [
      'read',
      { on: 'get', fault: { kind: 'flip-bit', offset: 100 } },
      ['connect', 'write'],
      'other bytes came back. Have its server and disks checked',
    ],
    ['read', { on: 'get', fault: { kind: 'end-at', offset: 100 } }, ['connect', 'write'], 'other bytes'],
    [
      'list',
      { on: 'list', fault: { kind: 'fail-before', error: denied } },
      ['connect', 'write', 'read'],
      'Not allowed.',
    ],
    [
      'delete',
      { on: 'delete', call: 1, fault: { kind: 'fail-before', error: denied } },
      ['connect', 'write', 'read', 'list'],
      'Not allowed.',
    ],
  ])('a storage that fails at %s says so, and keeps no probe', async (name, rule, passed, message) => {
    const memory = new MemoryDriver()
    const health = await checkStorage(new FaultyDriver(memory, [rule]), { connect })
    expect(health.ok).toBe(false)
    expect(health.checks).toEqual([
      ...passed.map(step => ({ name: step, ok: true })),
      {
        name,
        ok: false,
        message: expect.stringContaining(message),
        code: expect.stringMatching(/^STORAGE_/),
      },
    ])
    expect(memory.objects.size).toBe(0)
  })

  test('a storage that holds more than was written fails at read', async () => {
    const memory = new MemoryDriver()
    const put = memory.put.bind(memory)
    memory.put = async (key, body, options) => {
      const stored = await put(key, body, options)
      const object = memory.objects.get(key) ?? expect.fail()
      memory.objects.set(key, { ...object, bytes: Buffer.concat([object.bytes, Buffer.from('x')]) })
      return stored
    }
    expect((await checkStorage(memory, { connect })).checks.at(-1)).toMatchObject({ name: 'read', ok: false })
  })

  test('a storage that does not list what it holds fails at list', async () => {
    const memory = new MemoryDriver()
    memory.list = () => new MemoryDriver().list('')
    const health = await checkStorage(memory, { connect })
    expect(health.checks.at(-1)).toMatchObject({ name: 'list', ok: false })
    expect(memory.objects.size).toBe(0)
  })

  test('a check that is given up half-way keeps no probe either', async () => {
    const memory = new MemoryDriver()
    const controller = new AbortController()
    const storage = new FaultyDriver(memory, call => {
      if (call.operation !== 'get') return undefined
      controller.abort()
      return { kind: 'stall' }
    })
    const check = checkStorage(storage, { connect, signal: controller.signal })
    await expect(check).rejects.toMatchObject({ code: 'ABORTED' })
    expect(memory.objects.size).toBe(0)
  })

  test('probes of killed checks are removed when they are old, and left when they are new', async () => {
    const memory = new MemoryDriver()
    const day = 24 * 3_600_000
    const at = (age: number) => ({ bytes: Buffer.from('x'), modifiedAt: new Date(Date.now() - age) })
    memory.objects.set('.varve-check-old', at(2 * day))
    memory.objects.set('.varve-check-new', at(day / 2))
    memory.objects.set('other', at(9 * day))
    expect(await checkStorage(memory, { connect })).toMatchObject({ ok: true })
    expect([...memory.objects.keys()]).toEqual(['.varve-check-new', 'other'])
  })
})
